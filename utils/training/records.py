"""What a run says of itself: train.log, run.json, metrics.csv, training_curves.png, TensorBoard."""

import csv
import math
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.evaluation.results import at_chance
from utils.figures.plots import draw_curves, save_or_note
from utils.system import distributed
from utils.system.checkpoints import BEST
from utils.system.devices import precision_name
from utils.system.files import write_atomically, write_record
from utils.system.provenance import in_one_line
from utils.system.settings import code_flags, stored
from utils.system.values import as_given
from utils.training.job import Job
from utils.training.runs import Start

Row = dict[str, Any]  # of metrics.csv, by column
NOT_EVALUATED: Row = {"natural_accuracy": None, "pgd40_heads_accuracy": None}


def announce(job: Job, start: Start) -> None:
    """Log what will run, and record it in run.json."""
    settings = job.settings
    data = job.data
    record = {
        **job.provenance,
        "settings": stored(settings),
        "source": job.source,
        "precision": precision_name(settings, job.device),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "training_images": len(data.train.labels),
        "evaluation_images": len(data.selection.labels),
        "checksums": data.checksums,
        "ranks": distributed.world(),
    }
    write_record(job.folder / "run.json", record)

    job.log(in_one_line(job.provenance))
    job.log(f"network    {record['parameters']:,} parameters, {record['precision']}")
    job.log(f"data       {record['training_images']} images to train")
    job.log(f"selection  by pgd40_heads on {data.selected}, {record['evaluation_images']} images")
    for note in sorted({data.train.note, data.selection.note, data.test.note} - {""}):
        job.log(f"note       {note}")
    job.log(f"output     {job.folder}/")
    if start.state is not None:
        log_resume(job, start)


def log_resume(job: Job, start: Start) -> None:
    """Log where a resumed run goes on, and what is other than before.

    Its command, and run.json with those of before, tell other settings, images and ranks.
    """
    progress = job.progress
    job.log(f"resumed    in epoch {progress.epoch}, {progress.done} images done")
    if job.source != start.state.get("source"):
        job.log(f"network    {job.settings.arch.rpartition(':')[0]} has changed since then")
    if progress.epoch > job.settings.epochs:
        job.log("nothing is left to train; raise --epochs")


def epoch_row(job: Job, accuracies: Row, seconds: float) -> Row:
    """Return the row of an epoch for metrics.csv. seconds: what its evaluation took."""
    progress = job.progress
    count = progress.done
    terms = dict(progress.sums)
    train_natural = accuracy(terms.pop("natural"), count)
    train_robust = accuracy(terms.pop("robust"), count)
    images = count * job.settings.batch_size / job.own_images  # with those of --extra-data
    return {
        "epoch": progress.epoch,
        "lr": job.optimizer.param_groups[0]["lr"],
        **{name: total / count for name, total in terms.items()},
        "train_natural_accuracy_first_head": train_natural,
        "train_robust_accuracy_first_head": train_robust,
        **accuracies,
        "train_images_per_second": images / progress.seconds,
        "seconds": progress.seconds + seconds,
    }


def accuracy(right: float, count: int) -> float | None:
    """Return the percentage of right answers among `count`.

    None where none were given (NaN), as on natural images by plain pgd.
    """
    return None if math.isnan(right) else 100 * round(right) / count


def in_words(accuracies: Row, labels: Tensor) -> str:
    """Format the two accuracies of an evaluation on images of these labels, in percent."""
    natural = accuracies["natural_accuracy"]
    if natural is None:
        return "not evaluated"
    robust = accuracies["pgd40_heads_accuracy"]
    remark = at_chance(natural, labels.tolist())
    return f"natural {natural:.2f} %, PGD-40 over heads {robust:.2f} %{remark}"


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


def log_epoch(job: Job) -> None:
    """Log the last epoch in a line, and write it to metrics.csv and for TensorBoard."""
    settings = job.settings
    rows = job.progress.rows
    row = rows[-1]
    minutes = (settings.epochs - row["epoch"]) * row["seconds"] / 60
    speed = f"{row['seconds']:.1f} s, {minutes:.1f} min left"
    figures = in_words(row, job.data.selection.labels)
    job.log(f"epoch {row['epoch']}/{settings.epochs}  loss {row['loss']:.4f}  {figures}  {speed}")
    if not distributed.first():
        return
    write_atomically(job.folder / "metrics.csv", lambda file: write_metrics(file, rows))
    if settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with SummaryWriter(job.folder / "tensorboard") as writer:
            for name, value in row.items():
                if value is not None and name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])


def write_metrics(file: Path, rows: list[Row]) -> None:
    """Write rows to metrics.csv, with nine digits of each figure."""
    best = best_row(rows)
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, [*rows[0], "selected"], lineterminator="\n")
        table.writeheader()
        for row in rows:
            line = {"selected": int(row is best)}
            for name, value in row.items():
                line[name] = f"{value:.9g}" if isinstance(value, float) else value
            table.writerow(line)


def draw_training_curves(job: Job) -> str:
    """Draw the epochs so far; return '', or a line that says why they could not be drawn."""
    if not distributed.first():
        return ""
    rows = job.progress.rows
    draw = partial(draw_curves, rows, best_row(rows))
    return save_or_note(draw, job.folder / "training_curves.png")


def log_results(job: Job, best: Row, on_test: Row | None) -> None:
    """Log the figures of the best epoch, and how to go on.

    on_test: its two accuracies on images that did not choose it.
    """
    settings = job.settings
    data = job.data
    figures = in_words(best, data.selection.labels)
    job.log(f"best epoch, {best['epoch']}: {figures}, on {data.selected}")
    if on_test is not None:
        job.log(f"best epoch on {data.tested}: {in_words(on_test, data.test.labels)}")

    script = Path(__file__).resolve().parents[2] / "test_white_attack.py"
    command = ["python", str(script), "--ckpt_url", str(job.folder / BEST)]
    command += ["--epsilon", as_given(settings.epsilon)]
    command += ["--step-size", as_given(settings.step_size)]
    job.log(f"evaluate by: {shlex.join([*command, *code_flags(settings.arch)])}")
