"""Figures, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


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
    axes.set(
        xlabel=label, ylabel="robust accuracy in %", ylim=(-2, 102), xscale="log" if label == "steps" else "linear"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130, format="png")
