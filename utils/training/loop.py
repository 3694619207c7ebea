"""A training run: data and network, then epochs of training, evaluation and saving.

The way to the loss: run -> train_epoch -> train_step -> attack_batch and backward, which call
utils/step.py, where the terms of the loss are.
"""

import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from utils.attacks import pgd40_heads
from utils.data.datasets import Split, as_input, augment, batches, with_extra
from utils.data.subject import halving, largest_batch, percent, verdicts
from utils.step import Attacked, Draws, StepStats, attack, draw, negative_strategy
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, SearchedInBfloat16
from utils.system.checkpoints import BEST, LAST, checkpoint_file, load_model, save
from utils.system.devices import Sent, computing, pick_device
from utils.system.errors import UsageError, stop_signals
from utils.system.log import progress_bar
from utils.system.options import Command
from utils.system.settings import Training
from utils.training import records
from utils.training.companions import adversarial_weights, learning_rate
from utils.training.job import Job, Progress
from utils.training.runs import Start, prepare, take_new_folder
from utils.training.seeds import train_seeds
from utils.training.splits import load_training_data


def run(command: Command) -> None:
    """Train as a command says, a run for each of its seeds.

    Errors: UsageError, RunError, Stopped; whatever was saved stays loadable.
    """
    if len(command.seeds) > 1:
        train_seeds(command)
        return
    with ExitStack() as lock:
        start = distributed.from_first(lambda: prepare(command, lock))
        job = set_up(start, lock)
        if distributed.first():
            records.announce(job, start)
        del start  # holds a copy of the network
        with stop_signals(job.note_stop), computing(job.settings.precision):
            while job.progress.epoch <= job.settings.epochs:
                train_epoch(job)
                finish_epoch(job)
            finish_run(job)


def set_up(start: Start, lock: ExitStack) -> Job:
    """Load the data and build the network of a run, at its start or where it was stopped.

    lock: holds the lock of a new run's folder.
    """
    settings = start.settings
    state = start.state
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the package tensorboard; install it, or leave it out")
    device = pick_device(settings.device, settings.no_cuda, settings.precision)
    if settings.sync_bn and device.type != "cuda":
        raise UsageError(f"--sync-bn needs CUDA devices, and this run is on {device}")

    data = load_training_data(settings)
    weights = None
    if settings.restart_epoch and state is None:
        weights = distributed.from_first(
            lambda: checkpoint_file(settings.ckpt_url, settings.restart_epoch)
        )
    job = Job(settings, start.folder, device, data.to(device), weights)
    if state is not None:
        job.restore(state)
        return job
    distributed.from_first(lambda: take_new_folder(settings, job.folder, lock))
    distributed.from_first(job.save_state)
    if weights is not None:
        job.log(f"restart    after epoch {settings.restart_epoch} from the weights in {weights}")
    return job


def train_epoch(job: Job) -> None:
    """Train on what is left of the epoch under way, which is all of a new one."""
    settings = job.settings
    data = job.data
    progress = job.progress
    if progress.order is None:
        count = len(data.train.labels)
        order = torch.randperm(count, generator=job.generator, device=job.device)
        progress.order = order.cpu()
    job.model.train()

    bar = progress_bar(
        batches(progress.order[progress.done :], job.own_images),
        desc=f"epoch {progress.epoch}/{settings.epochs}",
        unit="batch",
    )
    with bar:
        started = time.perf_counter() - progress.seconds
        for indices in bar:
            set_learning_rate(job)
            batch = data.train.take(indices)
            seeds = (settings.seed, progress.epoch, progress.done)
            if data.extra is not None:
                batch = with_extra(batch, data.extra, settings.extra_images, seeds)
            torch.manual_seed(hash(seeds))  # for dropout in a network of the user's own
            stats = train_step(job, batch)

            # The numbers of the step before have arrived by now.
            job.read_stats()
            progress.done += len(indices)
            job.pending = len(indices), Sent(stats)
            progress.seconds = time.perf_counter() - started
            job.check_stop()
    job.read_stats()


def set_learning_rate(job: Job) -> None:
    """Set the learning rate of the next step."""
    progress = job.progress
    steps = math.ceil(len(progress.order) / job.own_images)
    done = progress.epoch - 1 + progress.done // job.own_images / steps
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(job.settings, done)


def attack_batch(
    attack_copy: AttackCopy,
    x: Tensor,
    labels: Tensor,
    settings: Training,
    generator: torch.Generator,
    epoch: int,
) -> Attacked:
    """Attack this rank's slice of a batch x (N, 3, H, W), labels (N,) on the CPU.

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
    loss_of: Callable[..., StepStats],
    x: Tensor,
    labels: Tensor,
    attacked: Attacked,
    settings: Training,
) -> Tensor:
    """Leave the gradients of a batch's loss in the parameters, the same on each rank.

    loss_of: `training_loss` of a network whose gradients are summed over ranks. x, labels: the
    whole batch; attacked: of this rank's slice. Returns the values of `StepStats` of the whole
    batch, on the device.
    """
    own = distributed.own_slice(len(x))
    weight = distributed.own_weight(len(x))
    stats = loss_of(x[own], labels[own], attacked, settings)
    # The loss is a mean over the slice. Its share of the batch makes it a part of the mean over the
    # batch, and gradients are summed over ranks.
    (stats.loss * weight).backward()
    return distributed.total(torch.stack(stats).detach() * weight)


def train_step(job: Job, batch: Split) -> Tensor:
    """Attack a batch, and train on it.

    Returns the values of `StepStats` and the norm of all gradients, on the device.
    """
    settings = job.settings
    epoch = job.progress.epoch
    labels = batch.labels.to(job.device, non_blocking=True)
    x = as_input(augment(batch.images, settings.augmentation, job.generator))
    attacked = attack_batch(job.attack_copy, x, batch.labels, settings, job.generator, epoch)

    gradients = partial(backward, job.training_loss, x, labels, attacked, settings)
    perturbation = nullcontext()
    if settings.awp and epoch > settings.awp_warmup:
        perturbation = adversarial_weights(job.model, gradients, settings.awp)
    with perturbation:
        stats = gradients()
        norm = get_total_norm([p.grad for p in job.model.parameters() if p.grad is not None])
        job.optimizer.step()
    job.optimizer.zero_grad()  # frees the gradients' memory for the next attack
    if job.average is not None:
        job.average.update(job.model, settings.ema)
    return torch.cat([stats, norm[None]])


def evaluate(job: Job, model: nn.Module, split: Split) -> records.Row:
    """Return the natural and the PGD-40-over-heads accuracy of a network, in percent, by column.

    With --precision bf16 the attack searches in bfloat16, and the network in float32 judges.
    """
    settings = job.settings
    net = AttackCopy(model).net
    if settings.precision == "bf16":
        net = SearchedInBfloat16(net, AttackCopy(model, "bf16").net)
    batch_size = settings.test_batch_size or largest_batch(split.labels.device)
    attack = halving(
        pgd40_heads(
            settings.epsilon,
            settings.step_size,
            settings.cr_beta,
            settings.seed,
            norm=settings.norm,
        )
    )

    with progress_bar(desc="evaluation", unit="img") as bar:

        def progress(images):
            bar.update(images)
            job.check_stop()

        natural = verdicts(net, split, batch_size, progress=progress)
        robust = verdicts(net, split, batch_size, attack, natural, progress)
    return {"natural_accuracy": percent(natural), "pgd40_heads_accuracy": percent(robust)}


def finish_epoch(job: Job) -> None:
    """Evaluate, log and save an epoch.

    last_state.pt is written last, so that it is never ahead of the other files.
    """
    settings = job.settings
    epoch = job.progress.epoch
    distributed.share_buffers(job.model)
    checkpoint = job.checkpoint(job.evaluated)

    started = time.perf_counter()
    accuracies = records.NOT_EVALUATED
    if epoch % settings.eval_interval == 0 or epoch == settings.epochs:
        accuracies = evaluate(job, job.evaluated, job.data.selection)
    row = records.epoch_row(job, accuracies, time.perf_counter() - started)
    rows = [*job.progress.rows, row]
    job.progress = Progress(epoch + 1, rows=rows)
    records.log_epoch(job)

    if distributed.first():
        save(job.folder / LAST, checkpoint)
        if epoch % settings.save_freq == 0:
            save(job.folder / f"model-{epoch}.pt", checkpoint)
            records.draw_training_curves(job)
        if records.best_row(rows) is row:
            save(job.folder / BEST, checkpoint)
        job.save_state()


def finish_run(job: Job) -> None:
    """Draw the curves, evaluate the best epoch on images that did not choose it, and log it all."""
    data = job.data
    best_row = records.best_row(job.progress.rows)
    if best_row is None:
        return
    if note := records.draw_training_curves(job):
        job.log(note)
    on_test = None
    if data.tested != data.selected:
        # A network of its own: a stop saves job.model, which is that of the last epoch.
        best, _ = distributed.from_first(
            lambda: load_model(job.folder / BEST, arch=job.settings.arch)
        )
        on_test = evaluate(job, best.to(job.device), data.test.to(job.device))
    records.log_results(job, best_row, on_test)
