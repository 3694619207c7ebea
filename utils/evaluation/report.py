"""What an evaluation looks like: the table, the record for white_attack.json, pictures, an npz."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.subject import Subject, percent
from utils.evaluation.cache import WorstImages
from utils.evaluation.diagnostics import Diagnosis
from utils.evaluation.results import FORMAT, at_chance, wilson
from utils.figures.plots import Draw, draw_examples, draw_robustness, save_or_note
from utils.system.files import write_arrays
from utils.system.settings import Evaluation
from utils.system.values import eps_text


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


Rows = dict[str, Row]  # of a table, by the name of the attack
# Images, natural and worst-case accuracy in percent, by the name of the class
Classes = dict[str, dict[str, float]]


def heading(settings: Evaluation, subject: Subject) -> Iterator[str]:
    """Yield what a log says of an evaluation before it begins."""
    yield f"{subject.file}: {subject.described()}"
    start = "random" if settings.random else "natural"
    yield f"{subject.radius}, step {eps_text(subject.step_size)}, {start} start"
    if "adaptive" in settings.attacks:
        yield (
            f"adaptive attack: {settings.restarts} x PGD and {settings.apgd_restarts} x APGD of "
            f"{settings.apgd_steps} steps, on each view"
        )


def lowest(rows: Rows) -> Tensor:
    """Return which images are right under every attack, (N,) bool."""
    return torch.stack([row.right for row in rows.values()]).all(0)


def by_class(rows: Rows, subject: Subject) -> Classes:
    """Return images, natural and worst-case accuracy in percent of each class, weakest first."""
    worst = lowest(rows)
    labels = subject.split.labels.cpu()
    classes = {}
    for label in labels.unique().tolist():
        of_class = labels == label
        classes[subject.split.classes[label]] = {
            "images": int(of_class.sum()),
            "natural": percent(rows["natural"].right[of_class]),
            "worst case": percent(worst[of_class]),
        }
    return dict(sorted(classes.items(), key=lambda item: item[1]["worst case"]))


def table_lines(
    rows: Rows, subject: Subject, classes: Classes, warnings: list[str]
) -> Iterator[str]:
    """Yield the lines of the table, and notes below it.

    classes: those of `by_class`, or none where the rows overestimate the network. warnings: what
    holds of every row; rows are marked by `!` then.
    """
    mark = " !" if warnings else ""
    width = max(map(len, rows))
    count = len(subject.split.labels)
    yield f"{'attack':<{width}}  robust %   95 % interval  images   seconds"
    for name, row in rows.items():
        low, high = wilson(int(row.right.sum()), count)
        yield (
            f"{name:<{width}}  {percent(row.right):>8.2f}  {low:>6.2f} - {high:>5.2f}  {count:>6}  "
            f"{row.seconds:>8.1f}{mark}"
        )

    for warning in warnings:
        yield f"! every attack: {warning}"
    if count < subject.split.total:
        yield f"note: {count} of {subject.split.total} test images, the first of a fixed shuffle"
    for note in subject.notes:
        yield f"note: {note}"
    for name, row in rows.items():
        if row.settings.get("precision") == "bf16":
            yield f"note, {name}: a first look, searched in bfloat16, which may miss something"
        if row.made:
            yield f"note, {name}: from an earlier evaluation of this network ({row.made})"
        for note in row.notes:
            yield f"note, {name}: {note}"
    if chance := at_chance(percent(rows["natural"].right), subject.split.labels.tolist()):
        yield f"note, natural{chance}: nothing here says anything about robustness"

    if classes:
        accuracies = [
            f"{name} {of_class['natural']:.2f}/{of_class['worst case']:.2f}"
            for name, of_class in classes.items()
        ]
        yield f"the weakest classes, natural/worst case: {', '.join(accuracies[:10])}"
    else:
        yield (
            "note: no worst case: attacks on the final logits overestimate networks with reverse "
            "attention; add --attacks adaptive, or all"
        )


def threat_model(subject: Subject) -> str:
    """Return the ball of an evaluation in words."""
    return f"{subject.norm}, eps {eps_text(subject.eps)} on images in [0, 1]"


def record(
    settings: Evaluation,
    subject: Subject,
    rows: Rows,
    classes: Classes,
    worst: WorstImages,
    warnings: list[str],
    made: str,
) -> dict:
    """Return what white_attack.json holds of an evaluation, as plain values.

    `utils.evaluation.results` describes it. Verdicts are in the order of the test set, or of the
    shuffle of --n-examples. classes, warnings: as in `table_lines`. made: when and where this
    evaluation's rows were found.
    """
    split = subject.split
    images = len(split.labels)
    attacks = {}
    for name, row in rows.items():
        attack = row._asdict()
        right = attack.pop("right").int()
        attacks[name] = attack | {
            "robust_accuracy": percent(right),
            "interval_95": wilson(int(right.sum()), len(right)),
            "notes": [*warnings, *row.notes],
            "made": row.made or made,
            "verdicts": "".join(map(str, right.tolist())),
        }
    return {
        "format": FORMAT,
        "checkpoint": str(subject.file),
        "network": subject.info | {"method": subject.method},
        "notes": subject.notes,
        "dataset": subject.dataset,
        "images": images,
        "image_numbers": split.numbers.tolist() if images < split.total else None,
        "threat_model": threat_model(subject),
        "settings": asdict(settings)
        | {
            "norm": subject.norm,
            "eps": subject.eps,
            "step_size": subject.step_size,
            "auxiliary_weight": subject.auxiliary_weight,
        },
        "attacks": attacks,
        "classes": classes,
        "labels": split.labels.tolist(),
        "predicted": {
            "natural": worst.natural_logits.argmax(1).tolist(),
            "worst case": worst.logits.argmax(1).tolist(),
        },
    }


def diagnosis_lines(diagnosis: Diagnosis, subject: Subject, folder: Path) -> Iterator[str]:
    """Draw the curves of --diagnostics -> a line for each sign, and for each picture."""
    for sign in diagnosis.signs:
        yield f"{'SIGN' if sign.raised else 'no sign'}: {sign.name} ({sign.figure})"

    def interval(accuracy):
        count = len(subject.split.labels)
        return wilson(round(accuracy * count / 100), count)

    trained_eps = None
    if subject.recipe.get("norm") == subject.norm:
        trained_eps = subject.recipe["epsilon"]
    for name, points, xlabel, marked in (
        ("eps", diagnosis.by_eps, f"{subject.norm} eps of PGD-40", trained_eps),
        ("steps", diagnosis.by_steps, f"steps of PGD at {subject.radius}", None),
    ):
        if points:
            draw = partial(draw_robustness, points, interval, xlabel, marked)
            yield _picture(draw, folder / f"robust_vs_{name}.png")


def _picture(draw: Draw, file: Path) -> str:
    """Save a picture -> a line that says so."""
    return save_or_note(draw, file) or f"picture    {file} and .pdf"


def draw_worst(file: Path, subject: Subject, worst: WorstImages, attacks: list[str]) -> str:
    """Draw eight images, evenly spaced, and the worst found for each -> a line that says so."""
    count = len(worst.labels)
    chosen = torch.linspace(0, count - 1, min(8, count)).round().long()
    draw = partial(
        draw_examples,
        [worst.natural_images[chosen], worst.images[chosen]],
        [worst.natural_logits[chosen].softmax(1), worst.logits[chosen].softmax(1)],
        worst.labels[chosen],
        subject.split.classes,
        f"{len(chosen)} of {count} images; attacks fool {percent(worst.fooled):.1f} % of all\n"
        f"below: the worst image of {', '.join(attacks)} at {subject.radius}, if one fools",
    )
    return _picture(draw, file)


def save_adversarial(file: Path, subject: Subject, worst: WorstImages) -> str:
    """Write the worst image found for each image to an npz -> a line that says so.

    It holds images (N, 3, S, S) float32, labels (N,), predicted (N,), the network's answers to the
    images, right (N,), eps and the threat model in words.
    """
    predicted = worst.logits.argmax(1)
    write_arrays(
        file,
        {"checkpoint": str(subject.file)},
        images=worst.images.numpy(),
        labels=worst.labels.numpy(),
        predicted=predicted.numpy(),
        right=(predicted == worst.labels).numpy(),
        eps=np.float32(subject.eps),
        threat_model=np.array(threat_model(subject)),
    )
    return f"saved      {file}"
