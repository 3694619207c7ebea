"""Fixtures of several test files."""

import urllib.error
import urllib.request
import warnings

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from tests.helpers import execute, files
from utils.data import as_input, load_split


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a script that must refuse its input, with status 2 and no file touched -> the one line it says."""

    def run(script, *argv, mentions=()):
        before = files(tmp_path)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)  # they would be further lines on standard error
            status = execute(script, *argv)
        lines = capsys.readouterr().err.splitlines() + [str(w.message) for w in said if w.category is UserWarning]
        assert status == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{script}: error: ")
        for word in mentions:
            assert str(word) in lines[0]
        assert files(tmp_path) == before
        return lines[0]

    return run


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
