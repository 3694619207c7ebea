"""State dicts of published networks: what network they belong to, and other names of layers."""

import torch
from torch import Tensor, nn


def shape_of(state: dict[str, Tensor]) -> dict:
    """Read arch, width, number of classes and, where it can be told, image size off a state dict.

    Also whose classifiers its gated blocks have, and if their own, how many such blocks there are.
    Errors: KeyError or another one where the state dict belongs to no network here.
    """
    own = sum(name.startswith("block_classifiers.") and name.endswith("weight") for name in state)
    blocks = {"classifier": "shared"}
    if own:
        blocks = {"classifier": "own", "ra_blocks": own, "reverse_attention": True}
    return _network_of(state) | blocks


def _network_of(state: dict[str, Tensor]) -> dict:
    classes, features = state[f"{classifier_of(state)}.weight"].shape
    width = len(state["conv1.weight"])
    if "bn.weight" in state:
        shape = {"arch": "PreActResNet18", "width": width, "num_classes": classes}
        side = round((features / (8 * width)) ** 0.5)  # of the pooled map, 1 for images up to 32
        if side > 1:
            shape["image_size"] = 32 * side
        return shape
    if "layer1.0.conv1.weight" in state:
        return {"arch": "ResNet18", "width": width, "num_classes": classes}
    blocks = {key.split(".")[2] for key in state if key.startswith("block1.layer.")}
    arch = {5: "WRN-34-10", 4: "WRN-28-10"}[len(blocks)]
    return {"arch": arch, "width": features // 64, "num_classes": classes}


def classifier_of(state: dict[str, Tensor]) -> str | None:
    """Return the name of the only top-level layer whose weight is a matrix, or None."""
    matrices = []
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 2 and name.count(".") == 1:
            matrices.append(name.partition(".")[0])
    return matrices[0] if len(matrices) == 1 else None


def named_as(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with a network's own names of classifier and shortcuts.

    Counts of batches that BatchNorm layers of old files lack are 0.
    """
    expected = model.state_dict()
    their_classifier = f"{classifier_of(state)}."
    our_classifier = f"{classifier_of(expected)}."
    renamed = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    for key, value in state.items():
        name = key
        if key not in expected:
            if key.startswith(their_classifier):
                name = our_classifier + key.removeprefix(their_classifier)
            else:
                name = key.replace(".downsample.", ".shortcut.")
        renamed[name] = value
    return renamed
