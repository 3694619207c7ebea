"""The device of a run, and what it computes in there: bfloat16, TF32, torch.compile."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.system import distributed
from utils.system.errors import UsageError, first_line
from utils.system.foreign import OwnNetwork
from utils.system.settings import Training

# Graphs of one network: for each batch size those of the attacked copy, of natural images and of
# negatives, with gradients and without. All runs of a process count together.
RECOMPILE_LIMIT = 64


def pick_device(
    device: str, no_cuda: bool, precision: str = "default", shared: bool = False
) -> torch.device:
    """Return the device of --device and --no-cuda, and make a CUDA device the current one.

    `auto` takes a card only if this build of PyTorch computes there, on all ranks. shared: whether
    several ranks may have the same device. Errors: UsageError where the device is unknown or cannot
    compute, at all or in `precision`.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device} is none of auto, cpu, cuda, cuda:N")
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    picked = distributed.own_device(torch.device("cpu" if no_cuda else name), shared)
    error = compute_error(picked)
    if device == "auto" and distributed.agreed(int(error is not None)):
        if error is not None:
            print(f"the CUDA device does not compute ({error}); using the CPU", file=sys.stderr)
        return torch.device("cpu")
    if error is not None:
        raise UsageError(
            f"--device {device}: {error}; use --device cpu, or a build of PyTorch for this card"
        )
    if picked.type == "cpu":
        return picked

    if picked.index is not None:
        torch.cuda.set_device(picked)
    emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision in ("bf16", "tf32") and emulated:
        raise UsageError(
            f"--precision {precision}: {torch.cuda.get_device_name()} does not compute in it; "
            "NVIDIA's cards of compute capability 8.0 and more do; use --precision fp32 here"
        )
    return picked


def compute_error(device: torch.device) -> str | None:
    """Compute something on a device; return the error, None where it works.

    It fails where the device is missing, and on a card that this build of PyTorch has no kernels
    for.
    """
    try:
        torch.ones(1, device=device).sin()
    except (RuntimeError, AssertionError) as error:  # an AssertionError in a build without CUDA
        return first_line(error)
    return None


def for_training(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """Move a network to its device, on CUDA in the memory format of the card's matrix units.

    Float32 does not use these units, and keeps the default format. So do users' own networks, whose
    code may not expect another one.
    """
    has_default_format = precision == "fp32" or isinstance(model, OwnNetwork)
    if device.type == "cuda" and not has_default_format:
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """Run a network's forwards through torch.compile, in place; keys of its state dict stay.

    Each shape is compiled by itself. Otherwise an epoch's short last batch would make PyTorch
    compile for batches of any size, which is slower for all batches from then on.
    On a CPU inductor must not choose channels-last: PyTorch 2.14's weight gradient of a
    channels-last 1x1 convolution of stride 2 with 8 to 12 channels and an odd batch writes outside
    its memory there. Errors: UsageError without a compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise UsageError(
            f"--compile: torch.compile does not work here ({first_line(error)}); install a C++ "
            "compiler (and Triton for CUDA), or leave --compile out"
        ) from error
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    model.compile(dynamic=False, options={"layout_optimization": device.type == "cuda"})


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Set what float32 convolutions and matrix products are computed in on CUDA, for the body.

    `fp32`: float32. `tf32`: TF32. Anything else: as it was, which is TF32 in convolutions and
    float32 in matrix products, unless somebody has changed it.
    """
    if precision not in ("fp32", "tf32"):
        yield
        return
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    inside = "tf32" if precision == "tf32" else "ieee"
    _set_precision(inside, inside)
    try:
        yield
    finally:
        _set_precision(*before)


def _set_precision(convolutions: str, products: str) -> None:
    """Set PyTorch's older switches and then the newer ones, which count.

    Where they disagree, reading an older one raises an error, in torch.compile for example.
    """
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    cudnn.allow_tf32 = convolutions == "tf32"
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    cudnn.conv.fp32_precision = convolutions
    cudnn.rnn.fp32_precision = convolutions
    matmul.fp32_precision = products


def precision_name(settings: Training, device: torch.device) -> str:
    """Say what training computes in; evaluation judges in float32 whatever it is."""
    if settings.precision == "bf16":
        return "bfloat16 autocast over float32 weights"
    if device.type != "cuda" or settings.precision == "fp32" or not torch.cuda.is_tf32_supported():
        return "float32"
    if settings.precision == "tf32":
        return "TF32"
    return "TF32 in convolutions, float32 in matrix products"


class Sent:
    """Figures on their way from a device to the host, which need not wait for other work."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.copied = None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> list[float]:
        """Return the figures as soon as they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()
