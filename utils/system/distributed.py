"""Many processes, one run: what ranks started by torchrun share, agree on and leave to the first of them.

Every rank draws the same batch, noise and negatives and works on its slice of them. Without torchrun, or with one
process, there is no process group: each function here then answers for a world of one and communicates nothing.

    torchrun --nproc-per-node=4 train_CIFAR10_ResNet.py            one node, a process for each of 4 CUDA devices
    torchrun --nproc-per-node=4 test_white_attack.py ...           ranks of an evaluation may share a device, also one
    torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=1 SCRIPT
                                                                   on both of two nodes; HOST is one of them
SLURM, torchrun once a node (#SBATCH --ntasks-per-node=1 --gpus-per-node=4 --signal=TERM@120):
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=4 --max-restarts=3 --rdzv-backend=c10d \\
        --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID" SCRIPT --data-dir DATA --model-dir RUNS/ANCRA
Where nodes do not find one another, name the network device: GLOO_SOCKET_IFNAME, with CUDA NCCL_SOCKET_IFNAME too. On
CPUs set OMP_NUM_THREADS to a process's cores; torchrun takes 1. The run folder has to be visible to the first rank (to
any that may become it, with --max-restarts; to all, for evaluation), --data-dir to each node; other data is refused.

Exact: slices are weighted by their share, so the number of ranks changes rounding and BatchNorm only; with BatchNorm in
eval mode gradients are those of one process, also of a batch with fewer images than ranks, which each then takes whole.
Evaluation is joined image by image; its attacks go in blocks of 250 images, so more ranks than blocks do not help.
Not exact, BatchNorm: a rank normalises by its own slice; the first rank's statistics are evaluated and saved, and all
take them over at each epoch's end. --sync-bn (CUDA only) normalises over all slices. Devices of one run should be of
one model: others draw other noise from equal seeds.

Stops: SIGTERM, SIGHUP or Ctrl-C, to torchrun or to one rank, stops all at the next step and the first saves (torchrun
kills after 30 seconds, and its own status is 1). SIGUSR1 is for a rank: torchrun does not pass it on. If a process dies
the others end within seconds and last_state.pt is whole; a machine that vanishes is noticed when the network notices.
--max-restarts=N goes on from the last epoch's end while the first process stays on its machine; otherwise add --resume.
It also restarts after a wrong flag and after a stop of a single rank: stop torchrun itself. Any number of ranks can
resume; stopped inside an epoch, all take the first rank's statistics. Tried by gloo on one machine, by NCCL with one
rank (tests/test_cuda.py); several cards, --sync-bn and real nodes were not.
"""

import inspect
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.system.errors import GRACE, TOLD, RunError, Stopped, UsageError, first_line, several_processes

T = TypeVar("T")
PATIENCE, PATIENCE_OF_NCCL = timedelta(days=7), timedelta(minutes=30)
QUIET = 20  # seconds in which ranks find one another, before each says whom it waits for
# How PyTorch's errors of communication read where they have no type of their own, as gloo's
LOST = re.compile(r"gloo|NCCL|closed by peer|reset by peer|Broken pipe|c10d|TCPStore", re.IGNORECASE)


@contextmanager
def started() -> Iterator[None]:
    """Join the other ranks for the body of a script; nothing to do where torchrun has not started several.

    CPU tensors go by gloo, CUDA tensors by NCCL, with PyTorch's own handling of NCCL's errors, which ends the
    process, after 30 minutes. By gloo ranks wait for one another for days, since blocks of an evaluation take hours;
    a rank that ends is noticed at once. An error that several ranks meet is said by one of them, whichever comes first;
    a stop, which all have agreed on, by the first rank. The others end in silence, with the same status.
    Errors: RunError where another rank ended or cannot be reached.
    """
    if not several_processes():
        yield
        return
    alarm = _alarm()
    store, nccl = None, torch.cuda.is_available() and dist.is_nccl_available()
    together = False  # whether the ranks end at the same place: NCCL's group ends by all of them, or waits
    try:
        store, rank, count = next(dist.rendezvous("env://"))
        store = _unused_part(store, rank, count)
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        alarm.cancel()
        if nccl:  # by which only training steps go
            dist.group.WORLD._get_backend(torch.device("cuda"))._set_default_timeout(PATIENCE_OF_NCCL)
        yield
        together = True
    except (Stopped, SystemExit) as stop:
        together = True
        if isinstance(stop, Stopped) and rank:
            raise SystemExit(128 + stop.args[0]) from None
        raise
    except (UsageError, RunError, OSError, RuntimeError) as error:
        if _said_already(store):
            time.sleep(GRACE)  # the launcher ends this process as soon as the one that speaks has ended
            raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and LOST.search(str(error))):
            lost = f"rank {os.environ['RANK']} lost another rank, which ended or is out of reach ({first_line(error)})"
            mend = "what was saved is intact; continue by the same command, a training with --resume"
            raise RunError(f"{lost}; {mend}") from error
        raise
    finally:
        alarm.cancel()
        if dist.is_initialized() and (together or not nccl):
            dist.destroy_process_group()
        # gloo's threads need Python's global lock to let go of their last tensors, and would abort the process if they
        # asked for it after Python has ended: leave it to them here
        time.sleep(0.2)


def _alarm() -> threading.Timer:
    """Says in a while whom this process waits for; UsageError where the environment's numbers are no launcher's."""
    rank, count, host, port = (os.environ[key] for key in TOLD)
    mend = f"unless torchrun has started this process, unset {', '.join(TOLD)}"
    if not (rank.isdecimal() and count.isdecimal() and port.isdecimal() and int(rank) < int(count)):
        raise UsageError(f"{', '.join(f'{key}={os.environ[key]}' for key in TOLD)} name no rank of a job; {mend}")
    line = f"rank {rank} of {count} waits for {'rank 0' if int(rank) else 'the others'} at {host}:{port}; {mend}"
    alarm = threading.Timer(QUIET, print, [line], {"file": sys.stderr, "flush": True})
    alarm.start()
    return alarm


def _unused_part(store: dist.Store, rank: int, count: int) -> dist.Store:
    """A part of the store that no earlier attempt has written to.

    torchrun keeps one store over its restarts, and with it the addresses of ranks that have ended; which attempt this
    is, its nodes may count differently. So the first rank names the attempt and answers each other rank under a key
    that only this very process can have asked for.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"asks {rank}", name)
        attempt = store.get(f"answer to {name}").decode()
        store.set(f"{attempt} heard by {rank}", "")
        return dist.PrefixStore(attempt, store)
    waiting, until = set(range(1, count)), time.monotonic() + 1800
    while waiting := {r for r in waiting if not store.check([f"{name} heard by {r}"])}:
        for r in waiting:
            if store.check([f"asks {r}"]):  # by an earlier attempt perhaps: ask again until it is heard
                store.set(f"answer to {store.get(f'asks {r}').decode()}", name)
        if time.monotonic() > until:
            raise RunError(f"{len(waiting)} of {count} ranks have not started within 30 minutes")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _said_already(store: dist.Store | None) -> bool:
    """Whether another rank has taken it upon itself to say why the job ends; False where there is none to ask."""
    try:
        return store is not None and store.add("said", 1) > 1
    except RuntimeError:  # the store ended with the rank that held it
        return False


def world() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this is the rank that writes, logs and speaks."""
    return rank() == 0


def quiet() -> bool | None:
    """tqdm's `disable`: a bar on the first rank's terminal only."""
    return None if first() else True


def restarted() -> bool:
    """Whether torchrun has started this process anew after a failure (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def launch() -> str | None:
    """This job's name, that of the torchrun of this process, the same after a restart; None without torchrun.

    An id, `--rdzv-id`, is not enough: the next job may be given the same.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return name and f"{name} {socket.gethostname()} {os.getppid()}"


def launcher() -> str:
    """The beginning of a command that starts a script as this one was."""
    if world() == 1:
        return "python"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    meeting = f"--rdzv-backend=c10d --rdzv-endpoint={os.environ['MASTER_ADDR']}:29500 "
    several = f"--nnodes={world() // local} {meeting}" if local < world() else ""
    return f"torchrun {several}--nproc-per-node={local}"


def own_device(device: torch.device, shared: bool = False) -> torch.device:
    """This rank's device: of CUDA devices the one of its number on its node. Errors: UsageError where there is none.

    shared: several ranks may have the same device. Those of an evaluation may, since they exchange verdicts alone, by
    gloo; those of a training may not, since NCCL, by which gradients go, refuses it.
    """
    if world() == 1 or device.type != "cuda":
        return device
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    index = local if device.index is None else device.index
    if shared:
        index %= count
    elif device.index is not None:
        raise UsageError(f"--device {device}: each rank takes a CUDA device of its own; give --device cuda")
    elif local >= count:
        raise UsageError(f"{count} CUDA devices for more ranks; lower --nproc-per-node, or give --device cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def own_slice(count: int) -> slice:
    """This rank's slice of `count` things: sizes differ by one at most, the first rank's is a largest.

    Of fewer things than ranks each takes all: every rank takes part in a step's backward, and BatchNorm needs images.
    """
    if count < world():
        return slice(0, count)
    return slice(-(-count * rank() // world()), -(-count * (rank() + 1) // world()))


def own_weight(count: int) -> float:
    """What a mean over this rank's slice of `count` things weighs in the mean over all; 1 without ranks."""
    own = own_slice(count)
    return 1 / world() if count < world() else (own.stop - own.start) / count


def total(values: Tensor) -> Tensor:
    """Sum over ranks, the same on each of them, exact for whole numbers. values: of the same shape on each rank."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def joined(part: Tensor, count: int) -> Tensor:
    """The whole (count, ...) of which each rank has computed the part of its `own_slice`, on every rank, exactly."""
    if world() == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    if count >= world() or first():  # of fewer things each rank has all
        whole[own_slice(count)] = part
    return total(whole)  # each row is one rank's, plus zeros


def agreed(wish: int) -> int:
    """The largest wish of all ranks, which waits for all of them. Not for signal handlers: they only note a wish."""
    if world() == 1:
        return wish
    wishes = torch.tensor(wish)
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return int(wishes)


def gathered(value: T) -> list[T]:
    """Every rank's value, in their order, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, which alone does it; an error of use or of the run is raised on all."""
    if world() == 1:
        return work()
    answer = [None, None]
    if first():
        try:
            answer[0] = work()
        except (UsageError, RunError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextmanager
def first_of_the_node_first() -> Iterator[None]:
    """The body runs on the first rank of each node, then on its others: to download, unpack and decode data once.

    Where it fails on a first rank, that one raises, and those for which it has not failed end in silence.
    """

    def wait(failed: int) -> None:
        if agreed(failed) and not failed:
            time.sleep(GRACE)
            raise SystemExit(2)

    others = world() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if others:
        wait(0)
    try:
        yield
    except (UsageError, OSError):
        if not others:
            wait(1)
        raise
    if not others:
        wait(0)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers, BatchNorm's statistics: the network that is evaluated and saved."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class _Step(nn.Module):
    """A network and a loss of it as one module: its forward is the loss, whatever forwards of the network it takes."""

    def __init__(self, model: nn.Module, loss: Callable) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: object) -> object:
        return self.loss(self.model, *args)


def parallel(model: nn.Module, loss: Callable[..., T]) -> Callable[..., T]:
    """`loss(model, ...)` as a function of its further arguments, whose backward averages gradients over ranks.

    DistributedDataParallel wraps the whole loss, not the network: it expects one forward before each backward, and a
    step has three. So it also reduces gradients while the backward is still under way, and attacks, which see the bare
    network, communicate nothing. Buffers are not broadcast: BatchNorm's statistics are each rank's own. Each rank has
    to use every parameter in each backward.
    """
    if world() == 1:
        return partial(loss, model)
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return DistributedDataParallel(_Step(model, loss), **{buffers: False})
