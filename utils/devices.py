"""The device of a run, and what it computes in there: bfloat16, TF32, torch.compile, memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import UsageError, first_line
from utils.recipes import Training


def pick_device(device: str, no_cuda: bool, shared: bool = False) -> torch.device:
    """The device of --device and --no-cuda; UsageError where it is unknown or not there.

    shared: of `distributed.own_device`, whether several ranks may have the same device.
    """
    if device == "auto":
        found = torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu")
        return distributed.own_device(found, shared)
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is none of auto, cpu, cuda, cuda:N")
    if picked.type == "cuda":
        if no_cuda:
            raise UsageError(f"--device {device} and --no-cuda contradict each other; give one of them")
        if (picked.index or 0) >= (count := torch.cuda.device_count()):
            raise UsageError(f"--device {device}: {count} CUDA devices are visible; use --device cpu")
    return distributed.own_device(picked, shared)


def for_training(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """A network on its device, on CUDA in the memory format of the card's matrix units, which float32 does not use."""
    fast = device.type == "cuda" and precision != "fp32"
    return model.to(device, memory_format=torch.channels_last if fast else torch.preserve_format)


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """Run a network's forwards through torch.compile, in place: state-dict keys stay. UsageError without a compiler.

    On a CPU not in inductor's own choice of channels-last: PyTorch 2.14's weight gradient of a channels-last 1x1
    convolution of stride 2 with 8 to 12 channels and an odd batch writes outside its memory there.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        said = f"--compile: torch.compile does not work here ({first_line(error)})"
        raise UsageError(f"{said}; install {needed}, or leave --compile out") from error
    model.compile(options={"layout_optimization": device.type == "cuda"})


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """What float32 convolutions and matrix products are computed in on CUDA, for the body.

    `fp32`: float32. `tf32`: TF32. Anything else: as it was, which is PyTorch's own unless somebody has changed it,
    TF32 in convolutions and float32 in matrix products.
    """
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches if precision in ("fp32", "tf32") else ():
            switch.allow_tf32 = precision == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def precision(settings: Training, device: torch.device) -> str:
    """What training computes in; the verdicts of evaluation are float32 whatever it says."""
    if settings.precision == "bf16":
        return "bfloat16 autocast over float32 weights"
    if device.type != "cuda" or settings.precision == "fp32":
        return "float32"
    return "TF32" if settings.precision == "tf32" else "TF32 in convolutions, float32 in matrix products"


class Sent:
    """Figures on their way from a device to the host, so that the host need not wait until all other work is done."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def arrived(self) -> list[float]:
        """The figures, as soon as they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes so far: of tensors on a CUDA device, or resident ones of the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux; getrusage's figure there includes what started the process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
