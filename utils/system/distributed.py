"""What the processes of one run share: slices of a batch, sums, agreement on a stop.

Each process started by torchrun is a rank. Every rank draws the same batch, noise and negatives and
works on its slice of them. Without torchrun, or with one process, there is no process group: the
functions here then answer for one rank and communicate nothing.

    torchrun --nproc-per-node=4 train_CIFAR10_ResNet.py      a process for each of 4 CUDA devices
    torchrun --nproc-per-node=4 test_white_attack.py ...     these processes may share a device
    torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 SCRIPT
                                                             on both of two nodes

On CPUs set OMP_NUM_THREADS to the cores of a process; torchrun sets 1. The run folder has to be
visible to the first rank (to all for an evaluation), the data to each node.

Slices are weighted by their share of the batch, so the number of ranks changes rounding and
BatchNorm only. Each rank normalises its own slice. The first rank's statistics are evaluated and
saved, and all take them over at the end of an epoch; --sync-bn (CUDA only) normalises over all
slices. Evaluation is shared in blocks of 250 images.

A stop signal, to torchrun or to one rank, stops all ranks at the next step, and the first one
saves. If a process dies, the others end; resume by hand. Tried with gloo on one machine;
tests/test_cuda.py tries NCCL on one card. Several cards, --sync-bn and real nodes were not tried.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.system.errors import RunError, Stopped, UsageError

T = TypeVar("T")

# Ranks wait for one another while one of them attacks a block, which may take hours.
TIMEOUT = timedelta(days=7)


@contextmanager
def started() -> Iterator[None]:
    """Join the other ranks for the body of a script, where torchrun has started several.

    CPU tensors go by gloo, CUDA tensors by NCCL. A stop, on which all ranks agree, is reported by
    the first one alone. Where another rank has ended, communication raises an error.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    together = False  # NCCL waits for all ranks when a group is destroyed
    try:
        yield
        together = True
    except Stopped as stop:
        together = True
        if first():
            raise
        raise SystemExit(128 + stop.args[0]) from None
    finally:
        if together or backend == "gloo":
            dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads abort a process that ends while they free tensors


def world() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0 on."""
    return dist.get_rank() if world() > 1 else 0


def first() -> bool:
    """Tell whether this rank is the one that writes and logs."""
    return rank() == 0


def quiet() -> bool | None:
    """Return tqdm's `disable`: only the first rank has a progress bar, and only on a terminal."""
    return None if first() else True


def launcher() -> str:
    """Return the beginning of a command that starts a script as this one was started."""
    if world() == 1:
        return "python"
    return f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"


def own_device(device: torch.device, shared: bool = False) -> torch.device:
    """Return this rank's device: of CUDA devices the one with its number on its node.

    shared: whether ranks may share a device. Those of an evaluation may; those of a training
    exchange gradients by NCCL, which refuses it. Errors: UsageError where there is no device left.
    """
    if world() == 1 or device.type != "cuda" or (shared and device.index is not None):
        return device
    count = torch.cuda.device_count()
    index = int(os.environ["LOCAL_RANK"])
    if shared:
        index %= max(count, 1)
    elif device.index is not None or index >= count:
        raise UsageError(
            f"--device {device}: each rank needs a CUDA device of its own, and there are {count}; "
            "start as many ranks with --device cuda, or give --device cpu"
        )
    return torch.device("cuda", index)


def own_slice(count: int) -> slice:
    """Return this rank's slice of `count` things. Sizes differ by one at most.

    Of fewer things than ranks each rank takes all: every rank takes part in a step's backward, and
    BatchNorm needs images.
    """
    if count < world():
        return slice(0, count)
    start = -(-count * rank() // world())
    stop = -(-count * (rank() + 1) // world())
    return slice(start, stop)


def own_weight(count: int) -> float:
    """Return the weight of a mean over this rank's slice of `count` things in the mean over all."""
    if count < world():
        return 1 / world()
    part = own_slice(count)
    return (part.stop - part.start) / count


def total(values: Tensor) -> Tensor:
    """Return the sum over ranks, the same on each of them. values: of the same shape on each."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def joined(part: Tensor, count: int) -> Tensor:
    """Return the whole (count, ...) of which each rank has the part of its `own_slice`."""
    if world() == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    if count >= world() or first():  # of fewer things than ranks each has all
        whole[own_slice(count)] = part
    return total(whole)


def agreed(wish: int) -> int:
    """Return the largest wish of all ranks, and wait for all of them; not for signal handlers."""
    if world() == 1:
        return wish
    wishes = torch.tensor(wish)
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return int(wishes)


def gathered(value: T) -> list[T]:
    """Return every rank's value, in their order, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Return on every rank what `work` returns on the first one, or raise its error on all.

    Only a UsageError, a RunError or an OSError is passed on.
    """
    if world() == 1:
        return work()
    answer = [None, None]
    if first():
        try:
            answer[0] = work()
        except (UsageError, RunError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    result, error = answer
    if error is not None:
        raise error
    return result


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers, which are BatchNorm's statistics."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def sum_gradients(model: nn.Module) -> None:
    """Give all ranks the first one's weights; each later backward sums gradients over ranks.

    Each rank has to use every parameter in each backward, but for those that are not trained.
    Attacks see copies of the network, and communicate nothing. BatchNorm's statistics stay each
    rank's own.
    """
    if world() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(total)
