"""What an evaluation looks like: the table, the record for white_attack.json, pictures, an npz."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.subject import Subject, at_chance, percent
from utils.evaluation.autoattack import BLOCK
from utils.evaluation.cache import WorstImages
from utils.evaluation.diagnostics import Diagnosis
from utils.evaluation.results import FORMAT, wilson
from utils.figures.plots import draw_examples, draw_robustness, save_or_note
from utils.system.files import write_atomically
from utils.system.settings import Evaluation
from utils.system.values import eps_text

RECORDED = (  # settings that white_attack.json keeps
    "num_steps",
    "random",
    "restarts",
    "apgd_steps",
    "apgd_restarts",
    "seed",
    "surrogate",
    "attacks",
    "test_batch_size",
    "n_examples",
    "diagnostics",
    "precision",
    "predict",
)
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


def heading(settings: Evaluation, subject: Subject) -> Iterator[str]:
    """Yield what a log says of an evaluation before it begins."""
    yield f"{subject.file}: {subject.described()}"
    yield (
        f"{subject.radius}, step {eps_text(subject.step_size)}, "
        f"{'random' if settings.random else 'natural'} start, seed {settings.seed}; adaptive "
        f"attack: {settings.restarts} x PGD, {settings.apgd_restarts} x APGD with "
        f"{settings.apgd_steps} steps"
    )
    yield f"blocks of {BLOCK} images, each cached when an attack has finished it"


def lowest(rows: dict[str, Row]) -> Tensor:
    """Return which images are right under every attack, (N,) bool."""
    return torch.stack([row.right for row in rows.values()]).all(0)


def by_class(rows: dict[str, Row], subject: Subject) -> dict[str, dict[str, float]]:
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
    rows: dict[str, Row], subject: Subject, classes: dict[str, dict], warnings: list[str]
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
    first_look = [name for name, row in rows.items() if row.settings.get("precision") == "bf16"]
    if first_look:
        yield (
            f"note: a first look: {', '.join(first_look)} searched in bfloat16, and may miss what "
            "a search in float32 finds; verdicts are float32"
        )
    for name, row in rows.items():
        if row.made:
            yield f"note, {name}: from an earlier evaluation of this network ({row.made})"
        for note in row.notes:
            yield f"note, {name}: {note}"
    chance = at_chance(percent(rows["natural"].right), subject.split.labels)
    if chance:
        yield f"note, natural{chance}: nothing here says anything about robustness"

    if classes:
        weakest = [
            f"{name} {shares['natural']:.2f}/{shares['worst case']:.2f}"
            for name, shares in classes.items()
        ]
        yield f"the weakest classes, natural/worst case: {', '.join(weakest[:10])}"
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
    rows: dict[str, Row],
    classes: dict[str, dict],
    worst: WorstImages,
    warnings: list[str],
    made: str,
) -> dict:
    """Return what white_attack.json holds of an evaluation, as plain values.

    `utils.evaluation.results` describes it. Verdicts are in the order of the test set, or of the
    shuffle of --n-examples. classes, warnings: as in `table_lines`. made: when and where this
    evaluation's rows were found.
    """
    keys = ("arch", "width", "reverse_attention", "gate", "ra_blocks", "epoch", "image_size")
    keys += ("classifier", "recipe", "mean", "std")
    split = subject.split
    images = len(split.labels)
    attacks = {}
    for name, row in rows.items():
        count = len(row.right)
        attacks[name] = {
            "robust_accuracy": percent(row.right),
            "interval_95": wilson(int(row.right.sum()), count),
            "images": count,
            "seconds": round(row.seconds, 2),
            "notes": [*warnings, *row.notes],
            "parts": row.parts,
            "settings": row.settings,
            "made": row.made or made,
            "verdicts": "".join("1" if right else "0" for right in row.right.tolist()),
        }
    return {
        "format": FORMAT,
        "checkpoint": str(subject.file),
        "network": {"method": subject.method, **{key: subject.info.get(key) for key in keys}},
        "notes": subject.notes,
        "dataset": subject.dataset,
        "images": images,
        "image_numbers": split.numbers.tolist() if images < split.total else None,
        "threat_model": threat_model(subject),
        "settings": {
            "norm": subject.norm,
            "eps": subject.eps,
            "step_size": subject.step_size,
            "auxiliary_weight": subject.auxiliary_weight,
            **{name: getattr(settings, name) for name in RECORDED},
        },
        "attacks": attacks,
        "classes": classes,
        "labels": split.labels.tolist(),
        "predicted": {
            "natural": worst.natural_logits.argmax(1).tolist(),
            "worst case": worst.logits.argmax(1).tolist(),
        },
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
        yield f"{'SIGN' if sign.raised else 'no sign'}: {sign.name} ({sign.figure})"
    if not diagnosis.by_eps:
        return

    count = len(subject.split.labels)

    def with_interval(accuracy: float) -> tuple[float, float, float]:
        return accuracy, *wilson(round(accuracy * count / 100), count)

    trained = None
    if subject.recipe.get("norm", subject.norm) == subject.norm:
        trained = subject.recipe.get("epsilon")
    for name, curve, xlabel, marked in (
        ("eps", diagnosis.by_eps, f"{subject.norm} eps of PGD-40", trained),
        ("steps", diagnosis.by_steps, f"steps of PGD at {subject.radius}", None),
    ):
        points = [(x, with_interval(final), with_interval(every)) for x, final, every in curve]
        draw = partial(draw_robustness, points, xlabel, marked)
        yield _picture(draw, folder / f"robust_vs_{name}.png")


def _picture(draw: Callable[[], object], file: Path) -> str:
    """Save a picture -> a line that says so."""
    return save_or_note(draw, file) or f"picture    {file} and .pdf"


def draw_worst(file: Path, subject: Subject, worst: WorstImages, attacks: list[str]) -> str:
    """Draw eight images with the worst one found for each -> a line that says so.

    Fooled, wrong and right images are shown in proportion to their numbers.
    """
    fooled = worst.fooled
    right = worst.logits.argmax(1) == worst.labels
    wrong = ~right & ~fooled
    order = torch.cat([kind.nonzero().squeeze(1) for kind in (fooled, wrong, right)])
    places = torch.linspace(0, len(order) - 1, min(8, len(order)))
    chosen = order[places.round().long()]
    pairs = (worst.natural_images[chosen], worst.images[chosen])
    answers = (worst.natural_logits[chosen], worst.logits[chosen])
    title = (
        f"Of {len(order)} images: {percent(fooled):.1f} % fooled, {percent(wrong):.1f} % wrong "
        f"without an attack, {percent(right):.1f} % right throughout\n"
        f"below: the worst image of {', '.join(attacks)} at {subject.radius}"
    )
    largest_change = subject.eps  # of a pixel
    if subject.norm == "L2":
        largest_change = (pairs[1] - pairs[0]).abs().max().item()
    draw = partial(
        draw_examples,
        [images.expand(-1, 3, -1, -1) for images in pairs],  # grey ones too
        [logits.softmax(1) for logits in answers],
        fooled[chosen],
        worst.labels[chosen],
        largest_change,
        subject.split.classes,
        title,
    )
    return _picture(draw, file)


def save_adversarial(file: Path, subject: Subject, worst: WorstImages) -> str:
    """Write the worst image found for each image to an npz -> a line that says so.

    It holds images (N, 3, S, S) float32, labels (N,), predicted (N,), the network's answers to the
    images, right (N,), eps and the threat model in words.
    """
    predicted = worst.logits.argmax(1)
    right = predicted == worst.labels

    def write(part: Path) -> None:
        with open(part, "wb") as out:
            np.savez_compressed(
                out,
                images=worst.images.numpy(),
                labels=worst.labels.numpy(),
                predicted=predicted.numpy(),
                right=right.numpy(),
                eps=np.float32(subject.eps),
                threat_model=threat_model(subject),
            )

    write_atomically(file, write)
    wrong = int((~right).sum())
    return f"saved      {file}: {len(right)} images, {wrong} of which the network gets wrong"
