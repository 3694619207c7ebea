"""A trained network with its test images, and the loop that looks at them batch by batch."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import ReverseAttentionNetwork
from utils.attacks import Attack
from utils.data.datasets import (
    Split,
    as_input,
    batches,
    load_split,
    numbers_of,
    require_same_on_ranks,
)
from utils.system import distributed
from utils.system.checkpoints import checkpoint_file, load_model, print_notes
from utils.system.devices import computing, pick_device
from utils.system.errors import RunError, UsageError, first_line
from utils.system.options import fitting
from utils.system.settings import (
    BLIND,
    CLASSES,
    DATASETS,
    Checkpoint,
    Evaluation,
    Training,
    combined,
    dataset_defaults,
)

# (images (n, 3, S, S) in [0, 1], labels (n,), numbers (n,)) -> answers, n rows each
Work = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Progress = Callable[[int], None]  # gets the number of images of each batch that is done

PROBE = 100  # images that tell how much memory an image takes
CPU_BATCH = 100  # images an attack takes at once on a CPU
LARGEST = 1000  # and at most; more are hardly faster on a card


# The loop over images


def over_images(
    split: Split,
    rows: Tensor,
    batch_size: int,
    work: Work,
    progress: Progress | None = None,
    shared: bool = True,
) -> tuple[Tensor, ...]:
    """Call `work` on the images at `rows` (M,), M > 0, of a split, batch by batch.

    Returns each of its answers for all rows, (M, ...), in their order, on the CPU.
    shared: ranks share the images, `batch_size` at a time for each of them, and all return all
    answers; otherwise this process goes over all images alone.
    """
    device = split.labels.device
    numbers = numbers_of(split)
    ranks = distributed.world() if shared else 1
    answers = []
    for positions in batches(torch.arange(len(rows)), batch_size * ranks):
        share = positions[distributed.rank() :: ranks] if shared else positions
        if len(share):
            batch = split.take(rows[share].to(device))
            answer = work(as_input(batch.images), batch.labels, numbers[rows[share]])
            answers.append((share, *(values.cpu() for values in answer)))
        if progress is not None:
            progress(len(positions))

    if shared:
        answers = list(chain.from_iterable(distributed.gathered(answers)))
    positions, *results = (torch.cat(parts) for parts in zip(*answers, strict=True))
    order = positions.argsort()
    return tuple(result[order] for result in results)


def largest_batch(net: nn.Module, split: Split, attack: Attack) -> int:
    """Return how many images of a split an attack can take at once, the same on all ranks.

    On CUDA these are as many as fit, as the memory that a small batch takes tells. Half of the free
    memory is left to libraries and to others on the same card.
    """
    device = split.labels.device
    if device.type != "cuda":
        return CPU_BATCH
    count = min(PROBE, len(split.labels))
    batch = split.take(torch.arange(count, device=device))
    numbers = numbers_of(split)[:count]
    for _ in range(2):  # the first time also loads kernels, which stay
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        attack(net, as_input(batch.images), batch.labels, numbers)
        left, _ = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    images = images_that_fit(free, max(free - left, 1) / count)
    return min(distributed.gathered(images))


def images_that_fit(free: int, bytes_per_image: float) -> int:
    """Return the batch size for `free` bytes, at least 1 and rounded down to two digits."""
    images = min(LARGEST, int(free / 2 / bytes_per_image))
    step = 10 ** max(0, len(str(images)) - 2)
    return max(1, images // step * step)


def halving(attack: Attack) -> Attack:
    """Return an attack that halves its batches for good when the device is out of memory."""
    limit = LARGEST

    def attack_in_parts(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        nonlocal limit
        while True:
            size = min(limit, len(x))
            parts = zip(x.split(size), labels.split(size), numbers.split(size), strict=True)
            try:
                return torch.cat([attack(net, *part) for part in parts])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                limit = size // 2
            torch.cuda.empty_cache()  # here, where the error no longer holds tensors

    return attack_in_parts


def right_or_not(
    net: nn.Module, attack: Callable[..., Tensor] | None, x: Tensor, labels: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack images as one batch and judge them in float32.

    Returns (n,) bool, right or not; the attacked images; the network's logits of them.
    Errors: RunError where logits are not finite.
    """
    if attack is not None:
        x = attack(net, x, labels, numbers)
    with torch.no_grad(), computing("fp32"):
        logits = net(x)
    if not logits.isfinite().all():
        raise RunError("the network's logits are not finite; its training has diverged")
    return logits.argmax(1) == labels, x, logits


def verdicts(
    net: nn.Module,
    split: Split,
    batch_size: int,
    attack: Callable[..., Tensor] | None = None,
    candidates: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Tell which images of a split the network classifies right -> (N,) bool on the CPU.

    net: what `frozen` yields. attack: None for natural images. candidates: (N,) bool, the images
    worth attacking; the others count as wrong, so that the figure stays one of the whole split.
    """
    right = torch.zeros(len(split.labels), dtype=torch.bool)
    rows = torch.arange(len(right))
    if candidates is not None:
        rows = candidates.nonzero().squeeze(1)

    def judge(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor]:
        return right_or_not(net, attack, x, labels, numbers)[:1]

    if len(rows):
        (right[rows],) = over_images(split, rows, batch_size, judge, progress)
    return right


def percent(right: Tensor) -> float:
    """Return the share of true verdicts, in percent."""
    return 100 * right.double().mean().item()


def at_chance(natural: float, labels: Tensor) -> str:
    """Return a remark on an accuracy that one class for all images attains too, or ''."""
    one_class = percent(labels == labels.mode().values)
    if natural <= one_class < 100:
        return f", at chance: one class for every image attains {one_class:.2f} %"
    return ""


# Networks and their images


class Subject(NamedTuple):
    """A network and the test images it is looked at with, on the device.

    info: what `load_model` says of it; for a network of --model also `module` and `file`, where it
    is defined. eps, step_size: of attacks. total_images: how many test images the data set has,
    where `split` may be a part of them. notes: what was assumed, for whoever reads its figures.
    """

    file: Path
    model: nn.Module
    info: dict
    dataset: str
    split: Split
    eps: float
    step_size: float
    total_images: int = 0
    notes: tuple[str, ...] = ()

    @property
    def recipe(self) -> dict:
        """The settings that it was trained with, as far as its checkpoint says."""
        return fitting(self.info["recipe"] or {})

    @property
    def method(self) -> str:
        """What a run is called in tables and figures: ANCRA-TRADES, TRADES-RA, TRADES.

        A network without a known method is called by its file, one of --model by that flag's value.
        """
        method = self.recipe.get("method")
        reverse_attention = self.info["reverse_attention"]
        if method is None:
            name = str(self.info["arch"]) if self.info.get("module") else self.file.stem
        else:
            name = "PGD-AT" if method == "pgd" else method.upper()
            contrast = not self.recipe.get("no_anc")
            if reverse_attention and contrast:
                name = "ANCRA-" + method.upper()
            elif reverse_attention:
                name += "-RA"
            elif contrast:
                name += "-ANC"
        parts = [name, *combined(self.recipe | self.gates | {"no_ra": not reverse_attention})]
        if self.info.get("averaged") is False and self.recipe.get("ema"):
            parts.append("not averaged")
        if self.head != "final":
            parts.append(self.head)
        return ", ".join(parts)

    @property
    def gates(self) -> dict:
        """The gate, and how many blocks have one, by the names of these settings."""
        return {
            "gate": self.info.get("gate") or Training.gate,
            "ra_blocks": self.info.get("ra_blocks") or Training.ra_blocks,
        }

    @property
    def head(self) -> str:
        """The name of the head whose logits are the network's answer."""
        name = getattr(self.model, "predict", None)
        return name if isinstance(name, str) else "final"  # --model's may have a method `predict`

    @property
    def auxiliary_weight(self) -> float:
        """lambda, the weight of the auxiliary heads in the loss that it was trained with."""
        return self.recipe.get("cr_beta", Training.cr_beta)

    def described(self) -> str:
        """Say in a line what the network is and on which images it is looked at."""
        network = "a network" if self.info.get("module") else self.info["arch"]
        attention = "with" if self.info["reverse_attention"] else "without"
        images = f"{len(self.split.labels)} test images"
        if self.total_images > len(self.split.labels):
            images += f", the first of {self.total_images} after a fixed shuffle"
        if self.split.note:
            images += f"; {self.split.note}"
        return f"{network} {attention} reverse attention, {self.dataset}, {images}"


def _load_images(
    settings: Checkpoint, dataset: str, data_dir: str, side: int, device: torch.device
) -> dict:
    """Load what a `Subject` holds of its data set; eps and step are the data set's by default."""
    with distributed.first_of_the_node_first():
        split = load_split(dataset, "test", data_dir, side, settings.n_examples)
    require_same_on_ranks(f"{dataset} in {data_dir}", split)
    defaults = dataset_defaults(dataset)
    return {
        "dataset": dataset,
        "split": split.to(device),
        "eps": defaults.epsilon if settings.epsilon is None else settings.epsilon,
        "step_size": defaults.step_size if settings.step_size is None else settings.step_size,
        "total_images": split.whole or len(split.labels),
    }


def load_subject(settings: Checkpoint, path: str) -> Subject:
    """Load the checkpoint file or run folder `path` and its test images (`--n-examples` of them).

    Data set and data folder are the checkpoint's own, eps and step its data set's, unless the
    command gave them. Errors: UsageError where checkpoint and data set do not match.
    """
    device = pick_device(settings.device, settings.no_cuda, settings.precision, shared=True)
    file = checkpoint_file(path)
    model, info = load_model(
        file,
        device,
        key=settings.key,
        predict=settings.predict,
        reverse_attention=False if settings.no_ra else None,
        arch=settings.arch,
        width=settings.width,
        image_size=settings.image_size,
        dataset=settings.dataset,
        mean=settings.mean,
        std=settings.std,
        gate=settings.gate,
        ra_blocks=settings.ra_blocks,
    )
    dataset = info["dataset"] or Training.dataset
    if dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise UsageError(
            f"{file} was trained on {dataset!r}, unknown here; name one of {known} by --dataset"
        )
    _require_classes(file, dataset, CLASSES.get(dataset), info)  # before anything is downloaded
    notes = info["notes"]
    if info["dataset"] is None:
        notes = [*notes, f"taken for a network of {dataset}, since --dataset names no other"]
    notes = print_notes(file, notes)

    data_dir = settings.data_dir or _recorded_data_dir(file, dataset, info)
    images = _load_images(settings, dataset, data_dir, info["image_size"], device)
    classes = images["split"].classes
    _require_classes(file, dataset, len(classes), info)
    if info["classes"] is not None and list(classes) != info["classes"]:
        raise UsageError(
            f"{file} was trained on other classes than those of {dataset}; name its own data by "
            "--dataset"
        )
    return Subject(file, model, info, **images, notes=notes)


def _require_classes(file: Path, dataset: str, classes: int | None, info: dict) -> None:
    """Raise UsageError where a data set has another number of classes than the network."""
    if classes is None or classes == info["num_classes"]:
        return
    fitting_data = [name for name, count in CLASSES.items() if count == info["num_classes"]]
    raise UsageError(
        f"{file} has {info['num_classes']} classes and {dataset} has {classes}; name the data set "
        f"it was trained on by --dataset {' or '.join(fitting_data) or 'folder'}"
    )


def _recorded_data_dir(file: Path, dataset: str, info: dict) -> str:
    """Return the folder of images that a checkpoint records, or the default if it is not there.

    Errors: UsageError for a data set `folder`, which is another one in another place.
    """
    recorded = (info["recipe"] or {}).get("data_dir", Training.data_dir)
    if Path(recorded).is_dir():
        return recorded
    if recorded != Training.data_dir:
        moved = f"{file} recorded {recorded!r} as the folder of its images, which is not there now"
        if dataset == "folder":
            raise UsageError(f"{moved}; name it by --data-dir")
        if distributed.first():
            print(f"{moved}; taking {Training.data_dir}")
    return Training.data_dir


# Networks of --model


class Foreign(nn.Module):
    """A network or function of --model as attacks take it: its answers are cast to float32."""

    def __init__(self, network: Callable) -> None:
        super().__init__()
        self.network = network
        if isinstance(getattr(network, "predict", None), str):  # the head that answers
            self.predict = network.predict

    def forward(self, x: Tensor, *args: object, **options: object) -> object:
        """Return logits (N, C), or whatever else the network returns."""
        return _in_float32(self.network(x, *args, **options))


def _in_float32(answer: object) -> object:
    """Cast logits, or those in a tuple such as heads; anything else stays as it is."""
    if isinstance(answer, Tensor):
        return answer.float()
    if isinstance(answer, tuple):
        parts = [_in_float32(part) for part in answer]
        return answer._make(parts) if hasattr(answer, "_make") else tuple(parts)
    return answer


def _module_and_folder(model: str) -> tuple[str, Path]:
    """Return what --model imports and from where: of a file, the folder around its packages."""
    name = model.rpartition(":")[0]
    file = Path(name).resolve()
    if file.suffix != ".py":
        return name, Path.cwd()
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return ".".join(file.relative_to(folder).with_suffix("").parts), folder


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let imports find the user's packages, also those called `models` and `utils` as ours are."""
    ours = Path(__file__).resolve().parents[2]
    names = set()
    if folder.resolve() != ours:
        modules = {file.stem for file in folder.glob("*.py")}
        packages = {file.parent.name for file in folder.glob("*/*.py")}
        names = {"models", "utils"} & (modules | packages)
    hidden = _remove_modules(names)
    path = sys.path[:]
    others = [entry for entry in path if not names or Path(entry).resolve() != ours]
    sys.path[:] = list(dict.fromkeys([str(folder), str(Path.cwd()), *others]))
    try:
        yield
    finally:
        _remove_modules(names)
        sys.modules.update(hidden)
        sys.path[:] = path


def _remove_modules(packages: set[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _build_foreign(model: str) -> tuple[Callable, ModuleType]:
    """Call the function that --model names -> what it returns, and the module that defines it."""
    name, folder = _module_and_folder(model)
    try:
        with _imports_from(folder):
            module = importlib.import_module(name)
            network = getattr(module, model.rpartition(":")[2])()
    except SystemExit as error:
        raise UsageError(
            f"--model {model} ends when it is imported; let it parse arguments under __main__ only"
        ) from error
    except Exception as error:  # whatever the user's own code raises
        raise UsageError(
            f"--model {model}: {type(error).__name__}: {first_line(error)}; name "
            "package.module:function or FILE.py:function, no arguments"
        ) from error
    if not callable(network):
        raise UsageError(f"--model {model} returns a {type(network).__name__}, not a network")
    return network, module


def foreign_subject(settings: Evaluation) -> Subject:
    """Build the network of --model, and load test images as it takes them.

    Errors: UsageError where it is no classifier of these images.
    """
    network, module = _build_foreign(settings.model)
    info = {
        "arch": settings.model,
        # One that answers with heads, as those of `models` do, has their views.
        "reverse_attention": getattr(network, "reverse_attention", None) is True,
        "recipe": None,
        "module": module.__name__,
        "file": module.__file__,
    }
    if info["reverse_attention"]:
        info["gate"] = getattr(network, "gate", None)
        info["ra_blocks"] = getattr(network, "ra_blocks", None)
    if not isinstance(network, ReverseAttentionNetwork):
        network = Foreign(network)
    device = pick_device(settings.device, settings.no_cuda, settings.precision, shared=True)
    network.to(device).requires_grad_(False).eval()

    dataset = settings.dataset or Training.dataset
    side = settings.image_size or dataset_defaults(dataset).image_size
    data_dir = settings.data_dir or Training.data_dir
    images = _load_images(settings, dataset, data_dir, side, device)
    images["split"], answer = _try_images(settings.model, network, images["split"])

    count = len(images["split"].labels[:2])
    classes = len(images["split"].classes)
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if shape != (count, classes):
        raise UsageError(
            f"--model {settings.model} answers with {shape}; logits (N, {classes}) are needed"
        )
    by_gradient = settings.diagnostics or not set(settings.attacks).issubset(BLIND)
    if by_gradient and not answer.requires_grad:
        raise UsageError(
            f"--model {settings.model} answers without a gradient of the images; only --attacks "
            f"{','.join(BLIND)} do without (transfer with --surrogate)"
        )
    return Subject(Path(settings.model), network, info, **images)


def _try_images(model: str, network: nn.Module, split: Split) -> tuple[Split, object]:
    """Return the images that a network takes, grey ones if no others, and its answer to two."""
    luma = torch.tensor([0.299, 0.587, 0.114], device=split.images.device)[:, None, None]
    failure = ""
    for colour in ("rgb", "grey"):
        images = split.images
        if colour == "grey":
            parts = [(part * luma).sum(1, keepdim=True) for part in images.split(500)]
            images = torch.cat([part.round().byte() for part in parts])
        try:
            for count in (1, 2):  # an attack may be left with one image
                x = as_input(images[:count]).requires_grad_()
                answer = network(x)
            return split._replace(images=images), answer
        except ImportError as error:
            raise UsageError(
                f"--model {model}: {first_line(error)}; import it where the file is imported, not "
                "in the network's forward"
            ) from error
        except Exception as error:  # whatever the user's own code raises
            message = f"{type(error).__name__}: {first_line(error)}"
            failure = failure or f"float32 images {tuple(x.shape)}: {message}"

    hint = "on grey ones too; for digits and folder --image-size gives it others"
    others = {parameter.dtype for parameter in network.parameters()} - {torch.float32}
    if others:
        kinds = ", ".join(map(str, others))
        hint = f"its weights are {kinds}: cast them, or the images in its forward"
    raise UsageError(f"--model {model} fails on {failure}; {hint}")


def foreign_fingerprint(subject: Subject) -> str:
    """Return a checksum of a network of --model: its defining file, state dict and some logits.

    The logits cover what a function without a state dict keeps elsewhere.
    """
    digest = hashlib.sha256(Path(subject.info["file"]).read_bytes())
    values = dict(subject.model.state_dict())
    with torch.no_grad():
        values["logits"] = subject.model(as_input(subject.split.images[:8]))
    for name, value in values.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()
