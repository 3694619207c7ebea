"""Figures, drawn without a display. They share one style: matplotlib's own settings and a few more, colours that the
colour-blind tell apart, PNG of 200 dpi and PDF with embedded fonts. Those for a paper are as wide as a column.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from utils.system.errors import UsageError, first_line
from utils.system.files import write_atomically
from utils.system.values import eps_text

if TYPE_CHECKING:  # imported where it draws, since a broken installation or matplotlibrc is no reason not to train
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLUMN = 3.3  # inches
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "pdf.fonttype": 42,  # TrueType, embedded: what submission systems ask for
    "text.parse_math": False,  # names of classes and runs are no formulas, whatever $ they hold
}
# Methods: Okabe and Ito, "Color Universal Design" (2008), the dark ones first.
METHOD_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Classes: Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270, ten colours.
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
GREY, DARK_GREY = "#d9d9d9", "#717581"
RIGHT, WRONG = "#009e73", "#d55e00"
BINS = 20
# Of an embedding: the run's name; points (kinds * N, 2), the N images of one kind after the other; for the title, what
# was measured: (layer, kind, silhouette, neighbours' agreement)
Panel = tuple[str, np.ndarray, Sequence[tuple[str, str, float, float]]]


@contextmanager
def styled() -> Iterator[None]:
    """Inside, matplotlib has its own settings and STYLE, whatever MPLBACKEND and the user's matplotlibrc ask for."""
    asked = {key: os.environ.pop(key) for key in ("MPLBACKEND",) if key in os.environ}  # an unknown one would end it
    import matplotlib

    os.environ |= asked
    own = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context(own | STYLE):
        yield


def draw_curves(rows: list[dict], best: dict | None) -> Figure:
    """A run's loss and accuracies by epoch. rows: those of metrics.csv, None where an epoch was not evaluated; best:
    that of the best checkpoint. It is marked, and where the learning rate falls, between two epochs.
    """
    figure = new_figure(3.8, width=9)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], color="#0072b2", marker=".")
    evaluated = [row for row in rows if row["natural_accuracy"] is not None]
    for rows_, key, label, style in (
        (rows, "train_natural_accuracy_first_head", "train natural (first head)", dict(color="#56b4e9", ls="--")),
        (rows, "train_robust_accuracy_first_head", "train robust (first head)", dict(color="#e69f00", ls="--")),
        (evaluated, "natural_accuracy", "natural", dict(color="#0072b2")),
        (evaluated, "pgd40_heads_accuracy", "PGD-40 over heads", dict(color="#d55e00")),
    ):
        accuracy.plot([row["epoch"] for row in rows_], [row[key] for row in rows_], marker=".", label=label, **style)
    if best is not None:
        ring = dict(color="black", marker="o", ms=9, mfc="none", ls="", label=f"best checkpoint: epoch {best['epoch']}")
        accuracy.plot(best["epoch"], best["pgd40_heads_accuracy"], **ring)
    accuracy.set_ylim(0, 100)
    handles = list(accuracy.get_lines())
    falls = [after["epoch"] - 0.5 for before, after in itertools.pairwise(rows) if after["lr"] < before["lr"] / 5]
    for axes, name in ((loss, "training loss"), (accuracy, "accuracy in %")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        lines = [axes.axvline(x, color=DARK_GREY, ls=":", label="learning rate is divided by 10") for x in falls]
    _legend(figure, [*handles, *lines[:1]], ncols=3)
    return figure


def draw_examples(
    images: list[Tensor],
    probabilities: list[Tensor],
    fooled: Tensor,
    labels: Tensor,
    eps: float,
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Natural image, perturbation (scaled to use the whole range) and adversarial image, a column each, with answers.

    images: natural and adversarial ones, (n, 3, S, S) in [0, 1]. probabilities: of both, (n, C). fooled: (n,) bool;
    of the others there is no adversarial image, which is said in its place. labels: (n,).
    """
    (natural, adversarial), count = images, len(labels)
    figure = new_figure(5.6, width=max(1.1 * count + 0.4, 4))
    grid = figure.subplots(3, count, squeeze=False)
    scale = 0.5 / max(eps, 1e-12)
    shown = natural, ((adversarial - natural) * scale + 0.5).clamp(0, 1), adversarial
    names = "natural", f"perturbation x{scale:.3g}", "adversarial"
    answers = probabilities[0], None, probabilities[1]
    for axes, name, row, found in zip(grid, names, shown, answers, strict=True):
        axes[0].set_ylabel(name)
        for i, (ax, image) in enumerate(zip(axes, row, strict=True)):
            ax.set(xticks=[], yticks=[])
            if row is not natural and not fooled[i]:
                ax.set(box_aspect=1)
                ax.spines[:].set_visible(False)
                if row is adversarial:
                    right = probabilities[0][i].argmax() == labels[i]
                    instead = "not fooled" if right else "wrong\nas it is"
                    ax.text(0.5, 0.5, instead, ha="center", va="center", transform=ax.transAxes, color=DARK_GREY)
                continue
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="none")
            if found is not None:
                confidence, predicted = found[i].max(0)
                colour = RIGHT if predicted == labels[i] else WRONG
                ax.set_xlabel(f"{classes[predicted][:14]}\n{100 * confidence:.1f} %", color=colour)
    for ax, label in zip(grid[0], labels, strict=True):
        ax.set_title(f"true class\n{classes[label][:14]}")
    figure.suptitle(title, fontsize=8, wrap=True)
    keys = [_marker(grid[0, 0], *key, "s") for key in (("right", RIGHT), ("wrong", WRONG))]
    _legend(figure, keys, ncols=2, title="the network's answer and its probability")
    return figure


def draw_robustness(curve: list[tuple], xlabel: str, trained: object = None) -> Figure:
    """Robust accuracy against eps or steps. curve: (eps or steps, PGD on the answer's logits, adaptive PGD), each of
    the two (%, the ends of its interval). trained: the eps of training, marked. The axis is logarithmic beyond 0.
    """
    figure = new_figure(3.8, width=4.6)
    axes = figure.subplots()
    x, *both = zip(*curve, strict=True)
    final = dict(color="#0072b2", marker=".", label="PGD on the answer's logits")
    adaptive = dict(color="#d55e00", marker="s", ms=4, ls="--", label="adaptive: PGD on every view, worst case")
    for style, shares in zip((final, adaptive), both, strict=True):
        middle, low, high = zip(*shares, strict=True)
        axes.plot(x, middle, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if isinstance(trained, float):  # as a checkpoint of ours says it
        axes.axvline(trained, color=DARK_GREY, ls=":", label=f"training eps, {eps_text(trained)}")
    axes.set_xscale("symlog", linthresh=min(value for value in x if value > 0), linscale=0.5)
    axes.set_xticks(x, [eps_text(value) for value in x], rotation=90)
    axes.minorticks_off()
    limits = {"xlim": (x[0], 1.1 * x[-1]), "ylim": (-2, 102)}
    axes.set(xlabel=xlabel, ylabel="robust accuracy in % (band: 95 % interval)", **limits)
    axes.grid(alpha=0.3)
    _legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def new_figure(height: float, show: bool = False, width: float = COLUMN) -> Figure:
    """An empty figure; height and width in inches. show: one that `window` opens a window for."""
    from matplotlib.figure import Figure as make

    if show:
        from matplotlib.pyplot import figure as make
    return make(figsize=(width, height), layout="constrained")


def window(wanted: bool) -> Callable[[], None]:
    """What opens a window for each figure, with --show; UsageError where it could not."""
    if not wanted:
        return lambda: None
    try:
        with styled():  # outside of which an unknown MPLBACKEND would not let pyplot be imported
            import matplotlib.pyplot as plt
        plt.switch_backend(os.environ.get("MPLBACKEND") or plt.get_backend())
        if plt.get_backend().lower() in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
            raise RuntimeError("there is no display")
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(f"--show: no window can be opened here ({first_line(error)}); leave it out") from error
    return plt.show


def save_or_note(draw: Callable[[], Figure], file: Path) -> str:
    """Save what `draw` draws as `file`, a PNG of 200 dpi, and beside it as PDF (vector, fonts embedded), the same bytes
    for the same figure -> "", or a note of what failed, since no job ends for want of a picture.
    """
    try:
        with styled():
            figure = draw()
            for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                save = partial(figure.savefig, format=kind, dpi=200, metadata=metadata)
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always", UserWarning)
                    write_atomically(file.with_suffix(f".{kind}"), save)
                if said:  # of letters that the font lacks there is one a letter; one a file says enough
                    print(f"note: {file.stem}.{kind}: {said[0].message}")
        return ""
    except Exception as error:
        return f"note: {file} is not drawn ({type(error).__name__}: {first_line(error)})"


def draw_histogram(values: dict[str, np.ndarray], xlabel: str, title: str, show: bool = False) -> Figure:
    """Images of several methods over the same 20 equal bins, in percent, each mean as a dashed line.

    values: (M,) by method.
    """
    everything = np.concatenate(list(values.values()))
    high = everything.max()
    low = min(everything.min(), high - 1e-3 * max(1, abs(high)))  # where all are equal it is still a figure
    edges = np.linspace(low, high, BINS + 1)
    columns = 2 if max(map(len, values)) <= 24 else 1
    rows = -(-len(values) // columns)
    figure = new_figure(2.0 + 0.14 * rows, show)
    axes = figure.subplots()
    handles = []
    for i, (label, found) in enumerate(values.items()):
        turn, colour = divmod(i, len(METHOD_COLOURS))
        line = {"color": METHOD_COLOURS[colour], "linestyle": ("-", ":", "-.")[turn % 3], "linewidth": 1.2}
        share = 100 * np.histogram(found, edges)[0] / len(found)
        axes.stairs(share, edges, fill=True, color=line["color"], alpha=0.2)
        axes.stairs(share, edges, **line)
        axes.axvline(found.mean(), color=line["color"], linewidth=1, linestyle="--", zorder=3)
        handles += axes.plot([], [], label=label, **line)
    axes.set(xlabel=f"{xlabel} (dashed: mean)", ylabel="images in %", xlim=(edges[0], edges[-1]), title=title)
    _legend(figure, handles, ncols=min(columns, len(values)))
    return figure


def draw_embedding(
    panels: list[Panel], labels: np.ndarray, classes: Sequence[str], kinds: list[str], features: str, show: bool = False
) -> Figure:
    """Scatter plots of embeddings, one panel a run, coloured by class.

    labels: (N,). kinds: `natural` and perhaps a second one, drawn as crosses. features: what was embedded, for the
    legend's title. Up to 20 classes have a colour and a legend entry, beyond 10 with a second marker; of more classes,
    10 evenly chosen ones have, and the others are grey.
    """
    present = np.unique(labels)
    named = present if len(present) <= 20 else present[np.linspace(0, len(present) - 1, 10).round().astype(int)]
    looks = [(CLASS_COLOURS[i % 10], "o^"[i // 10], "x+"[i // 10]) for i in range(len(named))]
    styles = {label: (classes[label], *look) for label, look in zip(named, looks, strict=True)}
    entries = [style[:3] for style in styles.values()]
    entries += [(kind, "black", marker) for kind, marker in zip(kinds, "ox", strict=False) if len(kinds) > 1]
    fitting = int(COLUMN * 72 / (4.2 * max(len(name) for name, *_ in styles.values()) + 18))
    legend_rows = -(-len(entries) // max(1, min(fitting, len(entries) if len(kinds) == 1 else 6)))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    heads = ["\n".join([name, *_measured(measured)]) for name, _, measured in panels]
    lines = 1 + max(head.count("\n") for head in heads)
    figure = new_figure(rows * (COLUMN / columns + 0.12 * lines) + 0.14 * legend_rows + 0.5, show)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    size = float(np.clip(4000 / columns / len(panels[0][1]), 1.5, 8))
    for axes, (_, points, _), head in zip(grid, panels, heads, strict=False):
        _draw_panel(axes, points, labels, styles, size)
        axes.set_title("\n" * (lines - 1 - head.count("\n")) + head, fontsize=6)  # of equal height, so panels are too
    for axes in grid[len(panels) :]:
        axes.remove()
    title = f"UMAP of {features}{f'; {kinds[0]} / {kinds[1]}' if len(kinds) > 1 else ''}\n"
    title += "label agreement: share of the 12 nearest neighbours of the same class"
    title += f"\n{len(named)} of {len(present)} classes, the others grey" if len(named) < len(present) else ""
    narrow = dict(handlelength=1, handletextpad=0.2, columnspacing=0.8, title_fontsize=6, alignment="center")
    handles = [_marker(grid[0], *entry) for entry in entries]
    _legend(figure, handles, ncols=-(-len(handles) // legend_rows), title=title, **narrow)
    return figure


def _draw_panel(axes: Axes, points: np.ndarray, labels: np.ndarray, styles: dict[int, tuple[str, ...]], size: float) -> None:
    """One run's points. styles: of each class that has one, its name, its colour, and a marker for each kind."""
    other = ~np.isin(labels, list(styles))
    for kind, (x, y) in enumerate(points.reshape(-1, len(labels), 2).transpose(0, 2, 1)):
        if other.any():
            axes.scatter(x[other], y[other], size, GREY, marker=".x"[kind], linewidths=0.4)
        edge = {"linewidths": 0.6} if kind else {"linewidths": 0, "alpha": 0.8}
        for label, (_, colour, *markers) in styles.items():
            own = labels == label
            axes.scatter(x[own], y[own], size, colour, marker=markers[kind], **edge)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.spines[:].set_visible(True)


def _measured(measured: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """Two lines for each layer, the kinds' numbers between slashes."""
    lines = []
    for layer, rows in itertools.groupby(measured, key=lambda row: row[0]):
        silhouettes, agreements = zip(*((f"{row[2]:.2f}", f"{100 * row[3]:.1f}") for row in rows), strict=True)
        lines += [f"{layer}: silhouette {' / '.join(silhouettes)}", f"label agreement {' / '.join(agreements)} %"]
    return lines


def _legend(figure: Figure, handles: Sequence[Line2D], **how: object) -> None:
    """A legend below the axes, where it covers nothing; matplotlib 3.8 leaves names out that begin with _."""
    legend = figure.legend(handles, [" "] * len(handles), loc="outside lower center", frameon=False, **how)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        text.set_text(handle.get_label())


def _marker(axes: Axes, label: str, colour: str, marker: str) -> Line2D:
    return axes.plot([], [], color=colour, marker=marker, linestyle="none", markersize=3.5, label=label)[0]
