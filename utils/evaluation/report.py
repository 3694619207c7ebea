"""What an evaluation leaves behind: the table, white_attack.json, pictures, and the adversarial images."""

import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.datasets import Split, as_input
from utils.data.subject import Subject, at_chance, percent
from utils.evaluation.adaptive import View
from utils.evaluation.autoattack import BLOCK, Says
from utils.evaluation.diagnostics import Diagnosis, diagnose
from utils.evaluation.results import ADAPTIVE, FORMAT, TOGETHER, needs_adaptive
from utils.figures.plots import draw_examples, draw_robustness, save_or_note
from utils.system import distributed
from utils.system.devices import computing
from utils.system.errors import RunError, UsageError
from utils.system.files import require_writable, write_atomically, write_record
from utils.system.settings import Evaluation
from utils.system.values import eps_text

THREAT = "Linf, eps {} on images in [0, 1]"
CURVES = ("PGD on the answer's logits", "PGD on every view")  # columns of the curves, besides eps or steps


class Row(NamedTuple):
    """A line of the table. right: (N,) bool, the verdicts. notes: what a reader must know. parts: of AutoAttack.

    settings: those of the attack. made: when and where, of a row that an earlier evaluation found.
    """

    right: Tensor
    seconds: float
    notes: list[str]
    parts: dict[str, dict[str, float]] | None = None
    settings: dict[str, object] | None = None
    made: str = ""


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
        log.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UsageError(f"{log} cannot be written ({error.strerror}); name another by --log_path") from error
    require_writable(log.parent, "name another folder by --log_path")
    if saved is not None:
        require_writable(Path(saved).resolve().parent, f"name another file by --save-adversarial, not {saved}")
        if Path(saved).is_dir():
            raise UsageError(f"--save-adversarial {saved} is a folder; name a file in it")


def earlier_rows(file: Path, identity: dict, rows: dict[str, Row], doubts: list[str]) -> dict[str, Row]:
    """What evaluations before this one found, on the same network and images in the same ball, and this one has not.

    file: their white_attack.json. A row with the name of one of `rows` that was found with other settings is a row of
    its own, named after what differs: a weaker search must not hide what a stronger one has found.
    """
    found: dict[str, Row] = {}
    try:
        newest = json.loads(file.read_text(encoding="utf-8"))
        records = [newest, *reversed(newest["earlier"])]
        same = next((record for record in records if record.get("identity") == identity), {"attacks": {}})
        for name, attack in same["attacks"].items():
            if name in TOGETHER:
                continue
            attack_name = name.partition(" (")[0]
            if attack_name in rows:
                other = differing(attack["settings"], rows[attack_name].settings)
                if not other:
                    continue
                name = f"{attack_name} ({other})"
            right = torch.tensor([verdict == "1" for verdict in attack["verdicts"]])
            notes = [note for note in attack["notes"] if note not in doubts]
            found[name] = Row(right, attack["seconds"], notes, attack["parts"], attack["settings"], attack["made"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # none, or none of today's
        return {}
    return found


def differing(settings: dict, others: dict) -> str:
    """The settings that are not those of another attack, in words."""
    keys = [key for key in settings | others if settings.get(key) != others.get(key)]
    return ", ".join(f"{key} {str(settings.get(key, 'as usual'))[:12]}" for key in keys)


def worst_cases(rows: dict[str, Row], network: dict) -> dict[str, Row]:
    """The worst case, image by image, over the views of the adaptive attack and over all lines of the table.

    None where attacks on the final logits overestimate the network and the adaptive attack is not there.
    """

    def together(some: dict[str, Row]) -> Row:
        right = torch.stack([row.right for row in some.values()]).all(0)
        return Row(right, sum(row.seconds for row in some.values()), [f"image by image, over {'; '.join(some)}"])

    if overestimated(rows, network):
        return {}
    adapted = {name: row for name, row in rows.items() if name.startswith(ADAPTIVE)}
    found = {"adaptive, worst case": together(adapted)} if len(adapted) > 1 else {}
    return found | ({"worst case": together(rows)} if len(rows) + len(found) > 2 else {})


def lowest(rows: dict[str, Row]) -> Tensor:
    """(N,) bool, which images stand every attack of the table."""
    return torch.stack([row.right for row in rows.values()]).all(0)


def overestimated(rows: dict[str, Row], network: dict) -> bool:
    """Whether these attacks overestimate a network, and have no worst case: it needs the adaptive one, too."""
    return needs_adaptive(network) and not any(name.startswith(ADAPTIVE) for name in rows)


def by_class(rows: dict[str, Row], subject: Subject) -> dict[str, dict[str, float]]:
    """Of each class, how many images there are, and natural and lowest accuracy in percent; the worst first."""
    split, found = subject.split, {}
    lower = "these attacks" if overestimated(rows, subject.info) else "worst case"
    verdicts = {"natural": rows["natural"].right, lower: lowest(rows)}
    for label in split.labels.unique().tolist():
        own = (split.labels == label).cpu()
        found[split.classes[label]] = {"images": int(own.sum())} | {k: percent(v[own]) for k, v in verdicts.items()}
    return dict(sorted(found.items(), key=lambda item: item[1][lower]))


def table(rows: dict[str, Row], subject: Subject, doubts: list[str]) -> Iterator[str]:
    """The lines of the table, notes below it, and the row in Markdown. doubts: what holds of every line, marked `!`."""
    doubted = " !" * bool(doubts)
    width, count = max(map(len, rows)), len(subject.split.labels)
    yield f"{'attack':<{width}}  {'robust %':>8}  {'95 % interval':>14}  {'images':>6}  {'seconds':>8}"
    for name, row in rows.items():
        low, high = wilson(row.right)
        seconds = ("" if "worst case" in name else f"{row.seconds:.1f}").rjust(8) + doubted
        yield f"{name:<{width}}  {percent(row.right):>8.2f}  {f'{low:.2f} - {high:.2f}':>14}  {count:>6}  {seconds}"
    for note in doubts:
        yield f"! every attack: {note}"
    for made in dict.fromkeys(row.made for row in rows.values() if row.made):
        names = [name for name, row in rows.items() if row.made == made]
        yield f"note: found on the same network and images by an earlier evaluation ({made}): {'; '.join(names)}"
    if subject.of > count:
        yield f"note: {count} of {subject.of} test images, the first after a fixed shuffle"
    yield from (f"note: {note}" for note in subject.notes)
    for name, row in rows.items():
        for note in row.notes[len(doubts) :]:
            yield f"note, {name}: {note}"
    classes = []
    for name, shares in by_class(rows, subject).items():
        _, natural, low = shares
        classes.append(f"{name} {shares[natural]:.2f}/{shares[low]:.2f}")
    more = ", ..." if len(classes) > 10 else ""
    yield f"classes, the weakest first, {natural}/{low}: {', '.join(classes[:10])}{more}"
    if said := at_chance(percent(rows["natural"].right), subject.split.labels):
        yield f"note, natural{said}: nothing here says anything of robustness"
    if overestimated(rows, subject.info):
        yield (
            "note: no worst case: attacks on the final logits overestimate networks with reverse attention; "
            "add --attacks adaptive, or all"
        )
    yield "| network | " + " | ".join(rows) + " |"
    yield "|" + "---|" * (len(rows) + 1)
    about = [subject.method, subject.info["arch"], subject.dataset, f"eps {eps_text(subject.eps)}", f"{count} images"]
    named = ", ".join(dict.fromkeys(about))  # a network of --model is called by its name only
    yield f"| {named} | " + " | ".join(f"{percent(row.right):.2f}{doubted}" for row in rows.values()) + " |"


def write_json(
    file: Path, settings: Evaluation, subject: Subject, rows: dict[str, Row], diagnosis: Diagnosis | None, more: dict
) -> dict:
    """white_attack.json: this evaluation, which is returned, and those before it as `earlier`. more: what else is told.

    `utils.evaluation.results` says what of it is stable. Verdicts are in the order of the test set or of --n-examples' shuffle.
    """
    split, known = subject.split, ("arch", "width", "reverse_attention", "gate", "ra_blocks", "epoch", "image_size")
    known += ("recipe", "mean", "std")
    said = ("num_steps", "random", "restarts", "apgd_steps", "seed", "surrogate", "attacks")
    said += ("test_batch_size", "n_examples", "diagnostics", "precision", "predict")
    started = f"{more['provenance']['started']}, {more['provenance']['device']}"
    record = {
        "format": FORMAT,
        "checkpoint": str(subject.file),
        "network": {"method": subject.method} | {key: subject.info.get(key) for key in known},
        "notes": subject.notes,
        "dataset": subject.dataset,
        "images": len(split.labels),
        "image_numbers": None if split.numbers is None else split.numbers.tolist(),
        "threat_model": THREAT.format(eps_text(subject.eps)),
        "settings": {"eps": subject.eps, "step_size": subject.step_size}
        | {key: getattr(settings, key) for key in said}
        | {"auxiliary_weight": subject.auxiliary_weight},
        "attacks": {
            name: {
                "robust_accuracy": percent(row.right),
                "interval_95": wilson(row.right),
                "images": len(row.right),
                "seconds": round(row.seconds, 2),
                "notes": row.notes,
                "parts": row.parts,
                "settings": row.settings,
                "made": row.made or started,
                "verdicts": "".join("01"[right] for right in row.right.tolist()),
            }
            for name, row in rows.items()
        },
        "classes": by_class(rows, subject),
        "labels": split.labels.tolist(),
    }
    if diagnosis is not None:
        curves = {"eps": diagnosis.by_eps, "steps": diagnosis.by_steps}
        named = {f"by_{x}": [dict(zip((x, *CURVES), row, strict=True)) for row in curves[x]] for x in curves}
        record["diagnostics"] = {"signs": [sign._asdict() for sign in diagnosis.signs]} | named
    write_record(file, record | more)
    return record


def predictions(subject: Subject, worst: Worst) -> dict[str, list[int]]:
    """The classes that the network answers: of each image as it is, and of the worst one found for it."""
    split, found = subject.split, {"natural": [], "worst case": []}
    with torch.no_grad(), computing("fp32"):
        for name, images in zip(found, (as_input(split.images.cpu()), worst.images), strict=True):
            for part in images.split(BLOCK):
                found[name] += subject.model(part.to(split.labels.device)).argmax(1).tolist()
    return found


def write_picture(file: Path, subject: Subject, worst: Worst, rows: dict[str, Row], count: int = 8) -> str:
    """Draw images and the worst found for each, kinds by their share of the data -> a line that says so."""
    kind = torch.where(worst.fooled, 0, torch.where(rows["natural"].right, 2, 1))
    order, device = kind.argsort(stable=True), subject.split.labels.device
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
    names = "fooled", "wrong without an attack", "right throughout"
    shares = ", ".join(f"{percent(kind == i):.1f} % {name}" for i, name in enumerate(names))
    tried = dict.fromkeys(name.split(":")[0] for name in rows if name != "natural" and "worst case" not in name)
    title = f"{len(chosen)} of {len(order)} images, spread evenly over {shares}\nbelow: the worst image that "
    title += f"{', '.join(tried)} found at eps {eps_text(subject.eps)}"
    batch = subject.split.take(chosen.to(device))
    pair = [as_input(batch.images), worst.images[chosen].to(device)]
    with torch.no_grad():
        probabilities = [subject.model(x).softmax(1).cpu() for x in pair]
    coloured = [x.cpu().expand(-1, 3, -1, -1) for x in pair]  # grey ones too
    shown = (coloured, probabilities, worst.fooled[chosen], batch.labels.cpu(), subject.eps, batch.classes, title)
    return save_or_note(partial(draw_examples, *shown), file) or f"picture    {file} and .pdf"


def save_adversarial(file: Path, subject: Subject, worst: Worst, predicted: list[int], right: Tensor) -> str:
    """Write the worst image found for each one to an npz -> a line that says so.

    images: (N, 3, S, S) float32 in [0, 1] and in the ball. labels, predicted: (N,). right: (N,) the verdicts on these,
    those of the table's worst case but for an image on the edge of two classes, judged in another batch by rounding.
    """
    images, split, eps = worst.images, subject.split, subject.eps
    off = (images - as_input(split.images.cpu())).abs().amax().item()
    if off > eps + 1e-6 or images.min() < 0 or images.max() > 1:
        raise RunError(f"an attack left the ball of {eps:.5g} (by {off - eps:.2g}) or [0, 1]; nothing is saved")
    labels = split.labels.cpu()
    found = torch.tensor(predicted) == labels
    content = {"images": images.numpy(), "labels": labels.numpy(), "predicted": predicted, "right": found.numpy()}

    def write(part: Path) -> None:
        with open(part, "wb") as out:
            np.savez_compressed(out, **content, eps=np.float32(eps), threat_model=THREAT.format(eps_text(eps)))

    write_atomically(file, write)
    differ = int((found != right).sum())
    return f"saved      {file}: {len(images)} images, {int((~found).sum())} of which the network gets wrong" + (
        f"; {differ} of them judged otherwise than in the table, by rounding" if differ else ""
    )


def run_diagnostics(
    subject: Subject, natural: Tensor, worst: Worst, views: dict[str, View], settings: Evaluation, log: Path, say: Says
) -> tuple[Row, Diagnosis]:
    """--diagnostics: a line for each sign of masking, two pictures, a line of the table; `worst` takes what fools."""
    began, own = time.perf_counter(), Worst(subject.split)
    style = dict(desc="diagnostics", bar_format="{desc}: {postfix} {elapsed}", leave=False, disable=distributed.quiet())
    how = dict(eps=subject.eps, step_size=subject.step_size, seed=settings.seed, batch_size=settings.test_batch_size)
    with tqdm(**style) as bar, computing("fp32"):  # verdicts
        found = diagnose(subject.model, subject.split, natural, views, found=own.take, progress=bar.set_postfix_str, **how)
    rows = own.fooled.nonzero().squeeze(1)
    worst.take(rows, own.images[rows], own.margins[rows])
    for sign in found.signs:
        say(f"{sign.figure}: {f'SIGN, {sign.name}' if sign.raised else 'ok'}")

    def banded(accuracy: float) -> tuple[float, float, float]:
        return accuracy, *wilson(torch.arange(len(natural)) < round(accuracy * len(natural) / 100))

    by_eps = "eps", found.by_eps, "eps of PGD-40", subject.recipe.get("epsilon")
    for label, curve, *said in by_eps, ("steps", found.by_steps, f"steps of PGD at eps {eps_text(subject.eps)}"):
        if curve and distributed.first():
            shares = [(x, banded(final), banded(adaptive)) for x, final, adaptive in curve]
            picture = log.parent / f"robust_vs_{label}.png"
            say(save_or_note(partial(draw_robustness, shares, *said), picture) or f"picture    {picture} and .pdf")
    return Row(natural & ~own.fooled, time.perf_counter() - began, []), found
