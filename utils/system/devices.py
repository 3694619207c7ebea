"""The device of a run, and what it computes in there: bfloat16, TF32, torch.compile, memory."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.system import distributed
from utils.system.errors import UsageError, first_line
from utils.system.settings import Training

# Graphs of one network: for each batch size those of the attacked copy, of natural images and of
# negatives, with gradients and without. All runs of a process count together.
RECOMPILE_LIMIT = 64


def pick_device(
    device: str, no_cuda: bool, precision: str = "default", shared: bool = False
) -> torch.device:
    """Return the device of --device and --no-cuda, and make a CUDA device the current one.

    `auto` takes a card only if this build of PyTorch has kernels for it. shared: whether several
    ranks may have the same device. Errors: UsageError where the device is unknown, is not there, or
    cannot compute, at all or in `precision`.
    """
    if device == "auto":
        picked = torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu")
    else:
        picked = _named_device(device, no_cuda)
    picked = distributed.own_device(picked, shared)
    missing = _missing_kernels(picked) if picked.type == "cuda" else None
    if device == "auto" and distributed.agreed(int(missing is not None)):  # alike on all ranks
        if missing is not None:
            print(f"{missing}; computing on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if missing is not None:
        hint = "install another build of PyTorch, or use --device cpu"
        raise UsageError(f"--device {device}: {missing}; {hint}")
    if picked.type == "cuda":
        _require_precision(picked, precision)
    return picked


def _named_device(device: str, no_cuda: bool) -> torch.device:
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is none of auto, cpu, cuda, cuda:N")
    if picked.type == "cuda":
        if no_cuda:
            raise UsageError(f"--device {device} and --no-cuda contradict each other; give one")
        count = torch.cuda.device_count()
        if (picked.index or 0) >= count:
            raise UsageError(f"--device {device}: {count} CUDA devices are visible; use cpu")
    return picked


def _missing_kernels(device: torch.device) -> str | None:
    """Make a card the current device; say so where this build of PyTorch has no kernels for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own about the same, of many lines
        if device.index is not None:
            torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if torch.version.hip or not architectures or has_kernels(capability, architectures):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
        f"{capability[1]}, for which this build of PyTorch has no kernels "
        f"({' '.join(architectures)})"
    )


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Tell whether code for any of these architectures runs on a card.

    capability: the card's, (major, minor). architectures: as `torch.cuda.get_arch_list` returns
    them. `sm_86` is machine code, for the same major number and at least that minor one;
    `compute_86` is compiled when it is loaded, for any card from 8.6 on.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        built_for = int(digits[:-1]), int(digits[-1])
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return False


def _require_precision(device: torch.device, precision: str) -> None:
    """Raise UsageError where a card has no units for a precision: it would emulate or ignore it."""
    supported = True
    if precision == "bf16":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "tf32":
        supported = torch.cuda.is_tf32_supported()
    if not supported:
        raise UsageError(
            f"--precision {precision}: {torch.cuda.get_device_name(device)} does not compute in it "
            "(NVIDIA's cards of compute capability 8.0 and more do); leave it out or use fp32, and "
            "resume a run that was started with it on another card or by --device cpu"
        )


def for_training(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """Move a network to its device, on CUDA in the memory format of the card's matrix units.

    Float32 does not use these units, and keeps the default format.
    """
    if device.type == "cuda" and precision != "fp32":
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
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise UsageError(
            f"--compile: torch.compile does not work here ({first_line(error)}); install {needed}, "
            "or leave --compile out"
        ) from error
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    model.compile(dynamic=False, options={"layout_optimization": device.type == "cuda"})


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Set what float32 convolutions and matrix products are computed in on CUDA, for the body.

    `fp32`: float32. `tf32`: TF32. Anything else: as it was, which is TF32 in convolutions and
    float32 in matrix products, unless somebody has changed it.

    PyTorch has newer switches (`fp32_precision`), which count, and older ones (`allow_tf32`), which
    raise an error when they are read and disagree. So the older ones follow here, unless somebody
    has used the newer ones alone.
    """
    if precision not in ("fp32", "tf32"):
        yield
        return
    backends = torch.backends
    try:
        older = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    operations = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    # Outer switches first. All are read before any is set: one that is not set reports the value of
    # the one around it.
    newer = (backends, backends.cudnn, backends.mkldnn, *operations, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in newer]
    for switch in newer:
        switch.fp32_precision = "none"
    try:
        if older is not None:
            backends.cudnn.allow_tf32 = precision == "tf32"
            backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for switch in operations:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        if older is not None:
            backends.cudnn.allow_tf32 = older[0]
            torch.set_float32_matmul_precision(older[1])
        for switch, value in zip(newer, before, strict=True):
            switch.fp32_precision = value


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


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes so far: of tensors on CUDA, else of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux; getrusage there includes the process that started this one
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return None
