"""The pictures of README.md: what each is drawn from, and how."""

import csv
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.tools import draw_idea, study
from tests.tools.readme_runs import RUNS
from utils.evaluation.results import Groups, verdicts
from utils.figures import plots

SHARP = 400  # dots an inch, for pictures that the page shows at the width of a paper's column

# What the forest plot calls rows of the study that have another name there.
FOREST = {
    "TRADES, three times the rate": "TRADES, three times the learning rate",
    "TRADES, 30 epochs": "TRADES, 30 epochs instead of 16",
    "gate label": "ANCRA-TRADES, as published",
    "gate label, own classifiers": "ANCRA-TRADES, own classifiers (as in CAS)",
    "gate soft": "ANCRA-TRADES, soft gate",
    "gate none": "ANCRA-TRADES without a gate",
    "gate none, 30 epochs": "ANCRA-TRADES without a gate, 30 epochs",
    "gate none, own classifiers": "ANCRA-TRADES without a gate, own classifiers",
    "gate none + EMA": "ANCRA-TRADES without a gate + EMA",
    "gate none + AWP": "ANCRA-TRADES without a gate + AWP",
    "PGD": "PGD training",
    "PGD, gate label": "ANCRA-PGD, as published",
    "PGD, gate none": "ANCRA-PGD without a gate",
    "MART, gate label": "ANCRA-MART, as published",
    "MART, gate none": "ANCRA-MART without a gate",
}
PANELS = {
    "digits-epyc": "digits, on an AMD EPYC",
    "digits": "digits, on an Intel Xeon",
    "fashion-mnist": "Fashion-MNIST",
}
USUAL_COLOUR = "#d55e00"
WORST_COLOUR = "#0072b2"
Draw = Callable[[object, Path], None]


def pictures() -> dict[str, tuple[object, Draw]]:
    """Return the data and the drawing function of each picture in figure/.

    The picture of the idea is drawn from no data but its own program.
    """
    runs = json.loads(RUNS.read_text())
    return {
        "idea.png": (Path(draw_idea.__file__).read_text(), lambda _, file: draw_idea.draw(file)),
        "forest.png": (forest_rows(), draw_forest),
        "digits_training_curves.png": (runs["metrics"], draw_curves),
        "hist-digits-all-NP-cosine.png": (runs["cosines"], draw_histogram),
        "umap-TRADES_ANCRA-TRADES-digits.png": (runs["embedding"], draw_embedding),
    }


@cache
def forest_rows() -> dict[str, list[dict]]:
    """Return the gains over TRADES by panel, in points of accuracy, those of most gain first.

    Each has `name`, `seeds`, `usual` for the gain under PGD-40 on the answer, and `worst`, the gain
    in the worst case and the ends of its 95 % interval.
    """
    panels = {}
    for study_name, title in PANELS.items():
        file = study.file_of(study_name)
        if file.exists():
            rows = study.STUDIES[study_name].rows()
            panels[title] = gains(study.groups_of(rows, study.saved(file)))
    return panels


def gains(groups: Groups) -> list[dict]:
    """Return the gains of all rows over TRADES, as `forest_rows` does for a panel."""
    baseline = groups["TRADES"]
    rows = []
    for name, group in groups.items():
        if group is not baseline:
            usual = mean_accuracy(group, "PGD-40") - mean_accuracy(baseline, "PGD-40")
            worst = [round(value, 3) for value in study.gain(group, baseline)]
            row = {"seeds": len(group), "usual": round(usual, 3), "worst": worst}
            rows.append({"name": FOREST.get(name, name)} | row)
    return sorted(rows, key=lambda row: -row["worst"][0])


def mean_accuracy(group: list[dict], column: str) -> float:
    """Return the mean accuracy of a row's runs in %."""
    return 100 * float(np.mean([verdicts(record)[column].mean() for record in group]))


def save(draw: Callable[[Figure], None], file: Path, dpi: int) -> None:
    """Save what `draw` draws, on white, which dark pages do not swallow."""
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = Figure()
        draw(figure)
        figure.savefig(file, dpi=dpi, facecolor="white")


def draw_forest(panels: dict[str, list[dict]], file: Path) -> None:
    """Draw the panels, and in each a line for each row: both gains."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 0.6 + sum(0.55 + 0.3 * len(rows) for rows in panels.values()))
        heights = [len(rows) + 1 for rows in panels.values()]
        every = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
        for axes, (title, rows) in zip(every[:, 0], panels.items(), strict=True):
            draw_panel(axes, title, rows)
        name_marks(every[0, 0], next(iter(panels.values())))
        label = "gain over TRADES in points, with 95 % intervals; in parentheses, seeds"
        if any(row["seeds"] == 1 for rows in panels.values() for row in rows):
            label += "\ndotted: one seed, an interval over images alone"
        axes.set_xlabel(label)

    save(draw, file, 250)


def draw_panel(axes: Axes, title: str, rows: list[dict]) -> None:
    """Draw the gains of a panel."""
    heights = np.arange(len(rows))[::-1]
    usual = [row["usual"] for row in rows]
    worst, low, high = np.array([row["worst"] for row in rows]).T
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot(usual, heights, "D", color=USUAL_COLOUR, mfc="white")
    axes.plot(worst, heights, "o", color=WORST_COLOUR)
    for row, *ends, height in zip(rows, low, high, heights, strict=True):
        line = ":" if row["seeds"] == 1 else "-"
        axes.plot(ends, [height, height], line, color=WORST_COLOUR)
    axes.set_yticks(heights, [f"{row['name']} ({row['seeds']})" for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)


def name_marks(axes: Axes, rows: list[dict]) -> None:
    """Say above the marks of the row in which they are farthest apart which is which."""
    gaps = [abs(row["worst"][0] - row["usual"]) for row in rows]
    i = int(np.argmax(gaps))
    height = len(rows) - 1 - i
    place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # no line crosses the words
    for text, x, colour in (
        ("PGD-40 on the answer", rows[i]["usual"], USUAL_COLOUR),
        ("worst case", rows[i]["worst"][0], WORST_COLOUR),
    ):
        axes.annotate(text, (x, height), color=colour, bbox=box, **place)


def draw_curves(metrics: str, file: Path) -> None:
    """Draw the curves of a run from the text of its metrics.csv."""
    rows = []
    for line in csv.DictReader(metrics.splitlines()):
        row = {key: float(text) if text else None for key, text in line.items()}
        rows.append(row | {"epoch": int(line["epoch"])})
    best = max(rows, key=lambda row: row["pgd40_heads_accuracy"])
    save(partial(plots.draw_curves, rows, best), file, 200)


def draw_histogram(cosines: dict[str, list[float]], file: Path) -> None:
    """Draw the histogram of the cosines of images and negatives, by method."""
    values = [(name, np.array(numbers)) for name, numbers in cosines.items()]
    title = "images and their negatives\ndigits, all classes, weighted features"
    save(partial(plots.draw_histogram, values, "cosine similarity", title), file, SHARP)


def draw_embedding(embedding: dict, file: Path) -> None:
    """Draw the maps of two networks' features."""
    panels = [
        plots.Panel(name, np.array(panel["points"]), panel["measured"])
        for name, panel in embedding["panels"].items()
    ]
    labels = np.array(embedding["labels"])
    classes = [str(label) for label in range(10)]
    kinds = ["natural"]
    draw = partial(plots.draw_embedding, panels, labels, classes, kinds, "weighted features")
    save(draw, file, SHARP)
