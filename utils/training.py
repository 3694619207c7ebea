"""Training: one step as the method's equations, the loop around it, and everything a run writes."""

import argparse
import csv
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import Heads, build_model
from utils import distributed
from utils.attacks import Bfloat16, cross_entropy_over_heads, frozen, gaussian_start, kl_over_heads, linf_pgd
from utils.checkpoints import (
    BEST,
    LAST,
    STATE,
    check_state,
    described,
    flaw,
    load_model,
    load_state,
    locked,
    ordinary,
    outline,
    read,
    remove_leftovers,
    save,
    write_atomically,
)
from utils.data import Split, as_input, augment, batches, load_split, shuffled
from utils.evaluation import open_log, percent, pgd40_heads, pick_device, subset, verdicts
from utils.figures import draw_curves
from utils.losses import asymmetric_negative_contrast, mart_loss, over_heads, pgd_loss, trades_loss
from utils.negatives import choose_negatives
from utils.options import FREE_ON_RESUME, TRAINING, RunError, Stopped, UsageError, impossible_setting
from utils.provenance import in_one_line, provenance

COLUMNS = (
    "epoch",
    "lr",
    "loss",
    "contrast",
    "train_natural_accuracy_first_head",
    "train_robust_accuracy_first_head",
    "natural_accuracy",
    "pgd40_heads_accuracy",
    "train_images_per_second",
    "seconds",
)
SUMS = ("loss", "contrast", "natural", "natural_images", "robust", "seconds")


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
    attack = (options.epsilon, options.step_size, options.num_steps)
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
        if options.inner == "kl":
            objective = kl_over_heads(net, natural, options.cr_beta)
        else:
            objective = cross_entropy_over_heads(net, labels[own], options.cr_beta)
        adversarial = linf_pgd(x[own], objective, *attack, gaussian_start(x, generator)[own])
        if chosen is None:
            return adversarial, None, None
        pairs = slice(own.start * chosen.shape[1], own.stop * chosen.shape[1])  # all those of this rank's anchors
        negatives, negative_labels = x[chosen.flatten()], labels[chosen.flatten()]
        if adversarial_negatives:  # pushed to look like the anchor's class
            anchors = labels.repeat_interleave(chosen.shape[1])[pairs]
            away = cross_entropy_over_heads(net, anchors, options.cr_beta)
            start = gaussian_start(negatives, generator)[pairs]
            negatives = linf_pgd(negatives[pairs], lambda x: -away(x), *attack, start)
        else:
            negatives = negatives[pairs]
    return adversarial, negatives, negative_labels[pairs]


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

    def over(criterion: Callable[..., Tensor], *heads: Heads) -> Tensor:
        return over_heads(criterion, *heads, auxiliary_weight=options.cr_beta)

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
        self.provenance = provenance(device, options.seed)
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
        hold(self.folder, held)
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


def precision(run: Run) -> str:
    """What training computes in; evaluation is float32 whatever it says."""
    if run.options.amp == "bf16":
        return "bfloat16 autocast over float32 weights"
    return "TF32" if run.options.tf32 and run.device.type == "cuda" else "float32"


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


def usable_memory(memory: object, parameters: list[Tensor]) -> bool:
    """Whether this is what SGD remembers of these parameters."""
    if not isinstance(memory, dict):
        return False
    for index, entry in memory.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            return False
        if entry.keys() != {"momentum_buffer"}:
            return False
        value = entry["momentum_buffer"]
        if value is None:
            continue
        if not ordinary(value) or value.shape != parameters[index].shape or value.dtype != parameters[index].dtype:
            return False
        if not value.isfinite().all():
            return False
    return True


def usable_progress(progress: dict, images: int) -> bool:
    """Whether this is how far a run over so many training images can be."""
    order, done, sums, rows = (progress[key] for key in ("order", "done", "sums", "rows"))

    def numbers(record: object, keys: tuple[str, ...]) -> bool:
        if not isinstance(record, dict) or record.keys() != set(keys):
            return False
        return all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in record.values())

    if type(progress["epoch"]) is not int or type(done) is not int or not isinstance(rows, list):
        return False
    if not all(numbers(row, COLUMNS) and type(row["epoch"]) is int for row in rows):
        return False
    epochs = [row["epoch"] for row in rows]
    if (
        epochs != sorted(set(epochs))
        or not 1 <= progress["epoch"] < 2**31
        or (epochs and epochs[-1] != progress["epoch"] - 1)
    ):
        return False
    if order is None:
        return done == 0 and sums == {}
    if (
        not ordinary(order)
        or order.dtype is not torch.int64
        or not torch.equal(order.sort().values, torch.arange(images))
    ):
        return False
    return (
        0 <= done <= images and numbers(sums, SUMS) and None not in sums.values() and (not done or sums["seconds"] > 0)
    )


def settings(options: argparse.Namespace) -> dict:
    """The settings that define a run, as plain values."""
    return {key: getattr(options, key) for key in TRAINING if key != "resume"}


def run_folder(options: argparse.Namespace) -> Path:
    """{model_dir}-strategy-..-seed-.., followed by whatever else differs from the script's own defaults."""
    o = options
    name = f"{o.model_dir.rstrip('/')}-strategy-{o.strategy}-alpha-{o.alpha}-beta-{o.beta}-zeta-{o.zeta}-seed-{o.seed}"
    name += "".join(f"-{getattr(o, key)}" for key in ("method", "dataset", "arch") if getattr(o, key) != o.own[key])
    name += "".join(f"-{key.replace('_', '-')}" for key in ("no_ra", "no_anc") if getattr(o, key) != o.own[key])
    elsewhere = {"model_dir", "strategy", "alpha", "beta", "zeta", "seed", "ckpt_url", *o.own, *FREE_ON_RESUME}
    for key, value in settings(o).items():
        if key not in elsewhere and value != o.defaults[key]:
            name += f"-{key}-{','.join(map(str, value)) if isinstance(value, list) else value}"
    return Path(name)


def prepare_resume(options: argparse.Namespace) -> tuple[dict, Path]:
    """Read the state to continue from and put the run's own settings into `options`; says which flags lose or win."""
    path = run_folder(options) if options.resume is True else Path(options.resume)
    path = path if path.is_file() else path / STATE
    if not path.is_file():
        raise UsageError(f"--resume: {path} does not exist; start the run without --resume, or name its folder")
    state = read(path)
    described(state, path)
    needed = {
        "model": dict,
        "recipe": dict,
        "progress": dict,
        "optimizer": dict,
        "generator": Tensor,
        "classes": list,
        "training_images": int,
    }
    wrong = sorted(key for key, kind in needed.items() if not isinstance(state.get(key), kind))
    if not wrong and not {"epoch", "order", "done", "sums", "rows"} <= state["progress"].keys():
        wrong = ["progress"]
    if wrong:
        raise UsageError(f"{path} cannot be resumed, it has no usable {', '.join(wrong)}; name a run's {STATE}")
    own = set(settings(options))
    if state["recipe"].keys() != own:
        raise UsageError(f"{path} was written by another version of this code; its settings do not match")
    odd = impossible_setting(state["recipe"])
    if odd:
        raise UsageError(f"{path} cannot be resumed, no command can have given its {odd}; name a run's {STATE}")
    devices = {"device", "no_cuda"}
    given = {*options.given, *(devices if devices & set(options.given) else ())}  # a device is said by both together
    for key, value in state["recipe"].items():
        asked = getattr(options, key)
        if key not in FREE_ON_RESUME or key not in given:
            setattr(options, key, value)
        if key in options.given and asked != value:
            wins = "the command's wins" if key in FREE_ON_RESUME else "the run's wins"
            print(f"--{key.replace('_', '-')}: the run has {value}, the command {asked}; {wins}")
    options.folder = str(path.parent)
    recipe = {key: getattr(options, key) for key in ("arch", "width", "image_size")}
    network = recipe | {"num_classes": len(state["classes"]), "reverse_attention": not options.no_ra}
    check_state(outline(network, path), state["model"], path)
    return state, path


def refuse_existing(folder: Path) -> None:
    """UsageError where a folder holds a run already."""
    if (folder / STATE).exists():
        raise UsageError(f"{folder} holds a run already; continue it by --resume, or name another --model-dir")
    if any(folder.glob("*.pt")) or (folder / "metrics.csv").exists():
        raise UsageError(f"{folder} holds a run that cannot be resumed; remove it, or name another --model-dir")


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
            f"device     {run.device}, {precision(run)}{', compiled' if o.compile else ''}{ranks}",
            f"output     {run.folder}/",
        )
    )


def write_run_json(run: Run, train: Split, selection: Split, resumed: bool) -> None:
    """run.json: what runs, where and by which command; a resumed run keeps its earlier records under `earlier`."""
    record = run.provenance | {
        "settings": settings(run.options),
        "precision": precision(run),
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


def resume_command(folder: Path) -> str:
    return f"{distributed.launcher()} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"


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
            own = distributed.own_slice(len(x))
            x, labels = x[own], labels[own]
            loss, contrast, natural, adversarial = run.loss(x, labels, attacked, options)
            share = len(labels) / len(indices)  # every term is a mean over images, or over as many pairs for each
            run.optimizer.zero_grad()
            (loss * (share * distributed.world())).backward()  # gradients are averaged over ranks
            right = [first_head_right(heads, labels) for heads in (natural, adversarial)]
            figures = torch.stack([loss.detach() * share, contrast.detach() * share, *right])
            figures = distributed.total(figures).tolist()  # one host sync for all four
            number = progress["done"] // options.batch_size + 1
            if not math.isfinite(figures[0]):
                raise RunError(
                    f"the loss is {figures[0]} in epoch {progress['epoch']}, batch {number}; {last_good(run)}; "
                    "lower --lr, or look at the data"
                )
            run.optimizer.step()
            count = len(indices)
            progress["done"] += count
            for key, value in (
                ("loss", figures[0] * count),
                ("contrast", figures[1] * count),
                ("natural", figures[2]),
                ("natural_images", 0 if natural is None else count),
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
    accuracies = "not evaluated"
    if evaluated:
        accuracies = f"natural {row['natural_accuracy']:.2f} %, pgd40_heads {row['pgd40_heads_accuracy']:.2f} %"
    log(
        f"epoch {epoch}/{options.epochs}  loss {row['loss']:.4f} (contrast {row['contrast']:.4f})  train, first head: "
        f"natural {shown(row['train_natural_accuracy_first_head'])}, robust "
        f"{row['train_robust_accuracy_first_head']:.2f} %  evaluation: {accuracies}  "
        f"{row['train_images_per_second']:.0f} images/s, {row['seconds']:.1f} s, "
        f"peak memory {peak_memory(run.device)}, {(options.epochs - epoch) * row['seconds'] / 60:.1f} min left"
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


def prepare(options: argparse.Namespace) -> tuple[dict | None, Path | None, dict]:
    """The state to continue from and its path, None for a new run, and the options as the run has them."""
    own = run_folder(options) / STATE
    again = options.resume is None and distributed.restarted() and own.is_file()
    if again and read(own).get("launch") == distributed.launch():  # not a run that this job was refused to overwrite
        print("started anew by torchrun, as if --resume had been given")
        options.resume = True
    if options.resume is not None:
        return *prepare_resume(options), vars(options)
    options.folder = str(run_folder(options))
    refuse_existing(Path(options.folder))
    return None, None, vars(options)


def hold(folder: Path, held: ExitStack) -> None:
    """Keep every other process out of a run folder until `held` closes; clear what a killed one left half-written.

    Of a distributed run the first process alone writes, so it alone holds the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder / ".lock", wait=False))
        remove_leftovers(folder)
    except TimeoutError:
        raise UsageError(f"another process writes to {folder}; wait for it, or name another --model-dir") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); name another --model-dir") from error


def run(options: argparse.Namespace) -> None:
    """Train as the options say. Errors: UsageError, RunError, Stopped; whatever was saved stays loadable."""
    with ExitStack() as held:
        train_in_folder(options, held)


def train_in_folder(options: argparse.Namespace, held: ExitStack) -> None:
    """What `run` does. held: gets the run folder's lock."""
    state, path, decided = distributed.from_first(lambda: prepare(options))
    vars(options).update(decided)
    device = pick_device(options.device, options.no_cuda)
    if options.sync_bn and device.type != "cuda":
        mend = "leave it out" if state is None else "this run was started with it, continue it where there are some"
        raise UsageError(f"--sync-bn needs CUDA devices, and this run is on {device}; {mend}")
    with distributed.first_of_the_node_first():
        train, selection, test = load_training_data(options)
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
        distributed.from_first(lambda: hold(job.folder, held))
        job.restore(state, path)
    else:
        if weights is not None:
            load_state(job.model, weights.get("model", weights), Path(options.ckpt_url))
        distributed.from_first(lambda: job.begin(held))
    if options.tf32 and device.type != "cuda" and distributed.first():
        print(f"{Path(sys.argv[0]).name}: --tf32 accepted, no effect here", file=sys.stderr)
    if options.amp == "bf16" and lacks_bfloat16(device) and distributed.first():
        print("this CPU has no bfloat16 instructions: --amp bf16 is slower here than float32", file=sys.stderr)
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
        with open(job.folder / "train.log", "a") as out:
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
