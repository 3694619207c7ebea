"""What an evaluation leaves behind: the table, white_attack.json, pictures, and the adversarial images."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.adaptive import View
from utils.autoattack import BLOCK
from utils.data import Split, as_input
from utils.diagnostics import Diagnosis, diagnose
from utils.errors import RunError, UsageError
from utils.evaluation import Subject, percent
from utils.figures import draw_examples, draw_robustness
from utils.files import require_writable, write_atomically, write_record
from utils.recipes import Evaluation

ADAPTIVE = "adaptive: "
Say = Callable[[str], None]


class Row(NamedTuple):
    """A line of the table. right: (N,) bool, the verdicts image by image. notes: what a reader must know of it."""

    right: Tensor
    seconds: float
    notes: list[str]


class Worst:
    """For each image the adversarial one with the largest margin, the natural one where no attack fools it.

    images: (N, 3, S, S) float32 on the CPU. margins: (N,), the largest other logit less the label's, of those found.
    """

    def __init__(self, split: Split) -> None:
        self.images = as_input(split.images.cpu())
        self.margins = torch.full((len(split.labels),), -torch.inf)

    @property
    def fooled(self) -> Tensor:
        """(N,) bool, the images that an attack fools."""
        return self.margins > -torch.inf

    def take(self, rows: Tensor, images: Tensor, margins: Tensor) -> None:
        """Take over what is worse than what was seen before, of the images at `rows`."""
        worse = margins > self.margins[rows]
        self.images[rows[worse]] = images[worse]
        self.margins[rows[worse]] = margins[worse]

    def join(self) -> None:
        """Take over what other ranks found."""
        rows = self.fooled.nonzero().squeeze(1)
        for found in distributed.gathered((rows, self.images[rows], self.margins[rows])):
            self.take(*found)


def wilson(right: Tensor) -> tuple[float, float]:
    """95 % interval of a share of true verdicts, in percent (Wilson, 1927)."""
    n, share, z = len(right), right.double().mean().item(), 1.959963984540054
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def refuse_unwritable(log: Path, saved: str | None) -> None:
    """UsageError where the log, the files beside it or the one of --save-adversarial cannot be written."""
    try:
        log.open("a").close()
    except OSError as error:
        raise UsageError(f"{log} cannot be written ({error.strerror}); name another by --log_path") from error
    require_writable(log.parent, "name another folder by --log_path")
    if saved is not None:
        require_writable(Path(saved).resolve().parent, f"name another file by --save-adversarial, not {saved}")
        if Path(saved).is_dir():
            raise UsageError(f"--save-adversarial {saved} is a folder; name a file in it")


def write(
    settings: Evaluation,
    subject: Subject,
    net: nn.Module,
    rows: dict[str, Row],
    worst: Worst,
    diagnosis: Diagnosis | None,
    origin: dict,
    folder: Path,
    say: Say,
) -> None:
    """Table, JSON, picture and the images of --save-adversarial."""
    attacked = len(rows) > 1
    rows = rows | worst_cases(rows)
    if diagnosis is not None:
        write_diagnosis(diagnosis, folder, say)
    write_json(folder / "white_attack.json", description(settings, subject, origin), rows, diagnosis)
    for line in table(rows, subject):
        say(line)
    if attacked:
        picture, shown = folder / "adversarial_examples.png", examples(net, subject.split, worst, rows["natural"].right)
        draw = partial(draw_examples, *shown, subject.eps, subject.split.classes)
        write_atomically(picture, lambda file: draw(file))
        say(f"picture    {picture}")
    if settings.save_adversarial:
        right = list(rows.values())[-1].right  # the worst case, where there are several attacks
        say(save_adversarial(Path(settings.save_adversarial), net, subject.split, worst, right, subject.eps))


def worst_cases(rows: dict[str, Row]) -> dict[str, Row]:
    """The worst case, image by image, over the views of the adaptive attack and over all attacks of the run."""

    def together(some: list[Row]) -> Row:
        return Row(torch.stack([row.right for row in some]).all(0), sum(row.seconds for row in some), [])

    adapted = [row for name, row in rows.items() if name.startswith(ADAPTIVE)]
    found = {"adaptive, worst case": together(adapted)} if len(adapted) > 1 else {}
    return found | ({"worst case": together(list(rows.values()))} if len(rows) + len(found) > 2 else {})


def table(rows: dict[str, Row], subject: Subject) -> Iterator[str]:
    """The lines of the table, notes below it, and the row in Markdown."""
    width, count = max(map(len, rows)), len(subject.split.labels)
    yield f"{'attack':<{width}}  {'robust %':>8}  {'95 % interval':>14}  {'images':>6}  {'seconds':>8}"
    for name, row in rows.items():
        low, high = wilson(row.right)
        seconds = "" if "worst case" in name else f"{row.seconds:.1f}"
        yield f"{name:<{width}}  {percent(row.right):>8.2f}  {f'{low:.2f} - {high:.2f}':>14}  {count:>6}  {seconds:>8}"
    if subject.of > count:
        yield f"note: {count} of {subject.of} test images, the first after a fixed shuffle"
    for name, row in rows.items():
        for note in row.notes:
            yield f"note, {name}: {note}"
    if subject.info["reverse_attention"] and "adaptive, worst case" not in rows:
        yield "note: attacks on the final logits overestimate networks with reverse attention; add --attacks all"
    yield "| network | " + " | ".join(rows) + " |"
    yield "|" + "---|" * (len(rows) + 1)
    named = f"{subject.method}, {subject.info['arch']}, {subject.dataset}, eps {subject.eps:.4g}, {count} images"
    yield f"| {named} | " + " | ".join(f"{percent(row.right):.2f}" for row in rows.values()) + " |"


def description(settings: Evaluation, subject: Subject, origin: dict) -> dict:
    """What white_attack.json says of the network, the images and the settings."""
    known = ("arch", "width", "reverse_attention", "epoch", "image_size", "recipe")
    said = ("num_steps", "random", "restarts", "seed", "surrogate", "attacks")
    said += ("test_batch_size", "n_examples", "diagnostics")
    split = subject.split
    return {
        "provenance": origin,
        "checkpoint": str(subject.file),
        "network": {"method": subject.method} | {key: subject.info.get(key) for key in known},
        "dataset": subject.dataset,
        "images": len(split.labels),
        "image_numbers": None if split.numbers is None else split.numbers.tolist(),
        "settings": {"eps": subject.eps, "step_size": subject.step_size}
        | {key: getattr(settings, key) for key in said}
        | {"auxiliary_weight": subject.auxiliary_weight},
    }


def write_json(file: Path, record: dict, rows: dict[str, Row], diagnosis: Diagnosis | None) -> None:
    """white_attack.json: this evaluation, and those before it under `earlier`.

    verdicts: a character an image, 1 where it is right, in the order of the test set or of the shuffle of --n-examples.
    """
    record["attacks"] = {
        name: {
            "robust_accuracy": percent(row.right),
            "interval_95": wilson(row.right),
            "images": len(row.right),
            "seconds": round(row.seconds, 2),
            "notes": row.notes,
            "verdicts": "".join("01"[right] for right in row.right.tolist()),
        }
        for name, row in rows.items()
    }
    if diagnosis is not None:
        record["diagnostics"] = diagnosis._asdict() | {"signs": [sign._asdict() for sign in diagnosis.signs]}
    write_record(file, record)


def examples(net: nn.Module, split: Split, worst: Worst, natural: Tensor, count: int = 8) -> tuple[Tensor, ...]:
    """Images for the picture, fooled ones first -> natural, adversarial (n, 3, S, S), probabilities of both, labels."""
    fooled = natural & worst.fooled
    chosen = torch.cat([fooled.nonzero().squeeze(1), (~fooled).nonzero().squeeze(1)])[:count]
    batch = split.take(chosen.to(split.labels.device))
    pair = as_input(batch.images), worst.images[chosen].to(batch.images.device)
    with torch.no_grad():
        probabilities = [net(x).softmax(1).cpu() for x in pair]
    return (*(x.cpu() for x in pair), *probabilities, batch.labels.cpu())


def save_adversarial(file: Path, net: nn.Module, split: Split, worst: Worst, right: Tensor, eps: float) -> str:
    """Write the worst image found for each one to an npz, after what is written was read and tried again.

    images: (N, 3, S, S) float32 in [0, 1] and in the ball. labels: (N,). right: (N,) the verdicts on just these images,
    those of the table's worst case but for an image on the edge of two classes, judged in another batch by rounding.
    """
    images, labels = worst.images, split.labels.cpu()
    off = (images - as_input(split.images.cpu())).abs().amax().item()
    if off > eps + 1e-6 or images.min() < 0 or images.max() > 1:
        raise RunError(f"an attack left the ball of {eps:.5g} (by {off - eps:.2g}) or [0, 1]; nothing is saved")

    def still_right(images: Tensor) -> Tensor:
        with torch.no_grad():
            answers = [net(x.to(split.labels.device)).argmax(1).cpu() for x in images.split(BLOCK)]
        return torch.cat(answers) == labels

    found = still_right(images)

    def write(part: Path) -> None:
        content = {"images": images.numpy(), "labels": labels.numpy(), "right": found.numpy(), "eps": np.float32(eps)}
        with open(part, "wb") as out:
            np.savez_compressed(out, **content)
        with np.load(part) as stored:
            if not torch.equal(still_right(torch.from_numpy(stored["images"])), found):
                raise RunError(f"{file}: the network answers otherwise to images read again; nothing is saved")

    write_atomically(file, write)
    differ = int((found != right).sum())
    return (
        f"saved      {file}: {len(labels)} images, {int((~found).sum())} of which the network gets wrong, read again"
        + (f"; {differ} of them judged otherwise than in the table, by rounding" if differ else "")
    )


def run_diagnostics(
    net: nn.Module, subject: Subject, natural: Tensor, views: dict[str, View], settings: Evaluation
) -> Diagnosis:
    """--diagnostics: look for the signs of masking, with a bar that names the part under way."""
    style = dict(desc="diagnostics", bar_format="{desc}: {postfix} {elapsed}", leave=False, disable=distributed.quiet())
    how = dict(eps=subject.eps, step_size=subject.step_size, seed=settings.seed, batch_size=settings.test_batch_size)
    with tqdm(**style) as bar:
        return diagnose(net, subject.split, natural, views, progress=bar.set_postfix_str, **how)


def write_diagnosis(diagnosis: Diagnosis, folder: Path, say: Say) -> None:
    """The signs of masking, a line each, and two pictures."""
    for sign in diagnosis.signs:
        say(f"{'SIGN' if sign.raised else 'ok':<5} {sign.name}: {sign.figure}")
    for curve, label, name in (
        (diagnosis.by_eps, "eps", "robust_vs_eps.png"),
        (diagnosis.by_steps, "steps", "robust_vs_steps.png"),
    ):
        if curve:
            write_atomically(folder / name, partial(draw_robustness, curve, label))
            say(f"picture    {folder / name}")
