"""Networks by name, each with or without reverse attention."""

from functools import partial

from torch import nn

from models.preactresnet import PreActResNet
from models.resnet import ResNet
from models.reverse_attention import CLASSIFIERS, GATES, Heads, ReverseAttentionNetwork
from models.wideresnet import WideResNet

__all__ = ["ARCHS", "CLASSIFIERS", "GATES", "Heads", "ReverseAttentionNetwork", "build_model"]

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
    classifier: str = "shared",
    ra_blocks: int = 2,
) -> nn.Module:
    """Build a network with fresh weights.

    arch: a key of `ARCHS`. width: channels of the first stage (ResNet18, PreActResNet18; default
    64) or widen factor (WRN-*; default 10). image_size: side of the square images, at least 16, a
    multiple of 8; above 32 PreActResNet18, whose classifier depends on it, takes multiples of 32.
    gate: how maps are weighted, a key of `GATES`. classifier: whose rows weight them, one of
    `CLASSIFIERS`. ra_blocks: 1 for reverse attention on the last block alone.
    Errors: ValueError for an unknown name or such a size of images.
    """
    names = (("arch", arch, ARCHS), ("gate", gate, GATES), ("classifier", classifier, CLASSIFIERS))
    for what, name, known in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    multiple = 32 if arch == "PreActResNet18" and image_size > 32 else 8
    if image_size < 16 or image_size % multiple:
        raise ValueError(f"image_size is {image_size}, no multiple of {multiple} from 16 on")

    sizes = {"image_size": image_size}
    if width is not None:
        sizes["width"] = width
    model = ARCHS[arch](num_classes, reverse_attention, **sizes)
    model.gate = gate
    model.ra_blocks = ra_blocks
    if reverse_attention and classifier == "own":
        model.add_block_classifiers()
    return model
