"""What training computes in, and how fast: bfloat16, TF32, torch.compile, memory."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether this is an x86 CPU that is known to compute bfloat16 by way of float32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    native = known.get("amx_bf16") or known.get("avx512_bf16")
    return device.type == "cpu" and known.get("architecture") == "x86_64" and not native


def peak_memory(device: torch.device) -> str:
    """The most memory so far: that of tensors on a CUDA device, or the process's resident one; `-` where unknown."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return "-"
    return f"{getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9:.2f} GB"
