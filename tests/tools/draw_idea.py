"""The README's picture of the idea: reverse attention above, asymmetric negative contrast below.

    python -m tests.tools.draw_idea [FILE]

FILE is figure/idea.png unless given. What the upper half shows is computed, for four classes and
six channels, by the equations of `models/reverse_attention.py`.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

CLASSES = ("cat", "dog", "car", "ship")
CHANNELS = 6
SIDE = 4

INK = "#1b1f24"
GREY = "#6e7781"
FLOW = "#57606a"
CHOSEN = "#d1242f"
PUSH = "#0969da"
TINTS = ("#ddf4ff", "#fff1e5", "#dafbe1")

# Of the drawing, in its own units
WIDTH = 100
HEIGHT = 62


def arrow(
    ax: Axes, start: tuple, end: tuple, color: str = FLOW, bend: float = 0, **line: object
) -> None:
    """Draw an arrow; bend: the curvature of its arc."""
    patch = FancyArrowPatch(
        start,
        end,
        color=color,
        arrowstyle="-|>",
        mutation_scale=13,
        shrinkA=0,
        shrinkB=0,
        connectionstyle=f"arc3,rad={bend}",
        **({"lw": 1.6} | line),
    )
    ax.add_patch(patch)


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    """Draw a box with a text in it."""
    patch = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.8",
        fc="#f6f8fa",
        ec=FLOW,
        lw=1.2,
    )
    ax.add_patch(patch)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, color=INK)


def map_of_channels(ax: Axes, x: float, y: float, z: np.ndarray, largest: float) -> None:
    """Draw the channels of a map, one behind the other; (x, y): lower left of the front one."""
    size = 6.5
    for depth in reversed(range(len(z))):
        left = x + 1.3 * depth
        low = y + 1.0 * depth
        order = 3 - 0.1 * depth
        ax.imshow(
            z[depth],
            extent=(left, left + size, low, low + size),
            cmap="Greys",
            vmin=0,
            vmax=largest,
            zorder=order,
            interpolation="nearest",
        )
        frame = Rectangle((left, low), size, size, fill=False, ec=INK, lw=0.8, zorder=order + 0.05)
        ax.add_patch(frame)


def classifier(ax: Axes, x: float, y: float, weights: np.ndarray, chosen: int) -> None:
    """Draw W as a grid, a row for each class, the chosen one framed."""
    cell = 1.9
    height = cell * len(weights)
    width = cell * weights.shape[1]
    extent = (x, x + width, y, y + height)
    ax.imshow(weights, extent=extent, cmap="Blues", vmin=0, vmax=1.4, zorder=2)
    ax.add_patch(Rectangle((x, y), width, height, fill=False, ec=INK, lw=1, zorder=3))
    low = y + cell * (len(weights) - 1 - chosen)
    ax.add_patch(Rectangle((x, low), width, cell, fill=False, ec=CHOSEN, lw=2.2, zorder=4))


def logits(ax: Axes, x: float, y: float, values: np.ndarray, chosen: int, unit: float) -> None:
    """Draw logits as bars, a row for each class; unit: length of a logit of 1."""
    for i, (name, value) in enumerate(zip(CLASSES, values, strict=True)):
        low = y + 1.9 * (len(values) - 1 - i)
        color = CHOSEN if i == chosen else "#afb8c1"
        ax.add_patch(Rectangle((x, low + 0.3), unit * value, 1.3, color=color, lw=0, zorder=3))
        ax.text(x - 0.6, low + 0.95, name, ha="right", va="center", fontsize=9.5, color=INK)
    ax.plot([x, x], [y, y + 1.9 * len(values)], color=INK, lw=0.9)


def draw_reverse_attention(ax: Axes) -> None:
    """Draw the upper half: what reverse attention computes."""
    rng = np.random.default_rng(5)
    z = rng.random((CHANNELS, SIDE, SIDE)) ** 1.5
    z *= np.array([1.2, 0.35, 1.0, 0.45, 0.9, 0.5])[:, None, None]
    weights = np.array(
        [
            [1.3, 0.1, 1.1, 0.0, 0.9, 0.2],
            [0.9, 0.6, 0.8, 0.1, 0.2, 0.3],
            [0.1, 1.2, 0.0, 1.0, 0.3, 0.6],
            [0.0, 0.3, 0.6, 0.9, 0.1, 1.3],
        ]
    )
    auxiliary = weights @ z.mean((1, 2))
    chosen = int(auxiliary.argmax())
    gated = z * weights[chosen][:, None, None]
    final = weights @ gated.mean((1, 2))
    largest = gated.max()
    unit = 7.5

    ax.text(0.5, 59.2, "Reverse attention (RA)", fontsize=14, weight="bold", color=INK)
    ax.text(
        27.5,
        59.2,
        "the classifier's own row of one class weights the map, in each of the last two blocks",
        fontsize=12,
        color=GREY,
    )
    box(ax, 0.5, 46.5, 8, 6, "image,\nblocks")
    arrow(ax, (8.5, 49.5), (12, 49.5))
    map_of_channels(ax, 12.5, 44.5, z, largest)
    ax.text(13.5, 41.7, "map $z$", fontsize=11.5, color=INK)
    arrow(ax, (26.5, 49.5), (47.2, 49.5))
    ax.add_patch(Circle((49, 49.5), 1.8, fc="white", ec=CHOSEN, lw=2, zorder=5))
    ax.text(49, 49.35, r"$\times$", fontsize=15, color=CHOSEN, ha="center", va="center", zorder=6)
    arrow(ax, (50.8, 49.5), (54, 49.5))
    map_of_channels(ax, 54.5, 44.5, gated, largest)
    ax.text(53.5, 41.7, "$z' = z \\cdot W[c]$", fontsize=11.5, color=INK)
    arrow(ax, (68.5, 49.5), (76, 49.5))
    ax.text(72, 50.4, "pool,", fontsize=10.5, color=INK, ha="center")
    ax.text(72, 47, "same $W$", fontsize=10.5, color=INK, ha="center")
    logits(ax, 82, 45.7, final, chosen, unit)
    ax.text(
        77,
        41.7,
        "final logits $p'$: the same\nanswer, a larger margin",
        fontsize=11,
        color=INK,
        va="center",
    )

    ax.plot([22, 22], [43.5, 34.2], color=FLOW, lw=1.6)
    arrow(ax, (22, 34.2), (30.5, 34.2))
    ax.text(26, 35, "pool", fontsize=10.5, color=INK, ha="center")
    classifier(ax, 31, 30.4, weights, chosen)
    ax.text(36.7, 28.4, "classifier $W$, shared", fontsize=11, color=INK, ha="center", va="center")
    arrow(ax, (42.6, 34.2), (49.5, 34.2))
    logits(ax, 56, 30.4, auxiliary, chosen, unit)
    ax.text(50, 28.4, "auxiliary logits $p$", fontsize=11, color=INK, va="center")
    low = 30.4 + 1.9 * (len(CLASSES) - 1 - chosen) + 0.95
    ax.plot([42.6, 49, 49], [low, low, 40], color=CHOSEN, lw=1.8)
    arrow(ax, (49, 39.5), (49, 47.6), CHOSEN, lw=1.8)
    ax.text(48.2, 42.4, "row $W[c]$", fontsize=11.5, color=CHOSEN, ha="right")
    words = (
        "class $c$: the label in training,\nthe largest auxiliary logit\nin attacks and evaluation"
    )
    ax.text(72, 34.2, words, fontsize=11, color=CHOSEN, va="center")


def regions(ax: Axes, x: float, y: float) -> None:
    """Draw three regions of prediction, of cat above left, dog to the right, car below."""
    middle = (x + 16, y + 8.5)
    w = 33
    h = 17.5
    corners = [
        [(x, y + h), (x + 22, y + h), middle, (x, y + 5)],
        [(x + 22, y + h), (x + w, y + h), (x + w, y), (x + 25, y), middle],
        [(x, y + 5), middle, (x + 25, y), (x, y)],
    ]
    for points, tint in zip(corners, TINTS, strict=True):
        ax.add_patch(Polygon(points, fc=tint, ec="white", lw=2))
    spots = {"cat": (1, h - 1.9), "dog": (w - 1, h - 1.9), "car": (1, 0.8)}
    for word, (right, up) in spots.items():
        side = "left" if right < w / 2 else "right"
        ax.text(x + right, y + up, f"taken for {word}", fontsize=9.5, color=GREY, ha=side)


def frozen_natural(ax: Axes, x: float, y: float) -> None:
    """Draw a natural image, through which no gradient flows."""
    ax.add_patch(Circle((x, y), 1.2, fc=INK, ec=INK, zorder=5))
    ax.add_patch(Circle((x, y), 2.0, fill=False, ec=INK, lw=1.3, ls=(0, (2, 1.5)), zorder=5))


def negative(ax: Axes, x: float, y: float, **style: object) -> None:
    """Draw an image of another class."""
    corners = [(x - 1.3, y - 1), (x + 1.3, y - 1), (x, y + 1.5)]
    ax.add_patch(Polygon(corners, zorder=5, lw=1.3, **({"fc": PUSH, "ec": PUSH} | style)))


def draw_contrast(ax: Axes) -> None:
    """Draw the lower half: which images the contrast pushes."""
    ax.text(0.5, 22.3, "Asymmetric negative contrast (ANC)", fontsize=14, weight="bold", color=INK)
    ax.text(
        44.5,
        22.3,
        "an image of another class is pushed away, the natural one stays",
        fontsize=12,
        color=GREY,
    )
    regions(ax, 0.5, 2.6)
    frozen_natural(ax, 5, 14.6)
    ax.text(1.3, 10.6, "natural cat, frozen", fontsize=10, color=INK)
    negative(ax, 29, 6.5, fc="white", ls=(0, (2, 1.5)))
    negative(ax, 15.5, 15.6)
    arrow(ax, (29, 9), (17.4, 16.4), GREY, 0.3, lw=1.3, ls=(0, (3, 2)))
    ax.text(24.7, 15.2, "attack", fontsize=10, color=GREY)
    ax.text(33.2, 3.2, "a negative: a dog", fontsize=10, color=PUSH, ha="right")
    arrow(ax, (16.4, 14), (24.5, 8.6), PUSH, 0.12, lw=3)
    ax.text(16.5, 7.6, "ANC", fontsize=12, color=PUSH, weight="bold")
    ax.text(
        17,
        1,
        "taken for the same class: pushed",
        fontsize=11.5,
        color=INK,
        ha="center",
        va="center",
    )
    regions(ax, 36.5, 2.6)
    frozen_natural(ax, 41, 14.6)
    negative(ax, 63, 9)
    ax.text(
        53,
        1,
        "taken for different classes: nothing",
        fontsize=11.5,
        color=INK,
        ha="center",
        va="center",
    )
    words = (
        "$S = \\sqrt{\\max q_{nat}\\; \\max q_{neg}}$",
        "if both are taken for one class,",
        "else $S = 0$;  $q$ = softmax of a head",
        "ANC = mean of $S$ over pairs",
        "no gradient into $q_{nat}$ ($\\alpha$ = 1)",
    )
    for i, line in enumerate(words):
        size = 13 if i == 0 else 11
        ax.text(71.5, 17.5 - 3.1 * i, line, fontsize=size, color=INK, va="center")


def draw(file: Path) -> None:
    """Draw the picture into a file."""
    with plt.rc_context(matplotlib.rcParamsDefault | {"backend": "Agg"}):
        figure = plt.figure(figsize=(10, 10 * HEIGHT / WIDTH), facecolor="white")
        ax = figure.add_axes((0.005, 0.005, 0.99, 0.99))
        draw_reverse_attention(ax)
        ax.plot([0.5, 99.5], [26, 26], color="#d0d7de", lw=1)
        draw_contrast(ax)
        ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
        ax.axis("off")
        figure.savefig(file, dpi=200, facecolor="white", pil_kwargs={"optimize": True})
        plt.close(figure)


if __name__ == "__main__":
    target = Path(__file__).parents[2] / "figure" / "idea.png"
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
    draw(target)
    print(target)
