"""What a run says of itself: train.log, run.json, metrics.csv, training_curves.png, TensorBoard."""

import csv
import shlex
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from utils.data.subject import at_chance
from utils.figures.plots import draw_curves, save_or_note
from utils.system import distributed
from utils.system.checkpoints import BEST
from utils.system.devices import peak_memory, precision_name
from utils.system.files import write_atomically, write_record
from utils.system.options import flag
from utils.system.provenance import in_one_line
from utils.system.settings import combined, dataset_defaults, stored
from utils.system.values import as_given
from utils.training.job import Job
from utils.training.runs import Start

Row = dict[str, Any]  # of metrics.csv, by column


def announce(job: Job, start: Start) -> None:
    """Log what will run, and record it in run.json."""
    job.log(in_one_line(job.provenance))
    job.log(describe(job))
    settings = job.settings
    record = {
        **job.provenance,
        "settings": stored(settings),
        "precision": precision_name(settings, job.device),
        "parameters": count_parameters(job),
        "classes": list(job.data.train.classes),
        "training_images": len(job.data.train.labels),
        "evaluation_images": len(job.data.selection.labels),
        "checksums": job.checksums,
        "ranks": distributed.world(),
    }
    write_record(job.folder / "run.json", record)
    if start.state is None:
        return
    progress = job.progress
    where = f"in epoch {progress.epoch}, {progress.done} images done, from {start.file}"
    job.log(f"resumed    {where}")
    for change in start.changes:
        job.log(f"changed    {change}")
    ranks = start.state["ranks"]
    if ranks != distributed.world():  # which decides the slices that BatchNorm sees
        job.log(f"ranks      {ranks} before, {distributed.world()} now")
    if job.checksums != start.state["checksums"]:
        job.log("data       other images than before, by --other-data")
    if progress.epoch > settings.epochs:
        job.log("nothing is left to train; raise --epochs")


def count_parameters(job: Job) -> int:
    """Count the parameters of the network."""
    return sum(parameter.numel() for parameter in job.model.parameters())


def describe(job: Job) -> str:
    """Describe what will run, as one block of lines."""
    settings = job.settings
    data = job.data
    parts = []
    if not settings.no_ra:
        parts.append("reverse attention")
    if not settings.no_anc:
        parts.append("asymmetric negative contrast")
    classes = data.train.classes
    counts = torch.bincount(data.train.labels, minlength=len(classes)).tolist()
    images = ", ".join(f"{name}: {count}" for name, count in zip(classes, counts, strict=True))
    if len(classes) > 20:
        images = f"{min(counts)} to {max(counts)} in each of {len(classes)} classes"
    stored_settings = stored(settings)

    lines = {
        "method": f"{settings.method}, {' and '.join(parts) or 'plain'}",
        "with": ", ".join(combined(stored_settings)),
        "network": f"{settings.arch}, {count_parameters(job):,} parameters",
        "data": f"{settings.dataset}, {sum(counts)} training images, {images}",
        "note": "; ".join(dict.fromkeys(split.note for split in data[:3] if split and split.note)),
        "selection": f"by pgd40_heads on {data.selected} ({len(data.selection.labels)} images)",
        "device": f"{job.device}, {precision_name(settings, job.device)}",
        "ranks": str(distributed.world()),
        "settings": ", ".join(f"{name} {as_given(v)}" for name, v in stored_settings.items()),
        "output": f"{job.folder}/",
    }
    if settings.precision == "bf16":
        lines["selection"] += ", searched in bfloat16, judged in float32"
    return "\n".join(f"{name:<11}{line}" for name, line in lines.items() if line)


def accuracies(natural: float, robust: float, labels: torch.Tensor) -> str:
    """Format the two accuracies of an evaluation on images of these labels, in percent."""
    chance = at_chance(natural, labels)
    return f"natural {natural:.2f} %, PGD-40 over heads {robust:.2f} %{chance}"


def percent_or_dash(accuracy: float | None) -> str:
    """Format an accuracy in percent, `-` where there is none."""
    return "-" if accuracy is None else f"{accuracy:.2f} %"


def epoch_line(job: Job, row: Row) -> str:
    """Describe an epoch in a line of the log."""
    natural = row["natural_accuracy"]
    robust = row["pgd40_heads_accuracy"]
    evaluation = "not evaluated"
    if natural is not None:
        evaluation = accuracies(natural, robust, job.data.selection.labels)
    memory = peak_memory(job.device)
    memory = "-" if memory is None else f"{memory / 1e9:.2f} GB"
    minutes = (job.settings.epochs - row["epoch"]) * row["seconds"] / 60
    return (
        f"epoch {row['epoch']}/{job.settings.epochs}  "
        f"loss {row['loss']:.4f} (contrast {row['contrast']:.4f})  train, first head: "
        f"natural {percent_or_dash(row['train_natural_accuracy_first_head'])}, "
        f"robust {row['train_robust_accuracy_first_head']:.2f} %  evaluation: {evaluation}  "
        f"{row['train_images_per_second']:.0f} images/s, {row['seconds']:.1f} s, "
        f"peak memory {memory}, {minutes:.1f} min left"
    )


def best_row(rows: list[Row]) -> Row | None:
    """Return the row of best_adv_model.pt, None where no epoch was evaluated.

    That is the first of the highest pgd40_heads_accuracy and, among these, natural accuracy.
    """
    evaluated = [row for row in rows if row["pgd40_heads_accuracy"] is not None]
    return max(
        evaluated,
        key=lambda row: (row["pgd40_heads_accuracy"], row["natural_accuracy"]),
        default=None,
    )


def write_metrics(file: Path, rows: list[Row]) -> None:
    """Write metrics.csv, with nine digits of each figure."""
    best = best_row(rows)
    lines = []
    for row in rows:
        line = {"selected": int(row is best)}
        for name, value in row.items():
            line[name] = f"{value:.9g}" if isinstance(value, float) else value
        lines.append(line)

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, [*rows[0], "selected"], lineterminator="\n")
            table.writeheader()
            table.writerows(lines)

    write_atomically(file, write)


def write_for_tensorboard(folder: Path, row: Row) -> None:
    """Add a row of metrics.csv to what TensorBoard shows of the run."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    with SummaryWriter(folder / "tensorboard") as writer:
        for name, value in row.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, row["epoch"])


class Curves:
    """The picture of a run's curves, drawn now and then by the first rank."""

    def __init__(self, job: Job) -> None:
        """Draw nothing yet."""
        self.job = job
        self.drawn_at = time.monotonic()
        self.log_once = cache(job.log)

    def draw(self, every: float = 0) -> None:
        """Draw the epochs so far, unless the last picture is younger than `every` seconds."""
        rows = self.job.progress.rows
        recent = time.monotonic() - self.drawn_at < every
        if recent or not rows or not distributed.first():
            return
        picture = partial(draw_curves, rows, best_row(rows))
        note = save_or_note(picture, self.job.folder / "training_curves.png")
        if note:
            self.log_once(note)
        self.drawn_at = time.monotonic()


def log_results(job: Job, on_test: tuple[float, float] | None) -> None:
    """Log the figures of the last and the best epoch, and how to go on.

    on_test: the two accuracies of the best epoch on images that did not choose it.
    """
    data = job.data
    rows = job.progress.rows
    labels = data.selection.labels
    for name, row in (("last", rows[-1]), ("best", best_row(rows))):
        if row is not None and row["natural_accuracy"] is not None:
            figures = accuracies(row["natural_accuracy"], row["pgd40_heads_accuracy"], labels)
            where = f"on {data.selected} at eps {as_given(job.settings.epsilon)}"
            job.log(f"{name} epoch, {row['epoch']}: {figures} {where}")
    if data.test is None:
        job.log("no test folder: no figure is of images that did not choose the epoch")
    if on_test is not None:
        job.log(f"best epoch on {data.tested}: {accuracies(*on_test, data.test.labels)}")
    job.log(f"checkpoint {job.folder / BEST}")
    job.log(f"curves     {job.folder / 'training_curves.png'}")
    job.log(f"evaluate by: python {shlex.join(evaluation_command(job))}")


def evaluation_command(job: Job) -> list[str]:
    """Return the command that evaluates a run's best checkpoint, without `python`."""
    script = Path(__file__).resolve().parents[2] / "test_white_attack.py"
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    command = [str(script), "--ckpt_url", str(job.folder / BEST)]
    usual = dataset_defaults(job.settings.dataset)
    for name in ("epsilon", "step_size"):
        value = getattr(job.settings, name)
        if value != getattr(usual, name):
            command += [flag(name), as_given(value)]
    return command
