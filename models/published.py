"""State dicts of published networks: what they are of, told by names and shapes of their tensors, and other names."""

import torch
from torch import Tensor, nn


def shape_of(state: dict[str, Tensor]) -> dict:
    """Arch, width, number of classes and, where they tell, side of the images of a state dict, read off its tensors.

    Errors: KeyError, or another one where it is of no network here; whoever reads strangers' files takes any.
    """
    classes, features = state[f"{classifier_of(state)}.weight"].shape
    if "bn.weight" in state:
        width = len(state["conv1.weight"])
        side = round((features / (8 * width)) ** 0.5)  # cells of the pooled map, 1 up to images of 32
        size = {"image_size": 32 * side} if side > 1 else {}
        return {"arch": "PreActResNet18", "width": width, "num_classes": classes, **size}
    if "layer1.0.conv1.weight" in state:
        return {"arch": "ResNet18", "width": len(state["conv1.weight"]), "num_classes": classes}
    blocks = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
    return {"arch": f"WRN-{ {5: 34, 4: 28}[blocks] }-10", "width": features // 64, "num_classes": classes}


def classifier_of(state: dict[str, Tensor]) -> str | None:
    """The name of the one layer at the top of a state dict whose weight is a matrix, None where there is none such."""
    found = [name for name, v in state.items() if isinstance(v, Tensor) and v.ndim == 2 and name.count(".") == 1]
    return found[0].partition(".")[0] if len(found) == 1 else None


def named_as(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by a network's own names: classifier and shortcuts may have others, old ones count no batches."""
    own = model.state_dict()
    theirs, ours = f"{classifier_of(state)}.", f"{classifier_of(own)}."

    def name(key: str) -> str:
        if key in own:
            return key
        return ours + key.removeprefix(theirs) if key.startswith(theirs) else key.replace(".downsample.", ".shortcut.")

    counts = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")}
    return counts | {name(key): value for key, value in state.items()}
