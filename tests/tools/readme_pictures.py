"""The pictures of README.md: what each is drawn from, and how."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from tests.tools import draw_idea, study
from tests.tools.readme_runs import RUNS
from utils.evaluation.results import difference, verdicts, worst_of
from utils.figures import plots

GOLDEN = Path(__file__).parents[1] / "golden"
SHARP = 400  # dots an inch, for pictures that the page shows at the width of a paper's column

# Rows of the forest plot: the table and row of the study, and what the picture calls it.
FOREST = {
    ("controls", "TRADES, lr 0.09"): "TRADES, three times the learning rate",
    ("companions_trades", "TRADES +AWP"): "TRADES + AWP",
    ("companions_trades", "TRADES +EMA"): "TRADES + EMA",
    ("gates", "gate label, no ANC"): "TRADES + RA",
    ("gates", "gate label"): "TRADES + RA + ANC (ANCRA)",
    ("companions_ancra", "ANCRA-TRADES +AWP"): "ANCRA + AWP",
    ("companions_ancra", "ANCRA-TRADES +EMA"): "ANCRA + EMA",
    ("gates", "gate soft"): "ANCRA, soft gate",
    ("gates", "gate none, no ANC"): "no gate, no ANC",
    ("gates", "gate none"): "no gate, ANC",
}
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


def forest_rows() -> list[dict]:
    """Return the gains over TRADES of the rows of `FOREST`, in points of accuracy.

    Each has `name`, `usual` for the gain under PGD-40 on the answer, and `worst`, the gain in the
    worst case and the ends of its 95 % interval.
    """
    records = study.saved(GOLDEN / "study_main.json")
    (first,) = study.groups_of({"TRADES": study.TRADES}, records).values()
    first_verdicts = [verdicts(record) for record in first]
    rows = []
    for (table, name), title in FOREST.items():
        row = study.TABLES[table]()[name]
        (group,) = study.groups_of({name: row}, records).values()
        row_verdicts = [verdicts(record) for record in group]
        gains = []
        for attacks in (["PGD-40"], list(first_verdicts[0])):
            one = worst_of(row_verdicts, attacks)
            other = worst_of(first_verdicts, attacks)
            gains.append([round(value, 3) for value in difference(one, other)])
        rows.append({"name": title, "usual": gains[0][0], "worst": gains[1]})
    return rows


def save(figure: object, file: Path, dpi: int) -> None:
    """Save a figure on white, which dark pages do not swallow."""
    figure.savefig(file, dpi=dpi, facecolor="white")


def draw_forest(rows: list[dict], file: Path) -> None:
    """Draw a line for each row: the gain by the usual attack, and that in the worst case."""
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = plots.new_figure(3.6, width=7)
        axes = figure.subplots()
        heights = np.arange(len(rows))[::-1]
        usual = [row["usual"] for row in rows]
        worst, low, high = np.array([row["worst"] for row in rows]).T
        axes.axvline(0, color="black", linewidth=0.8)
        axes.plot(usual, heights, "D", color="#d55e00", mfc="white", label="PGD-40 on the answer")
        axes.errorbar(
            worst,
            heights,
            xerr=[worst - low, high - worst],
            fmt="o",
            color="#0072b2",
            label="worst case, with its 95 % interval",
        )
        axes.set(xlabel="gain over TRADES in points of accuracy; digits, eps 0.1, three seeds each")
        axes.set_yticks(heights, [row["name"] for row in rows], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
        save(figure, file, 250)


def draw_curves(metrics: str, file: Path) -> None:
    """Draw the curves of a run from the text of its metrics.csv."""
    rows = []
    for line in csv.DictReader(metrics.splitlines()):
        row = {key: float(text) if text else None for key, text in line.items()}
        rows.append(row | {"epoch": int(line["epoch"])})
    best = max(rows, key=lambda row: row["pgd40_heads_accuracy"])
    with matplotlib.style.context(["default", plots.STYLE]):
        save(plots.draw_curves(rows, best), file, 200)


def draw_histogram(cosines: dict[str, list[float]], file: Path) -> None:
    """Draw the histogram of the cosines of images and negatives, by method."""
    values = [(name, np.array(numbers)) for name, numbers in cosines.items()]
    title = "images and their negatives\ndigits, 10 classes together, weighted features"
    with matplotlib.style.context(["default", plots.STYLE]):
        save(plots.draw_histogram(values, "cosine similarity", title), file, SHARP)


def draw_embedding(embedding: dict, file: Path) -> None:
    """Draw the maps of two networks' features."""
    panels = []
    for name, panel in embedding["panels"].items():
        clusters = [plots.Clusters(*one) for one in panel["clusters"]]
        panels.append(plots.Panel(name, np.array(panel["points"]), clusters))
    classes = [str(label) for label in range(10)]
    labels = np.array(embedding["labels"])
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = plots.draw_embedding(panels, labels, classes, ["natural"], "weighted features")
        save(figure, file, SHARP)
