"""The pictures of README.md: what each is drawn from, and how."""

import csv
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from tests.tools import draw_idea, study
from tests.tools.readme_runs import RUNS
from utils.evaluation.results import difference, seed_of, verdicts, worst_of
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


@cache
def forest_rows() -> list[dict]:
    """Return the gains over TRADES of the rows of `FOREST`, in points of accuracy.

    Each has `name`, `usual` for the gain under PGD-40 on the answer, and `worst`, the gain in the
    worst case and the ends of its 95 % interval.
    """
    records = study.saved(GOLDEN / "study_main.json")
    (first,) = study.groups_of({"TRADES": study.TRADES}, records).values()
    first_verdicts = [verdicts(record) for record in first]
    first_usual = np.mean([run["PGD-40"] for run in first_verdicts])
    attacks = list(first_verdicts[0])
    rows = []
    for (table, name), title in FOREST.items():
        row = study.TABLES[table]()[name]
        (group,) = study.groups_of({name: row}, records).values()
        row_verdicts = [verdicts(record) for record in group]
        usual = np.mean([run["PGD-40"] for run in row_verdicts]) - first_usual
        worsts = worst_of(row_verdicts, attacks), worst_of(first_verdicts, attacks)
        gain = difference(*worsts, list(map(seed_of, group)) == list(map(seed_of, first)))
        worst = [round(value, 3) for value in gain]
        rows.append({"name": title, "usual": round(100 * usual, 3), "worst": worst})
    return rows


def save(draw: Callable[[Figure], None], file: Path, dpi: int) -> None:
    """Save what `draw` draws, on white, which dark pages do not swallow."""
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = Figure()
        draw(figure)
        figure.savefig(file, dpi=dpi, facecolor="white")


def draw_forest(rows: list[dict], file: Path) -> None:
    """Draw a line for each row: the gain by the usual attack, and that in the worst case."""
    heights = np.arange(len(rows))[::-1]
    usual = [row["usual"] for row in rows]
    worst, low, high = np.array([row["worst"] for row in rows]).T
    bars = [worst - low, high - worst]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 3.6)
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.plot(usual, heights, "D", color="#d55e00", mfc="white", label="PGD-40 on the answer")
        label = "worst case, with its 95 % interval"
        axes.errorbar(worst, heights, xerr=bars, fmt="o", color="#0072b2", label=label)
        axes.set(xlabel="gain over TRADES in points of accuracy; digits, eps 0.1, three seeds each")
        axes.set_yticks(heights, [row["name"] for row in rows], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)

    save(draw, file, 250)


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
