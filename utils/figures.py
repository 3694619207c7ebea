"""Figures, drawn without a display. Those for a paper share one style: a column's width, colours that the colour-blind
tell apart, PNG of 200 dpi and PDF with embedded fonts.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.errors import UsageError, first_line
from utils.files import write_atomically

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke
except ValueError as error:  # as soon as it is imported, it reads its settings
    raise UsageError(f"matplotlib: {first_line(error)}; unset or correct MPLBACKEND, or its matplotlibrc") from error

COLUMN = 3.3  # inches
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "pdf.fonttype": 42,  # TrueType, embedded: what submission systems ask for
}
# Methods: Okabe and Ito, "Color Universal Design" (2008), the dark ones first.
METHOD_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Classes: Petroff, "Accessible color sequences for data visualization", arXiv 2107.02270, ten colours.
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
GREY = "#d9d9d9"
BINS = 20
# Of an embedding: the run's name; points (kinds * N, 2), the N images of one kind after the other; for the title, what
# was measured: (layer, kind, silhouette, neighbours' agreement)
Panel = tuple[str, np.ndarray, Sequence[tuple[str, str, float, float]]]


def draw_curves(rows: list[dict], file: Path) -> None:
    """Draw a run's loss and accuracies by epoch. rows: those of metrics.csv; None where an epoch was not evaluated."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], color="#0072b2", marker=".")
    loss.set(xlabel="epoch", ylabel="training loss")
    evaluated = [row for row in rows if row["natural_accuracy"] is not None]
    for rows_, key, label, style in (
        (rows, "train_natural_accuracy_first_head", "train natural (first head)", dict(color="#56b4e9", ls="--")),
        (rows, "train_robust_accuracy_first_head", "train robust (first head)", dict(color="#e69f00", ls="--")),
        (evaluated, "natural_accuracy", "natural", dict(color="#0072b2", marker=".")),
        (evaluated, "pgd40_heads_accuracy", "PGD-40 over heads", dict(color="#d55e00", marker=".")),
    ):
        accuracy.plot([row["epoch"] for row in rows_], [row[key] for row in rows_], label=label, **style)
    accuracy.set(xlabel="epoch", ylabel="accuracy in %", ylim=(0, 100))
    accuracy.legend(fontsize=8, loc="lower right")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130, format="png")


def draw_examples(
    natural: Tensor,
    adversarial: Tensor,
    natural_probabilities: Tensor,
    adversarial_probabilities: Tensor,
    labels: Tensor,
    eps: float,
    classes: Sequence[str],
    file: Path,
) -> None:
    """Natural image, perturbation (scaled to use the whole range) and adversarial image, a column each.

    natural, adversarial: (n, 3, S, S) in [0, 1]. *_probabilities: (n, C). labels: (n,), indices into classes.
    """
    count = len(labels)
    figure = Figure(figsize=(1.25 * count + 0.4, 5), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    scale = 0.5 / max(eps, 1e-12)
    rows = (
        ("natural", natural, natural_probabilities),
        (f"perturbation x{scale:.3g}", ((adversarial - natural) * scale + 0.5).clamp(0, 1), None),
        ("adversarial", adversarial, adversarial_probabilities),
    )
    for axes, (name, images, probabilities) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(name, fontsize=9)
        for i, (ax, image) in enumerate(zip(axes, images, strict=True)):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            if probabilities is not None:
                confidence, predicted = probabilities[i].max(0)
                colour = "#009e73" if predicted == labels[i] else "#d55e00"
                ax.set_title(f"{classes[predicted][:14]}\n{100 * confidence:.1f} %", fontsize=8, color=colour)
    figure.savefig(file, dpi=130, format="png")


def draw_robustness(curve: list[tuple[float, float, float]], label: str, file: Path) -> None:
    """Robust accuracy against eps or steps. curve: (eps or steps, PGD on the final logits, adaptive PGD), in %."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    x, final, adaptive = zip(*curve, strict=True)
    axes.plot(x, final, color="#0072b2", marker=".", label="PGD on the final logits")
    axes.plot(x, adaptive, color="#d55e00", marker="s", ms=4, ls="--", label="adaptive: PGD on every view, worst case")
    scale = "log" if label == "steps" else "linear"
    axes.set(xlabel=label, ylabel="robust accuracy in %", ylim=(-2, 102), xscale=scale)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130, format="png")


def new_figure(height: float, show: bool) -> Figure:
    """An empty figure as wide as a column; height in inches. show: one that `show_figures` opens a window for."""
    make = Figure
    if show:
        from matplotlib.pyplot import figure as make
    return make(figsize=(COLUMN, height), layout="constrained")


def require_display() -> None:
    """UsageError where --show could not open a window."""
    import matplotlib.pyplot as plt

    try:
        plt.switch_backend(plt.get_backend())
        if plt.get_backend().lower() in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template"):
            raise RuntimeError("there is no display")
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--show: no window can be opened here ({error}); leave it out") from error


def show_figures() -> None:
    import matplotlib.pyplot as plt

    plt.show()


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png (200 dpi) and stem.pdf (vector, fonts embedded), the same bytes for the same figure."""
    files = [stem.with_name(stem.name + ending) for ending in (".png", ".pdf")]
    for file, metadata in zip(files, ({"Software": None}, {"CreationDate": None}), strict=True):
        draw = partial(figure.savefig, format=file.suffix[1:], dpi=200, metadata=metadata)
        with matplotlib.rc_context(STYLE), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                write_atomically(file, draw)
            except ValueError as error:
                why = str(error).splitlines()[-1]
                raise UsageError(f"{file} cannot be drawn ({why}); a name between $ signs is a formula") from error
        if said:  # of letters that the font lacks there is one a letter; one a file says enough
            print(f"note: {file.name}: {said[0].message} (--labels names runs otherwise)")
    return files


def draw_histogram(values: dict[str, np.ndarray], xlabel: str, title: str, show: bool = False) -> Figure:
    """Densities of several methods over the same 20 bins, each mean as a dashed line. values: (M,) by method."""
    everything = np.concatenate(list(values.values()))
    spread = max(np.ptp(everything), 1e-6 * max(1, abs(everything).max()))  # equal up to rounding: still a figure
    centre = (everything.max() + everything.min()) / 2
    edges = np.histogram_bin_edges(everything, BINS, (centre - spread / 2, centre + spread / 2))
    columns = 2 if max(map(len, values)) <= 24 else 1
    rows = -(-len(values) // columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.0 + 0.14 * rows, show)
        axes = figure.subplots()
        handles = []
        for i, (label, found) in enumerate(values.items()):
            turn, colour = divmod(i, len(METHOD_COLOURS))
            line = {"color": METHOD_COLOURS[colour], "linestyle": ("-", ":", "-.")[turn % 3], "linewidth": 1.2}
            density, _ = np.histogram(found, edges, density=True)
            axes.stairs(density, edges, fill=True, color=line["color"], alpha=0.2)
            axes.stairs(density, edges, **line)
            axes.axvline(found.mean(), color=line["color"], linewidth=1, linestyle="--", zorder=3)
            handles.append(Line2D([], [], label=label, **line))
        axes.set(xlabel=f"{xlabel} (dashed: mean)", ylabel="density", xlim=(edges[0], edges[-1]))
        axes.set_title(title)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(values)), frameon=False)
    return figure


def draw_embedding(
    panels: Sequence[Panel],
    labels: np.ndarray,
    classes: Sequence[str],
    kinds: Sequence[str],
    features: str,
    show: bool = False,
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
    handles = [_marker(*style[:3]) for style in styles.values()]
    handles += [_marker(kind, "black", marker) for kind, marker in zip(kinds, "ox", strict=False) if len(kinds) > 1]
    fitting = int(COLUMN * 72 / (4.2 * max(len(name) for name, *_ in styles.values()) + 18))
    legend_rows = -(-len(handles) // max(1, min(fitting, len(handles) if len(kinds) == 1 else 6)))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    lines = 1 + max(len({layer for layer, *_ in measured}) for _, _, measured in panels)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(rows * (COLUMN / columns + 0.12 * lines) + 0.14 * legend_rows + 0.4, show)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        size = float(np.clip(4000 / columns / len(panels[0][1]), 1.5, 8))
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, labels, styles, size)
        for axes in grid[len(panels) :]:
            axes.remove()
        title = f"UMAP of {features}\ns: silhouette, a: 12-NN label agreement in %"
        title += f"; {' / '.join(kinds)}" if len(kinds) > 1 else ""
        title += f"\n{len(named)} of {len(present)} classes, the others grey" if len(named) < len(present) else ""
        figure.legend(
            handles=handles, loc="outside lower center", ncols=-(-len(handles) // legend_rows), frameon=False,
            title=title, title_fontsize=6, alignment="center", handlelength=1, handletextpad=0.2, columnspacing=0.8,
        )  # fmt: skip
    return figure


def _draw_panel(axes: Axes, panel: Panel, labels: np.ndarray, styles: dict[int, tuple[str, ...]], size: float) -> None:
    """One run's points. styles: of each class that has one, its name, its colour, and a marker for each kind."""
    name, points, measured = panel
    other = ~np.isin(labels, list(styles))
    for kind, (x, y) in enumerate(points.reshape(-1, len(labels), 2).transpose(0, 2, 1)):
        if other.any():
            axes.scatter(x[other], y[other], size, GREY, marker=".x"[kind], linewidths=0.4)
        edge = {"linewidths": 0.6} if kind else {"linewidths": 0, "alpha": 0.8}
        for label, (_, colour, *markers) in styles.items():
            own = labels == label
            axes.scatter(x[own], y[own], size, colour, marker=markers[kind], **edge)
    short = len(styles) <= 10 and max(len(said) for said, *_ in styles.values()) <= 10
    for label, (said, *_) in styles.items() if short else ():  # beside the cluster, not on it
        own = points[: len(labels)][labels == label]
        at = own[np.linalg.norm(own - np.median(own, 0), axis=1).argmin()]
        halo = [withStroke(linewidth=1.5, foreground="white")]
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(said, at, (0, 4), fontsize=7, path_effects=halo, **place)
    axes.set_title("\n".join([name, *_measured(measured)]), fontsize=6)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.spines[:].set_visible(True)


def _measured(measured: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """A line for each layer, the kinds' numbers between slashes."""
    lines = []
    for layer in dict.fromkeys(row[0] for row in measured):
        rows = [row for row in measured if row[0] == layer]
        silhouettes = " / ".join(f"{row[2]:.2f}" for row in rows)
        agreements = " / ".join(f"{100 * row[3]:.{1 if len(rows) == 1 else 0}f}" for row in rows)
        lines.append(f"{layer}: s {silhouettes}, a {agreements}")
    return lines


def _marker(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=3.5, label=label)
