"""Training: one step as the method's equations, the loop around it, and everything a run writes."""

import argparse
import csv
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import Heads, build_model
from utils import distributed
from utils.attacks import Bfloat16, ToAttack, frozen, gaussian_start, linf_pgd_together, summed_cross_entropy
from utils.checkpoints import (
    BEST,
    LAST,
    STATE,
    flaw,
    load_model,
    load_state,
    read,
    save,
    write_atomically,
)
from utils.data import Split, as_input, augment, batches, load_split, require_same_on_ranks, shuffled
from utils.evaluation import open_log, percent, pgd40_heads, pick_device, subset, verdicts
from utils.figures import draw_curves
from utils.losses import asymmetric_negative_contrast, kl_divergence, mart_loss, over_heads, pgd_loss, trades_loss
from utils.negatives import choose_negatives
from utils.options import RunError, Stopped, UsageError
from utils.precision import bfloat16_gain, compile_for_training, peak_memory, precision, tf32
from utils.provenance import in_one_line, provenance
from utils.runs import (
    COLUMNS,
    SUMS,
    prepare,
    refuse_existing,
    resume_command,
    settings,
    take_folder,
    usable_memory,
    usable_progress,
)


def attack_batch(
    model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace, generator: torch.Generator, epoch: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Adversarial examples of a batch, its negatives and their labels (both None without ANC or other classes).

    Of this rank's slice of the batch: random draws are those of the whole batch, on every rank the same.
    """
    strategy, _, adversarial_negatives = options.strategy.partition("_")
    if epoch <= options.warmup_epochs:
        strategy = "random"
    contrast = not options.no_anc
    own = distributed.own_slice(len(x))
    with frozen(model, options.amp, options.compile) as net:
        natural = None
        if options.inner == "kl" or (contrast and strategy != "random"):
            with torch.no_grad():
                natural = net(x[own], heads=True)
        chosen = None
        if contrast:
            chosen = choose_negatives(
                None if strategy == "random" else distributed.joined(natural.final, len(x)),
                labels,
                strategy,
                generator,
                options.sample_class_number,
                options.sample_number,
            )
        over = partial(over_heads, auxiliary_weight=options.cr_beta)
        if options.inner == "kl":
            untargeted = partial(over, kl_divergence, natural)
        else:
            untargeted = partial(over, summed_cross_entropy(labels[own]))
        attacks = [ToAttack(x[own], gaussian_start(x, generator)[own], untargeted)]
        if chosen is not None:
            count, chosen = chosen.shape[1], chosen.flatten()
            pairs = slice(own.start * count, own.stop * count)  # all those of this rank's anchors
            of_all = x[chosen]
            negatives, negative_labels = of_all[pairs], labels[chosen[pairs]]
            if adversarial_negatives:  # pushed to look like the anchor's class
                towards = summed_cross_entropy(labels.repeat_interleave(count)[pairs])
                start = gaussian_start(of_all, generator)[pairs]
                attacks.append(ToAttack(negatives, start, lambda heads: -over(towards, heads)))
        adversarial, *others = linf_pgd_together(net, attacks, options.epsilon, options.step_size, options.num_steps)
    if chosen is None:
        return adversarial, None, None
    return adversarial, others[0] if others else negatives, negative_labels


def training_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    attacked: tuple[Tensor, Tensor | None, Tensor | None],
    options: argparse.Namespace,
) -> tuple[Tensor, Tensor, Heads | None, Heads | None]:
    """Loss of a batch by separate training forwards, in the order natural, adversarial, negative.

    attacked: what `attack_batch` returns. Returns the loss, its contrast part before zeta (0 without negatives), the
    heads of the natural batch (None where the method does not need it) and those of the adversarial one. A batch may be
    empty, the slice of a rank where there are more ranks than images: 0, 0, None, None then, and gradients of 0.
    """
    model = Bfloat16(model) if options.amp == "bf16" else model
    x_adversarial, x_negative, negative_labels = attacked
    needs_natural = options.method != "pgd" or x_negative is not None
    if not len(labels):
        unused = [p.sum() for p in model.parameters()]  # no forward: statistics of BatchNorm stay as they are
        if options.sync_bn:  # it communicates in forward and backward, as often as the other ranks do
            forwards = [(x, labels)] * needs_natural + [(x_adversarial, labels)]
            forwards += [] if x_negative is None else [(x_negative, negative_labels)]
            heads = [model(*batch, heads=True) for batch in forwards]
            unused += [logits.sum() for h in heads for logits in (h.final, *h.auxiliary)]
        zero = 0 * sum(unused)
        return zero, zero, None, None
    natural = model(x, labels, heads=True) if needs_natural else None
    adversarial = model(x_adversarial, labels, heads=True)
    over = partial(over_heads, auxiliary_weight=options.cr_beta)
    if options.method == "pgd":
        loss = over(lambda adv: pgd_loss(adv, labels), adversarial)
    else:
        objective = {"trades": trades_loss, "mart": mart_loss}[options.method]
        loss = over(lambda nat, adv: objective(nat, adv, labels, options.beta), natural, adversarial)
    contrast = loss.new_zeros(())
    if x_negative is not None:
        negative = model(x_negative, negative_labels, heads=True)
        contrast = over(lambda nat, neg: asymmetric_negative_contrast(nat, neg, options.alpha), natural, negative)
        loss = loss + options.zeta * contrast
    return loss, contrast, natural, adversarial


def first_head_right(heads: Heads | None, labels: Tensor) -> Tensor:
    """How many predictions of the first head are right, a scalar; 0 without heads.

    The first head is `auxiliary[0]`, the only one a training forward computes without the labels, or a plain network's
    `final`.
    """
    if heads is None:
        return labels.new_zeros(())
    logits = heads.auxiliary[0] if heads.auxiliary else heads.final
    return (logits.argmax(1) == labels).sum()


def backward(
    loss_of: Callable[..., tuple],
    x: Tensor,
    labels: Tensor,
    attacked: tuple[Tensor, Tensor | None, Tensor | None],
    options: argparse.Namespace,
) -> tuple[Tensor, bool]:
    """Gradients of a batch's loss, computed by each rank on its slice and the same on all of them.

    loss_of: `distributed.parallel` of `training_loss`. x, labels: the whole batch; attacked: of this rank's slice.
    Returns (4,) of the whole batch: loss, contrast, right natural and right adversarial predictions of the first head;
    and whether the method needed a natural forward.
    """
    own = distributed.own_slice(len(x))
    loss, contrast, natural, adversarial = loss_of(x[own], labels[own], attacked, options)
    share = len(labels[own]) / len(x)  # every term is a mean over images, or over as many pairs for each
    (loss * (share * distributed.world())).backward()  # gradients are averaged over ranks
    right = [first_head_right(heads, labels[own]) for heads in (natural, adversarial)]
    figures = torch.stack([loss.detach() * share, contrast.detach() * share, *right])
    return distributed.total(figures), natural is not None


def natural_share(sums: dict[str, float]) -> float | None:
    """Training accuracy on natural images in percent; None where no batch needed a natural forward (plain pgd)."""
    return 100 * sums["natural"] / sums["natural_images"] if sums["natural_images"] else None


def shown(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f} %"


def learning_rate(options: argparse.Namespace, epoch: int) -> float:
    """lr, divided by 10 at the start of each milestone epoch."""
    return options.lr * 0.1 ** sum(epoch >= milestone for milestone in options.milestones)


class StopRequest:
    """A context that notes which signal asked the run to stop; the first waits for the next step, a second does not."""

    signum: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        if distributed.world() > 1:
            return  # torchrun may say it again, and ends the process itself after 30 seconds
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


class Run:
    """A training run: its settings, network, optimiser, random state, and how far it is.

    `progress` is all that a resumed run needs besides the tensors: the epoch under way, its order of images, how many
    of them are done, sums over those, and the rows of metrics.csv so far.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, data: Split) -> None:
        self.options, self.device, self.classes = options, device, data.classes
        self.folder = Path(options.folder)
        self.training_images = len(data.labels)
        self.provenance = distributed.from_first(lambda: provenance(device, options.seed))
        torch.manual_seed(options.seed)
        try:
            model = build_model(
                options.arch,
                len(data.classes),
                reverse_attention=not options.no_ra,
                width=options.width,
                image_size=options.image_size,
            )
        except ValueError as error:  # an image size that this network does not take
            raise UsageError(str(error)) from error
        if options.sync_bn and distributed.world() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device)
        if options.compile:
            compile_for_training(self.model, device)
        self.loss = distributed.parallel(self.model, training_loss)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.generator = torch.Generator(device).manual_seed(options.seed)
        self.progress = {"epoch": options.restart_epoch + 1, "order": None, "done": 0, "sums": {}, "rows": []}

    def checkpoint(self) -> dict:
        """The network and what it is, as `load_model` reads it; RunError where its weights are absurd."""
        options = self.options
        for key, value in self.model.state_dict().items():
            wrong = flaw(key, value)
            if wrong:
                raise RunError(f"{key} {wrong} in epoch {self.progress['epoch']}; {last_good(self)}; lower --lr")
        return {
            "model": self.model.state_dict(),
            "arch": options.arch,
            "classes": list(self.classes),
            "num_classes": len(self.classes),
            "reverse_attention": not options.no_ra,
            "width": options.width,
            "image_size": options.image_size,
            "dataset": options.dataset,
            "recipe": settings(options),
            "epoch": self.progress["epoch"],
            "provenance": self.provenance,
        }

    def begin(self, held: ExitStack) -> None:
        """Hold the folder and save the state that a run starts with."""
        take_folder(self.folder, held)
        refuse_existing(self.folder)  # another process may have been faster
        try:
            self.save_state()
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}); name another --model-dir") from error

    def save_state(self) -> None:
        if not distributed.first():
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": self.progress,
            "training_images": self.training_images,
            "epoch": self.progress["epoch"] - 1,  # the last one completed
            "ranks": distributed.world(),
            "launch": distributed.launch(),
        }
        save(self.folder / STATE, self.checkpoint() | state)

    def restore(self, state: dict, path: Path) -> None:
        """Continue from what `save_state` wrote; generator states carry over on the same kind of device only."""
        load_state(self.model, state["model"], path)
        parameters, memory = list(self.model.parameters()), state["optimizer"].get("state")
        wrong = [] if usable_memory(memory, parameters) else ["optimizer"]
        wrong += [] if usable_progress(state["progress"], self.training_images) else ["progress"]
        if wrong:
            raise UsageError(f"{path} cannot be resumed, it has no usable {', '.join(wrong)}; name a run's {STATE}")
        self.optimizer.load_state_dict({"state": memory, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.progress = state["progress"]
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError):
            if distributed.first():
                print("the run was saved on another kind of device: its random draws do not carry over")


def load_training_data(options: argparse.Namespace) -> tuple[Split, Split, Split]:
    """(train, the evaluation set that selects epochs, test), on the CPU; the latter two are one without --val-size."""
    train = load_split(options.dataset, "train", options.data_dir, options.image_size)
    test = subset(load_split(options.dataset, "test", options.data_dir, options.image_size), options.limit_test)
    selection = test
    order = shuffled(len(train.labels), 0)
    if options.val_size:
        if options.val_size > len(order) - 2:
            raise UsageError(f"--val-size {options.val_size} leaves too few of {len(order)} training images")
        selection, order = train.take(order[: options.val_size]), order[options.val_size :]
    if options.limit_train is not None:
        order = order[: options.limit_train]
    if options.val_size or options.limit_train is not None:
        train = train.take(order)
    return train, selection, test


def describe(run: Run, train: Split, selection: Split) -> str:
    """What will run, as one block."""
    o = run.options
    parameters = sum(p.numel() for p in run.model.parameters())
    parts = [] if o.no_ra else ["reverse attention"]
    parts += [] if o.no_anc else [f"asymmetric negative contrast ({o.strategy}, alpha {o.alpha}, zeta {o.zeta})"]
    ranks = f", {distributed.world()} ranks" if distributed.world() > 1 else ""
    selected = f"{o.val_size} held-out training images" if o.val_size else "the test set"
    return "\n".join(
        (
            f"method     {o.method}, {' and '.join(parts) or 'plain'}; beta {o.beta}, inner {o.inner}",
            f"network    {o.arch}, width {o.width or 'as published'}, {parameters:,} parameters",
            f"data       {o.dataset}, {len(run.classes)} classes, {len(train.labels)} training images, side "
            f"{o.image_size}, augmentation {o.augmentation}",
            f"selection  by pgd40_heads on {selected} ({len(selection.labels)} images)",
            f"attack     L-infinity eps {o.epsilon:.5g}, {o.num_steps} steps of {o.step_size:.5g}",
            f"optimiser  SGD lr {o.lr}, x0.1 at {o.milestones}, momentum {o.momentum}, weight decay {o.weight_decay}; "
            f"{o.epochs} epochs, batch {o.batch_size}, seed {o.seed}",
            f"device     {run.device}, {precision(o, run.device)}{', compiled' if o.compile else ''}{ranks}",
            f"output     {run.folder}/",
        )
    )


def write_run_json(run: Run, train: Split, selection: Split, resumed: bool) -> None:
    """run.json: what runs, where and by which command; a resumed run keeps its earlier records under `earlier`."""
    record = run.provenance | {
        "settings": settings(run.options),
        "precision": precision(run.options, run.device),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "classes": list(run.classes),
        "training_images": len(train.labels),
        "evaluation_images": len(selection.labels),
        "ranks": distributed.world(),
    }
    if resumed:
        try:
            before = json.loads((run.folder / "run.json").read_text())
            record["earlier"] = [*before.pop("earlier", []), before]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            record["earlier"] = []  # lost; the run itself is in last_state.pt
    write_atomically(run.folder / "run.json", lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))


def write_metrics(run: Run) -> None:
    """metrics.csv and the curves, whole, from the rows so far."""

    def write(file: Path) -> None:
        with open(file, "w", newline="") as out:
            table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(run.progress["rows"])

    write_atomically(run.folder / "metrics.csv", write)
    write_atomically(run.folder / "training_curves.png", lambda file: draw_curves(run.progress["rows"], file))


def train_epoch(run: Run, train: Split, log: Callable[[str], None], check_stop: Callable[[], None]) -> None:
    """The rest of the epoch under way, all of it where it has just begun."""
    options, progress = run.options, run.progress
    if progress["order"] is None:
        order = torch.randperm(len(train.labels), generator=run.generator, device=run.device)
        sums = dict.fromkeys(SUMS, 0.0)
        progress.update(order=order.cpu(), done=0, sums=sums)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(options, progress["epoch"])
    order, sums, total = progress["order"], progress["sums"], len(progress["order"])
    run.model.train()
    bar = tqdm(
        total=total,
        initial=progress["done"],
        unit="img",
        leave=False,
        disable=distributed.quiet(),
        desc=f"epoch {progress['epoch']}/{options.epochs}",
    )
    with bar:
        for indices in batches(order[progress["done"] :], options.batch_size):
            began = time.perf_counter()
            batch = train.take(indices.to(run.device))
            x, labels = as_input(augment(batch.images, options.augmentation, run.generator)), batch.labels
            attacked = attack_batch(run.model, x, labels, options, run.generator, progress["epoch"])
            figures, has_natural = backward(run.loss, x, labels, attacked, options)
            figures = figures.tolist()  # one host sync for all four
            number = progress["done"] // options.batch_size + 1
            if not math.isfinite(figures[0]):
                raise RunError(
                    f"the loss is {figures[0]} in epoch {progress['epoch']}, batch {number}; {last_good(run)}; "
                    "lower --lr, or look at the data"
                )
            run.optimizer.step()
            run.optimizer.zero_grad()  # now, so that no gradients take memory beside the next attack
            count = len(indices)
            progress["done"] += count
            for key, value in (
                ("loss", figures[0] * count),
                ("contrast", figures[1] * count),
                ("natural", figures[2]),
                ("natural_images", count * has_natural),
                ("robust", figures[3]),
                ("seconds", time.perf_counter() - began),
            ):
                sums[key] += value
            done = progress["done"]
            bar.update(count)
            bar.set_postfix(
                loss=f"{sums['loss'] / done:.3f}",
                nat=shown(natural_share(sums)),
                rob=f"{100 * sums['robust'] / done:.1f}%",
            )
            if number % options.log_interval == 0:
                log(f"epoch {progress['epoch']} [{done}/{total}] loss {figures[0]:.4f} contrast {figures[1]:.4f}")
            check_stop()


def last_good(run: Run) -> str:
    state = run.folder / STATE
    return f"the last good checkpoint is {state}" if state.exists() else "there is no checkpoint yet"


def evaluate(
    model: nn.Module, split: Split, options: argparse.Namespace, check_stop: Callable[[], None]
) -> tuple[float, float]:
    """Natural and PGD-40-over-heads accuracy of a network, in percent."""
    attack = pgd40_heads(options.epsilon, options.step_size, options.cr_beta, options.seed)
    with (
        frozen(model) as net,
        tqdm(total=None, desc="evaluation", unit="img", leave=False, disable=distributed.quiet()) as bar,
    ):

        def progress(images: int) -> None:
            bar.update(images)
            check_stop()

        natural = verdicts(net, split, options.test_batch_size, progress=progress)
        robust = verdicts(net, split, options.test_batch_size, attack, natural, progress)
    return percent(natural), percent(robust)


def finish_epoch(run: Run, selection: Split, log: Callable[[str], None], check_stop: Callable[[], None]) -> None:
    """Evaluate, log and write everything of an epoch; last_state.pt last, so that it is never ahead of the others."""
    distributed.share_buffers(run.model)
    options, progress, checkpoint = run.options, run.progress, run.checkpoint()
    epoch, sums, total = progress["epoch"], progress["sums"], progress["done"]
    row = {
        "epoch": epoch,
        "lr": learning_rate(options, epoch),
        "loss": sums["loss"] / total,
        "contrast": sums["contrast"] / total,
        "train_natural_accuracy_first_head": natural_share(sums),
        "train_robust_accuracy_first_head": 100 * sums["robust"] / total,
        "natural_accuracy": None,
        "pgd40_heads_accuracy": None,
        "train_images_per_second": total / sums["seconds"],
    }
    began = time.perf_counter()
    evaluated = epoch % options.eval_interval == 0 or epoch == options.epochs
    if evaluated:
        row["natural_accuracy"], row["pgd40_heads_accuracy"] = evaluate(run.model, selection, options, check_stop)
    row["seconds"] = sums["seconds"] + time.perf_counter() - began
    best = best_row(progress["rows"])
    progress["rows"].append(row)
    peak, accuracies = peak_memory(run.device), "not evaluated"
    memory = "-" if peak is None else f"{peak / 1e9:.2f} GB"
    if evaluated:
        accuracies = f"natural {row['natural_accuracy']:.2f} %, pgd40_heads {row['pgd40_heads_accuracy']:.2f} %"
    log(
        f"epoch {epoch}/{options.epochs}  loss {row['loss']:.4f} (contrast {row['contrast']:.4f})  train, first head: "
        f"natural {shown(row['train_natural_accuracy_first_head'])}, robust "
        f"{row['train_robust_accuracy_first_head']:.2f} %  evaluation: {accuracies}  "
        f"{row['train_images_per_second']:.0f} images/s, {row['seconds']:.1f} s, "
        f"peak memory {memory}, {(options.epochs - epoch) * row['seconds'] / 60:.1f} min left"
    )
    if distributed.first():
        write_metrics(run)
        save(run.folder / LAST, checkpoint)
        if epoch % options.save_freq == 0:
            save(run.folder / f"model-{epoch}.pt", checkpoint)
        if evaluated and (best is None or row["pgd40_heads_accuracy"] > best["pgd40_heads_accuracy"]):
            save(run.folder / BEST, checkpoint)
    progress.update(epoch=epoch + 1, order=None, done=0, sums={})
    run.save_state()


def best_row(rows: list[dict]) -> dict | None:
    """The first row with the highest pgd40_heads_accuracy, the epoch of best_adv_model.pt."""
    evaluated = [row for row in rows if row["pgd40_heads_accuracy"] is not None]
    return max(evaluated, key=lambda row: row["pgd40_heads_accuracy"], default=None)


def run(options: argparse.Namespace) -> None:
    """Train as the options say. Errors: UsageError, RunError, Stopped; whatever was saved stays loadable."""
    with ExitStack() as held:
        train_in_folder(options, held)


def train_in_folder(options: argparse.Namespace, held: ExitStack) -> None:
    """What `run` does. held: gets the run folder's lock."""
    state, path, decided = distributed.from_first(lambda: prepare(options, held))
    vars(options).update(decided)
    device = pick_device(options.device, options.no_cuda)
    if options.sync_bn and device.type != "cuda":
        mend = "leave it out" if state is None else "this run was started with it, continue it where there are some"
        raise UsageError(f"--sync-bn needs CUDA devices, and this run is on {device}; {mend}")
    with distributed.first_of_the_node_first():
        train, selection, test = load_training_data(options)
    require_same_on_ranks(f"{options.dataset} in {options.data_dir}", train, selection, test)
    weights = None
    if state is None and options.restart_epoch:
        weights = distributed.from_first(lambda: read(Path(options.ckpt_url)))
    job = Run(options, device, train)
    if state is not None:
        if state["classes"] != list(train.classes) or state["training_images"] != len(train.labels):
            raise UsageError(
                f"{path} was trained on {state['training_images']} images of {len(state['classes'])} classes, and "
                f"{options.dataset} in {options.data_dir} differs; name the run's own --data-dir"
            )
        job.restore(state, path)
    else:
        if weights is not None:
            load_state(job.model, weights.get("model", weights), Path(options.ckpt_url))
        distributed.from_first(lambda: job.begin(held))
    for flag, idle in (
        ("--tf32", options.tf32 and device.type != "cuda"),
        ("--sync-bn", options.sync_bn and distributed.world() == 1),
    ):
        if idle and distributed.first():
            print(f"{Path(sys.argv[0]).name}: {flag} accepted, no effect here", file=sys.stderr)
    if options.amp == "bf16" and distributed.first() and (gain := bfloat16_gain(device)) < 0.9:
        told = f"matrix products in bfloat16 run at {gain:.2f} times the rate of float32 here, so this is likely slower"
        print(f"{Path(sys.argv[0]).name}: --amp bf16: {told}", file=sys.stderr)
    log = open_log(job.folder / "train.log")
    log(in_one_line(job.provenance))
    log(describe(job, train, selection))
    if distributed.first():
        write_run_json(job, train, selection, resumed=state is not None)
    if state is not None:
        log(f"resumed    in epoch {job.progress['epoch']}, {job.progress['done']} images done")
        ranks = (state.get("ranks", 1), distributed.world())
        if ranks[0] != ranks[1]:
            log(
                f"ranks      {ranks[0]} before, {ranks[1]} now: weights, optimiser, random draws and position carry "
                "over; BatchNorm sees other slices"
            )
    del state, weights  # each a copy of the network
    train, selection = train.to(device), selection.to(device)

    def check_stop() -> None:
        signum = distributed.agreed(stop.signum or 0)
        if signum:
            word = "interrupted" if signum == signal.SIGINT else "terminated"
            line = f"{word}; continue by: {resume_command(job.folder)}"
            distributed.from_first(lambda: save_stop(line))  # the others end after it only
            raise Stopped(signum, line)

    def save_stop(line: str) -> None:
        job.save_state()
        with suppress(OSError), open(job.folder / "train.log", "a") as out:  # the state is saved, that counts
            out.write(line + "\n")

    with StopRequest() as stop:
        while job.progress["epoch"] <= job.options.epochs:
            with tf32(job.options.tf32):
                train_epoch(job, train, log, check_stop)
            finish_epoch(job, selection, log, check_stop)
        report(job, test, log, check_stop)


def report(job: Run, test: Split, log: Callable[[str], None], check_stop: Callable[[], None]) -> None:
    """The last and the best epoch's figures, and where everything is."""
    rows, folder = job.progress["rows"], job.folder
    if not rows:
        log("nothing left to train")
        return
    where = f"{job.options.val_size} held-out training images" if job.options.val_size else "the test set"
    for name, row in (("last", rows[-1]), ("best", best_row(rows))):
        if row and row["natural_accuracy"] is not None:
            log(
                f"{name} epoch, {row['epoch']}: natural {row['natural_accuracy']:.2f} %, PGD-40 over heads "
                f"{row['pgd40_heads_accuracy']:.2f} % on {where} at eps {job.options.epsilon:.4g}"
            )
    if job.options.val_size:
        best, _ = distributed.from_first(lambda: load_model(folder / BEST))  # not into job.model, which a stop saves
        natural, robust = evaluate(best.to(job.device), test.to(job.device), job.options, check_stop)
        log(f"best epoch on the test set: natural {natural:.2f} %, PGD-40 over heads {robust:.2f} %")
    log(
        f"checkpoint {folder / BEST}\ncurves     {folder / 'training_curves.png'}\nevaluate by: "
        f"python test_white_attack.py --ckpt_url {shlex.quote(str(folder / BEST))}"
    )
