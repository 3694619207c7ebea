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

# Graphs of one network: of each batch size those of the attacked copy, of natural images and negatives, with gradients
# and without. The network and its copy count together, and so do all runs of a process.
RECOMPILE_LIMIT = 64


def pick_device(device: str, no_cuda: bool, precision: str = "default", shared: bool = False) -> torch.device:
    """Return the device of --device and --no-cuda; a CUDA device becomes the current one, too.

    `auto` takes a card only if this build of PyTorch has kernels for it. Errors: UsageError where the device is
    unknown, is not there, or cannot compute, at all or in `precision`. shared: whether several ranks may have the same
    device.
    """
    if device == "auto":
        picked = torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu")
    else:
        picked = _named_device(device, no_cuda)
    picked = distributed.own_device(picked, shared)
    missing = _missing_kernels(picked) if picked.type == "cuda" else None
    if device == "auto" and distributed.agreed(int(missing is not None)):  # ranks compute on the same kind of device
        if missing is not None:
            print(f"{missing}; computing on the CPU", file=sys.stderr)
        return torch.device("cpu")
    if missing is not None:
        raise UsageError(f"--device {device}: {missing}; install another build of PyTorch, or use --device cpu")
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
            raise UsageError(f"--device {device} and --no-cuda contradict each other; give one of them")
        if (picked.index or 0) >= (count := torch.cuda.device_count()):
            raise UsageError(f"--device {device}: {count} CUDA devices are visible; use --device cpu")
    return picked


def _missing_kernels(device: torch.device) -> str | None:
    """Make a card the current device, and say so where this build of PyTorch has no kernels for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own about the same, of many lines
        if device.index is not None:
            torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if torch.version.hip or not architectures or has_kernels(capability, architectures):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, for which this "
        f"build of PyTorch has no kernels ({' '.join(architectures)})"
    )


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for any of these architectures runs on a card.

    capability: the card's, (major, minor). architectures: as `torch.cuda.get_arch_list` returns them. `sm_86` is
    machine code, for the same major number and at least that minor one; `compute_86` is compiled when it is loaded, for
    any card from 8.6 on.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        built_for = int(digits[:-1]), int(digits[-1])
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return False


def _require_precision(device: torch.device, precision: str) -> None:
    """Raise UsageError where the current card has no units for a precision, and would emulate or ignore it."""
    if precision == "bf16":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "tf32":
        supported = torch.cuda.is_tf32_supported()
    else:
        supported = True
    if not supported:
        card = torch.cuda.get_device_name(device)
        needed = "of NVIDIA's, those of compute capability 8.0 and more do"
        raise UsageError(f"--precision {precision}: {card} does not compute in it ({needed}); leave it out, or use fp32")


def for_training(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """A network on its device, on CUDA in the memory format of the card's matrix units, which float32 does not use."""
    fast = device.type == "cuda" and precision != "fp32"
    return model.to(device, memory_format=torch.channels_last if fast else torch.preserve_format)


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """Run a network's forwards through torch.compile, in place: state-dict keys stay. UsageError without a compiler.

    Each shape is compiled by itself. A graph for any batch size, which is what PyTorch makes of an epoch's short last
    batch, would be slower for all batches from then on, without the layouts that the compiler chooses.
    On a CPU not in inductor's own choice of channels-last: PyTorch 2.14's weight gradient of a channels-last 1x1
    convolution of stride 2 with 8 to 12 channels and an odd batch writes outside its memory there.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        said = f"--compile: torch.compile does not work here ({first_line(error)})"
        raise UsageError(f"{said}; install {needed}, or leave --compile out") from error
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    model.compile(dynamic=False, options={"layout_optimization": device.type == "cuda"})


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """What float32 convolutions and matrix products are computed in on CUDA, for the body.

    `fp32`: float32. `tf32`: TF32. Anything else: as it was, which is PyTorch's own unless somebody has changed it,
    TF32 in convolutions and float32 in matrix products.

    PyTorch has newer switches (`fp32_precision`), which count, and older ones (`allow_tf32`), which raise an error when
    they are read and disagree. So the older ones follow here, unless somebody has used the newer ones alone.
    """
    if precision not in ("fp32", "tf32"):
        yield
        return
    try:
        older = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    backends = torch.backends
    operations = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    newer = []
    for switch in (backends, backends.cudnn, *operations, backends.mkldnn.matmul):
        newer.append((switch, switch.fp32_precision))
        switch.fp32_precision = "none"  # else those inside this one would show its value for their own
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
        for switch, value in newer:
            switch.fp32_precision = value


def precision(settings: Training, device: torch.device) -> str:
    """What training computes in; the verdicts of evaluation are float32 whatever it says."""
    if settings.precision == "bf16":
        return "bfloat16 autocast over float32 weights"
    if device.type != "cuda" or settings.precision == "fp32" or not torch.cuda.is_tf32_supported():
        return "float32"
    return "TF32" if settings.precision == "tf32" else "TF32 in convolutions, float32 in matrix products"


class Sent:
    """Figures on their way from a device to the host, so that the host need not wait until all other work is done."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.copied = None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))

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
