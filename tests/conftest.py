"""What several test files share."""

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from utils.data import as_input, load_split


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network that knows digits, with reverse attention, as a checkpoint; split and file."""
    torch.manual_seed(0)
    split = load_split("digits", "train", "", 16)
    model = build_model("ResNet18", 10, width=4, image_size=16).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        for images, labels in zip(split.images.split(64), split.labels.split(64), strict=True):
            heads = model(as_input(images), labels, heads=True)
            loss = F.cross_entropy(heads.final, labels) + 2 * F.cross_entropy(heads.auxiliary[0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("run") / "best_adv_model.pt"
    content = {
        "model": model.state_dict(), "arch": "ResNet18", "classes": list("0123456789"), "num_classes": 10,
        "reverse_attention": True, "width": 4, "image_size": 16, "dataset": "digits", "recipe": {}, "epoch": 3,
    }  # fmt: skip
    torch.save(content, file)
    return model, load_split("digits", "test", "", 16), file
