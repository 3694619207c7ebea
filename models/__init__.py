"""Networks by name, each with or without reverse attention."""

from functools import partial

from torch import nn

from models.preactresnet import PreActResNet
from models.resnet import ResNet
from models.reverse_attention import Heads, ReverseAttentionNetwork
from models.wideresnet import WideResNet

__all__ = ["ARCHS", "GATES", "Heads", "ReverseAttentionNetwork", "build_model"]

GATES = ("label", "predicted", "soft", "none")
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

    arch: a key of `ARCHS`. width: channels of the first stage (ResNet18, PreActResNet18; default 64) or widen factor
    (WRN-*; default 10). image_size: side of the square images, a multiple of 8, at least 16; only PreActResNet18's
    classifier depends on it. gate: how maps are weighted, one of `GATES`. ra_blocks: 1 for reverse attention on the
    last block alone. Errors: ValueError for an unknown arch (it lists the known ones) or a size out of range.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHS)}")
    if image_size < 16 or image_size % 8:
        raise ValueError(f"image_size is {image_size}; it must be a multiple of 8, at least 16")
    if arch == "PreActResNet18" and image_size > 32 and image_size % 32:
        raise ValueError(f"image_size is {image_size}; PreActResNet18 pools 4x4 windows and takes 16, 24, 32, 64, 96, ...")
    if num_classes < 2 or (width is not None and width < 1):
        raise ValueError(f"num_classes is {num_classes} and width {width}; at least 2 and 1 are needed")
    sizes = {"image_size": image_size} if width is None else {"image_size": image_size, "width": width}
    if gate not in GATES or ra_blocks not in (1, 2):
        raise ValueError(f"gate is {gate!r} and ra_blocks {ra_blocks}; one of {', '.join(GATES)} and 1 or 2 are needed")
    model = ARCHS[arch](num_classes, reverse_attention, **sizes)
    model.gate, model.ra_blocks = gate, ra_blocks
    return model
