"""What is drawn: draw_hist.py, draw_umap.py, and the pictures of training and evaluation."""

import sys
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import utils.figures.features
from tests.helpers import checkpoint, digits_checkpoint, digits_split, execute, image_folder
from utils.figures.features import METRICS, PAIRS, embed
from utils.figures.plots import (
    BINS,
    RIGHT,
    WRONG,
    Panel,
    draw_curves,
    draw_embedding,
    draw_examples,
    draw_histogram,
    draw_robustness,
    save_figure,
)
from utils.system.errors import RunError
from utils.system.files import read_arrays, write_arrays
from utils.system.settings import FEATURES

HIST = "draw_hist.py"
UMAP = "draw_umap.py"


@pytest.fixture
def drawn(tmp_path):
    """Draw and save a figure, and return it."""

    def draw_and_save(draw, *args):
        figure = save_figure(partial(draw, *args), tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
        return figure

    return draw_and_save


def legend_texts(figure):
    """Return the entries of a figure's only legend."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def write_distances(file, seed=0, **changes):
    """Write a file as feature_distance.py does, of 30 random values each."""
    rng = np.random.default_rng(seed)
    settings = {
        "name": file.stem,
        "method": f"METHOD {seed}",
        "checkpoints": [f"{seed}.pt"],
        "dataset": "digits",
        "target": 3,
        "target_name": "three",
        "features": "weighted",
        "reverse_attention": True,
    }
    keys = ["_".join(parts) for parts in product(FEATURES, PAIRS, METRICS)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, settings | changes, **{key: rng.random(30) for key in keys})
    return file


@pytest.fixture
def histograms(monkeypatch):
    """Draw no histograms; the list gets (values by label, axis, title) of each instead."""
    figures = []

    def note(draw, file, make_figure):
        values, xlabel, title = draw.args
        figures.append((dict(values), xlabel, title))

    monkeypatch.setattr(utils.figures.features, "save_figure", note)
    return figures


# Histograms


@pytest.mark.parametrize("methods", [1, 9])
def test_a_histogram_has_the_same_bins_for_all_methods(drawn, methods):
    values = [(f"method {i}", np.random.default_rng(i).normal(i, 1, 200)) for i in range(methods)]
    figure = drawn(draw_histogram, values, "cosine similarity", "some title")
    (axes,) = figure.axes
    every_value = np.concatenate([distances for _, distances in values])
    bins = np.linspace(every_value.min(), every_value.max(), BINS + 1)
    for patch in axes.patches:
        heights, edges, _ = patch.get_data()
        assert edges == pytest.approx(bins)
        assert heights.sum() == pytest.approx(100)
    means = [line.get_xdata()[0] for line in axes.lines]
    assert means == [distances.mean() for _, distances in values]
    assert legend_texts(figure) == [label for label, _ in values]
    lines = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == methods


def test_equal_values_can_be_drawn(drawn):
    drawn(draw_histogram, [("eps 0", np.full(9, -0.5))], "cosine similarity", "PP")


def test_four_figures_are_of_each_class_and_four_of_all(here, histograms):
    for seed, method in enumerate(("ANCRA", "TRADES")):
        for target, name in ((0, "zero"), ("all", "all classes")):
            write_distances(
                here / "distances" / f"{method}-{target}.npz",
                seed,
                method=method,
                target=target,
                target_name=name,
                reverse_attention=method == "ANCRA",
            )
    assert execute(HIST) == 0
    titles = [title.split(", ")[1] for _, _, title in histograms]
    assert titles == ["zero"] * 4 + ["all classes"] * 4
    values, xlabel, title = histograms[4]
    assert "PP" in title
    assert xlabel == METRICS["cosine"]
    assert list(values) == ["TRADES", "ANCRA"]  # baselines come first
    for method, distances in values.items():
        _, arrays = read_arrays(here / "distances" / f"{method}-all.npz")
        assert np.array_equal(distances, arrays["weighted_PP_cosine"])


@pytest.mark.parametrize(
    ("network", "features"),
    [
        ({"reverse_attention": False}, "three, features"),
        ({"reverse_attention": True, "gate": "none"}, "three, features"),
        ({"reverse_attention": True, "gate": "label"}, "three, weighted features"),
    ],
)
def test_only_features_of_a_gated_network_are_called_weighted(here, histograms, network, features):
    write_distances(here / "distances" / "a-3.npz", **network)
    assert execute(HIST) == 0
    assert all(title.endswith(features) for _, _, title in histograms)


def test_files_are_drawn_in_the_order_of_the_labels(here, histograms):
    a = write_distances(here / "a.npz", 1, method="TRADES")
    b = write_distances(here / "b.npz", 2, method="TRADES")
    flags = ("--labels", "B", "A", "--features", "unweighted")
    assert execute(HIST, "--distances", b, a, *flags) == 0
    assert len(histograms) == 4
    values, _, title = histograms[2]
    assert list(values) == ["B", "A"]
    assert "NP" in title
    assert "unweighted" in title
    assert np.array_equal(values["B"], read_arrays(b)[1]["unweighted_NP_cosine"])
    assert execute(HIST, "--distances", a, b) == 0
    assert list(histograms[-1][0]) == ["a", "b"]  # two runs of one method have their names


def test_files_that_are_not_comparable_do_not_share_a_figure(here, histograms, capsys):
    folder = here / "distances"
    write_distances(folder / "a-3.npz", epsilon=0.1)
    write_distances(folder / "b-3.npz", 1, dataset="cifar10")
    write_distances(folder / "c-3.npz", 2, features="unweighted")
    write_distances(folder / "d-3.npz", 3, epsilon=0.2)
    assert execute(HIST) == 0
    assert [list(values) for values, _, _ in histograms[::4]] == [
        ["METHOD 0", "METHOD 3"],
        ["METHOD 1"],
        ["METHOD 2"],
    ]
    assert "differ in epsilon: 0.1, 0.2" in capsys.readouterr().out
    assert execute(HIST, "--dataset", "cifar10") == 0
    assert len(histograms) == 16


def test_figures_do_not_depend_on_the_users_settings_and_open_no_window(here, monkeypatch):
    write_distances(here / "distances" / "a-3.npz")
    assert execute(HIST, "--out", "expected") == 0
    monkeypatch.setitem(plt.rcParams, "font.size", 20)
    plt.close("all")
    assert execute(HIST) == 0
    assert not plt.get_fignums()
    expected = {file.name: file.read_bytes() for file in here.glob("expected/*")}
    assert len(expected) == 8
    assert {file.name: file.read_bytes() for file in here.glob("plots/*")} == expected


def test_show_opens_the_figures_that_were_saved(here, monkeypatch):
    write_distances(here / "distances" / "a-3.npz")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    plt.close("all")
    assert execute(HIST, "--show") == 0
    assert len(shown) == len(list(here.glob("plots/*.png"))) == 4
    plt.close("all")


def test_a_file_that_holds_no_distances_is_named(here, refused):
    whole = write_distances(here / "whole.npz")
    (here / "truncated.npz").write_bytes(whole.read_bytes()[:1000])
    np.savez(here / "foreign.npz", a=np.arange(3))
    write_arrays(here / "embedding.npz", {"names": ["TRADES"]})
    for name in ("truncated.npz", "foreign.npz", "embedding.npz"):
        refused(HIST, "--distances", whole, here / name, mentions=[name])


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "feature_distance.py"),
        (("--distances", "a.npz", "--labels", "A", "B"), "--labels"),
        (("--distances", "a.npz", "--dataset", "cifar10"), "cifar10"),
        (("--distances", "a.npz", "--out", "a.npz"), "--out"),
    ],
)
def test_bad_input_of_draw_hist(here, refused, flags, word):
    write_distances(here / "a.npz")
    refused(HIST, *flags, mentions=[word])


# Embeddings


@pytest.mark.parametrize(
    ("classes", "kinds"), [(2, ["natural"]), (10, ["natural", "PGD-10"]), (200, ["natural"])]
)
def test_every_point_of_an_embedding_is_drawn_once(drawn, classes, kinds):
    rng = np.random.default_rng(0)
    labels = np.arange(400) % classes
    names = [f"name {i}" for i in range(classes)]
    measured = {"weighted, natural": {"silhouette": -0.25, "agreement": 0.875}}
    shape = (400 * len(kinds), 2)
    panels = [Panel(name, rng.normal(size=shape), measured) for name in "abc"]
    figure = drawn(draw_embedding, panels, labels, names, kinds, "some features")

    for axes, panel in zip(figure.axes, panels, strict=True):
        points = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections])
        assert np.array_equal(np.sort(points, 0), np.sort(panel.points, 0))
        assert axes.get_title() == f"{panel.name}\nweighted, natural: -0.25, 87.5 %"
    coloured = min(classes, 10)
    (legend,) = figure.legends
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    entries = kinds if len(kinds) > 1 else []
    assert len(looks) == len(legend.get_lines()) == coloured + len(entries)
    assert set(legend_texts(figure)) <= {*names, *entries}
    title = legend.get_title().get_text()
    assert f"UMAP of some features; {coloured} of {classes} classes" in title


@pytest.mark.slow
def test_runs_are_panels_on_the_same_images_and_a_seed_gives_one_picture(here):
    digits_checkpoint(here / "a.pt", recipe={})
    digits_checkpoint(here / "b.pt", reverse_attention=False)
    flags = ("--n-examples", "60", "--adversarial", "--num-steps", "2", "--name", "same")
    pictures = []
    for out in ("one", "two"):
        assert execute(UMAP, "--model_dir", "a.pt", "b.pt", *flags, "--out", out) == 0
        pictures.append((here / out / "same.png").read_bytes())
    assert pictures[0] == pictures[1]
    settings, arrays = read_arrays(here / "one" / "same.npz")
    assert settings["names"] == ["a", "TRADES"]
    assert settings["kinds"] == ["natural", "PGD-2"]
    assert list(settings["measured"]) == [
        "a, weighted, natural",
        "a, weighted, PGD-2",
        "a, unweighted, natural",
        "a, unweighted, PGD-2",
        "TRADES, plain, natural",
        "TRADES, plain, PGD-2",
    ]
    assert arrays["embedding_0"].shape == arrays["embedding_1"].shape == (120, 2)
    assert np.array_equal(arrays["labels"], digits_split().labels[arrays["indices"]].numpy())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("a.pt", "--n-examples", "14"), "--n-examples"),
        (("a.pt", "--labels", "A", "B"), "--labels"),
        (("a.pt", "--n-examples", "20", "--out", "a.pt"), "--out"),
        (("a.pt", "folder.pt"), "folder.pt"),
    ],
)
def test_bad_input_of_draw_umap(here, refused, flags, word):
    checkpoint(here / "a.pt")
    counts = {part: {str(i): 2 for i in range(10)} for part in ("train", "test")}
    root = image_folder(here / "pictures", counts)
    checkpoint(here / "folder.pt", dataset="folder", recipe={"data_dir": str(root)})
    refused(UMAP, "--model_dir", *flags, mentions=[word])


def test_umap_that_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "umap.py").write_text('raise RuntimeError("no locator available")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    with pytest.raises(RunError, match="no locator available.*NUMBA_CACHE_DIR"):
        embed(torch.zeros(13, 2), 0)


# Training and evaluation


def metrics_rows(epochs, interval):
    """Return rows of metrics.csv; the learning rate falls at epochs 11 and 14."""
    rows = []
    for epoch in range(1, epochs + 1):
        evaluated = epoch % interval == 0
        row = {
            "epoch": epoch,
            "lr": 0.1 ** ((epoch >= 11) + (epoch >= 14)),
            "loss": 5 / epoch,
            "train_natural_accuracy_first_head": None,
            "train_robust_accuracy_first_head": 60.0,
            "natural_accuracy": 95.0 if evaluated else None,
            "pgd40_heads_accuracy": 80.0 - abs(epoch - 12) if evaluated else None,
        }
        rows.append(row)
    return rows


@pytest.mark.parametrize("epochs, interval", [(1, 2), (3, 1), (16, 2)])
def test_training_curves_mark_the_best_epoch_and_the_learning_rate(drawn, epochs, interval):
    rows = metrics_rows(epochs, interval)
    best = None if interval > epochs else rows[min(epochs, 12) - 1]
    figure = drawn(draw_curves, rows, best)
    falls = [10.5, 13.5] if epochs == 16 else []
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == falls
    marks = [line for line in figure.axes[1].lines if "best" in line.get_label()]
    points = [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks]
    assert points == ([(best["epoch"], best["pgd40_heads_accuracy"])] if best else [])
    assert len(legend_texts(figure)) == 4 + len(marks) + (len(falls) > 0)


@pytest.mark.parametrize(
    ("eps", "ticks"),
    [(8 / 255, ["0", "2/255", "8/255", "12/255", "1"]), (0.1, ["0", "0.025", "0.1", "0.15", "1"])],
)
def test_robustness_curves_have_intervals_and_the_fractions_of_255(drawn, eps, ticks):
    curve = []
    for i, x in enumerate((0, eps / 4, eps, 1.5 * eps, 1.0)):
        curve.append((x, (80 - i, 75 - i, 85 - i), (70 - i, 60 - i, 75 - i)))
    (axes,) = drawn(draw_robustness, curve, "eps", eps).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ticks
    (mark,) = [line for line in axes.lines if "training eps" in line.get_label()]
    assert mark.get_xdata()[0] == eps
    final, adaptive = (band.get_paths()[0].vertices[:, 1] for band in axes.collections)
    assert (final.min(), final.max()) == (71, 85)
    assert (adaptive.min(), adaptive.max()) == (56, 75)


def test_examples_show_the_answers_and_say_which_images_are_not_fooled(drawn):
    labels = torch.tensor([0, 1, 2])
    fooled = torch.tensor([True, False, False])
    # Fooled, right throughout, and wrong from the start
    answers = [torch.eye(3)[[0, 1, 0]], torch.eye(3)[[1, 1, 0]]]
    images = [torch.rand(3, 3, 16, 16) for _ in range(2)]
    classes = ["a$b$c", "$x^{$", r"\frac_"]  # no formulas
    figure = drawn(draw_examples, images, answers, fooled, labels, 8 / 255, classes, "some title")
    grid = np.array(figure.axes).reshape(3, 3)
    assert [axes.get_title() for axes in grid[0]] == [f"true class\n{name}" for name in classes]
    shown = [[len(axes.images) for axes in row] for row in grid]
    assert shown == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    natural, adversarial = (grid[row, 0].xaxis.label for row in (0, 2))
    assert natural.get_text().startswith(classes[0])
    assert natural.get_color() == RIGHT
    assert adversarial.get_text().startswith(classes[1])
    assert adversarial.get_color() == WRONG
    texts = [[text.get_text() for text in axes.texts] for axes in grid[2]]
    assert texts == [[], ["not fooled"], ["wrong\nas it is"]]


def test_a_picture_that_fails_ends_draw_hist(here, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no\nfont")

    monkeypatch.setattr(utils.figures.features, "draw_histogram", fail)
    write_distances(here / "distances" / "a-3.npz")
    assert execute(HIST) == 1
    assert "is not drawn (ValueError: no)\n" in capsys.readouterr().err
