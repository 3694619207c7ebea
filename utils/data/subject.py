"""Looking at a trained network: what it is and on which images, and the one loop over a split."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import ReverseAttentionNetwork
from models.normalise import Normalise
from utils.attacks import Attack
from utils.data.datasets import Split, as_input, batches, load_split, numbers_of, require_same_on_ranks
from utils.system import distributed
from utils.system.checkpoints import checkpoint_file, load_model, told
from utils.system.devices import computing, pick_device
from utils.system.errors import RunError, UsageError, first_line
from utils.system.options import fitting
from utils.system.settings import (
    BLIND,
    CLASSES,
    DATASETS,
    NORMALISATIONS,
    Checkpoint,
    Evaluation,
    Training,
    combined,
    dataset_defaults,
)

# (images (n, 3, S, S) in [0, 1], labels (n,), numbers (n,)) -> answers, n rows each
Work = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Progress = Callable[[int], None]  # is told of the images of each batch that is done

FEW = 100  # images that tell whether a file was read as it was meant, and how much memory an image takes
ON_CPU, LARGEST = 100, 1000  # images an attack takes at once: on a CPU, and at most; more are hardly faster on a card


def over_images(
    split: Split, rows: Tensor, batch_size: int, work: Work, progress: Progress | None = None, shared: bool = True
) -> tuple[Tensor, ...]:
    """What `work` answers to the images at `rows` (M,), M > 0, of a split, batch by batch -> (M, ...) each, on the CPU.

    shared: ranks share the images, batch_size for each of them at a time, and all return all answers; otherwise this
    process alone goes over them.
    """
    device, numbers, answers = split.labels.device, numbers_of(split), []
    ranks = distributed.world() if shared else 1
    for positions in batches(torch.arange(len(rows)), batch_size * ranks):
        own = positions[distributed.rank() :: ranks] if shared else positions
        if len(own):
            batch = split.take(rows[own].to(device))
            found = work(as_input(batch.images), batch.labels, numbers[rows[own]])
            answers.append((own, *(part.cpu() for part in found)))
        if progress is not None:
            progress(len(positions))
    everyone = distributed.gathered(answers) if shared else [answers]
    positions, *whole = (torch.cat(part) for part in zip(*(a for one in everyone for a in one), strict=True))
    return tuple(part[positions.argsort()] for part in whole)


def largest_batch(net: nn.Module, split: Split, attack: Attack) -> int:
    """How many images of a split an attack can take at once: on CUDA as many as fit, on a CPU `ON_CPU`.

    The memory that a small batch takes tells what an image takes. Half of what is free is left alone, for the
    workspaces of libraries and for others on the same card. All ranks return the same number.
    """
    device = split.labels.device
    if device.type != "cuda":
        return ON_CPU
    count = min(FEW, len(split.labels))
    batch, numbers = split.take(torch.arange(count, device=device)), numbers_of(split)[:count]
    for _ in range(2):  # the first time also loads kernels, which stay
        torch.cuda.empty_cache()  # what training holds in reserve is free, too
        free, _ = torch.cuda.mem_get_info(device)
        attack(net, as_input(batch.images), batch.labels, numbers)
        left, _ = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    fitting = images_that_fit(free, max(free - left, 1) / count)
    return LARGEST - distributed.agreed(LARGEST - fitting)  # the smallest of all ranks'


def images_that_fit(free: int, each: float) -> int:
    """A batch for `free` bytes where an image takes `each` of them, at least 1, to two digits."""
    images = min(LARGEST, int(free / 2 / each))
    step = 10 ** max(0, len(str(images)) - 2)
    return max(1, images // step * step)


def halving(attack: Attack) -> Attack:
    """An attack whose batches are halved for good whenever the device has too little memory for one."""
    most = LARGEST

    def halved(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        nonlocal most
        while True:
            size = min(most, len(x))
            parts = zip(x.split(size), labels.split(size), numbers.split(size), strict=True)
            try:
                return torch.cat([attack(net, *part) for part in parts])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                most = size // 2
            torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of the attempt

    return halved


def right_or_not(
    net: nn.Module, attack: Callable[..., Tensor] | None, x: Tensor, labels: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack images as one batch -> (n,) bool, right or not; the images that the network was given; its logits.

    Whatever the attack computes in, the logits are float32.
    """
    if attack is not None:
        x = attack(net, x, labels, numbers)
    with torch.no_grad(), computing("fp32"):
        logits = net(x)
    if not logits.isfinite().all():
        raise RunError("the network answers with logits that are not finite; its training has diverged")
    return logits.argmax(1) == labels, x, logits


def verdicts(
    net: nn.Module,
    split: Split,
    batch_size: int,
    attack: Callable[..., Tensor] | None = None,
    candidates: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Which images of a split the network classifies right, attacked or not -> (N,) bool on the CPU.

    net: what `frozen` yields. attack: an `attacks.Attack`. candidates: (N,) bool, the images worth attacking, those
    right without the attack; the others count as wrong, so that the figure stays one of the whole split.
    """
    right = torch.zeros(len(split.labels), dtype=torch.bool)
    rows = torch.arange(len(right)) if candidates is None else candidates.nonzero().squeeze(1)
    if len(rows):
        (right[rows],) = over_images(split, rows, batch_size, lambda *batch: right_or_not(net, attack, *batch)[:1], progress)
    return right


def percent(right: Tensor) -> float:
    """Share of true verdicts, in percent."""
    return 100 * right.double().mean().item()


def at_chance(natural: float, labels: Tensor) -> str:
    """What to say behind an accuracy on images of these labels that one class for all of them attains, too; or ''."""
    single = percent(labels == labels.mode().values)
    return f", at chance: one class for every image attains {single:.2f} %" if natural <= single < 100 else ""


class Subject(NamedTuple):
    """A network and the test images it is looked at with, on the device, and the attack settings of its data set."""

    file: Path
    model: nn.Module
    info: dict  # what `load_model` says it is
    dataset: str
    split: Split
    eps: float
    step_size: float
    of: int = 0  # how many test images the data set has, where `split` may be a part of them
    notes: tuple[str, ...] = ()  # what was assumed of it, and doubts of that; they stand beside every figure of it

    @property
    def recipe(self) -> dict:
        """The settings that it was trained with, as far as its checkpoint says."""
        return fitting(self.info["recipe"]) if isinstance(self.info["recipe"], dict) else {}

    @property
    def method(self) -> str:
        """What a run is called in tables and figures: ANCRA-TRADES, TRADES-RA, TRADES; else its file's name."""
        method, ra, anc = self.recipe.get("method"), self.info["reverse_attention"], not self.recipe.get("no_anc")
        name = str(self.info["arch"]) if self.info.get("module") else self.file.stem
        if method is not None:
            method = "PGD-AT" if method == "pgd" else method.upper()
            name = method + ("-RA" if ra else "-ANC" if anc else "")
            name = "ANCRA-" + method.removesuffix("-AT") if ra and anc else name
        said = [name, *combined(self.recipe | self.gates | {"no_ra": not ra})]
        said += ["not averaged"] * (self.info.get("averaged") is False and bool(self.recipe.get("ema")))
        return ", ".join(said + [self.answers] * (self.answers != "final"))

    @property
    def gates(self) -> dict:
        """The gate, and how many blocks have one, by the names of these settings."""
        return {key: self.info.get(key) or getattr(Training, key) for key in ("gate", "ra_blocks")}

    @property
    def answers(self) -> str:
        """The head whose logits are the network's answer."""
        named = getattr(self.model, "predict", None)
        return named if isinstance(named, str) else "final"  # a stranger's may be a method

    @property
    def auxiliary_weight(self) -> float:
        """lambda, the weight of the auxiliary heads in the loss that it was trained with."""
        return self.recipe.get("cr_beta", Training.cr_beta)

    def described(self) -> str:
        ra = "with" if self.info["reverse_attention"] else "without"
        count = len(self.split.labels)
        part = f", the first of {self.of} after a fixed shuffle" if self.of > count else ""
        note = f"; {self.split.note}" if self.split.note else ""
        network = "a network" if self.info.get("module") else self.info["arch"]  # whose name is that of its file
        return f"{network} {ra} reverse attention, {self.dataset}, {count} test images{part}{note}"


def looked_at(
    settings: Checkpoint, dataset: str, data_dir: str, side: int, device: torch.device
) -> tuple[str, Split, float, float, int]:
    """What a `Subject` holds of its data set, from `dataset` on: eps and step are its own, unless the command's."""
    with distributed.first_of_the_node_first():
        split = load_split(dataset, "test", data_dir, side, settings.n_examples)
    require_same_on_ranks(f"{dataset} in {data_dir}", split)
    own = dataset_defaults(dataset)
    eps = own.epsilon if settings.epsilon is None else settings.epsilon
    step_size = own.step_size if settings.step_size is None else settings.step_size
    return dataset, split.to(device), eps, step_size, split.whole or len(split.labels)


def load_subject(settings: Checkpoint, path: str) -> Subject:
    """Load the checkpoint file or run folder `path` and its test images (`--n-examples` of them).

    Data set and data folder are the checkpoint's own, eps and step its data set's, unless the command gave them.
    Errors: UsageError where checkpoint and data set do not match.
    """
    device = pick_device(settings.device, settings.no_cuda, settings.precision, shared=True)
    file = checkpoint_file(path)
    about = ("key", "arch", "width", "image_size", "dataset", "mean", "std", "gate", "ra_blocks", "predict")
    said = {key: getattr(settings, key) for key in about}
    model, info = load_model(file, device, reverse_attention=False if settings.no_ra else None, **said)
    dataset = info["dataset"] or Training.dataset
    if dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise UsageError(f"{file} was trained on {dataset!r}, unknown here; name one of {known} by --dataset")
    count, fitting = info["num_classes"], [name for name, of in CLASSES.items() if of == info["num_classes"]]
    if info["notes"] and CLASSES.get(dataset, count) != count:  # before anything is downloaded
        both = f"{file} has {count} classes and {dataset} has {CLASSES[dataset]}"
        raise UsageError(f"{both}; name the data set it was trained on by --dataset {' or '.join(fitting) or 'folder'}")
    unnamed = [] if info["dataset"] else [f"taken for a network of {dataset}, since --dataset names no other"]
    notes = told(file, info["notes"] + unnamed)
    own = info["recipe"].get("data_dir") if isinstance(info["recipe"], dict) else None
    found = isinstance(own, str) and "\0" not in own and Path(own).is_dir()  # as the training's, here too
    data_dir = settings.data_dir or (own if found else Training.data_dir)
    if isinstance(own, str) and data_dir not in (own, settings.data_dir):
        moved = f"{file} recorded {own[:200]!r} as the folder of its images, which is not there now"
        if dataset == "folder":  # what lies in another one are other images
            raise UsageError(f"{moved}; name it by --data-dir")
        if distributed.first():
            print(f"{moved}; taking {data_dir}")
    subject = Subject(file, model, info, *looked_at(settings, dataset, data_dir, info["image_size"], device))
    classes = subject.split.classes
    if len(classes) != count:
        raise UsageError(f"{file} has {count} classes and {dataset} has {len(classes)}; name its own data by --dataset")
    if info["classes"] is not None and list(classes) != info["classes"]:
        raise UsageError(f"{file} was trained on other classes than those of {dataset}; name its own data by --dataset")
    return subject._replace(notes=notes + told(file, misread(subject, settings) if notes else []))


@torch.no_grad()
def misread(subject: Subject, settings: Checkpoint) -> list[str]:
    """What speaks against the way in which a published file was read: that few of some natural images are right."""
    model, count = subject.model, min(FEW, settings.test_batch_size, len(subject.split.labels))
    batch = subject.split.take(torch.arange(count, device=subject.split.labels.device))
    own, shares = (model.reverse_attention, model.normalise), {}
    images = {"": own[1]}
    if settings.mean or own[1] is None:  # the file's own is no guess
        images = {"": None} | {f" --mean {n} --std {n}": Normalise(**of) for n, of in NORMALISATIONS.items()}
    ways = {by: (own[0], how) for by, how in images.items()}
    if model.predict == "final":  # a head of a plain network cannot answer
        ways = {ra + by: (not ra, how) for ra in ("", " --no-ra") for by, how in images.items()}
    for flags, way in {"as taken": own, **ways}.items():
        if shares.get("as taken", 0) < 90:
            model.reverse_attention, model.normalise = way
            shares[flags] = percent(model.to(batch.labels.device)(as_input(batch.images)).argmax(1) == batch.labels)
    model.reverse_attention, model.normalise = own
    best = max(shares, key=lambda flags: shares[flags] - len(flags.split()) / 2)
    said = f"only {shares['as taken']:.1f} % of {count} natural images are right"
    if shares[best] > shares["as taken"] + 100 / count**0.5:
        return [f"{said}; {shares[best]:.1f} % are with{best or ' none of --no-ra, --mean and --std'}, or the like"]
    near = shares["as taken"] < 100 / len(subject.split.classes) + 10
    return [f"{said}, near chance; is {subject.dataset} its data, and were --arch, --width, --key meant so?"] * near


def module_of(model: str) -> tuple[str, list[Path]]:
    """What --model imports and from where: of a file the folder around its packages, the one above; the current one."""
    name = model.rpartition(":")[0]
    file = Path(name).resolve()
    if file.suffix != ".py":
        return name, [Path.cwd()]
    root = next(folder for folder in file.parents if not (folder / "__init__.py").is_file())
    return ".".join(file.relative_to(root).with_suffix("").parts), [root, root.parent, Path.cwd()]


@contextmanager
def at_home(model: str) -> Iterator[None]:
    """For the body, imports are those of --model's author: `models` and `utils` are theirs where they have such."""
    ours, folders = Path(__file__).resolve().parents[2], module_of(model)[1]
    theirs = [path for folder in folders if folder.resolve() != ours for path in folder.glob("*")]
    taken = {p.stem for p in theirs if p.stem in ("models", "utils") and (p.suffix == ".py" or any(p.rglob("*.py")))}
    before, hidden = sys.path[:], _taken_out(taken)
    sys.path[:] = [f for f in (*map(str, folders), *before) if not taken or Path(f).resolve() != ours]
    try:
        yield
    finally:
        _taken_out(taken)
        sys.modules.update(hidden)
        sys.path[:] = before


def _taken_out(packages: set[str]) -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in packages}


class Foreign(nn.Module):
    """A stranger's network or function as attacks take it: what it answers is float32, whatever it computes in."""

    def __init__(self, network: Callable) -> None:
        super().__init__()
        self.network = network
        if isinstance(getattr(network, "predict", None), str):  # the head that answers, of one with heads
            self.predict = network.predict

    def forward(self, x: Tensor, *args: object, **options: object) -> object:
        return _in_float32(self.network(x, *args, **options))


def _in_float32(answer: object) -> object:
    """Logits, or a tuple that holds some, such as heads, in float32; anything else as it is."""
    if isinstance(answer, Tensor):
        return answer.float()
    if isinstance(answer, tuple):
        parts = [_in_float32(part) for part in answer]
        return answer._make(parts) if hasattr(answer, "_make") else tuple(parts)
    return answer


def foreign_subject(settings: Evaluation) -> Subject:
    """The classifier that --model builds, in `at_home`, with test images as it takes them; UsageError if it is none."""
    named, name = f"--model {settings.model}", module_of(settings.model)[0]
    try:
        built = getattr(importlib.import_module(name), settings.model.rpartition(":")[2])()
    except SystemExit as error:
        raise UsageError(f"{named} ends when it is imported; let it parse arguments under __main__ only") from error
    except Exception as error:  # whatever the user's own code raises
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{named}: {said}; name package.module:function or FILE.py:function, no arguments") from error
    if not callable(built):
        raise UsageError(f"{named} returns a {type(built).__name__}, not a network")
    model = built if isinstance(built, ReverseAttentionNetwork) else Foreign(built)
    # one that answers with heads, as those of `models` do, has their views
    ra = getattr(built, "reverse_attention", None) is True
    info = {"arch": settings.model, "reverse_attention": ra, "recipe": None, "module": name}
    info |= {key: getattr(built, key, None) for key in ("gate", "ra_blocks")} if ra else {}
    device = pick_device(settings.device, settings.no_cuda, settings.precision, shared=True)
    dataset = settings.dataset or Training.dataset
    side = settings.image_size or dataset_defaults(dataset).image_size
    data = looked_at(settings, dataset, settings.data_dir or Training.data_dir, side, device)
    subject = Subject(Path(settings.model), model, info, *data)
    model.to(device).requires_grad_(False).eval()
    split, answer = _taken(named, model, subject.split)
    subject, classes = subject._replace(split=split), len(split.classes)
    if not isinstance(answer, Tensor) or answer.shape != (len(split.labels[:2]), classes):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UsageError(f"{named} answers with {got}; logits (N, {classes}) are needed")
    if not answer.requires_grad and (settings.diagnostics or not set(settings.attacks).issubset(BLIND)):
        only = f"only --attacks {','.join(BLIND)} do without (transfer with --surrogate)"
        raise UsageError(f"{named} answers without a gradient of the images; {only}")
    return subject


def _taken(named: str, model: nn.Module, split: Split) -> tuple[Split, object]:
    """The images that a network takes, grey where it takes no others, and its answer to two of them."""

    def grey() -> Tensor:
        luma = torch.tensor([0.299, 0.587, 0.114], device=split.images.device)[:, None, None]
        return torch.cat([(part * luma).sum(1, keepdim=True).round().byte() for part in split.images.split(500)])

    failed = []
    for made in (lambda: split.images, grey):
        images = made()
        try:
            for x in (as_input(images[:1]), as_input(images[:2])):  # an attack may be left with one image
                answer = model(x.requires_grad_())
            return split._replace(images=images), answer
        except Exception as error:  # again whatever it raises
            failed.append(f"float32 images {tuple(x.shape)}: {type(error).__name__}: {first_line(error)}")
    hint = "on grey ones too; for digits and folder --image-size gives it others"
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        hint = f"its weights are {', '.join(map(str, dtypes))}: let its forward cast the images, or its maker weights"
    raise UsageError(f"{named} fails on {failed[0]}; {hint}")
