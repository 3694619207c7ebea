"""Evaluating a network: verdicts image by image, and the table of test_white_attack.py."""

import argparse
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.attacks import cross_entropy, cross_entropy_over_heads, frozen, image_noise, linf_pgd, margin
from utils.checkpoints import checkpoint_file, load_model
from utils.data import Split, as_input, batches, load_split, shuffled
from utils.options import BY_DATASET, DATASETS, RunError, UsageError

# An attack: (network, images (N, 3, H, W) in [0, 1], labels (N,), indices (N,) in the data set) -> adversarial images
Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def verdicts(
    net: nn.Module,
    split: Split,
    batch_size: int,
    attack: Attack | None = None,
    candidates: Tensor | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Which images of a split the network classifies right, attacked or not -> (N,) bool on the CPU.

    net: what `frozen` yields. candidates: (N,) bool, the images worth attacking, those right without the attack; the
    others count as wrong, so that the figure stays one of the whole split. progress(images) is called after each batch.
    """
    right = torch.zeros(len(split.labels), dtype=torch.bool)
    chosen = torch.arange(len(right)) if candidates is None else candidates.nonzero().squeeze(1)
    for indices in batches(chosen, batch_size):
        batch = split.take(indices.to(split.labels.device))
        x = as_input(batch.images)
        if attack is not None:
            x = attack(net, x, batch.labels, indices)
        with torch.no_grad():
            logits = net(x)
        if not logits.isfinite().all():
            raise RunError("the network answers with logits that are not finite; its training has diverged")
        right[indices] = (logits.argmax(1) == batch.labels).cpu()
        progress(len(indices))
    return right


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


def subset(split: Split, limit: int | None) -> Split:
    """The first `limit` images after a fixed shuffle, all of them where limit is None or larger."""
    if limit is None or limit >= len(split.labels):
        return split
    return split.take(shuffled(len(split.labels), 0)[:limit])


def pick_device(device: str, no_cuda: bool) -> torch.device:
    """The device of --device and --no-cuda; UsageError where it is unknown or not there."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a CUDA device too
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu")
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
    return picked


def open_log(file: Path) -> Callable[[str], None]:
    """A function that prints a line above any progress bar and appends it to the log."""

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

    def described(self) -> str:
        ra = "with" if self.info["reverse_attention"] else "without"
        return f"{self.info['arch']} {ra} reverse attention, {self.dataset}, {len(self.split.labels)} test images"


def load_subject(options: argparse.Namespace, path: str) -> Subject:
    """Load the checkpoint file or run folder `path` and its test images (`--n-examples` of them).

    Data set, data folder, eps and step are the checkpoint's own unless the command gave them.
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
    if info["dataset"] is None:
        print(f"a bare state dict, taken as {info['arch']} on cifar10; --dataset and --no-ra say otherwise")
    if dataset not in DATASETS:
        raise UsageError(
            f"{file} was trained on {dataset!r}, unknown here; name one of {', '.join(DATASETS)} by --dataset"
        )
    data_dir = options.data_dir
    if "data_dir" not in options.given and isinstance(info["recipe"], dict):
        own = info["recipe"].get("data_dir")  # where the training found its data, if that is a folder here too
        data_dir = own if isinstance(own, str) and "\0" not in own and Path(own).is_dir() else data_dir
    split = load_split(dataset, "test", data_dir, info["image_size"])
    if len(split.classes) != info["num_classes"]:
        raise UsageError(
            f"{file} has {info['num_classes']} classes and {dataset} has {len(split.classes)}; "
            "name the data set it was trained on by --dataset"
        )
    if info["classes"] is not None and list(split.classes) != info["classes"]:
        raise UsageError(f"{file} was trained on other classes than those of {dataset}; name its own data by --dataset")
    split = subset(split, options.n_examples).to(device)
    own = BY_DATASET[dataset]  # a data set's eps and step, unless given
    eps, step_size = (
        getattr(options, key) if key in options.given else own.get(key, getattr(options, key))
        for key in ("epsilon", "step_size")
    )
    return Subject(file, model, info, dataset, split, eps, step_size)


def white_attack(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint under natural images, FGSM, PGD and CW; print a table and append it to test.log."""
    subject = load_subject(options, options.ckpt_url)
    file, model, split, eps, step_size = (subject.file, subject.model, subject.split, subject.eps, subject.step_size)
    log = Path(options.log_path) if options.log_path else file.parent / "test.log"
    try:
        log.open("a").close()  # a log that cannot be written is said before the attacks, not after
    except OSError as error:
        raise UsageError(f"{log} cannot be written ({error.strerror}); name another by --log_path") from error
    settings = dict(eps=eps, random=options.random, seed=options.seed)
    attacks = {
        "natural": None,
        "FGSM": white_box(cross_entropy, step_size=eps, steps=1, **settings),
        f"PGD-{options.num_steps}": white_box(cross_entropy, step_size=step_size, steps=options.num_steps, **settings),
        f"CW-{max(1, options.num_steps // 2)}": white_box(
            margin, step_size=step_size, steps=max(1, options.num_steps // 2), **settings
        ),
    }

    say = open_log(log)
    say(f"{datetime.now():%Y-%m-%d %H:%M:%S} {file}")
    say(
        f"{subject.described()}, eps {eps:.5g}, "
        f"step {step_size:.5g}, {'random' if options.random else 'natural'} start, seed {options.seed}"
    )
    say(f"{'attack':<10} {'accuracy %':>10}")
    natural = None
    with frozen(model) as net:
        for name, attack in attacks.items():
            images = len(split.labels) if natural is None else int(natural.sum())
            with tqdm(total=images, desc=name, unit="img", leave=False, disable=None) as bar:
                right = verdicts(net, split, options.test_batch_size, attack, natural, progress=bar.update)
            natural = right if attack is None else natural
            say(f"{name:<10} {percent(right):>10.2f}")
