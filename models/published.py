"""State dicts of published networks: their network, their normalisation, other names of layers."""

import torch
from torch import Tensor, nn

# Names of the buffers that normalise images: mean, and standard deviation.
BUFFERS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}


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


def normalisation_in(
    state: dict[str, Tensor],
) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """Find the buffers of a state dict that normalise images.

    Returns their names, and `mean` and `std`, or nothing of both. Of several pairs the outermost
    counts; the others belong to copies of the network inside it.
    """
    names: list[str] = []
    normalisation = {}
    for mean_name in sorted(state, key=len, reverse=True):
        prefix, dot, last = mean_name.rpartition(".")
        std_name = f"{prefix}{dot}{BUFFERS.get(last)}"
        if std_name not in state:
            continue
        mean = _by_channel(state[mean_name])
        std = _by_channel(state[std_name])
        if mean and std:
            names = [mean_name, std_name, *names]
            normalisation = {"mean": mean, "std": std}
    return names, normalisation


def _by_channel(values: Tensor) -> tuple[float, ...]:
    """Return three numbers from three or one, or none from a tensor of another size."""
    if values.numel() not in (1, 3):
        return ()
    numbers = [float(f"{value:.7g}") for value in values.flatten().tolist()]
    return tuple(numbers * (3 // len(numbers)))
