"""Networks by name, each with or without reverse attention."""

from functools import partial

from torch import nn

from models.preactresnet import PreActResNet
from models.resnet import ResNet
from models.reverse_attention import GATES, Heads, ReverseAttentionNetwork
from models.wideresnet import WideResNet

__all__ = ["ARCHS", "GATES", "Heads", "ReverseAttentionNetwork", "build_model"]

ARCHS = {
    "ResNet18": ResNet,
    "WRN-34-10": partial(WideResNet, depth=34),
    "WRN-28-10": partial(WideResNet, depth=28),
    "PreActResNet18": PreActResNet,
}


def build_model(
    arch: str,
    num_classes: int,
    *,
    reverse_attention: bool = True,
    width: int | None = None,
    image_size: int = 32,
    gate: str = "label",
    ra_blocks: int = 2,
) -> nn.Module:
    """Build a network with fresh weights.

    arch: a key of `ARCHS`. width: channels of the first stage (ResNet18, PreActResNet18; default
    64) or widen factor (WRN-*; default 10). image_size: side of the square images, a multiple of 8,
    at least 16; only PreActResNet18's classifier depends on it. gate: how maps are weighted, a key
    of `GATES`. ra_blocks: 1 for reverse attention on the last block alone.
    Errors: ValueError for an unknown name or a size out of range.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHS)}")
    if gate not in GATES:
        raise ValueError(f"unknown gate {gate!r}; known: {', '.join(GATES)}")
    if ra_blocks not in (1, 2):
        raise ValueError(f"ra_blocks is {ra_blocks}; it must be 1 or 2")
    if image_size < 16 or image_size % 8:
        raise ValueError(f"image_size is {image_size}; it must be a multiple of 8, at least 16")
    if arch == "PreActResNet18" and image_size > 32 and image_size % 32:
        allowed = "16, 24, 32, 64, 96, ..."
        raise ValueError(f"image_size is {image_size}; PreActResNet18 takes {allowed}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; at least 2 are needed")
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; at least 1 is needed")

    sizes = {"image_size": image_size}
    if width is not None:
        sizes["width"] = width
    model = ARCHS[arch](num_classes, reverse_attention, **sizes)
    model.gate = gate
    model.ra_blocks = ra_blocks
    return model
