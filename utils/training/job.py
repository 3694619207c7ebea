"""A process that trains a run: what it holds, and how it is saved, resumed and stopped."""

import math
import shlex
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models import build_model
from utils.step import StepStats, training_loss
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, in_precision
from utils.system.checkpoints import STATE, load_state, load_weights, save
from utils.system.devices import Sent, compile_for_training, for_training
from utils.system.errors import RunError, Stopped, UsageError
from utils.system.foreign import build_own, source_of
from utils.system.log import open_log
from utils.system.provenance import provenance
from utils.system.settings import Training, code_flags, is_code, stored
from utils.training.companions import Average, make_optimizer
from utils.training.runs import VERSION
from utils.training.splits import Data


@dataclass
class Progress:
    """How far a run is: what a resumed run needs besides weights, optimiser and generator.

    epoch: the one under way, counted from 1. order: its order of images, None before its first
    step. done: how many of these are trained on. sums: of each of `StepStats` over these images.
    seconds: what they took. rows: of metrics.csv so far.
    """

    epoch: int
    order: torch.Tensor | None = None
    done: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(StepStats._fields, 0.0))
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)


class Job:
    """A process that trains a run, alone or as one of several ranks.

    evaluated: the network that is evaluated, selected and saved, with --ema the average. pending:
    how many images the last step had, and its numbers on their way from the device.
    """

    def __init__(
        self,
        settings: Training,
        folder: Path,
        device: torch.device,
        data: Data,
        weights: Path | None = None,
    ) -> None:
        """Build the network and what trains it, as before the first step.

        weights: a file whose weights the network starts with, instead of random ones.
        """
        self.settings = settings
        self.folder = folder
        self.device = device
        self.data = data
        self.provenance = provenance(device, settings.seed)
        self.log = open_log(folder / "train.log")
        self.progress = Progress(settings.restart_epoch + 1)
        self.pending: tuple[int, Sent] | None = None
        self.stop_signal = 0

        torch.manual_seed(settings.seed)
        self.model = build(settings, len(data.train.classes), device)
        self.source = source_of(settings.arch)
        if weights is not None:
            load_weights(self.model, weights)
        self.attack_copy = AttackCopy(
            self.model,
            settings.precision,
            compiled=settings.compile,
            graph=settings.cuda_graph and device.type == "cuda",
        )
        model = in_precision(self.model, settings.precision)
        self.training_loss = partial(training_loss, model)
        distributed.sum_gradients(self.model)
        self.average = Average(self.model) if settings.ema else None
        self.evaluated = self.model if self.average is None else self.average.model
        self.optimizer = make_optimizer(self.model, settings)
        self.generator = torch.Generator(device).manual_seed(settings.seed)

    @property
    def own_images(self) -> int:
        """How many images of a batch are not from --extra-data."""
        return self.settings.batch_size - self.settings.extra_images

    def diverged(self, what: str) -> RunError:
        """Return the error of a training that has diverged."""
        where = f"{what} in epoch {self.progress.epoch}"
        return RunError(f"{where}; {self.folder} keeps what was saved before; lower --lr")

    def checkpoint(self, model: nn.Module) -> dict:
        """Return a network of the run and what it is, as `load_model` reads it.

        Errors: RunError where weights are not finite.
        """
        settings = self.settings
        weights = model.state_dict()
        for name, value in weights.items():
            if not value.isfinite().all():
                raise self.diverged(f"{name} is not finite")
        return {
            "model": weights,
            "arch": settings.arch,
            "source": self.source,
            "dataset": settings.dataset,
            **network_options(settings),
            "classes": list(self.data.train.classes),
            "num_classes": len(self.data.train.classes),
            "averaged": model is not self.model,
            "epoch": self.progress.epoch,
            "recipe": stored(settings),
            "provenance": self.provenance,
            "checksums": self.data.checksums,
        }

    def save_state(self) -> None:
        """Write all that `restore` needs."""
        state = self.checkpoint(self.model)
        state["version"] = VERSION
        state["optimizer"] = self.optimizer.state_dict()
        state["generator"] = self.generator.get_state()
        state["progress"] = vars(self.progress)
        state["epoch"] = self.progress.epoch - 1  # the last one completed
        if self.average is not None:
            state["average"] = self.average.model.state_dict()
            state["average_steps"] = self.average.steps
        save(self.folder / STATE, state)

    def restore(self, state: dict) -> None:
        """Continue from what `save_state` wrote.

        Errors: UsageError where the run had other images, and --other-data is not given.
        """
        settings = self.settings
        if not settings.other_data and self.data.checksums != state["checksums"]:
            hint = "name the run's own --data-dir, or go on with these by --other-data"
            raise UsageError(f"{settings.data_dir} has other images than the run had; {hint}")
        file = self.folder / STATE
        load_state(self.model, state["model"], file)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        if self.average is not None:
            load_state(self.average.model, state["average"], file)
            self.average.steps = state["average_steps"]
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError):
            self.log("note       saved on another kind of device: random draws do not carry over")

    def read_stats(self) -> None:
        """Add the numbers of the last step to the sums of the epoch.

        They are read one step late, when they have arrived. Reading them at once would leave the
        device idle until the host has started the next step.
        Errors: RunError where they are not finite.
        """
        if self.pending is None:
            return
        images, sent = self.pending
        self.pending = None
        *values, norm = sent.arrived()
        stats = StepStats(*values)

        progress = self.progress
        batch = math.ceil(progress.done / self.own_images)
        if not math.isfinite(stats.loss) or not math.isfinite(norm):
            numbers = f"the loss is {stats.loss} and the norm of its gradients {norm}"
            raise self.diverged(f"{numbers} in batch {batch}")
        for name, value in stats._asdict().items():
            progress.sums[name] += value * images
        if batch % self.settings.log_interval == 0:
            where = f"epoch {progress.epoch} [{progress.done}/{len(progress.order)}]"
            self.log(f"{where} loss {stats.loss:.4f} contrast {stats.contrast:.4f}")

    def note_stop(self, signum: int, frame: object) -> None:
        """Handle a signal: the first waits for the next step, a second Ctrl-C or SIGTERM does not.

        SIGHUP and SIGUSR1 may come twice by themselves: both the system and the shell send SIGHUP.
        """
        self.stop_signal = signum
        # torchrun may repeat a signal, and kills its processes in the end.
        if signum in (signal.SIGINT, signal.SIGTERM) and distributed.world() == 1:
            signal.signal(signum, signal.SIG_DFL)

    def check_stop(self) -> None:
        """Save and raise Stopped, on all ranks, where a signal has come to any of them."""
        signum = distributed.agreed(self.stop_signal)
        if not signum:
            return
        self.read_stats()
        distributed.from_first(self.save_state)
        progress = self.progress
        self.log(f"stopped    in epoch {progress.epoch}, {progress.done} images done")
        command = [sys.argv[0], "--resume", str(self.folder), *code_flags(self.settings.arch)]
        go_on = f"{distributed.launcher()} {shlex.join(command)}"
        cause = signal.Signals(signum).name
        raise Stopped(signum, f"stopped by {cause}; continue by: {go_on}")


def network_options(settings: Training) -> dict:
    """Return the arguments of `build_model` that checkpoints keep, too."""
    names = ("width", "image_size", "gate", "classifier", "ra_blocks")
    options = {name: getattr(settings, name) for name in names}
    return options | {"reverse_attention": not settings.no_ra}


def build(settings: Training, num_classes: int, device: torch.device) -> nn.Module:
    """Build the network of a run, on its device. UsageError where it takes no such images."""
    builder = build_own if is_code(settings.arch) else build_model
    try:
        model = builder(settings.arch, num_classes, **network_options(settings))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if settings.sync_bn and distributed.world() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = for_training(model, device, settings.precision)
    if settings.compile:
        compile_for_training(model, device)
    return model
