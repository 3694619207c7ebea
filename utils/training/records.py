"""What a run says of itself: train.log, run.json, metrics.csv, training_curves.png, TensorBoard."""

import csv
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.data.subject import at_chance
from utils.figures.plots import draw_curves, save_or_note
from utils.system import distributed
from utils.system.checkpoints import BEST
from utils.system.devices import precision_name
from utils.system.files import write_atomically, write_record
from utils.system.options import flag
from utils.system.provenance import in_one_line
from utils.system.settings import code_flags, dataset_defaults, idle, stored
from utils.system.values import as_given
from utils.training.job import Job
from utils.training.runs import Start

Row = dict[str, Any]  # of metrics.csv, by column


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
        "classes": list(data.train.classes),
        "training_images": len(data.train.labels),
        "evaluation_images": len(data.selection.labels),
        "checksums": data.checksums,
        "ranks": distributed.world(),
    }
    write_record(job.folder / "run.json", record)

    usual = stored(dataset_defaults(settings.dataset))
    changed = []
    for name, value in record["settings"].items():
        if value is None or value == usual[name] or name in idle(settings):
            continue
        changed.append(flag(name) if value is True else f"{flag(name)} {as_given(value)}")
    job.log(in_one_line(job.provenance))
    others = f", but for {' '.join(changed)}" if changed else ""
    job.log(f"settings   the defaults of {settings.dataset}{others}")
    job.log(f"network    {record['parameters']:,} parameters, {record['precision']}")
    job.log(f"data       {record['training_images']} images to train")
    job.log(f"selection  by pgd40_heads on {data.selected}, {record['evaluation_images']} images")
    for note in sorted({split.note for split in data[:3] if split and split.note}):
        job.log(f"note       {note}")
    job.log(f"output     {job.folder}/")
    if start.state is not None:
        log_resume(job, start)


def log_resume(job: Job, start: Start) -> None:
    """Log where a resumed run goes on, and what is other than before."""
    progress = job.progress
    job.log(f"resumed    in epoch {progress.epoch}, {progress.done} images done")
    for change in start.changes:
        job.log(f"changed    {change}")
    ranks = start.state["ranks"]
    if ranks != distributed.world():  # which decides the slices that BatchNorm sees
        job.log(f"ranks      {ranks} before, {distributed.world()} now")
    if job.source != start.state.get("source"):
        job.log(f"network    {job.settings.arch.rpartition(':')[0]} has changed since then")
    if job.data.checksums != start.state["checksums"]:
        job.log("data       other images than before, by --other-data")
    if progress.epoch > job.settings.epochs:
        job.log("nothing is left to train; raise --epochs")


def accuracies(natural: float | None, robust: float | None, labels: Tensor, where: str = "") -> str:
    """Format the two accuracies of an evaluation on images of these labels, in percent."""
    if natural is None:
        return "not evaluated"
    figures = f"natural {natural:.2f} %, PGD-40 over heads {robust:.2f} %"
    return f"{figures}{where}{at_chance(natural, labels)}"


def log_epoch(job: Job, row: Row) -> None:
    """Log an epoch in a line; metrics.csv has all of its figures."""
    epochs = job.settings.epochs
    labels = job.data.selection.labels
    figures = accuracies(row["natural_accuracy"], row["pgd40_heads_accuracy"], labels)
    minutes = (epochs - row["epoch"]) * row["seconds"] / 60
    speed = f"{row['seconds']:.1f} s, {minutes:.1f} min left"
    job.log(f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  {figures}  {speed}")


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


def draw_training_curves(job: Job) -> str:
    """Draw the epochs so far; return '', or a line that says why they could not be drawn."""
    rows = job.progress.rows
    if not rows or not distributed.first():
        return ""
    return save_or_note(
        partial(draw_curves, rows, best_row(rows)), job.folder / "training_curves.png"
    )


def log_results(job: Job, on_test: tuple[float, float] | None) -> None:
    """Log the figures of the last and the best epoch, and how to go on.

    on_test: the two accuracies of the best epoch on images that did not choose it.
    """
    data = job.data
    rows = job.progress.rows
    labels = data.selection.labels
    for name, row in (("last", rows[-1]), ("best", best_row(rows))):
        both = (row["natural_accuracy"], row["pgd40_heads_accuracy"])
        figures = accuracies(*both, labels, f" on {data.selected}")
        job.log(f"{name} epoch, {row['epoch']}: {figures}")
    if on_test is not None:
        job.log(f"best epoch on {data.tested}: {accuracies(*on_test, data.test.labels)}")

    script = Path(__file__).resolve().parents[2] / "test_white_attack.py"
    command = [str(script), "--ckpt_url", str(job.folder / BEST), *code_flags(job.settings.arch)]
    usual = dataset_defaults(job.settings.dataset, job.settings.norm)
    for name in ("epsilon", "step_size"):
        value = getattr(job.settings, name)
        if value != getattr(usual, name):
            command += [flag(name), as_given(value)]
    job.log(f"evaluate by: python {shlex.join(command)}")
