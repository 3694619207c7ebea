"""Figures, drawn from numbers and saved as PNG and PDF, without a display.

All share one style: matplotlib's defaults and `STYLE`, with colours that the colour-blind tell
apart. Figures for a paper are as wide as one of its columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from utils.system.errors import UsageError, first_line
from utils.system.files import write_atomically
from utils.system.values import eps_text

# matplotlib is imported where it draws, since training goes on where its installation is broken.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLUMN = 3.3  # width in inches
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # TrueType, embedded: submission systems ask for it
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


class Clusters(NamedTuple):
    """How far classes are clusters in one kind of features of one kind of images.

    layer: `weighted`, `unweighted` or `plain`. images: such as `natural`. silhouette: the mean, in
    [-1, 1]. agreement: the share of nearest neighbours of the same class, in [0, 1].
    """

    layer: str
    images: str
    silhouette: float
    agreement: float


class Panel(NamedTuple):
    """The embedding of one run: points (kinds * N, 2), the N images of one kind in a row."""

    name: str
    points: np.ndarray
    clusters: Sequence[Clusters]


def save_or_note(draw: Callable[[], Figure], file: Path) -> str:
    """Save the figure that `draw` returns as `file`, a PNG, and beside it as a PDF.

    The same figure gives the same bytes. Returns "", or a line on what failed: no job ends because
    a picture could not be drawn.
    """
    try:
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):  # not the user's matplotlibrc
            figure = draw()
            for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                save = partial(figure.savefig, format=kind, dpi=200, metadata=metadata)
                write_atomically(file.with_suffix(f".{kind}"), save)
    except Exception as error:
        return f"note: {file} is not drawn ({type(error).__name__}: {first_line(error)})"
    return ""


def new_figure(height: float, width: float = COLUMN, show: bool = False) -> Figure:
    """Make an empty figure, height and width in inches; show: one that gets a window."""
    if show:
        import matplotlib.pyplot as plt

        return plt.figure(figsize=(width, height), layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def require_display() -> None:
    """Raise UsageError where no window can be opened, with `--show`."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        raise UsageError("--show: there is no display to open a window on; leave it out")


def show_windows() -> None:
    """Open a window for each figure that was made to be shown, and wait until they are closed."""
    import matplotlib.pyplot as plt

    plt.show()


def draw_curves(rows: list[dict], best: dict | None) -> Figure:
    """Draw a run's loss and accuracies by epoch.

    rows: those of metrics.csv, with None where an epoch was not evaluated. best: the row of the
    best checkpoint, which is marked. So are the epochs before which the learning rate falls.
    """
    figure = new_figure(3.8, width=9)
    loss, accuracy = figure.subplots(1, 2)
    _plot_column(loss, rows, "loss", color="#0072b2")

    evaluated = [row for row in rows if row["natural_accuracy"] is not None]
    plot = partial(_plot_column, accuracy)
    natural, robust = "train_natural_accuracy_first_head", "train_robust_accuracy_first_head"
    plot(rows, natural, label="train natural (first head)", color="#56b4e9", ls="--")
    plot(rows, robust, label="train robust (first head)", color="#e69f00", ls="--")
    plot(evaluated, "natural_accuracy", label="natural", color="#0072b2")
    plot(evaluated, "pgd40_heads_accuracy", label="PGD-40 over heads", color="#d55e00")
    if best is not None:
        accuracy.plot(
            best["epoch"],
            best["pgd40_heads_accuracy"],
            color="black",
            marker="o",
            ms=9,
            mfc="none",
            ls="",
            label=f"best checkpoint: epoch {best['epoch']}",
        )
    accuracy.set_ylim(0, 100)
    handles = list(accuracy.get_lines())

    falls = []
    for before, after in itertools.pairwise(rows):
        if after["lr"] < before["lr"] / 5:
            falls.append(after["epoch"] - 0.5)
    for axes, name in ((loss, "training loss"), (accuracy, "accuracy in %")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        lines = [axes.axvline(epoch, color=DARK_GREY, ls=":") for epoch in falls]
    if falls:
        lines[0].set_label("learning rate is divided by 10")
        handles.append(lines[0])
    _legend(figure, handles, ncols=3)
    return figure


def _plot_column(axes: Axes, rows: list[dict], column: str, **style: object) -> None:
    """Plot a column of metrics.csv against the epoch."""
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row[column] for row in rows], marker=".", **style)


def draw_examples(
    images: list[Tensor],
    probabilities: list[Tensor],
    fooled: Tensor,
    labels: Tensor,
    eps: float,
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Draw images, a column each: natural, perturbation, adversarial, with the network's answers.

    images: natural and adversarial ones, (n, 3, S, S) in [0, 1]. probabilities: of both, (n, C).
    fooled: (n,) bool; the others have no adversarial image, and the figure says so. labels: (n,).
    The perturbation is scaled to use the whole range.
    """
    natural, adversarial = images
    natural_answers, adversarial_answers = probabilities
    scale = 0.5 / max(eps, 1e-12)
    perturbation = ((adversarial - natural) * scale + 0.5).clamp(0, 1)

    count = len(labels)
    figure = new_figure(5.6, width=max(1.1 * count + 0.4, 4))
    grid = figure.subplots(3, count, squeeze=False)
    names = ("natural", f"perturbation x{scale:.3g}", "adversarial")
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], box_aspect=1)

    for i, (top, middle, bottom) in enumerate(grid.T):
        top.set_title(f"true class\n{classes[labels[i]][:14]}")
        shown = [(top, natural[i], natural_answers[i])]
        if fooled[i]:
            middle.imshow(perturbation[i].permute(1, 2, 0).numpy(), interpolation="none")
            shown.append((bottom, adversarial[i], adversarial_answers[i]))
        else:
            middle.spines[:].set_visible(False)
            bottom.spines[:].set_visible(False)
            is_right = natural_answers[i].argmax() == labels[i]
            text = "not fooled" if is_right else "wrong\nas it is"
            place = {"ha": "center", "va": "center", "transform": bottom.transAxes}
            bottom.text(0.5, 0.5, text, color=DARK_GREY, **place)
        for axes, image, answer in shown:
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="none")
            confidence, predicted = answer.max(0)
            colour = RIGHT if predicted == labels[i] else WRONG
            text = f"{classes[predicted][:14]}\n{100 * confidence:.1f} %"
            axes.set_xlabel(text, color=colour)

    figure.suptitle(title, fontsize=8, wrap=True)
    handles = [_marker("right", RIGHT, "s"), _marker("wrong", WRONG, "s")]
    _legend(figure, handles, ncols=2, title="the network's answer and its probability")
    return figure


def draw_robustness(curve: list[tuple], xlabel: str, trained: object = None) -> Figure:
    """Draw robust accuracy against eps or the number of steps, on an axis logarithmic beyond 0.

    curve: (eps or steps, PGD on the answer's logits, adaptive PGD), where each of the two is
    (accuracy in %, low and high end of its interval). trained: the eps of training, marked where it
    is a number.
    """
    figure = new_figure(3.8, width=4.6)
    axes = figure.subplots()
    x, final, adaptive = zip(*curve, strict=True)
    _plot_band(axes, x, final, "#0072b2", marker=".", label="PGD on the answer's logits")
    label = "adaptive: PGD on every view, worst case"
    _plot_band(axes, x, adaptive, "#d55e00", marker="s", ms=4, ls="--", label=label)
    if isinstance(trained, float):
        label = f"training eps, {eps_text(trained)}"
        axes.axvline(trained, color=DARK_GREY, ls=":", label=label)

    axes.set_xscale("symlog", linthresh=min(value for value in x if value > 0), linscale=0.5)
    axes.set_xticks(x, [eps_text(value) for value in x], rotation=90)
    axes.minorticks_off()
    axes.set(xlim=(x[0], 1.1 * x[-1]), ylim=(-2, 102))
    axes.set(xlabel=xlabel, ylabel="robust accuracy in % (band: 95 % interval)")
    axes.grid(alpha=0.3)
    _legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _plot_band(
    axes: Axes, x: Sequence[float], shares: Sequence[tuple], colour: str, **style: object
) -> None:
    """Plot a curve and its intervals. shares: (accuracy, low, high) at each x."""
    accuracy, low, high = zip(*shares, strict=True)
    axes.plot(x, accuracy, color=colour, **style)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_histogram(
    values: list[tuple[str, np.ndarray]], xlabel: str, title: str, show: bool = False
) -> Figure:
    """Draw the distances of several methods over the same 20 bins, in percent of the images.

    values: (method, distances (M,)). A dashed line marks the mean of each.
    """
    every_value = np.concatenate([distances for _, distances in values])
    high = every_value.max()
    low = min(every_value.min(), high - 1e-3 * max(1, abs(high)))  # all values may be equal
    edges = np.linspace(low, high, BINS + 1)

    longest_label = max(len(label) for label, _ in values)
    columns = min(len(values), 2 if longest_label <= 24 else 1)
    legend_rows = math.ceil(len(values) / columns)
    figure = new_figure(2.0 + 0.14 * legend_rows, show=show)
    axes = figure.subplots()
    handles = []
    for i, (label, distances) in enumerate(values):
        line_style, colour = METHOD_STYLES[i % len(METHOD_STYLES)]
        share = 100 * np.histogram(distances, edges)[0] / len(distances)
        line = {"color": colour, "linestyle": line_style, "linewidth": 1.2}
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(share, edges, **line)
        axes.axvline(distances.mean(), color=colour, linewidth=1, linestyle="--", zorder=3)
        handles += axes.plot([], [], label=label, **line)
    axes.set(xlabel=f"{xlabel} (dashed: mean)", ylabel="images in %", title=title)
    axes.set_xlim(edges[0], edges[-1])
    _legend(figure, handles, ncols=columns)
    return figure


def draw_embedding(
    panels: list[Panel],
    labels: np.ndarray,
    classes: Sequence[str],
    kinds: list[str],
    features: str,
    show: bool = False,
) -> Figure:
    """Draw embeddings as scatter plots coloured by class, one panel a run.

    labels: (N,). kinds: of images, `natural` and perhaps a second one, which is drawn as crosses.
    features: what was embedded, for the legend's title. Up to 20 classes have a colour, beyond 10
    with a second marker; of more classes 10 evenly chosen ones have a colour, and others are grey.
    """
    present = np.unique(labels)
    coloured = present
    if len(present) > 20:
        coloured = present[np.linspace(0, len(present) - 1, 10).round().astype(int)]
    styles = {}
    handles = []
    for i, label in enumerate(coloured):
        markers = ("ox", "^+")[i // 10]
        styles[label] = (CLASS_COLOURS[i % 10], markers)
        handles.append(_marker(classes[label], CLASS_COLOURS[i % 10], markers[0]))
    legend_title = f"UMAP of {features}"
    if len(kinds) > 1:
        legend_title += f"; {kinds[0]} / {kinds[1]}"
        handles.append(_marker(kinds[0], "black", "o"))
        handles.append(_marker(kinds[1], "black", "x"))
    legend_title += "\nlabel agreement: share of the 12 nearest neighbours of the same class"
    if len(coloured) < len(present):
        legend_title += f"\n{len(coloured)} of {len(present)} classes, the others grey"

    # As many legend entries in a row as fit; a letter takes 4.2 points
    longest_name = max(len(classes[label]) for label in coloured)
    fitting = int(COLUMN * 72 / (4.2 * longest_name + 18))
    legend_columns = max(1, min(fitting, 20 if len(kinds) == 1 else 6))
    legend_rows = math.ceil(len(handles) / legend_columns)

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    titles = [_panel_title(panel) for panel in panels]
    title_lines = max(len(title) for title in titles)
    height = rows * (COLUMN / columns + 0.12 * title_lines) + 0.14 * legend_rows + 0.5
    figure = new_figure(height, show=show)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    size = float(np.clip(4000 / columns / len(panels[0].points), 1.5, 8))
    for axes, panel, title in zip(grid, panels, titles, strict=False):
        _draw_panel(axes, panel.points, labels, styles, size)
        padding = [""] * (title_lines - len(title))  # titles of one height give panels of one size
        axes.set_title("\n".join(padding + title), fontsize=6)
    for axes in grid[len(panels) :]:
        axes.remove()
    _legend(
        figure,
        handles,
        ncols=math.ceil(len(handles) / legend_rows),
        title=legend_title,
        title_fontsize=6,
        alignment="center",
        handlelength=1,
        handletextpad=0.2,
        columnspacing=0.8,
    )
    return figure


def _panel_title(panel: Panel) -> list[str]:
    """Return the lines of a panel's title: the run's name, and its clusters in each layer."""
    lines = [panel.name]
    for layer, measured in itertools.groupby(panel.clusters, key=lambda clusters: clusters.layer):
        by_kind = list(measured)
        silhouettes = " / ".join(f"{clusters.silhouette:.2f}" for clusters in by_kind)
        agreements = " / ".join(f"{100 * clusters.agreement:.1f}" for clusters in by_kind)
        lines.append(f"{layer}: silhouette {silhouettes}")
        lines.append(f"label agreement {agreements} %")
    return lines


def _draw_panel(
    axes: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    styles: dict[int, tuple[str, str]],
    size: float,
) -> None:
    """Draw one run's points.

    styles: by class its colour, and a marker for each kind of images; other classes are grey.
    """
    is_grey = ~np.isin(labels, list(styles))
    for kind, (x, y) in enumerate(points.reshape(-1, len(labels), 2).transpose(0, 2, 1)):
        if is_grey.any():
            marker = ".x"[kind]
            axes.scatter(x[is_grey], y[is_grey], size, GREY, marker=marker, linewidths=0.4)
        edge = {"linewidths": 0.6} if kind else {"linewidths": 0, "alpha": 0.8}
        for label, (colour, markers) in styles.items():
            chosen = labels == label
            axes.scatter(x[chosen], y[chosen], size, colour, marker=markers[kind], **edge)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.spines[:].set_visible(True)


def _legend(figure: Figure, handles: Sequence[Line2D], **style: object) -> None:
    """Put a legend below the axes, where it covers nothing."""
    figure.legend(handles=handles, loc="outside lower center", frameon=False, **style)


def _marker(label: str, colour: str, marker: str) -> Line2D:
    """Make an entry of a legend that is a marker without a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, ls="none", markersize=3.5, label=label)
