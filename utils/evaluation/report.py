"""What an evaluation looks like: the table, the record for white_attack.json, pictures, an npz."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.datasets import as_input
from utils.data.subject import Subject, at_chance, percent
from utils.evaluation.diagnostics import Diagnosis
from utils.evaluation.results import ADAPTIVE, FORMAT, WORST_CASES, needs_adaptive
from utils.figures.plots import draw_examples, draw_robustness, save_or_note
from utils.system.errors import RunError
from utils.system.files import write_atomically
from utils.system.values import eps_text

CURVES = ("PGD on the answer's logits", "PGD on every view")  # columns besides eps or steps


class Row(NamedTuple):
    """A row of the table.

    right: (N,) bool, which images are right under the attack. notes: what a reader must know.
    settings: the attack's. parts: robust accuracy and seconds after each part of AutoAttack.
    made: when and where, for a row of an earlier evaluation.
    """

    right: Tensor
    seconds: float
    notes: list[str] = []
    settings: dict[str, object] = {}
    parts: dict[str, dict[str, float]] = {}
    made: str = ""


def wilson(right: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of a share of true verdicts, in percent (Wilson, 1927)."""
    n = len(right)
    share = right.double().mean().item()
    z = 1.959963984540054
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = (centre - spread) / (1 + z * z / n)
    high = (centre + spread) / (1 + z * z / n)
    return 100 * max(0.0, low), 100 * min(1.0, high)


def lowest(rows: dict[str, Row]) -> Tensor:
    """Return which images are right under every attack, (N,) bool."""
    return torch.stack([row.right for row in rows.values()]).all(0)


def overestimated(rows: dict[str, Row], network: dict) -> bool:
    """Whether these rows overestimate a network: it needs the adaptive attack, which is missing."""
    return needs_adaptive(network) and not any(name.startswith(ADAPTIVE) for name in rows)


def by_class(rows: dict[str, Row], subject: Subject) -> dict[str, dict[str, float]]:
    """Return images, natural and lowest accuracy in percent of each class, the weakest first."""
    lowest_name = "these attacks" if overestimated(rows, subject.info) else "worst case"
    natural = rows["natural"].right
    worst = lowest(rows)
    classes = {}
    for label in subject.split.labels.unique().tolist():
        of_class = (subject.split.labels == label).cpu()
        classes[subject.split.classes[label]] = {
            "images": int(of_class.sum()),
            "natural": percent(natural[of_class]),
            lowest_name: percent(worst[of_class]),
        }
    return dict(sorted(classes.items(), key=lambda item: item[1][lowest_name]))


def table(rows: dict[str, Row], subject: Subject, warnings: list[str]) -> Iterator[str]:
    """Yield the lines of the table, notes below it, and its row in Markdown.

    warnings: what holds of every row; rows are marked by `!` then.
    """
    mark = " !" if warnings else ""
    width = max(map(len, rows))
    count = len(subject.split.labels)
    yield f"{'attack':<{width}}  robust %   95 % interval  images   seconds"
    for name, row in rows.items():
        low, high = wilson(row.right)
        interval = f"{low:.2f} - {high:.2f}"
        seconds = "" if name in WORST_CASES else f"{row.seconds:.1f}"
        yield (
            f"{name:<{width}}  {percent(row.right):>8.2f}  {interval:>14}  {count:>6}  "
            f"{seconds:>8}{mark}"
        )
    yield from _notes(rows, subject, warnings)
    yield _weakest_classes(by_class(rows, subject))

    yield "| network | " + " | ".join(rows) + " |"
    yield "|" + "---|" * (len(rows) + 1)
    about = [subject.method, subject.info["arch"], subject.dataset]
    about += [f"eps {eps_text(subject.eps)}", f"{count} images"]
    network = ", ".join(dict.fromkeys(about))  # method and arch of a --model are both its name
    figures = " | ".join(f"{percent(row.right):.2f}{mark}" for row in rows.values())
    yield f"| {network} | {figures} |"


def _notes(rows: dict[str, Row], subject: Subject, warnings: list[str]) -> Iterator[str]:
    for warning in warnings:
        yield f"! every attack: {warning}"
    for made in dict.fromkeys(row.made for row in rows.values() if row.made):
        names = [name for name, row in rows.items() if row.made == made]
        yield f"note: from an earlier evaluation of this network ({made}): {'; '.join(names)}"
    if subject.split.total > len(subject.split.labels):
        yield (
            f"note: {len(subject.split.labels)} of {subject.split.total} test images, "
            "the first after a fixed shuffle"
        )
    for note in subject.notes:
        yield f"note: {note}"
    for name, row in rows.items():
        for note in row.notes:
            yield f"note, {name}: {note}"

    chance = at_chance(percent(rows["natural"].right), subject.split.labels)
    if chance:
        yield f"note, natural{chance}: nothing here says anything about robustness"
    if overestimated(rows, subject.info):
        yield (
            "note: no worst case: attacks on the final logits overestimate networks with reverse "
            "attention; add --attacks adaptive, or all"
        )


def _weakest_classes(classes: dict[str, dict[str, float]]) -> str:
    _, natural, lowest_name = next(iter(classes.values()))
    weakest = [
        f"{name} {shares[natural]:.2f}/{shares[lowest_name]:.2f}"
        for name, shares in list(classes.items())[:10]
    ]
    more = ", ..." if len(classes) > 10 else ""
    return f"classes, the weakest first, {natural}/{lowest_name}: {', '.join(weakest)}{more}"


def threat_model(eps: float) -> str:
    """Return the ball of an evaluation in words."""
    return f"Linf, eps {eps_text(eps)} on images in [0, 1]"


def record(
    rows: dict[str, Row],
    subject: Subject,
    warnings: list[str],
    settings: dict[str, object],
    made: str,
) -> dict:
    """Return what white_attack.json holds of an evaluation, as plain values.

    `utils.evaluation.results` describes it. Verdicts are in the order of the test set, or of the
    shuffle of --n-examples. settings: those of the command that are recorded. made: when and where
    this evaluation's rows were found.
    """
    info = subject.info
    network = {"method": subject.method}
    for key in ("arch", "width", "reverse_attention", "gate", "ra_blocks", "epoch", "image_size"):
        network[key] = info.get(key)
    for key in ("recipe", "mean", "std"):
        network[key] = info.get(key)

    split = subject.split
    return {
        "format": FORMAT,
        "checkpoint": str(subject.file),
        "network": network,
        "notes": subject.notes,
        "dataset": subject.dataset,
        "images": len(split.labels),
        "image_numbers": None if split.numbers is None else split.numbers.tolist(),
        "threat_model": threat_model(subject.eps),
        "settings": {
            "eps": subject.eps,
            "step_size": subject.step_size,
            **settings,
            "auxiliary_weight": subject.auxiliary_weight,
        },
        "attacks": {
            name: {
                "robust_accuracy": percent(row.right),
                "interval_95": wilson(row.right),
                "images": len(row.right),
                "seconds": round(row.seconds, 2),
                "notes": [*warnings, *row.notes],
                "parts": row.parts,
                "settings": row.settings,
                "made": row.made or made,
                "verdicts": "".join("1" if right else "0" for right in row.right.tolist()),
            }
            for name, row in rows.items()
        },
        "classes": by_class(rows, subject),
        "labels": split.labels.tolist(),
    }


def diagnosis_record(diagnosis: Diagnosis) -> dict:
    """Return what white_attack.json holds of --diagnostics."""
    by_eps = ("eps", *CURVES)
    by_steps = ("steps", *CURVES)
    return {
        "signs": [sign._asdict() for sign in diagnosis.signs],
        "by_eps": [dict(zip(by_eps, point, strict=True)) for point in diagnosis.by_eps],
        "by_steps": [dict(zip(by_steps, point, strict=True)) for point in diagnosis.by_steps],
    }


def diagnosis_lines(diagnosis: Diagnosis, subject: Subject, folder: Path) -> Iterator[str]:
    """Draw the curves of --diagnostics -> a line for each sign, and for each picture."""
    for sign in diagnosis.signs:
        yield f"{sign.figure}: {f'SIGN, {sign.name}' if sign.raised else 'ok'}"

    count = len(subject.split.labels)

    def with_interval(accuracy: float) -> tuple[float, float, float]:
        low, high = wilson(torch.arange(count) < round(accuracy * count / 100))
        return accuracy, low, high

    def draw(curve: list[tuple], name: str, xlabel: str, trained: object = None) -> str:
        points = [(x, with_interval(final), with_interval(every)) for x, final, every in curve]
        file = folder / f"robust_vs_{name}.png"
        note = save_or_note(partial(draw_robustness, points, xlabel, trained), file)
        return note or f"picture    {file} and .pdf"

    if diagnosis.by_eps:
        yield draw(diagnosis.by_eps, "eps", "eps of PGD-40", subject.recipe.get("epsilon"))
        steps = f"steps of PGD at eps {eps_text(subject.eps)}"
        yield draw(diagnosis.by_steps, "steps", steps)


def draw_worst(
    file: Path,
    subject: Subject,
    worst_images: Tensor,
    answers: list[Tensor],
    fooled: Tensor,
    attacks: list[str],
    count: int = 8,
) -> str:
    """Draw some images with the worst one found for each -> a line that says so.

    worst_images: (N, 3, S, S), for every image. answers: the network's logits (N, C) for the images
    and for the worst images. fooled: (N,) bool. Fooled, wrong and right images are shown in
    proportion to their numbers.
    """
    labels = subject.split.labels.cpu()
    natural = answers[0].argmax(1) == labels
    kind = torch.where(fooled, 0, torch.where(natural, 2, 1))
    order = kind.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]

    shares = [percent(kind == i) for i in range(3)]
    tried = dict.fromkeys(name.partition(":")[0] for name in attacks)
    title = (
        f"{len(chosen)} of {len(order)} images, spread evenly over {shares[0]:.1f} % fooled, "
        f"{shares[1]:.1f} % wrong without an attack, {shares[2]:.1f} % right throughout\n"
        f"below: the worst image that {', '.join(tried)} found at eps {eps_text(subject.eps)}"
    )
    images = as_input(subject.split.images.cpu()[chosen])
    draw = partial(
        draw_examples,
        [x.expand(-1, 3, -1, -1) for x in (images, worst_images[chosen])],  # grey ones too
        [logits[chosen].softmax(1) for logits in answers],
        fooled[chosen],
        labels[chosen],
        subject.eps,
        subject.split.classes,
        title,
    )
    return save_or_note(draw, file) or f"picture    {file} and .pdf"


def save_adversarial(file: Path, subject: Subject, images: Tensor, predicted: Tensor) -> str:
    """Write the worst image found for each image to an npz -> a line that says so.

    images: (N, 3, S, S) float32. predicted: (N,), the network's answers to them. The npz also holds
    labels (N,), right (N,), eps and the threat model in words.
    Errors: RunError where an image is not in the ball or not in [0, 1].
    """
    eps = subject.eps
    labels = subject.split.labels.cpu()
    distance = (images - as_input(subject.split.images.cpu())).abs().amax().item()
    if distance > eps + 1e-6 or images.min() < 0 or images.max() > 1:
        raise RunError(
            f"an attack left [0, 1] or the ball of {eps:.5g} (distance {distance:.5g}); "
            "no images are saved"
        )
    right = predicted == labels

    def write(part: Path) -> None:
        with open(part, "wb") as out:
            np.savez_compressed(
                out,
                images=images.numpy(),
                labels=labels.numpy(),
                predicted=predicted.numpy(),
                right=right.numpy(),
                eps=np.float32(eps),
                threat_model=threat_model(eps),
            )

    write_atomically(file, write)
    wrong = int((~right).sum())
    return f"saved      {file}: {len(images)} images, {wrong} of which the network gets wrong"
