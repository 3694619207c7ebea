"""A training run: the loop around `step`, and everything that it evaluates, logs and saves."""

import csv
import importlib.util
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model
from utils.attacks import pgd40_heads
from utils.data.datasets import (
    Split,
    as_input,
    augment,
    batches,
    load_extra,
    load_splits,
    parts_of,
    require_same_on_ranks,
    shuffled,
    with_extra,
)
from utils.data.subject import at_chance, halving, largest_batch, percent, verdicts
from utils.figures.plots import draw_curves, save_or_note
from utils.step import (
    Attacked,
    Draws,
    Figures,
    Terms,
    attack,
    draw,
    negative_strategy,
    step_figures,
    training_loss,
)
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, frozen, in_precision
from utils.system.checkpoints import (
    BEST,
    LAST,
    STATE,
    flaw,
    load_model,
    load_state,
    load_weights,
    save,
    weights_after,
)
from utils.system.devices import Sent, compile_for_training, computing, for_training, peak_memory, pick_device, precision
from utils.system.errors import RunError, Stopped, UsageError, stop_signals, stop_word
from utils.system.files import write_atomically, write_record
from utils.system.log import open_log
from utils.system.options import Command
from utils.system.provenance import in_one_line, provenance
from utils.system.settings import Training, combined, dataset_defaults, stored
from utils.system.values import as_given, eps_text
from utils.training import runs
from utils.training.companions import Average, adversarial_weights, learning_rate
from utils.training.runs import Start, prepare

DRAW_EVERY = 30  # seconds between two drawings of the curves, which take most of a second


class Data(NamedTuple):
    """The images of a run. selection: those that choose the best epoch, the test images where there are no others.

    test: those that report on it; None where there are none. selected, tested: what these two are called.
    extra: those of --extra-data, on the host.
    """

    train: Split
    selection: Split
    test: Split | None
    selected: str = "the test set"
    tested: str = "the test set"
    extra: Split | None = None


def run(command: Command) -> None:
    """Train as a command says. Errors: UsageError, RunError, Stopped; whatever was saved stays loadable."""
    with ExitStack() as held:
        start = distributed.from_first(lambda: prepare(command, held))
        job, data = set_up(start, held)
        announce(job, data, start)
        del start  # it holds a copy of the network
        train, selection = data.train.to(job.device), data.selection.to(job.device)
        train = train._replace(labels=data.train.labels)  # on the host, where choosing negatives counts them
        with stop_signals(job.note_stop), computing(job.settings.precision):
            while job.progress["epoch"] <= job.settings.epochs:
                train_epoch(job, train, data.extra)
                finish_epoch(job, selection)
            report(job, data)


class Run:
    """A training run: its settings, network, optimiser, random state, and how far it is.

    `progress` is all that a resumed run needs besides the tensors: the epoch under way, its order of images, how many
    of them are done, sums over those, and the rows of metrics.csv so far.
    """

    def __init__(self, settings: Training, folder: Path, device: torch.device, data: Data) -> None:
        self.settings, self.folder, self.device, self.classes = settings, folder, device, data.train.classes
        self.training_images, self.selection_labels = len(data.train.labels), data.selection.labels
        self.checksums, self.notes = {}, without_effect(settings, data)
        self.log = open_log(folder / "train.log")
        self.note = cache(lambda said: said and self.log(said))  # once, what each epoch would say
        self.stop = 0  # the signal that asks for a stop
        self.provenance = distributed.from_first(lambda: provenance(device, settings.seed))
        torch.manual_seed(settings.seed)
        how = {key: getattr(settings, key) for key in ("width", "image_size", "gate", "ra_blocks")}
        try:
            model = build_model(settings.arch, len(self.classes), reverse_attention=not settings.no_ra, **how)
        except ValueError as error:  # an image size that this network does not take
            raise UsageError(str(error)) from error
        if settings.sync_bn and distributed.world() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = for_training(model, device, settings.precision)
        if settings.compile:
            compile_for_training(self.model, device)
        graph = settings.cuda_graph and device.type == "cuda"
        self.attack_copy = AttackCopy(self.model, settings.precision, settings.compile, graph, self.note)
        self.average = Average(self.model) if settings.ema else None
        trained = in_precision(self.model, settings.precision)
        self.training_loss = distributed.parallel(trained, training_loss)  # without its first argument
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.late: Late | None = None
        self.own_images = settings.batch_size - settings.extra_images  # of a batch
        self.progress = {"epoch": settings.restart_epoch + 1, "order": None, "done": 0, "sums": {}, "rows": []}
        self.epochs_drawn = 0  # by the curves, as far as this process knows
        self.drawn_at = time.monotonic()

    @property
    def last_good(self) -> str:
        state = self.folder / STATE
        return f"the last good checkpoint is {state}" if state.exists() else "there is no checkpoint yet"

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated, selected and saved: the trained one, or with --ema its average."""
        return self.model if self.average is None else self.average.model

    def checkpoint(self, model: nn.Module) -> dict:
        """A network of the run and what it is, as `load_model` reads it; RunError where its weights are absurd."""
        settings = self.settings
        for key, value in model.state_dict().items():
            if wrong := flaw(key, value):
                raise RunError(f"{key} {wrong} in epoch {self.progress['epoch']}; {self.last_good}; lower --lr")
        said = ("arch", "width", "image_size", "dataset", "gate", "ra_blocks")
        return {key: getattr(settings, key) for key in said} | {
            "model": model.state_dict(),
            "classes": list(self.classes),
            "num_classes": len(self.classes),
            "reverse_attention": not settings.no_ra,
            "averaged": model is not self.model,
            "recipe": stored(settings),
            "epoch": self.progress["epoch"],
            "provenance": self.provenance,
            "checksums": self.checksums,
        }

    def take_folder(self, held: ExitStack) -> None:
        """Hold the folder and save the state that a run starts with."""
        runs.take_folder(self.folder, held)
        clear = runs.remove_existing if self.settings.overwrite else runs.refuse_existing
        clear(self.folder)  # another process may have been faster
        try:
            self.save_state()
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}); name another --model-dir") from error

    def save_state(self) -> None:
        state = {
            "version": runs.VERSION,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": self.progress,
            "training_images": self.training_images,
            "epoch": self.progress["epoch"] - 1,  # the last one completed
            "ranks": distributed.world(),
            "launch": distributed.launch(),
        }
        if self.average is not None:
            state |= {"average": self.average.model.state_dict(), "average_steps": self.average.steps}
        save(self.folder / STATE, self.checkpoint(self.model) | state)

    def restore(self, state: dict, file: Path) -> None:
        """Continue from what `save_state` wrote; generator states carry over on the same kind of device only."""
        load_state(self.model, state["model"], file)
        if not runs.usable(state, list(self.model.parameters()), self.training_images):
            raise UsageError(f"{file} cannot be resumed, its optimizer or progress is damaged; name a run's {STATE}")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.progress = state["progress"]
        if self.average is not None:
            load_state(self.average.model, state.get("average"), file)
            self.average.steps = state["average_steps"]
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError):
            if distributed.first():
                print("the run was saved on another kind of device: its random draws do not carry over")

    def note_stop(self, signum: int, frame: object) -> None:
        """The first signal waits for the next step; a second Ctrl-C or SIGTERM does not.

        SIGHUP and SIGUSR1 may come twice by themselves: both the system and the shell send the former.
        """
        self.stop = signum
        if distributed.world() > 1:  # torchrun may say it again, and ends the process itself after 30 seconds
            return
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)

    def check_stop(self) -> None:
        """Between steps, on all ranks alike: save and raise Stopped where a signal has come to any of them."""
        signum = distributed.agreed(self.stop)
        if not signum:
            return
        take_up(self)
        again = f"{distributed.launcher()} {shlex.join([sys.argv[0], '--resume', str(self.folder)])}"
        line = f"{stop_word(signum)}; continue by: {again}"

        def save_and_log() -> None:
            self.save_state()  # that counts, whatever becomes of the log
            log = self.folder / "train.log"
            with suppress(OSError):
                with open(log, "a", encoding="utf-8", errors="backslashreplace") as out:
                    out.write(line + "\n")
                draw_new_curves(self)

        distributed.from_first(save_and_log)  # the others end after it only
        raise Stopped(signum, line)


def set_up(start: Start, held: ExitStack) -> tuple[Run, Data]:
    """The run with its data, at its start or where it was left, on its device; held: gets the folder's lock."""
    settings, state = start.settings, start.state
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:  # before anything is trained
        raise UsageError("--tensorboard needs the package tensorboard; pip install it, or leave it out")
    device = pick_device(settings.device, settings.no_cuda, settings.precision)
    if settings.sync_bn and device.type != "cuda":
        mend = "leave it out" if state is None else "this run was started with it, continue it where there are some"
        raise UsageError(f"--sync-bn needs CUDA devices, and this run is on {device}; {mend}")
    with distributed.first_of_the_node_first():
        data = load_training_data(settings)
    where = f"{settings.dataset} in {settings.data_dir}"
    old = state is not None and not state.get("checksums")
    if old and data.test is not None and not settings.val_size:  # before there were checksums, test images selected
        data = data._replace(selection=data.test, selected=data.tested)
    parts = {"training": data.train, "selection": data.selection} | ({"test": data.test} if data.test else {})
    parts |= {"extra": data.extra} if data.extra else {}
    sums = require_same_on_ranks(where, *parts.values())
    job = Run(settings, start.folder, device, data)
    job.checksums = {} if old else dict(zip(parts, sums, strict=True))
    if state is None:
        if settings.restart_epoch:
            weights = distributed.from_first(lambda: weights_after(settings.ckpt_url, settings.restart_epoch))
            load_weights(job.model, weights)
            job.average = Average(job.model) if settings.ema else None
        distributed.from_first(lambda: job.take_folder(held))
        if settings.restart_epoch:
            job.log(f"restart    after epoch {settings.restart_epoch} from the weights in {weights}")
    elif state["classes"] != list(data.train.classes) or state["training_images"] != job.training_images:
        own = f"{state['training_images']} images of {len(state['classes'])} classes"
        raise UsageError(f"{start.file} was trained on {own}, and {where} differs; name the run's own --data-dir")
    elif (others := other_parts(job, state)) and not settings.other_data:
        mend = "name the run's own --data-dir, or go on with these by --other-data"
        raise UsageError(f"{where} has other {others} images than {start.file} was written with; {mend}")
    else:
        job.restore(state, start.file)
    return job, data


def other_parts(job: Run, state: dict) -> str:
    """The parts of the data whose images are not those that a state was saved with, in words."""
    return " and ".join(name for name, own in job.checksums.items() if state["checksums"].get(name) != own)


def load_training_data(settings: Training) -> Data:
    """The images of a run, on the CPU. Of a folder with both, the val part selects and the test part reports."""
    held_out, parts = settings.val_size, parts_of(settings.dataset, Path(settings.data_dir))
    tested = "test" if "test" in parts else "val"
    selecting = "train" if held_out else "val" if "val" in parts else "test"
    limits = {part: settings.limit_test for part in (selecting, tested) if part in parts or not held_out}
    limits |= {"train": None if settings.limit_train is None else held_out + settings.limit_train}
    loaded = load_splits(settings.dataset, limits, settings.data_dir, settings.image_size)
    train, selection, numbers = loaded["train"]._replace(numbers=None), loaded[selecting], loaded["train"].numbers
    test = loaded.get(tested) if held_out or tested == "test" else None  # images that choose the epoch are no test
    order = shuffled(len(train.labels), 0) if numbers is None else torch.arange(len(train.labels))  # shuffled already
    if held_out:
        if held_out > len(order) - 2:
            raise UsageError(f"--val-size {held_out} leaves too few of {len(order)} training images")
        selection, order = train.take(order[:held_out]), order[held_out:]
    if held_out or settings.limit_train is not None:
        train = train.take(order[: settings.limit_train])
    names = {"train": f"{held_out} held-out training images", "val": "the val part", "test": "the test set"}
    extra = None if settings.extra_data is None else load_extra(settings.extra_data, train)
    return Data(train, selection, test, names[selecting], names[tested], extra)


def announce(job: Run, data: Data, start: Start) -> None:
    """Say what will run and record it in run.json, on the first rank."""
    if not distributed.first():
        return
    settings, ranks = job.settings, distributed.world()
    idle = ["--precision tf32"] if settings.precision == "tf32" and job.device.type != "cuda" else []
    idle += ["--sync-bn"] if settings.sync_bn and ranks == 1 else []
    if idle:
        print(f"{Path(sys.argv[0]).name}: {', '.join(idle)} accepted, no effect here", file=sys.stderr)
    job.log(in_one_line(job.provenance))
    job.log("\n".join([describe(job, data), *job.notes]))
    record = {
        "settings": stored(settings),
        "precision": precision(settings, job.device),
        "parameters": job.parameters,
        "classes": list(job.classes),
        "training_images": job.training_images,
        "evaluation_images": len(data.selection.labels),
        "checksums": job.checksums,
        "ranks": ranks,
    }
    write_record(job.folder / "run.json", job.provenance | record)
    if start.state is not None:
        where = f"in epoch {job.progress['epoch']}, {job.progress['done']} images done, from {start.file}"
        over = "; nothing is left to train, raise --epochs" * (job.progress["epoch"] > settings.epochs)
        job.log(f"resumed    {where}{over}")
        for change in start.changes:
            job.log(f"changed    {change}")
        if start.state["ranks"] != ranks:
            carried = "weights, optimiser, random draws and position carry over; BatchNorm sees other slices"
            job.log(f"ranks      {start.state['ranks']} before, {ranks} now: {carried}")
        if job.checksums and (others := other_parts(job, start.state)):
            job.log(f"data       other {others} images than before, by --other-data")
        before, now = start.state.get("provenance", {}).get("commit"), job.provenance["commit"]
        if isinstance(before, str) and before.isprintable() and before != now:
            job.log(f"code       commit {before[:41]} before, {now or 'unknown'} now: other code may compute otherwise")


def describe(job: Run, data: Data) -> str:
    """What will run, as one block."""
    s = job.settings
    parts = [] if s.no_ra else ["reverse attention"]
    parts += [] if s.no_anc else [f"asymmetric negative contrast ({s.strategy}, alpha {s.alpha}, zeta {s.zeta})"]
    falls = f"x0.1 at {list(s.milestones)}" if s.lr_schedule == "milestones" else s.lr_schedule
    ranks = f", {distributed.world()} ranks" if distributed.world() > 1 else ""
    counts = torch.bincount(data.train.labels, minlength=len(job.classes)).tolist()
    each = ", ".join(f"{name}: {count}" for name, count in zip(job.classes, counts, strict=True))
    if len(counts) > 20:
        each = f"{min(counts)} to {max(counts)} training images each"
    searched = ", searched in bfloat16, judged in float32" if s.precision == "bf16" else ""
    notes = "; ".join(dict.fromkeys(split.note for split in data[:3] if split is not None and split.note))
    lines = {
        "method": f"{s.method}, {' and '.join(parts) or 'plain'}; beta {s.beta}, inner {s.inner}",
        "network": f"{s.arch}, width {s.width or 'as published'}, {job.parameters:,} parameters",
        "data": f"{s.dataset}, {len(job.classes)} classes, {job.training_images} training images, side "
        f"{s.image_size}, augmentation {s.augmentation}",
        "classes": each,
        **({"note": notes} if notes else {}),
        "selection": f"by pgd40_heads on {data.selected} ({len(data.selection.labels)} images){searched}",
        "attack": f"L-infinity eps {eps_text(s.epsilon)}, {s.num_steps} steps of {eps_text(s.step_size)}",
        **({"with": ", ".join(more)} if (more := combined(stored(s))) else {}),
        "optimiser": f"SGD lr {s.lr}, {falls}, momentum {s.momentum}, weight decay "
        f"{s.weight_decay}; {s.epochs} epochs, batch {s.batch_size}, seed {s.seed}",
        "device": f"{job.device}, {precision(s, job.device)}{', compiled' if s.compile else ''}{ranks}",
        "output": f"{job.folder}/",
    }
    return "\n".join(f"{name:<11}{line}" for name, line in lines.items())


def share(job: Run, done: int) -> float:
    """The share of an epoch's steps that lie behind the one that begins behind `done` images, or contains it."""
    return done // job.own_images / math.ceil(job.training_images / job.own_images)


def rate(settings: Training, done: float) -> float:
    """The learning rate behind so many epochs."""
    s = settings
    return learning_rate(s.lr_schedule, s.lr, s.epochs, done, milestones=s.milestones, warmup=s.warmup_lr)


def without_effect(s: Training, data: Data) -> list[str]:
    """What a run is asked for that cannot act in it, a line each, for its log: the figures hide it."""
    late = [epoch for epoch in s.milestones if epoch > s.epochs and s.lr_schedule == "milestones"]
    reach, notes = s.num_steps * s.step_size, []
    if s.awp and s.awp_warmup >= s.epochs:  # of a resumed run: a new one is refused
        notes.append(f"awp {s.awp}: all {s.epochs} epochs are its warm-up")
    if not (s.no_anc or s.strategy.startswith("random")) and s.warmup_epochs >= s.epochs:
        notes.append(f"strategy {s.strategy}: all {s.epochs} epochs are warm-up, at random; lower --warmup-epochs")
    if late:
        notes.append(f"milestones {as_given(tuple(late))}: after the last epoch, {s.epochs}; lr never falls there")
    if s.step_size > s.epsilon:
        notes.append(f"step-size {as_given(s.step_size)}: above eps {as_given(s.epsilon)}, which cuts every step short")
    if reach < s.epsilon * (1 - 1e-9):
        notes.append(f"epsilon {as_given(s.epsilon)}: never reached, {s.num_steps} steps go as far as {reach:.4g}")
    images, there = len(data.train.labels), {} if s.no_anc else {"sample_class_number": len(data.train.classes) - 1}
    there |= {"limit_train": images, "batch_size": images, "limit_test": len((data.test or data.selection).labels)}
    for key, count in there.items():
        if (getattr(s, key) or 0) > count:
            notes.append(f"{key.replace('_', '-')} {getattr(s, key)}: there are {count}")
    return [f"no effect  {note}" for note in notes]


def train_epoch(job: Run, train: Split, extra: Split | None = None) -> None:
    """The rest of the epoch under way, all of it where it has just begun."""
    settings, progress, epoch = job.settings, job.progress, job.progress["epoch"]
    if progress["order"] is None:
        order = torch.randperm(len(train.labels), generator=job.generator, device=job.device)
        progress.update(order=order.cpu(), done=0, sums=dict(runs.SUMS))
    order, sums, total = progress["order"], progress["sums"], len(progress["order"])
    job.model.train()
    began = time.perf_counter()
    style = dict(unit="img", leave=False, disable=distributed.quiet(), desc=f"epoch {epoch}/{settings.epochs}")
    with tqdm(total=total, initial=progress["done"], **style) as bar:
        for indices in batches(order[progress["done"] :], job.own_images):
            for group in job.optimizer.param_groups:
                group["lr"] = rate(settings, epoch - 1 + share(job, progress["done"]))
            batch = train.take(indices)
            if extra is not None:
                seeds = settings.seed, epoch, progress["done"]
                batch = with_extra(batch, extra, settings.extra_images, seeds)
            figures = train_step(job, batch, epoch)
            take_up(job)
            progress["done"] += len(indices)
            job.late = Late(progress["done"], len(indices), Sent(figures))
            sums["seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            bar.update(len(indices))
            bar.set_postfix_str(postfix(job), refresh=False)
            job.check_stop()
    take_up(job)


def attack_batch(
    attack_copy: AttackCopy,
    x: Tensor,
    labels: Tensor,
    settings: Training,
    generator: torch.Generator,
    epoch: int,
) -> Attacked:
    """Attack this rank's slice of a batch x (N, 3, H, W), labels (N,), best on the host.

    Every rank draws for the whole batch, so that figures do not depend on the number of ranks.
    """
    own = distributed.own_slice(len(x))
    net = attack_copy.sync_weights()
    strategy = negative_strategy(settings, epoch)
    guided = strategy not in (None, "random")
    natural = None
    if guided or settings.inner == "kl":
        with torch.no_grad():
            natural = net(x[own], heads=True)
    logits = distributed.joined(natural.final, len(x)) if guided else None

    draws = draw(x, labels, logits, strategy, settings, generator)
    own_draws = Draws(*(None if values is None else values[own] for values in draws))
    own_labels = labels.to(x.device, non_blocking=True)[own]
    return attack(attack_copy.pgd, x[own], own_labels, own_draws, natural, settings)


def backward(
    loss_of: Callable[..., Terms],
    x: Tensor,
    labels: Tensor,
    attacked: Attacked,
    settings: Training,
) -> Tensor:
    """Leave the gradients of a batch's loss in the parameters, the same on each rank.

    loss_of: `distributed.parallel` of `training_loss`. x, labels: the whole batch; attacked: of
    this rank's slice. Returns the values of `Figures` of the whole batch, on the device.
    """
    own = distributed.own_slice(len(x))
    weight = distributed.own_weight(len(x))
    terms = loss_of(x[own], labels[own], attacked, settings)
    # Each term is a mean over the slice, and gradients are averaged over ranks.
    (terms.loss * (weight * distributed.world())).backward()
    return distributed.total(step_figures(terms, labels[own], settings) * weight)


def train_step(job: Run, batch: Split, epoch: int) -> Tensor:
    """Attack a batch, train on it -> the values of `Figures` and the norm of all gradients, on the device."""
    settings, labels = job.settings, batch.labels.to(job.device, non_blocking=True)
    x = as_input(augment(batch.images, settings.augmentation, job.generator))
    attacked = attack_batch(job.attack_copy, x, batch.labels, settings, job.generator, epoch)
    gradients = partial(backward, job.training_loss, x, labels, attacked, settings)
    perturbs = settings.awp and epoch > settings.awp_warmup
    with adversarial_weights(job.model, gradients, settings.awp) if perturbs else nullcontext():
        figures = gradients()
        norms = torch._foreach_norm([p.grad for p in job.model.parameters() if p.grad is not None])
        job.optimizer.step()
    job.optimizer.zero_grad()  # now, so that no gradients take memory beside the next attack
    if job.average is not None:
        job.average.update(job.model, settings.ema)
    return torch.cat([figures, torch.stack(norms).sum()[None]])


class Late(NamedTuple):
    """A step whose figures are still under way: how many images of the epoch it ended with, its own images."""

    done: int
    images: int
    sent: Sent


def take_up(job: Run) -> None:
    """Add the figures of the last step to those of the epoch. Errors: RunError where they are not finite.

    That is a step later than they were computed, so that the device never waits for the host to read them.
    """
    if job.late is None:
        return
    (done, images, sent), job.late = job.late, None
    *values, norm = sent.arrived()
    figures, settings, epoch = Figures(*values), job.settings, job.progress["epoch"]
    number = -(-done // job.own_images)
    for what, value in (("the loss", figures.loss), ("the norm of its gradients", norm)):
        if not math.isfinite(value):
            where = f"{what} is {value} in epoch {epoch}, batch {number}"
            raise RunError(f"{where}; {job.last_good}; lower --lr, or look at the data")
    sums = job.progress["sums"]
    for name in ("loss", "contrast", *runs.TERMS):
        sums[name] += getattr(figures, name) * images
    sums["robust"] += round(figures.robust * images)
    if figures.natural is not None:
        sums["natural"] += round(figures.natural * images)
        sums["natural_images"] += images
    if number % settings.log_interval == 0:
        total = len(job.progress["order"])
        job.log(f"epoch {epoch} [{done}/{total}] loss {figures.loss:.4f} contrast {figures.contrast:.4f}")


def postfix(job: Run) -> str:
    """What the progress bar says of the epoch so far, up to the step before the last."""
    sums, done = job.progress["sums"], job.progress["done"] - job.late.images
    if not done:
        return ""
    return f"loss={sums['loss'] / done:.3f}, nat={shown(natural_share(sums))}, rob={100 * sums['robust'] / done:.1f}%"


def natural_share(sums: dict[str, float]) -> float | None:
    """Training accuracy on natural images in percent; None where no batch needed a natural forward (plain pgd)."""
    return 100 * sums["natural"] / sums["natural_images"] if sums["natural_images"] else None


def shown(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f} %"


def evaluate(job: Run, model: nn.Module, split: Split) -> tuple[float, float]:
    """Natural and PGD-40-over-heads accuracy of a network, the run's own or its best, in percent.

    With --precision bf16 the attack ascends the network in bfloat16; the network in float32 judges what it finds.
    """
    settings = job.settings
    attack_by = partial(pgd40_heads, settings.epsilon, settings.step_size, settings.cr_beta, settings.seed)
    with ExitStack() as held:
        net = held.enter_context(frozen(model))
        attacked_net = held.enter_context(frozen(model, "bf16")) if settings.precision == "bf16" else net
        size, attack = settings.test_batch_size, attack_by()
        if size is None:
            size = largest_batch(attacked_net, split, attack_by(steps=1))
            attack = halving(attack)
        bar = held.enter_context(tqdm(desc="evaluation", unit="img", leave=False, disable=distributed.quiet()))

        def search(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
            return attack(attacked_net, x, labels, numbers)

        def progress(images: int) -> None:
            bar.update(images)
            job.check_stop()

        natural = verdicts(net, split, size, progress=progress)
        robust = verdicts(net, split, size, search, natural, progress)
    return percent(natural), percent(robust)


def finish_epoch(job: Run, selection: Split) -> None:
    """Evaluate, log and write everything of an epoch; last_state.pt last, so that it is never ahead of the others."""
    distributed.share_buffers(job.model)
    if job.average is not None:
        job.average.take_statistics(job.model)
        job.checkpoint(job.model)  # refuses absurd weights, before anything of this epoch is written
    settings, progress, checkpoint = job.settings, job.progress, job.checkpoint(job.evaluated)
    epoch, sums, total = progress["epoch"], progress["sums"], progress["done"]
    began, accuracies = time.perf_counter(), (None, None)
    if epoch % settings.eval_interval == 0 or epoch == settings.epochs:
        accuracies = evaluate(job, job.evaluated, selection)
    shares = natural_share(sums), 100 * sums["robust"] / total
    images = total * settings.batch_size / job.own_images  # with those of --extra-data
    took = images / sums["seconds"], sums["seconds"] + time.perf_counter() - began
    losses = rate(settings, epoch - 1 + share(job, total - 1)), sums["loss"] / total, sums["contrast"] / total
    terms = (sums[name] / total for name in runs.TERMS)
    row = dict(zip(runs.ROW, (epoch, *losses, *shares, *accuracies, *took, *terms), strict=True))
    best = best_row(progress["rows"])
    progress["rows"].append(row)
    job.log(epoch_line(job, row))
    progress.update(epoch=epoch + 1, order=None, done=0, sums={})
    if distributed.first():
        write_metrics(job)
        save(job.folder / LAST, checkpoint)
        if epoch % settings.save_freq == 0:
            save(job.folder / f"model-{epoch}.pt", checkpoint)
        if best_row(progress["rows"]) is not best:
            save(job.folder / BEST, checkpoint)
        job.save_state()


def epoch_line(job: Run, row: dict) -> str:
    """What the log says of an epoch."""
    epochs, peak, accuracies = job.settings.epochs, peak_memory(job.device), "not evaluated"
    left = (epochs - row["epoch"]) * row["seconds"] / 60
    if row["natural_accuracy"] is not None:
        accuracies = f"natural {row['natural_accuracy']:.2f} %, pgd40_heads {row['pgd40_heads_accuracy']:.2f} %"
        accuracies += at_chance(row["natural_accuracy"], job.selection_labels)
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f} (contrast {row['contrast']:.4f})  train, first head: "
        f"natural {shown(row['train_natural_accuracy_first_head'])}, robust "
        f"{row['train_robust_accuracy_first_head']:.2f} %  evaluation: {accuracies}  "
        f"{row['train_images_per_second']:.0f} images/s, {row['seconds']:.1f} s, peak memory "
        f"{'-' if peak is None else f'{peak / 1e9:.2f} GB'}, {left:.1f} min left"
    )


def write_metrics(job: Run) -> None:
    """metrics.csv, whole, from the rows so far, what TensorBoard shows of them, and now and then the curves."""
    rows, best = job.progress["rows"], best_row(job.progress["rows"])
    short = [{key: f"{value:.9g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]

    def write(file: Path) -> None:
        with open(file, "w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, [*runs.ROW, "selected"], lineterminator="\n")
            table.writeheader()
            table.writerows(line | {"selected": int(row is best)} for line, row in zip(short, rows, strict=True))

    write_atomically(job.folder / "metrics.csv", write)
    if job.settings.tensorboard:
        write_for_tensorboard(job.folder, rows[-1])
    if time.monotonic() - job.drawn_at >= DRAW_EVERY:
        draw_new_curves(job)


def draw_new_curves(job: Run) -> None:
    """Draw the curves, unless they show all epochs already."""
    rows = job.progress["rows"]
    if len(rows) == job.epochs_drawn:
        return
    draw = partial(draw_curves, rows, best_row(rows))
    job.note(save_or_note(draw, job.folder / "training_curves.png"))
    job.epochs_drawn = len(rows)
    job.drawn_at = time.monotonic()


def write_for_tensorboard(folder: Path, row: dict) -> None:
    """Add an epoch's row of metrics.csv to what TensorBoard shows of the run."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    with SummaryWriter(folder / "tensorboard") as writer:
        for name, value in row.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, row["epoch"])


def best_row(rows: list[dict]) -> dict | None:
    """The row of best_adv_model.pt: of the highest pgd40_heads_accuracy, then natural accuracy, then the first."""
    evaluated = [row for row in rows if row["pgd40_heads_accuracy"] is not None]
    return max(evaluated, key=lambda row: (row["pgd40_heads_accuracy"], row["natural_accuracy"]), default=None)


def report(job: Run, data: Data) -> None:
    """The last and the best epoch's figures, and where everything is."""
    rows, folder, settings = job.progress["rows"], job.folder, job.settings
    if not rows:
        job.log("nothing left to train")
        return
    if distributed.first():
        draw_new_curves(job)
    for name, row in (("last", rows[-1]), ("best", best_row(rows))):
        if row and row["natural_accuracy"] is not None:
            job.log(
                f"{name} epoch, {row['epoch']}: natural {row['natural_accuracy']:.2f} %, PGD-40 over heads "
                f"{row['pgd40_heads_accuracy']:.2f} % on {data.selected} at eps {eps_text(settings.epsilon)}"
                f"{at_chance(row['natural_accuracy'], job.selection_labels)}"
            )
    if data.test is None:
        job.log("no test folder: no figure is of images that did not choose the epoch")
    elif data.test is not data.selection:
        best, _ = distributed.from_first(lambda: load_model(folder / BEST))  # not into job.model, which a stop saves
        natural, robust = evaluate(job, best.to(job.device), data.test.to(job.device))
        said = f"natural {natural:.2f} %, PGD-40 over heads {robust:.2f} %{at_chance(natural, data.test.labels)}"
        job.log(f"best epoch on {data.tested}: {said}")
    usual = dataset_defaults(settings.dataset)
    command = [str(script_beside("test_white_attack.py")), "--ckpt_url", str(folder / BEST)]
    for key in ("epsilon", "step_size"):
        if getattr(settings, key) != getattr(usual, key):
            command += [f"--{key.replace('_', '-')}", as_given(getattr(settings, key))]
    job.log("\n".join([*job.notes, f"checkpoint {folder / BEST}", f"curves     {folder / 'training_curves.png'}"]))
    job.log(f"evaluate by: python {shlex.join(command)}")


def script_beside(name: str) -> Path:
    """The path by which a script of this repository is started from the current folder."""
    script = Path(__file__).resolve().parents[2] / name
    return script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
