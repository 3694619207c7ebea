"""The device of a run, and what it computes in there: bfloat16, TF32, torch.compile, memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from utils import distributed
from utils.errors import UsageError, first_line
from utils.recipes import Training


def pick_device(device: str, no_cuda: bool) -> torch.device:
    """The device of --device and --no-cuda; UsageError where it is unknown or not there."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a CUDA device too
    if device == "auto":
        return distributed.own_device(torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu"))
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
    return distributed.own_device(picked)


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """Run a network's forwards through torch.compile, in place: state-dict keys stay. UsageError without a compiler.

    Not in inductor's own choice of channels-last: PyTorch 2.14's weight gradient of a channels-last 1x1 convolution of
    stride 2 with 8 to 12 channels and an odd batch writes outside its memory on a CPU.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        mend = "install a C++ compiler, or leave --compile out"
        raise UsageError(f"--compile: torch.compile does not work here ({first_line(error)}); {mend}") from error
    model.compile(options={"layout_optimization": False})


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """TF32 in the matrix products and convolutions of a CUDA device, and float32 again afterwards."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for switch in switches:
        switch.allow_tf32 = enabled
    try:
        yield
    finally:
        for switch in switches:
            switch.allow_tf32 = False


def precision(settings: Training, device: torch.device) -> str:
    """What training computes in; evaluation is float32 whatever it says."""
    if settings.amp == "bf16":
        return "bfloat16 autocast over float32 weights"
    return "TF32" if settings.tf32 and device.type == "cuda" else "float32"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes so far: of tensors on a CUDA device, or resident ones of the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux; getrusage's figure there includes what started the process
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
