"""Evaluating a network: verdicts image by image, and the table of test_white_attack.py."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.attacks import cross_entropy_over_heads, image_noise, linf_pgd
from utils.checkpoints import checkpoint_file, load_model
from utils.data import Split, as_input, batches, load_split, numbers_of, require_same_on_ranks, shuffled
from utils.options import BY_DATASET, DATASETS, TRAINING, RunError, UsageError

NOISE_DRAWS = 100

# An attack: (network, images (N, 3, H, W) in [0, 1], labels (N,), numbers (N,) in the test set) -> adversarial images
Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def verdicts(
    net: nn.Module,
    split: Split,
    batch_size: int,
    attack: Attack | None = None,
    candidates: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
    see: Callable[[Tensor, Tensor, Tensor, Tensor], None] = lambda indices, x, labels, logits: None,
) -> Tensor:
    """Which images of a split the network classifies right, attacked or not -> (N,) bool on the CPU.

    net: what `frozen` yields. candidates: (N,) bool, the images worth attacking, those right without the attack; the
    others count as wrong, so that the figure stays one of the whole split. After each batch progress(images) is called,
    and see(indices, images, labels, logits) on what the network was given and answered.
    Ranks share each batch, of batch_size images for each of them, and all return the verdicts of all; they must agree
    on the network, its buffers included.
    """
    right = torch.zeros(len(split.labels), dtype=torch.bool)
    chosen = torch.arange(len(right)) if candidates is None else candidates.nonzero().squeeze(1)
    for together in batches(chosen, batch_size * distributed.world()):
        indices = together[distributed.own_slice(len(together))]
        if len(indices):
            right[indices] = judged(net, split, indices, attack, see)
        progress(len(together))
    return distributed.total(right.byte()).bool()


def judged(
    net: nn.Module,
    split: Split,
    indices: Tensor,
    attack: Attack | None = None,
    see: Callable[[Tensor, Tensor, Tensor, Tensor], None] = lambda indices, x, labels, logits: None,
) -> Tensor:
    """Attack the images `indices` (n,) of a split as one batch -> (n,) bool on the CPU, right or not."""
    batch = split.take(indices.to(split.labels.device))
    x = as_input(batch.images)
    if attack is not None:
        x = attack(net, x, batch.labels, numbers_of(split)[indices])
    with torch.no_grad():
        logits = net(x)
    if not logits.isfinite().all():
        raise RunError("the network answers with logits that are not finite; its training has diverged")
    see(indices, x, batch.labels, logits)
    return (logits.argmax(1) == batch.labels).cpu()


def percent(right: Tensor) -> float:
    """Share of true verdicts, in percent."""
    return 100 * right.double().mean().item()


def pgd40_heads(eps: float, step_size: float, auxiliary_weight: float, seed: int, steps: int = 40) -> Attack:
    """The PGD-40 that selects epochs: cross-entropy over heads, from x + 0.001 N(0, 1)."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        start = x + 0.001 * image_noise(x, indices, seed, "normal")
        return linf_pgd(x, cross_entropy_over_heads(net, labels, auxiliary_weight), eps, step_size, steps, start)

    return attack


def white_box(objective: Callable, eps: float, step_size: float, steps: int, random: bool, seed: int) -> Attack:
    """An attack of the README's table: `steps` on objective(net, labels) of the final logits, the last iterate counts.

    random: start uniformly in the ball, unclipped; otherwise at the image.
    """

    def attack(net: nn.Module, x: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        start = x + eps * image_noise(x, indices, seed, "uniform") if random else x
        return linf_pgd(x, objective(net, labels), eps, step_size, steps, start)

    return attack


def noise(eps: float, seed: int, draws: int = NOISE_DRAWS) -> Attack:
    """Uniform noise in the ball, clipped to [0, 1]: of each image the last draw that fools the network, if any does."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        found = x
        for draw in range(draws):
            noisy = (x + eps * image_noise(x, indices, seed, "uniform", draw)).clamp(0, 1)
            with torch.no_grad():
                wrong = net(noisy).argmax(1) != labels
            found = torch.where(wrong[:, None, None, None], noisy, found)
        return found

    return attack


def subset(split: Split, limit: int | None) -> Split:
    """The first `limit` images after a fixed shuffle, all of them where limit is None or larger."""
    if limit is None or limit >= len(split.labels):
        return split
    numbers = shuffled(len(split.labels), 0)[:limit]
    return split.take(numbers)._replace(numbers=numbers)


def pick_device(device: str, no_cuda: bool) -> torch.device:
    """The device of --device and --no-cuda; UsageError where it is unknown or not there."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a CUDA device too
    if device == "auto":
        return distributed.own_device(torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu"))
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is none of auto, cpu, cuda, cuda:N")
    if picked.type == "cuda":
        if no_cuda:
            raise UsageError(f"--device {device} and --no-cuda contradict each other; give one of them")
        if (picked.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu"
            )
    return distributed.own_device(picked)


def open_log(file: Path) -> Callable[[str], None]:
    """A function that prints a line above any progress bar and appends it to the log, on the first rank only."""
    if not distributed.first():
        return lambda line: None

    def log(line: str) -> None:
        tqdm.write(line)
        try:
            with open(file, "a") as out:
                out.write(line + "\n")
        except OSError as error:  # a full disk, which Python reports without the file's name
            raise OSError(error.errno, error.strerror, str(file)) from error

    return log


class Subject(NamedTuple):
    """A checkpoint and the test images it is looked at with, on the device, and the attack settings of its data set."""

    file: Path
    model: nn.Module
    info: dict  # what `load_model` says it is
    dataset: str
    split: Split
    eps: float
    step_size: float
    of: int = 0  # how many test images the data set has, where `split` may be a part of them

    def described(self) -> str:
        ra = "with" if self.info["reverse_attention"] else "without"
        count = len(self.split.labels)
        part = f", the first of {self.of} after a fixed shuffle" if self.of > count else ""
        return f"{self.info['arch']} {ra} reverse attention, {self.dataset}, {count} test images{part}"


def load_subject(options: argparse.Namespace, path: str) -> Subject:
    """Load the checkpoint file or run folder `path` and its test images (`--n-examples` of them).

    Data set and data folder are the checkpoint's own, eps and step its data set's, unless the command gave them.
    Errors: UsageError where checkpoint and data set do not match.
    """
    device = pick_device(options.device, options.no_cuda)
    file = checkpoint_file(path)
    model, info = load_model(
        file,
        device,
        arch=options.arch,
        width=options.width,
        image_size=options.image_size,
        dataset=options.dataset,
        reverse_attention=False if options.no_ra else None,
    )
    dataset = info["dataset"] or "cifar10"
    if info["dataset"] is None and distributed.first():
        print(f"a bare state dict, taken as {info['arch']} on cifar10; --dataset and --no-ra say otherwise")
    if dataset not in DATASETS:
        raise UsageError(
            f"{file} was trained on {dataset!r}, unknown here; name one of {', '.join(DATASETS)} by --dataset"
        )
    data_dir = options.data_dir
    if "data_dir" not in options.given and isinstance(info["recipe"], dict):
        own = info["recipe"].get("data_dir")  # where the training found its data, if that is a folder here too
        data_dir = own if isinstance(own, str) and "\0" not in own and Path(own).is_dir() else data_dir
    with distributed.first_of_the_node_first():
        split = load_split(dataset, "test", data_dir, info["image_size"])
    require_same_on_ranks(f"{dataset} in {data_dir}", split)
    if len(split.classes) != info["num_classes"]:
        raise UsageError(
            f"{file} has {info['num_classes']} classes and {dataset} has {len(split.classes)}; "
            "name the data set it was trained on by --dataset"
        )
    if info["classes"] is not None and list(split.classes) != info["classes"]:
        raise UsageError(f"{file} was trained on other classes than those of {dataset}; name its own data by --dataset")
    part = subset(split, options.n_examples).to(device)
    return Subject(file, model, info, dataset, part, *attack_settings(options, dataset), len(split.labels))


def method_name(subject: Subject) -> str:
    """What a run is called in tables and figures: ANCRA-TRADES, TRADES-RA, TRADES-ANC, TRADES; else its file's name."""
    recipe = subject.info["recipe"] if isinstance(subject.info["recipe"], dict) else {}
    method = {"pgd": "PGD-AT", "trades": "TRADES", "mart": "MART"}.get(str(recipe.get("method")))
    if method is None:
        return subject.file.stem
    ra, anc = subject.info["reverse_attention"], not recipe.get("no_anc")
    if ra and anc:
        return "ANCRA-" + method.removesuffix("-AT")
    return method + ("-RA" if ra else "-ANC" if anc else "")


def recipe_weight(subject: Subject) -> float:
    """lambda, the weight of the auxiliary heads in the loss that a checkpoint was trained with."""
    recipe = subject.info["recipe"]
    weight = recipe.get("cr_beta") if isinstance(recipe, dict) else None
    return weight if isinstance(weight, float) and 0 <= weight < math.inf else TRAINING["cr_beta"]


def attack_settings(options: argparse.Namespace, dataset: str) -> tuple[float, float]:
    """eps and step size: the data set's own, unless the command gave them."""
    own = BY_DATASET[dataset]
    eps, step_size = (
        getattr(options, key) if key in options.given else own.get(key, getattr(options, key))
        for key in ("epsilon", "step_size")
    )
    return eps, step_size
