"""Figures, drawn without a display."""

from pathlib import Path

from matplotlib.figure import Figure


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
