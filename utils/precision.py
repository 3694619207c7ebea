"""What training computes in, and how fast: bfloat16, TF32, torch.compile, memory."""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from utils.options import UsageError


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """Run a network's forwards through torch.compile, in place: state-dict keys stay. UsageError without a compiler.

    Not in inductor's own choice of channels-last: PyTorch 2.14's weight gradient of a channels-last 1x1 convolution of
    stride 2 with 8 to 12 channels and an odd batch writes outside its memory on a CPU.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--compile: torch.compile does not work here ({reason}); install a C++ compiler, or leave --compile out"
        ) from error
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


def precision(options: argparse.Namespace, device: torch.device) -> str:
    """What training computes in; evaluation is float32 whatever it says."""
    if options.amp == "bf16":
        return "bfloat16 autocast over float32 weights"
    return "TF32" if options.tf32 and device.type == "cuda" else "float32"


def bfloat16_gain(device: torch.device) -> float:
    """How many times as fast as float32 a device multiplies bfloat16 matrices, measured.

    What instructions it has does not tell: one CPU with AVX512-BF16 was half as fast in bfloat16.
    """
    kinds = [torch.ones(512, 512, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]
    for matrix in kinds:
        (matrix @ matrix)[0, 0].item()  # once without the clock
    for _ in range(3):
        for i, matrix in enumerate(kinds):
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # which waits for the device
            fastest[i] = min(fastest[i], time.perf_counter() - began)
    return fastest[0] / fastest[1]


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
