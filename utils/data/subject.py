"""A trained network with its test images, and what it makes of them under an attack."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.attacks import Attack
from utils.data.datasets import (
    Progress,
    Split,
    as_input,
    checksum_of,
    load_split,
    over_images,
)
from utils.system.attack_copy import attack_copy
from utils.system.checkpoints import checkpoint_file, load_model
from utils.system.devices import computing, pick_device
from utils.system.errors import RunError, UsageError, first_line
from utils.system.foreign import load_foreign
from utils.system.settings import (
    BLIND,
    Checkpoint,
    Evaluation,
    Training,
    beyond_all_images,
    combined,
    dataset_defaults,
    fitting,
    is_code,
)
from utils.system.values import eps_text

LARGEST = 1000  # images that an attack takes at once; more are hardly faster


# Verdicts


def largest_batch(device: torch.device) -> int:
    """Return how many images an attack takes at once, where memory allows (see `halving`)."""
    return LARGEST if device.type == "cuda" else 100


def halving(attack: Attack) -> Attack:
    """Return an attack that halves its batches for good when the device is out of memory."""
    limit = LARGEST

    def attack_in_parts(net, x, labels, numbers):
        nonlocal limit
        while True:
            parts = zip(x.split(limit), labels.split(limit), numbers.split(limit), strict=True)
            try:
                return torch.cat([attack(net, *part) for part in parts])
            except torch.cuda.OutOfMemoryError:
                limit = min(limit, len(x)) // 2
                if limit == 0:
                    raise
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

    Trainings call this. net: what `frozen` yields. attack: None for natural images.
    candidates: (N,) bool, the images worth attacking; the others count as wrong, so that the figure
    stays one of the whole split.
    """
    right = torch.zeros(len(split.labels), dtype=torch.bool)
    rows = torch.arange(len(right))
    if candidates is not None:
        rows = candidates.nonzero().squeeze(1)

    def judge(x, labels, numbers):
        return right_or_not(net, attack, x, labels, numbers)[:1]

    if len(rows):
        (right[rows],) = over_images(split.take(rows), batch_size, judge, progress)
    return right


def percent(right: Tensor) -> float:
    """Return the share of true verdicts, in percent."""
    return 100 * right.double().mean().item()


# Networks and their images


class Subject(NamedTuple):
    """A network and the test images it is looked at with, on the device.

    info: what `load_model` or `load_foreign` says of it; its `file` is that of a user's own code.
    eps, step_size, norm: of attacks. notes: what was assumed, for whoever reads its figures.
    """

    file: Path
    model: nn.Module
    info: dict
    dataset: str
    split: Split
    eps: float
    step_size: float
    notes: tuple[str, ...] = ()
    norm: str = Training.norm

    @property
    def ball(self) -> dict[str, object]:
        """The ball of attacks, as an evaluation's files tell it; the usual norm is left out."""
        ball = {"eps": self.eps}
        if self.norm != Training.norm:
            ball["norm"] = self.norm
        return ball

    @property
    def radius(self) -> str:
        """The ball of attacks in words: `eps 8/255`, or `L2 eps 0.5`."""
        radius = f"eps {eps_text(self.eps)}"
        return radius if self.norm == Training.norm else f"{self.norm} {radius}"

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
            name = str(self.info["arch"]) if self.info.get("file") else self.file.stem
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
        """What gates take, and how many blocks have one, by the names of these settings."""
        names = ("gate", "classifier", "ra_blocks")
        return {name: self.info.get(name) or getattr(Training, name) for name in names}

    @property
    def head(self) -> str:
        """The name of the head whose logits are the network's answer."""
        return getattr(self.model, "predict", "final")

    @property
    def auxiliary_weight(self) -> float:
        """lambda, the weight of the auxiliary heads in the loss that it was trained with."""
        return self.recipe.get("cr_beta", Training.cr_beta)

    def described(self) -> str:
        """Say on which images the network is looked at."""
        note = f"; {self.split.note}" if self.split.note else ""
        count = len(self.split.labels)
        return f"{self.dataset}, {count} of {self.split.total} test images{note}"

    def identity(self) -> dict[str, object]:
        """Return checksums of network and images, and the ball.

        Rows of evaluations belong in one table where these are equal.
        """
        network = network_checksum(self.model, self.info, self.split)
        return {"network": network, "images": images_checksum(self.split), **self.ball}


def images_checksum(split: Split) -> str:
    """Return a checksum of the images of a split, their labels and their numbers."""
    return checksum_of(value for value in split if isinstance(value, Tensor))


def network_checksum(model: nn.Module, info: dict, split: Split) -> str:
    """Return a checksum of a network: its weights, and what its checkpoint says it is.

    One of a user's own code is told by its file, its state dict and some logits. These cover what a
    function without a state dict keeps elsewhere, and code in other files.
    """
    tensors = list(model.state_dict().values())
    if "file" in info:
        about = Path(info["file"]).read_bytes()
        with torch.no_grad():
            tensors.append(model(as_input(split.images[:8])))
    else:
        keys = ("arch", "width", "image_size", "reverse_attention", "gate", "ra_blocks")
        keys += ("mean", "std")
        about = f"{[info.get(key) for key in keys]} {model.predict} ".encode()
    return hashlib.sha256(about + checksum_of(tensors).encode()).hexdigest()


def load_subject(settings: Checkpoint, path: str | None = None) -> Subject:
    """Load a network, and test images for it (`--n-examples` of them).

    path: a checkpoint file or run folder; None for the network of --model. Data set, data folder
    and norm are the checkpoint's own, eps and step size those of the data set and the norm, unless
    the command gave them.
    Errors: UsageError where network and images do not fit each other, or the ball is too large.
    """
    device = pick_device(settings.device, settings.no_cuda, settings.precision, shared=True)
    if path is None:
        file = Path(settings.model)
        model, info = load_foreign(settings.model)
    else:
        file = checkpoint_file(path)
        model, info = load_model(
            file,
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
            classifier=settings.classifier,
            ra_blocks=settings.ra_blocks,
        )
    dataset = info["dataset"] or settings.dataset or Training.dataset
    recipe = info["recipe"] or {}
    trained_norm = recipe.get("norm", Training.norm)
    norm = settings.norm or trained_norm
    defaults = dataset_defaults(dataset, norm)
    eps = defaults.epsilon if settings.epsilon is None else settings.epsilon
    step_size = settings.step_size or defaults.step_size
    model.to(device)

    side = info["image_size"] or settings.image_size or defaults.image_size
    if problem := beyond_all_images(norm, eps, step_size, side):
        raise UsageError(problem)
    recorded = recipe.get("data_dir", Training.data_dir)
    if dataset != "folder" and not Path(recorded).is_dir():  # of a run on another machine
        recorded = Training.data_dir
    data_dir = settings.data_dir or recorded
    split = load_split(dataset, "test", data_dir, side, settings.n_examples).to(device)

    classes = list(split.classes)
    if path is None:
        _require_classifier(settings, model, split)
    elif info["num_classes"] != len(classes) or info["classes"] not in (None, classes):
        raise UsageError(
            f"{file} has {info['num_classes']} classes, other classes than those of {dataset}; "
            "name what it was trained on by --dataset and --data-dir"
        )
    notes = info["notes"]
    if recipe and norm != trained_norm:
        notes = [*notes, f"trained against {trained_norm} attacks, and attacked in {norm} here"]
    return Subject(file, model, info, dataset, split, eps, step_size, notes, norm)


def _require_classifier(settings: Evaluation, model: nn.Module, split: Split) -> None:
    """Try a network of --model on an image.

    Errors: UsageError where its answer is not logits of a split's classes, or has no gradient and
    the attacks of the settings need one.
    """
    x = as_input(split.images[:1]).requires_grad_()
    classes = len(split.classes)
    by_gradient = settings.diagnostics or not set(settings.attacks).issubset(BLIND)
    try:
        logits = model(x)
        if logits.shape != (1, classes):
            raise ValueError(f"it answers with {tuple(logits.shape)}")
        if by_gradient and not logits.requires_grad:
            raise ValueError(f"without a gradient of the images only {', '.join(BLIND)} work")
    except Exception as error:  # whatever the user's own code raises
        raise UsageError(
            f"--model {settings.model} must turn float32 images {tuple(x.shape)} into logits "
            f"(N, {classes}): {first_line(error)}"
        ) from error


def load_surrogate(settings: Evaluation, subject: Subject) -> nn.Module | None:
    """Load the network of --surrogate, as attacks call it; None without this flag.

    Errors: UsageError where it has another number of classes.
    """
    path = settings.surrogate
    if path is None:
        return None
    code = settings.arch if is_code(settings.arch) else None
    model, info = load_model(path, subject.split.labels.device, arch=code)
    classes = len(subject.split.classes)
    if info["num_classes"] != classes:
        raise UsageError(
            f"--surrogate {path} has {info['num_classes']} classes and {subject.dataset} has "
            f"{classes}; name a network that was trained on the same classes"
        )
    return attack_copy(model)
