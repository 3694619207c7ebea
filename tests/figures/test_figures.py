"""What is drawn: draw_hist.py, draw_umap.py, and the pictures of training and evaluation."""

import sys
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import utils.figures.features
from tests.helpers import (
    checkpoint,
    digits_checkpoint,
    digits_split,
    execute,
    files,
    image_folder,
)
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
        **changes,
    }
    arrays = {}
    for key in product(FEATURES, PAIRS, METRICS):
        arrays["_".join(key)] = rng.random(30)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, settings, **arrays)
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


def test_a_histogram_has_the_same_bins_for_all_methods(drawn):
    methods = [f"method {i}" for i in range(9)]
    distances = np.random.default_rng(0).normal(size=(9, 200))
    distances += np.arange(9)[:, None]
    values = list(zip(methods, distances, strict=True))
    figure = drawn(draw_histogram, values, "cosine similarity", "some title")
    assert legend_texts(figure) == methods
    (axes,) = figure.axes
    bins = np.linspace(distances.min(), distances.max(), BINS + 1)
    for patch in axes.patches:
        heights, edges, _ = patch.get_data()
        assert edges == pytest.approx(bins)
        assert heights.sum() == pytest.approx(100)
    means = [line.get_xdata()[0] for line in axes.lines]
    assert means == pytest.approx(distances.mean(1))


def test_equal_values_can_be_drawn(drawn):
    drawn(draw_histogram, [("eps 0", np.full(9, -0.5))], "cosine similarity", "PP")


def test_four_figures_are_of_each_class_and_four_of_all(here, histograms):
    folder = here / "distances"
    for target, name in ((0, "zero"), ("all", "all classes")):
        of_class = {"target": target, "target_name": name}
        write_distances(folder / f"a-{target}.npz", 1, **of_class)
        write_distances(folder / f"b-{target}.npz", 2, **of_class, reverse_attention=False)
    assert execute(HIST) == 0
    titles = [title.split(", ")[1] for _, _, title in histograms]
    assert titles == ["zero"] * 4 + ["all classes"] * 4
    values, xlabel, title = histograms[4]
    assert "PP" in title
    assert xlabel == METRICS["cosine"]
    assert list(values) == ["METHOD 2", "METHOD 1"]  # the plain network first
    _, arrays = read_arrays(folder / "a-all.npz")
    assert np.array_equal(values["METHOD 1"], arrays["weighted_PP_cosine"])


@pytest.mark.parametrize(
    ("gate", "features"),
    [("none", "three, features"), ("label", "three, weighted features")],
)
def test_only_features_of_a_gated_network_are_called_weighted(here, histograms, gate, features):
    write_distances(here / "distances" / "a-3.npz", gate=gate)
    assert execute(HIST) == 0
    assert all(title.endswith(features) for _, _, title in histograms)


def test_files_are_drawn_in_the_order_of_the_labels(here, histograms):
    a = write_distances(here / "a.npz", 1, method="TRADES")
    b = write_distances(here / "b.npz", 2, method="TRADES")
    flags = ("--labels", "B", "A", "--features=unweighted")
    assert execute(HIST, "--distances", b, a, *flags) == 0
    assert len(histograms) == 4
    values, _, title = histograms[2]
    assert list(values) == ["B", "A"]
    assert title.startswith("NP") and title.endswith("unweighted features")
    _, arrays = read_arrays(b)
    assert np.array_equal(values["B"], arrays["unweighted_NP_cosine"])
    assert execute(HIST, "--distances", a, b) == 0
    values, _, _ = histograms[-1]
    assert list(values) == ["a", "b"]  # two runs of one method have their names


def test_files_that_are_not_comparable_do_not_share_a_figure(here, histograms, capsys):
    folder = here / "distances"
    write_distances(folder / "a-3.npz", epsilon=0.1)
    write_distances(folder / "b-3.npz", 1, dataset="cifar10")
    write_distances(folder / "c-3.npz", 2, features="unweighted")
    write_distances(folder / "d-3.npz", 3, epsilon=0.2)
    assert execute(HIST) == 0
    methods = [list(values) for values, _, _ in histograms[::4]]
    assert methods == [["METHOD 0", "METHOD 3"], ["METHOD 1"], ["METHOD 2"]]
    assert "differ in epsilon: 0.1, 0.2" in capsys.readouterr().out
    assert execute(HIST, "--dataset=cifar10") == 0
    assert len(histograms) == 16


def test_figures_depend_on_no_setting_of_the_user_s_and_open_no_window_unasked(here, monkeypatch):
    write_distances(here / "distances" / "a-3.npz")
    plt.close("all")
    assert execute(HIST) == 0
    assert not plt.get_fignums()

    monkeypatch.setitem(plt.rcParams, "font.size", 20)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    assert execute(HIST, "--show", "--out=shown") == 0
    plt.close("all")
    assert len(shown) == 4
    expected = sorted(files(here / "plots").values())
    assert len(expected) == 8
    assert sorted(files(here / "shown").values()) == expected


@pytest.mark.parametrize("name", ["truncated.npz", "foreign.npz", "embedding.npz"])
def test_a_file_that_holds_no_distances_is_named(here, refused, name):
    whole = write_distances(here / "whole.npz")
    (here / "truncated.npz").write_bytes(whole.read_bytes()[:1000])
    np.savez(here / "foreign.npz", a=np.arange(3))
    write_arrays(here / "embedding.npz", {"names": ["TRADES"]})
    refused(HIST, "--distances", whole, here / name, mentions=[name])


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("", "feature_distance.py"),
        ("--distances a.npz --labels A B", "--labels"),
        ("--distances a.npz --dataset=cifar10", "cifar10"),
        ("--distances a.npz --out=a.npz", "--out"),
    ],
)
def test_bad_input_of_draw_hist(here, refused, flags, word):
    write_distances(here / "a.npz")
    refused(HIST, *flags.split(), mentions=[word])


# Embeddings


@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (2, ["natural"]),
        (10, ["natural", "PGD-10"]),
        (200, ["natural"]),
    ],
)
def test_every_point_of_an_embedding_is_drawn_once(drawn, classes, kinds):
    labels = np.arange(400) % classes
    names = [f"name {i}" for i in range(classes)]
    points = np.random.default_rng(0).normal(size=(400 * len(kinds), 2))
    measured = {"silhouette": -0.25, "agreement": 0.875}
    panel = Panel("a run", points, {"weighted, natural": measured})
    figure = drawn(draw_embedding, [panel], labels, names, kinds, "some features")

    (axes,) = figure.axes
    assert axes.get_title() == "a run\nweighted, natural: -0.25, 87.5 %"
    shown = np.concatenate([dots.get_offsets() for dots in axes.collections])
    assert np.array_equal(np.sort(shown, 0), np.sort(points, 0))
    (legend,) = figure.legends
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    coloured = min(classes, 10)
    of_kinds = len(kinds) if len(kinds) > 1 else 0
    assert len(looks) == len(legend_texts(figure)) == coloured + of_kinds
    title = legend.get_title().get_text()
    assert f"some features; {coloured} of {classes} classes" in title


@pytest.mark.slow
def test_runs_are_panels_on_the_same_images_and_a_seed_gives_one_picture(here):
    digits_checkpoint(here / "a.pt", recipe={})
    digits_checkpoint(here / "b.pt", reverse_attention=False)
    flags = ("--n-examples=60", "--adversarial", "--num-steps=2", "--name=same")
    for out in ("one", "two"):
        assert execute(UMAP, "--model_dir", "a.pt", "b.pt", *flags, "--out", out) == 0
    picture = (here / "one" / "same.png").read_bytes()
    assert (here / "two" / "same.png").read_bytes() == picture
    settings, arrays = read_arrays(here / "one" / "same.npz")
    assert settings["names"] == ["a", "TRADES"]
    assert settings["kinds"] == ["natural", "PGD-2"]
    of_gated, of_plain = settings["measured"]
    assert list(of_gated) == [
        "weighted, natural",
        "weighted, PGD-2",
        "unweighted, natural",
        "unweighted, PGD-2",
    ]
    assert list(of_plain) == ["unweighted, natural", "unweighted, PGD-2"]
    assert arrays["embedding_0"].shape == arrays["embedding_1"].shape == (120, 2)
    labels = digits_split().labels[arrays["indices"]]
    assert np.array_equal(arrays["labels"], labels)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("a.pt --n-examples=14", "--n-examples"),
        ("a.pt --labels A B", "--labels"),
        ("a.pt --n-examples=20 --out=a.pt", "--out"),
        ("a.pt folder.pt", "folder.pt"),
    ],
)
def test_bad_input_of_draw_umap(here, refused, flags, word):
    checkpoint(here / "a.pt")
    recipe = {"data_dir": str(image_folder(here / "pictures"))}
    network = {"num_classes": 2, "classes": ["cat", "dog"], "dataset": "folder"}
    checkpoint(here / "folder.pt", recipe=recipe, **network)
    refused(UMAP, "--model_dir", *flags.split(), mentions=[word])


def test_umap_that_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "umap.py").write_text('raise RuntimeError("no locator available")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    with pytest.raises(RunError, match="no locator available.*NUMBA_CACHE_DIR"):
        embed(torch.zeros(13, 2), 0)


# Training and evaluation


def metrics_rows(epochs):
    """Return rows of metrics.csv, evaluated every second epoch; the learning rate falls at 11."""
    rows = []
    for epoch in range(1, epochs + 1):
        is_evaluated = epoch % 2 == 0
        rows.append(
            {
                "epoch": epoch,
                "lr": 0.1 if epoch < 11 else 0.01,
                "loss": 5 / epoch,
                "train_natural_accuracy_first_head": None,
                "train_robust_accuracy_first_head": 60.0,
                "natural_accuracy": 95.0 if is_evaluated else None,
                "pgd40_heads_accuracy": 80.0 if is_evaluated else None,
            }
        )
    return rows


@pytest.mark.parametrize(
    ("epochs", "best", "falls"),
    [
        (1, [], []),
        (16, [12], [10.5]),
    ],
)
def test_training_curves_mark_the_best_epoch_and_the_learning_rate(drawn, epochs, best, falls):
    rows = metrics_rows(epochs)
    figure = drawn(draw_curves, rows, rows[11] if best else None)
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == falls
    _, accuracy = figure.axes
    marks = [line for line in accuracy.lines if "best" in line.get_label()]
    assert [mark.get_xdata()[0] for mark in marks] == best


def test_robustness_curves_have_intervals_and_the_fractions_of_255(drawn):
    eps = 8 / 255
    points = [{"eps": x, "answer": 80.0, "views": 70.0} for x in (0, eps / 4, eps, 1.0)]
    (axes,) = drawn(draw_robustness, points, lambda y: (y - 9, y + 5), "eps", eps).axes
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["0", "2/255", "8/255", "1"]
    *curves, trained = axes.lines
    assert [set(line.get_ydata()) for line in curves] == [{80}, {70}]
    assert trained.get_label() == "training eps, 8/255"
    outlines = [band.get_paths()[0] for band in axes.collections]
    assert [set(outline.vertices[:, 1]) for outline in outlines] == [{71, 85}, {61, 75}]


def test_examples_show_the_answers_before_and_after_the_attack(drawn):
    """Of two images the first is fooled."""
    labels = torch.tensor([0, 1])
    answers = [torch.eye(3)[[0, 1]], torch.eye(3)[[1, 1]]]
    images = torch.full((2, 2, 3, 16, 16), 0.5)
    images[1, 0, :, :8] += 0.1
    classes = ["a$b$c", "$x^{$", r"\frac_"]  # no formulas
    figure = drawn(draw_examples, images, answers, labels, classes, "some title")
    top, middle, bottom = np.array(figure.axes).reshape(3, 2)
    assert [axes.get_title() for axes in top] == [f"true class\n{name}" for name in classes[:2]]
    for axes, name, colour in ((top[0], classes[0], RIGHT), (bottom[0], classes[1], WRONG)):
        assert axes.get_xlabel().startswith(name)
        assert axes.xaxis.label.get_color() == colour
    assert [axes.get_xlabel() for axes in middle] == ["", "not fooled"]
    changes = [axes.images[0].get_array() for axes in middle]
    assert [(change.min(), change.max()) for change in changes] == [(0.5, 1), (0.5, 0.5)]


def test_a_picture_that_fails_ends_draw_hist(here, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no\nfont")

    monkeypatch.setattr(utils.figures.features, "draw_histogram", fail)
    write_distances(here / "distances" / "a-3.npz")
    assert execute(HIST) == 1
    assert "is not drawn (ValueError: no)\n" in capsys.readouterr().err
