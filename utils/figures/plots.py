"""Figures, drawn from numbers and saved as PNG and PDF, without a display.

All share one style: matplotlib's defaults and `STYLE`, with colours that the colour-blind tell
apart. Each function draws on the empty figure it is given; `save_figure` makes that and saves it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from utils.system.errors import RunError, first_line
from utils.system.files import write_atomically
from utils.system.values import eps_text

Draw = Callable[[Figure], None]  # draws on an empty figure
COLUMN = 3.3  # width of a paper's column in inches
STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "figure.labelsize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "image.interpolation": "none",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # TrueType, embedded: submission systems ask for it
    "savefig.dpi": 200,
    "savefig.bbox": "tight",  # a long legend makes the picture wider, and is not cut off
    "text.parse_math": False,  # the names of classes and runs are not formulas, even with a $
}
# Okabe and Ito, "Color Universal Design" (2008), the dark colours first
METHOD_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
METHOD_STYLES = tuple(itertools.product(("-", ":", "-."), METHOD_COLOURS))
# Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270, ten colours
CLASS_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
GREY = "#d9d9d9"
DARK_GREY = "#717581"
RIGHT = "#009e73"
WRONG = "#d55e00"
BINS = 20
BELOW = "outside lower center"  # the place of a legend
# Accuracies of a training's curves: column of metrics.csv, label, colour, style of the line
ACCURACIES = (
    ("train_natural_accuracy_first_head", "train natural (first head)", "#56b4e9", "--"),
    ("train_robust_accuracy_first_head", "train robust (first head)", "#e69f00", "--"),
    ("natural_accuracy", "natural", "#0072b2", "-"),
    ("pgd40_heads_accuracy", "PGD-40 over heads", "#d55e00", "-"),
)


def save_figure(draw: Draw, file: Path, make_figure: Callable[[], Figure] = Figure) -> Figure:
    """Save what `draw` draws on an empty figure as `file`, a PNG, and beside it as a PDF.

    The same figure gives the same bytes. make_figure: `pyplot.figure` for one with a window.
    Errors: RunError where it cannot be drawn.
    """
    try:
        with matplotlib.style.context(["default", STYLE]):  # not the user's matplotlibrc
            figure = make_figure()
            draw(figure)
            for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                save = partial(figure.savefig, format=kind, metadata=metadata)
                write_atomically(file.with_suffix(f".{kind}"), save)
    except Exception as error:  # a missing font, a full disk
        raise RunError(f"{file} is not drawn ({first_line(error)})") from error
    return figure


def save_or_note(draw: Draw, file: Path) -> str:
    """Save a figure, and return "" or a note where that fails, which must not end a training."""
    try:
        save_figure(draw, file)
    except RunError as error:
        return f"note: {error}"
    return ""


def draw_curves(rows: list[dict], best: dict | None, figure: Figure) -> None:
    """Draw a run's loss and accuracies by epoch.

    rows: those of metrics.csv, with None where an epoch was not evaluated. best: the row of the
    best checkpoint, which is marked. So are the epochs before which the learning rate falls.
    """
    figure.set_size_inches(9, 3.8)
    loss, accuracy = figure.subplots(1, 2)
    _plot_column(loss, rows, "loss", color="#0072b2")

    for column, label, colour, line in ACCURACIES:
        _plot_column(accuracy, rows, column, label=label, color=colour, ls=line)
    if best is not None:
        label = f"best checkpoint: epoch {best['epoch']}"
        circle = {"color": "black", "marker": "o", "ms": 9, "mfc": "none", "ls": ""}
        accuracy.plot(best["epoch"], best["pgd40_heads_accuracy"], label=label, **circle)

    label = "learning rate falls"
    for before, after in itertools.pairwise(rows):
        if after["lr"] < before["lr"] / 5:
            for axes in (loss, accuracy):
                axes.axvline(after["epoch"] - 0.5, color=DARK_GREY, ls=":", label=label)
            label = None  # once in the legend
    for axes, name in ((loss, "training loss"), (accuracy, "accuracy in %")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    accuracy.set_ylim(0, 100)
    figure.legend(handles=accuracy.get_legend_handles_labels()[0], loc=BELOW, ncols=3)


def _plot_column(axes: Axes, rows: list[dict], column: str, **style: object) -> None:
    """Plot a column of metrics.csv against the epoch, where it has values."""
    known = [row for row in rows if row[column] is not None]
    epochs = [row["epoch"] for row in known]
    axes.plot(epochs, [row[column] for row in known], marker=".", **style)


def draw_examples(
    images: list[Tensor],
    probabilities: list[Tensor],
    labels: Tensor,
    classes: Sequence[str],
    title: str,
    figure: Figure,
) -> None:
    """Draw images, a column each: natural, the change by an attack, attacked, and the answers.

    images: natural and attacked ones, (n, 3, S, S) in [0, 1], which are equal where no attack fools
    the network. probabilities: the network's answers to both, (n, C). labels: (n,). The change is
    scaled so that the largest of a pixel uses the whole range.
    """
    natural, attacked = images
    change = attacked - natural
    scale = 0.5 / max(change.abs().max().item(), 1e-12)
    pictures_by_row = {
        "natural": natural,
        f"change x{scale:.3g}": (change * scale + 0.5).clamp(0, 1),
        "attacked": attacked,
    }
    count = len(labels)
    figure.set_size_inches(max(1.1 * count + 0.4, 4), 5.6)
    grid = figure.subplots(3, count, squeeze=False)
    for row, (name, pictures) in zip(grid, pictures_by_row.items(), strict=True):
        row[0].set_ylabel(name)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[], frame_on=False)

    fooled = change.flatten(1).any(1)
    for column, label, is_fooled, *answers in zip(
        grid.T, labels, fooled, *probabilities, strict=True
    ):
        column[0].set_title(f"true class\n{classes[label][:14]}")
        if not is_fooled:
            is_right = answers[0].argmax() == label
            column[1].set_xlabel("not fooled" if is_right else "wrong already")
        for axes, answer in zip(column[::2], answers, strict=True):
            confidence, predicted = answer.max(0)
            text = f"{classes[predicted][:14]}\n{100 * confidence:.1f} %"
            axes.set_xlabel(text, color=RIGHT if predicted == label else WRONG)
    figure.suptitle(title, wrap=True)
    figure.supxlabel("the network's answer and its probability; green: right, red: wrong")


def draw_robustness(
    points: list[dict[str, float]],
    interval: Callable[[float], tuple[float, float]],
    xlabel: str,
    trained_eps: float | None,
    figure: Figure,
) -> None:
    """Draw robust accuracy against eps or the number of steps, on an axis logarithmic beyond 0.

    points: of each first that number, then the accuracies in % by the name of the attack.
    interval(accuracy): the ends of its interval. trained_eps: the eps of training, which is marked,
    or None.
    """
    figure.set_size_inches(4.6, 3.8)
    axes = figure.subplots()
    x_name, *names = points[0]
    x = [point[x_name] for point in points]
    for name, colour, line in zip(names, METHOD_COLOURS, (".-", "s--"), strict=False):
        accuracies = [point[name] for point in points]
        low, high = zip(*map(interval, accuracies), strict=True)
        axes.plot(x, accuracies, line, color=colour, ms=4, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if trained_eps is not None:
        label = f"training eps, {eps_text(trained_eps)}"
        axes.axvline(trained_eps, color=DARK_GREY, ls=":", label=label)

    axes.set_xscale("symlog", linthresh=min(value for value in x if value > 0), linscale=0.5)
    axes.set_xticks(x, [eps_text(value) for value in x], rotation=90)
    axes.minorticks_off()
    axes.set(
        xlim=(x[0], 1.1 * x[-1]),
        ylim=(-2, 102),
        xlabel=xlabel,
        ylabel="robust accuracy in % (band: 95 % interval)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc=BELOW)


def draw_histogram(
    values: list[tuple[str, np.ndarray]], xlabel: str, title: str, figure: Figure
) -> None:
    """Draw the distances of several methods over the same 20 bins, in percent of the images.

    values: (method, distances (M,)). A dashed line marks the mean of each.
    """
    figure.set_size_inches(COLUMN, 2 + 0.14 * len(values))
    axes = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate([distances for _, distances in values]), BINS)
    for (label, distances), (line_style, colour) in zip(
        values, itertools.cycle(METHOD_STYLES), strict=False
    ):
        share = 100 * np.histogram(distances, edges)[0] / len(distances)
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(share, edges, color=colour, linestyle=line_style, linewidth=1.2, label=label)
        axes.axvline(distances.mean(), color=colour, linewidth=1, linestyle="--")
    axes.set(xlabel=f"{xlabel} (dashed: mean)", ylabel="images in %", title=title)
    axes.set_xlim(edges[0], edges[-1])
    figure.legend(loc=BELOW)


class Panel(NamedTuple):
    """The embedding of one run: points (kinds * N, 2), the N images of one kind in a row.

    measured: how far classes are clusters, by features and images such as `weighted, natural`: the
    mean `silhouette`, in [-1, 1], and `agreement`, the share of nearest neighbours of the same
    class, in [0, 1].
    """

    name: str
    points: np.ndarray
    measured: dict[str, dict[str, float]]


def draw_embedding(
    panels: list[Panel],
    labels: np.ndarray,
    classes: Sequence[str],
    kinds: list[str],
    features: str,
    figure: Figure,
) -> None:
    """Draw embeddings as scatter plots coloured by class, one panel a run.

    labels: (N,). kinds: of images, `natural` and perhaps a second one, which is drawn as crosses.
    features: what was embedded, for the legend's title. Of more than ten classes, ten evenly chosen
    ones have a colour, and the others are grey.
    """
    present = np.unique(labels)
    count = min(len(present), len(CLASS_COLOURS))
    coloured = present[np.linspace(0, len(present) - 1, count).round().astype(int)]
    colour_of = dict(zip(coloured, CLASS_COLOURS, strict=False))
    handles = [_marker(classes[label], colour, "o") for label, colour in colour_of.items()]
    markers = dict(zip(kinds, "ox", strict=False))
    if len(kinds) > 1:
        handles += [_marker(kind, "black", marker) for kind, marker in markers.items()]
    legend_rows = 2 if max(len(classes[label]) for label in coloured) < 6 else 5

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure.set_size_inches(COLUMN, rows * (COLUMN / columns + 0.4) + 0.14 * legend_rows + 0.6)
    size = 4000 / columns / len(panels[0].points)
    order = np.isin(labels, coloured).argsort()  # grey ones first, below the others
    colours = [colour_of.get(label, GREY) for label in labels[order]]
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1, xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        points_by_kind = np.split(panel.points, len(kinds))
        for points, marker in zip(points_by_kind, markers.values(), strict=True):
            axes.scatter(*points[order].T, max(size, 1.5), colours, marker=marker, linewidths=0.4)
        lines = [panel.name]
        for key, numbers in panel.measured.items():
            lines.append(f"{key}: {numbers['silhouette']:.2f}, {100 * numbers['agreement']:.1f} %")
        axes.set_title("\n".join(lines), fontsize=6)

    figure.legend(
        handles=handles,
        loc=BELOW,
        ncols=math.ceil(len(handles) / legend_rows),
        title=(
            f"UMAP of {features}; {len(coloured)} of {len(present)} classes in colour\n"
            "above: silhouette, share of the 12 nearest neighbours of the same class"
        ),
        title_fontsize=6,
        handletextpad=0.2,
        columnspacing=0.8,
    )


def _marker(label: str, colour: str, marker: str) -> Line2D:
    """Make an entry of a legend that is a marker without a line."""
    return Line2D([], [], color=colour, marker=marker, ls="none", markersize=3.5, label=label)
