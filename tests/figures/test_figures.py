"""What is drawn: draw_hist.py, draw_umap.py, the pictures of training and evaluation, and the style they share."""

import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import (
    ANCRA,
    ROOT,
    RunsCode,
    checkpoint,
    digits_checkpoint,
    digits_split,
    execute,
    image_folder,
    python,
)
from utils.figures.features import METRICS, NEIGHBOURS, PAIRS, embed, refuse_few
from utils.figures.plots import (
    BINS,
    COLUMN,
    RIGHT,
    WRONG,
    draw_curves,
    draw_embedding,
    draw_examples,
    draw_histogram,
    draw_robustness,
    save_or_note,
    styled,
)
from utils.system.errors import UsageError
from utils.system.files import read_arrays, write_arrays
from utils.system.settings import FEATURES
from utils.system.values import eps_text

HIST, UMAP = "draw_hist.py", "draw_umap.py"
MEASURED = [("weighted", "natural", 0.5, 0.875), ("unweighted", "natural", -0.25, 0.5)]


def drawn(file, draw, *args):
    """A figure as it is drawn and saved; nothing may fail, and no legend may cover any axes."""
    figures = []
    assert save_or_note(lambda: figures.append(draw(*args)) or figures[0], file) == ""
    for legend in figures[0].legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figures[0].axes)
        assert box.x0 >= 0 and box.x1 <= figures[0].bbox.x1
    return figures[0]


def entries(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def distances(file, seed=0, drop=(), **settings):
    """Write a file as feature_distance.py does, of 30 random values each."""
    rng = np.random.default_rng(seed)
    values = {f"{layer}_{pair}_{metric}": rng.random(30) for layer in FEATURES for pair in PAIRS for metric in METRICS}
    settings = {
        "name": file.stem, "method": f"METHOD {seed}", "checkpoints": ["x.pt"], "dataset": "digits", "target": 3,
        "target_name": "three", "features": "weighted", "reverse_attention": True,
    } | settings  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, settings, **{key: value for key, value in values.items() if key not in drop})
    return file


def assert_printable(stem):
    """A PNG one column wide at 200 dpi and a PDF with embedded TrueType fonts, neither empty nor heavy."""
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    with Image.open(png) as image:
        assert image.width == round(200 * COLUMN) and 300 < image.height < 2000
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    assert 5_000 < len(png.read_bytes()) < 250_000 and 3_000 < len(content) < 200_000


# histograms


@pytest.mark.parametrize("methods", [1, 4, 9])
def test_a_histogram_has_the_same_bins_densities_and_means_for_all_methods(tmp_path, methods):
    values = {f"method {i}": np.random.default_rng(i).normal(i, 1, 200) for i in range(methods)}
    figure = drawn(tmp_path / "hist.png", draw_histogram, values, "L2 distance", "some title")
    (axes,) = figure.axes
    assert "L2 distance" in axes.get_xlabel() and "%" in axes.get_ylabel() and axes.get_title() == "some title"
    every = np.concatenate(list(values.values()))
    filled, outlines = axes.patches[::2], axes.patches[1::2]
    assert len(filled) == len(outlines) == methods
    for patch in axes.patches:
        heights, edges, _ = patch.get_data()
        assert len(edges) == BINS + 1 and edges[0] == every.min() and edges[-1] == every.max()
        assert heights.sum() == pytest.approx(100)
    assert [line.get_xdata()[0] for line in axes.lines[::2]] == [v.mean() for v in values.values()]
    (legend,) = figure.legends
    assert entries(figure) == list(values)
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == methods
    assert_printable(tmp_path / "hist")


def test_bins_of_cosines_are_equal_on_an_even_axis(tmp_path):
    rng = np.random.default_rng(0)
    values = {"near": 1 - 0.02 * rng.random(500) ** 2, "far": rng.uniform(0.3, 0.9, 500)}
    (axes,) = drawn(tmp_path / "hist.png", draw_histogram, values, "cosine similarity", "PP").axes
    (_, edges, _), _ = (patch.get_data() for patch in axes.patches[::2])
    assert np.diff(edges) == pytest.approx(np.ptp(edges) / BINS)
    assert axes.get_xscale() == "linear" and np.ptp(np.diff(axes.get_xticks())) == pytest.approx(0)


def test_the_papers_four_figures_are_over_all_classes_of_every_run(here, monkeypatch):
    """Over those that all runs have files of, whose values are put together; 44 figures of ten classes."""
    import utils.figures.features

    shown = []
    monkeypatch.setattr(utils.figures.features, "draw_histogram", lambda *args: shown.append(args))
    monkeypatch.setattr(utils.figures.features, "save_or_note", lambda draw, file: shown.append(file.name) or draw() or "")
    for seed, (method, weighted) in enumerate((("TRADES", False), ("ANCRA", True))):
        for target in (0, 3, 5)[: 2 + seed]:
            file = here / "distances" / f"{method}-{target}.npz"
            about = {"name": method, "method": method, "target": target, "reverse_attention": weighted}
            distances(file, 10 * seed + target, **about)
    assert execute(HIST) == 0
    assert [name.split("-")[2] for name in shown[::2]] == ["all"] * 4 + ["0"] * 4 + ["3"] * 4 + ["5"] * 4
    for method, values in shown[1][0].items():
        files = [read_arrays(here / "distances" / f"{method}-{target}.npz")[1] for target in (0, 3)]
        assert values.tolist() == [*files[0]["weighted_PP_cosine"], *files[1]["weighted_PP_cosine"]]
    assert "2 classes together" in shown[1][2]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"reverse_attention": False}, "three, features"),
        ({"reverse_attention": True, "gate": "none"}, "three, features"),
        ({"reverse_attention": True, "gate": "label"}, "three, weighted features"),
    ],
)
def test_features_of_a_network_that_weights_none_are_called_features(here, monkeypatch, network, said):
    import utils.figures.features

    titles = []
    monkeypatch.setattr(utils.figures.features, "draw_histogram", lambda values, xlabel, title, show: titles.append(title))
    monkeypatch.setattr(utils.figures.features, "save_or_note", lambda draw, file: draw() or "")
    distances(here / "distances" / "a-3.npz", **network)
    assert execute(HIST) == 0
    assert len(titles) == 4 and all(title.endswith(said) for title in titles)


@pytest.mark.slow
def test_no_argument_draws_everything_in_distances(here, capsys):
    for seed, method in enumerate(("PGD-AT", "TRADES", "ANCRA-TRADES")):
        for target in (0, 3):
            distances(here / "distances" / f"{method}-{target}.npz", seed, method=method, target=target)
    assert execute(HIST) == 0
    stems = [f"hist-digits-{k}-{pair}-{metric}" for k in ("all", 0, 3) for pair in PAIRS for metric in METRICS]
    assert [name.name for name in here.iterdir() if name.name != "distances"] == ["plots"]
    assert "plots/" in (ROOT / ".gitignore").read_text().splitlines()
    assert sorted(f.name for f in here.glob("plots/*")) == sorted(s + e for s in stems for e in (".pdf", ".png"))
    assert capsys.readouterr().out.count("saved") == 12
    assert_printable(here / "plots" / stems[0])


@pytest.mark.slow
def test_files_and_labels_are_drawn_as_named(here, monkeypatch):
    import utils.figures.features

    drawn = []
    monkeypatch.setattr(utils.figures.features, "draw_histogram", lambda *args: drawn.append(args) or draw_histogram(*args))
    a, b = distances(here / "a.npz", 1, method="TRADES"), distances(here / "b.npz", 2, method="TRADES")
    assert execute(HIST, "--distances", b, a, "--labels", "B", "A", "--features", "unweighted", "--out", "out") == 0
    assert len(drawn) == 4 and len(list(here.glob("out/*-unweighted.png"))) == 4
    values, xlabel, title, _ = drawn[2]
    assert (list(values), xlabel) == (["B", "A"], "cosine similarity")
    assert "NP" in title and "class three" in title and "unweighted" in title
    assert np.array_equal(values["B"], read_arrays(b)[1]["unweighted_NP_cosine"])
    assert execute(HIST, "--distances", a, b) == 0
    assert list(drawn[-1][0]) == ["a", "b"]  # two runs of one method are told apart by their names
    for seed, (name, ra) in enumerate((("ANCRA-PGD", True), ("PGD-ANC", False), ("TRADES", False))):
        distances(here / "distances" / f"{name}-3.npz", seed, method=name, reverse_attention=ra)
    assert execute(HIST) == 0
    assert list(drawn[-1][0]) == ["TRADES", "ANCRA-PGD", "PGD-ANC"]  # the baseline first


@pytest.mark.parametrize("value", [1, -0.5, 0])
def test_equal_values_can_be_drawn(tmp_path, value):
    drawn(tmp_path / "one.png", draw_histogram, {"eps 0": np.full(9, value)}, "cosine similarity", "PP")
    assert_printable(tmp_path / "one")


def test_letters_that_the_font_lacks_are_one_line_a_file(tmp_path, capsys, recwarn):
    save_or_note(partial(draw_histogram, {"模型": np.ones(9)}, "cosine similarity", "PP"), tmp_path / "one.png")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in said] == [" one.png", " one.pdf"] and not recwarn.list


@pytest.mark.slow
def test_nothing_opens_a_window_or_heeds_the_users_settings(here):
    """Neither MPLBACKEND, be it unknown, nor a matplotlibrc changes a bit of what is drawn."""
    distances(here / "distances" / "a-3.npz")
    assert execute(HIST, "--out", "expected") == 0
    settings = "text.usetex: True\nfont.size: 20\nsavefig.bbox: tight\nlines.linewidth: 9\nbackend: TkAgg\n"
    (here / "matplotlibrc").write_text(settings)
    code = f"import runpy, sys; sys.argv = ['{HIST}']\ntry: runpy.run_path(r'{ROOT / HIST}', run_name='__main__')\n"
    code += "except SystemExit as stop: sys.exit(stop.code or 'matplotlib.pyplot' in sys.modules)"
    assert python("-c", code, cwd=here, MPLBACKEND="gtk9").returncode == 0
    for file in (here / "expected").iterdir():
        assert (here / "plots" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("script, backend", [(HIST, None), (UMAP, None), (HIST, "gtk9")])
def test_show_without_a_display_is_refused(here, refused, monkeypatch, script, backend):
    import matplotlib.pyplot as plt

    if backend is None:
        monkeypatch.delenv("MPLBACKEND", raising=False)
        monkeypatch.setattr(plt, "get_backend", lambda: "agg")
    else:
        monkeypatch.setenv("MPLBACKEND", backend)
    distances(here / "distances" / "a-3.npz")
    flags = ("--model_dir", checkpoint(here / "run.pt"), "--n-examples", "30") if script == UMAP else ()
    refused(script, "--show", *flags, mentions=["--show", backend or "display"])


def test_show_opens_the_figures_that_were_saved(here, monkeypatch):
    import matplotlib.pyplot as plt

    import utils.figures.features

    shown = []
    monkeypatch.setattr(utils.figures.features, "window", lambda wanted: lambda: shown.extend(plt.get_fignums()))
    plt.close("all")
    distances(here / "distances" / "a-3.npz")
    assert execute(HIST, "--show") == 0
    assert len(shown) == 4 and len(list(here.glob("plots/*.png"))) == 4
    plt.close("all")


def broken(here):
    """Write a file of distances and those that are none -> their names."""
    whole = distances(here / "whole.npz").read_bytes()
    (here / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (here / "text.npz").write_text("no numbers here")
    (here / "empty.npz").write_bytes(b"")
    np.savez(here / "foreign.npz", a=np.arange(3))
    np.savez(here / "list.npz", settings=json.dumps([1]))
    np.savez(here / "json.npz", settings="{")
    np.savez(here / "code.npz", settings=np.array([RunsCode(here / "ran")], dtype=object), allow_pickle=True)
    np.save(here / "array.npy", np.arange(3))
    (here / "array.npy").rename(here / "array.npz")
    distances(here / "short.npz", drop=["weighted_NP_L2"])
    distances(here / "layer.npz", features="other")
    distances(here / "target.npz", target="3")
    settings, arrays = read_arrays(here / "whole.npz")
    write_arrays(here / "nan.npz", settings, **arrays | {"weighted_PP_L2": np.array([0.0, np.nan])})
    write_arrays(here / "none.npz", settings, **arrays | {"weighted_PP_L2": np.array([])})
    write_arrays(here / "words.npz", settings, **arrays | {"weighted_PP_L2": np.array(["a"])})
    return sorted(file.name for file in here.glob("*.npz") if file.stem != "whole")


def test_a_file_that_holds_no_distances_is_named(here, refused):
    names = broken(here)
    assert len(names) == 14
    for name in names:
        refused(HIST, "--distances", here / "whole.npz", here / name, mentions=[name])
    assert not (here / "ran").exists() and not (here / "plots").exists()


def test_distances_that_do_not_belong_together_are_refused(here, refused):
    a = distances(here / "distances" / "a-3.npz")
    for name, changes, said in (
        ("b-3", {"dataset": "cifar10"}, "--dataset"),
        ("b-3", {"features": "unweighted"}, "--features"),
        ("b-3", {"target_name": "drei"}, "target_name"),
    ):
        b = distances(here / "distances" / f"{name}.npz", 1, **changes)
        for flags in ((), ("--distances", a, b)):
            refused(HIST, *flags, mentions=["a-3.npz", "b-3.npz", said])
    b = distances(here / "distances" / "b-3.npz", 1, target=4)
    refused(HIST, "--distances", a, b, mentions=["target 3 and 4"])
    distances(b, 1, dataset="cifar10")
    assert execute(HIST, "--dataset", "cifar10") == 0
    distances(b, 1, features="unweighted")
    assert execute(HIST, "--features", "weighted") == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "feature_distance.py"),
        (("--distances", "nowhere.npz"), "feature_distance.py"),
        (("--distances", "a.npz", "--labels", "A", "B"), "2 names"),
        (("--distances", "a.npz", "--dataset", "cifar10"), "cifar10"),
        (("--distances", "a.npz", "--out", "a.npz"), "--out"),
    ],
)
def test_bad_input_of_draw_hist(here, refused, flags, said):
    distances(here / "a.npz")
    refused(HIST, *flags, mentions=[said])


# embeddings


@pytest.mark.parametrize("classes, count, kinds", [(2, 2, 1), (10, 10, 2), (15, 15, 1), (15, 15, 2), (200, 10, 2)])
def test_every_point_of_an_embedding_is_drawn_once(tmp_path, classes, count, kinds):
    kinds = ["natural", "PGD-10"][:kinds]
    rng = np.random.default_rng(0)
    labels, names = np.arange(400) % classes, [f"name {i}" for i in range(classes)]
    panels = [(f"run {i}", rng.normal(size=(400 * len(kinds), 2)), list(MEASURED)) for i in range(3)]
    panels[0][2][:] = [("plain", "natural", 0.5, 0.875)]
    figure = drawn(tmp_path / "umap.png", draw_embedding, panels, labels, names, kinds, "unweighted features")
    assert len(figure.axes) == 3
    assert len({round(axes.get_window_extent().height, 3) for axes in figure.axes}) == 1
    layers = ["weighted: silhouette 0.50", "label agreement 87.5 %", "unweighted: silhouette -0.25"]
    heads = [["plain: silhouette 0.50", layers[1]]] + 2 * [[*layers, "label agreement 50.0 %"]]
    for axes, (name, points, _), head in zip(figure.axes, panels, heads, strict=True):
        shown = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections])
        assert np.array_equal(np.sort(shown, 0), np.sort(points, 0))
        assert axes.get_title().strip().splitlines() == [name, *head]
        assert not axes.texts  # the legend alone names the classes
    (legend,) = figure.legends
    said = entries(figure)
    assert len(said) == count + (len(kinds) if len(kinds) > 1 else 0) and set(said) <= {*names, *kinds}
    assert "unweighted features" in legend.get_title().get_text()
    assert ("200 classes" in legend.get_title().get_text()) == (classes == 200)
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == len(said)
    assert_printable(tmp_path / "umap")
    for axes in figure.axes:
        assert axes.title.get_window_extent().y1 <= figure.bbox.y1


def test_natural_and_adversarial_points_have_their_own_marks():
    points = np.arange(80.0).reshape(40, 2)
    measured = [("weighted", "natural", 0.5, 0.9), ("weighted", "PGD-10", 0.25, 0.4)]
    with styled():
        figure = draw_embedding([("run", points, measured)], np.arange(20) % 2, "ab", ["natural", "PGD-10"], "features")
    paths = [c.get_paths()[0].vertices.shape for c in figure.axes[0].collections]
    assert paths[0] == paths[1] != paths[2] == paths[3]
    assert figure.axes[0].get_title() == "run\nweighted: silhouette 0.50 / 0.25\nlabel agreement 90.0 / 40.0 %"
    counts = [len(c.get_offsets()) for c in figure.axes[0].collections]
    assert counts == [10, 10, 10, 10]


@pytest.mark.slow
def test_runs_are_panels_on_the_same_images_and_a_seed_gives_one_picture(here, capsys):
    digits_checkpoint(here / "a.pt", recipe={})
    digits_checkpoint(here / "b.pt", reverse_attention=False)
    flags = ("--model_dir", "a.pt", "b.pt", "--n-examples", "60", "--adversarial", "--num-steps", "2")
    for out, batch in (("one", "200"), ("two", "200")):
        assert execute(UMAP, *flags, "--out", out, "--test-batch-size", batch) == 0
    said = capsys.readouterr().out
    assert said.count("silhouette") == 2 * (4 + 2) and "label agreement" in said
    one, two = ({f.suffix: f.read_bytes() for f in (here / out).iterdir()} for out in ("one", "two"))
    assert sorted(one) == [".npz", ".pdf", ".png"] and one[".png"] == two[".png"] and one[".pdf"] == two[".pdf"]
    (file,) = (here / "one").glob("umap-a_TRADES-digits-adversarial.npz")
    settings, arrays = read_arrays(file)
    again = read_arrays(next((here / "two").glob("*.npz")))[1]
    assert settings["names"] == ["a", "TRADES"] and settings["kinds"] == ["natural", "PGD-2"] and settings["seed"] == 42
    assert set(settings["measured"]) == {
        *(f"a, {layer}, {kind}" for layer in FEATURES for kind in settings["kinds"]),
        *(f"TRADES, plain, {kind}" for kind in settings["kinds"]),
    }
    assert arrays["embedding_0"].shape == arrays["embedding_1"].shape == (120, 2)
    for key in arrays:
        assert np.array_equal(arrays[key], again[key])
    assert np.array_equal(arrays["labels"], digits_split().labels[arrays["indices"]].numpy())
    assert_printable(file.with_suffix(""))
    assert execute(UMAP, "--model_dir", "a.pt", "--n-examples", "60", "--out", "other", "--seed", "1") == 0
    other = read_arrays(here / "other" / "umap-a-digits.npz")[1]["embedding_0"]
    assert other.shape == (60, 2) and not np.array_equal(other, arrays["embedding_0"][:60])


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--model-dir"),
        (("--model_dir", "a.pt", "--n-examples", "14"), "at least 15"),
        (("--model_dir", "a.pt", "five.pt"), "5 classes"),
        (("--model_dir", "a.pt", "--labels", "A", "B"), "--labels"),
        (("--model_dir", "a.pt", "nowhere.pt"), "nowhere.pt"),
        (("--model_dir", "a.pt", "--name", "../x"), "--out"),
        (("--model_dir", "a.pt", "--n-examples", "20", "--out", "a.pt"), "--out"),
    ],
)
def test_bad_input_of_draw_umap(here, refused, flags, said):
    checkpoint(here / "a.pt")
    checkpoint(here / "five.pt", num_classes=5)
    refused(UMAP, *flags, mentions=[said])


def test_panels_of_other_data_and_other_runs_figures_are_refused(here, refused):
    for name in ("a.pt", "b.pt"):
        checkpoint(here / name)
    root = image_folder(here / "pictures", {part: {str(i): 2 for i in range(10)} for part in ("train", "test")})
    checkpoint(here / "folder.pt", dataset="folder", recipe={"data_dir": str(root)})
    refused(UMAP, "--model_dir", "a.pt", "folder.pt", mentions=["a.pt", "folder.pt", "digits"])
    (here / "plots").mkdir()
    write_arrays(here / "plots" / "mine.npz", {"checkpoints": ["b.pt"]})
    refused(UMAP, "--model_dir", "a.pt", "--name", "mine", "--n-examples", "30", mentions=["mine.npz", "--name"])


def test_few_classes_form_no_clusters():
    for labels, said in ((torch.zeros(30), "1 class "), (torch.arange(30), "30 classes"), (torch.zeros(5), "not 5")):
        with pytest.raises(UsageError, match=said):
            refuse_few(labels)
    refuse_few(torch.arange(30) // 2)


def test_umap_compiles_where_nothing_of_the_installation_can_be_written(tmp_path, monkeypatch):
    """Numba then refuses when umap is imported; its cache goes to a folder that ends with the process."""
    stand_in = "import numba\nif not numba.config.CACHE_DIR:\n    raise RuntimeError('no locator available')\n"
    stand_in += "class UMAP:\n    def __init__(self, **how): pass\n    fit_transform = staticmethod(len)\n"
    (tmp_path / "umap.py").write_text(stand_in)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    monkeypatch.setitem(sys.modules, "numba", types.SimpleNamespace(config=types.SimpleNamespace(CACHE_DIR="")))
    assert embed(torch.zeros(NEIGHBOURS + 1, 2), 0) == NEIGHBOURS + 1
    assert Path(sys.modules["numba"].config.CACHE_DIR).is_dir()
    del sys.modules["umap"]


# training and evaluation


def rows(epochs, interval=1):
    """Rows of metrics.csv whose best epoch is 12, whose rate falls at epochs 11 and 14."""
    evaluated = {e: {"natural_accuracy": 95.0, "pgd40_heads_accuracy": 80.0 - abs(e - 12)} for e in range(1, 99)}
    none = dict.fromkeys(evaluated[1])
    shares = {"train_natural_accuracy_first_head": None, "train_robust_accuracy_first_head": 60.0}
    return [
        {"epoch": e, "lr": 0.1 ** ((e >= 11) + (e >= 14)), "loss": 5 / e, **shares} | (none if e % interval else evaluated[e])
        for e in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs, interval", [(1, 1), (1, 2), (3, 1), (16, 2)])
def test_training_curves_mark_the_best_epoch_and_the_learning_rate(tmp_path, epochs, interval):
    of_run = rows(epochs, interval)
    best = max((row for row in of_run if row["natural_accuracy"]), key=lambda r: r["pgd40_heads_accuracy"], default=None)
    figure = drawn(tmp_path / "curves.png", draw_curves, of_run, best)
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        falls = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert falls == ([10.5, 13.5] if epochs == 16 else [])
    marked = [line for line in figure.axes[1].lines if line.get_label().startswith("best checkpoint")]
    assert [line.get_label() for line in marked] == ([f"best checkpoint: epoch {best['epoch']}"] if best else [])
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marked] == (
        [(best["epoch"], best["pgd40_heads_accuracy"])] if best else []
    )
    assert len(entries(figure)) == 4 + len(marked) + (epochs == 16)
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("eps", [8 / 255, 0.1])
def test_robustness_curves_have_intervals_and_the_fractions_of_255(tmp_path, eps):
    at = [0, eps / 4, eps, 1.5 * eps, 1.0]
    curve = [(x, (80 - i, 75 - i, 85 - i), (70 - i, 60 - i, 75 - i)) for i, x in enumerate(at)]
    (axes,) = drawn(tmp_path / "eps.png", draw_robustness, curve, "eps", eps).axes
    shown = ["0", "2/255", "8/255", "12/255", "1"] if eps < 0.1 else ["0", "0.025", "0.1", "0.15", "1"]
    assert [text.get_text() for text in axes.get_xticklabels()] == shown and list(axes.get_xticks()) == at
    (mark,) = [line for line in axes.lines if line.get_label().startswith("training eps")]
    assert mark.get_label() == f"training eps, {shown[2]}" and mark.get_xdata()[0] == eps
    for band, low, high in zip(axes.collections, (75, 60), (85, 75), strict=True):
        ends = band.get_paths()[0].vertices
        assert ends[:, 1].max() == high and ends[:, 1].min() == low - 4
    (axes,) = drawn(tmp_path / "steps.png", draw_robustness, [(s, *curve[0][1:]) for s in (1, 5, 200)], "steps").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5", "200"] and len(axes.lines) == 2


@pytest.mark.parametrize("count", [1, 8])
def test_examples_say_the_true_class_the_answers_and_what_is_shown(tmp_path, count):
    labels, classes = torch.arange(count) % 3, ["_a$b$c", "$x^{$", r"\frac_"]
    natural, wrong = torch.eye(3)[labels], torch.eye(3)[(labels + 1) % 3]
    images = [torch.rand(count, 3, 16, 16) for _ in range(2)]
    title = "the worst image that FGSM found"
    shown = (images, [natural, wrong], labels == labels, labels, 8 / 255, classes, title)
    figure = drawn(tmp_path / "x.png", draw_examples, *shown)
    grid = np.array(figure.axes).reshape(3, count)
    for i, label in enumerate(labels):
        assert grid[0, i].get_title() == f"true class\n{classes[label]}"
        answers = [grid[row, i].xaxis.label for row in (0, 2)]
        assert [said.get_text().splitlines()[0] for said in answers] == [classes[label], classes[(label + 1) % 3]]
        assert [said.get_color() for said in answers] == [RIGHT, WRONG]
        assert grid[0, i].get_xlim() == (-0.5, 15.5) and grid[0, i].get_ylim() == (15.5, -0.5)
    assert entries(figure) == ["right", "wrong"] and figure.get_suptitle() == title
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [RIGHT, WRONG]


def test_an_image_that_is_not_fooled_has_neither_perturbation_nor_copy(tmp_path):
    labels, fooled = torch.tensor([0, 1, 2]), torch.tensor([True, False, False])
    answers = [torch.eye(3)[[0, 1, 0]], torch.eye(3)[[1, 1, 0]]]  # fooled, right throughout, wrong from the start
    images = [torch.rand(3, 3, 16, 16) for _ in range(2)]
    figure = drawn(tmp_path / "x.png", draw_examples, images, answers, fooled, labels, 0.1, "abc", "")
    grid = np.array(figure.axes).reshape(3, 3)
    for row, shown in zip(grid, ([1, 1, 1], [1, 0, 0], [1, 0, 0]), strict=True):
        assert [len(axes.images) for axes in row] == shown
    said = [[text.get_text() for text in axes.texts] for axes in grid[2]]
    assert said == [[], ["not fooled"], ["wrong\nas it is"]]
    assert not any(axes.texts for axes in grid[:2].flat)
    assert not grid[2, 1].get_xlabel()


@pytest.mark.parametrize("error", [ValueError("no\nfont"), OSError(28, "No space left on device"), MemoryError()])
def test_a_picture_that_fails_is_one_note(here, monkeypatch, capsys, error):
    from matplotlib.figure import Figure

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Figure, "savefig", fail)
    note = save_or_note(partial(draw_curves, rows(2), None), here / "curves.png")
    assert note.startswith(f"note: {here / 'curves.png'} is not drawn ({type(error).__name__}") and "\n" not in note
    assert not list(here.iterdir())
    distances(here / "distances" / "a-3.npz")
    assert execute(HIST) == 1
    said = capsys.readouterr()
    assert said.out.count("is not drawn") == 4 and "4 of 4 figures" in said.err


def test_eps_is_said_as_the_field_writes_it(capsys):
    for k in (1, 2, 4, 8, 16, 50):
        assert eps_text(k / 255) == eps_text(float(np.float32(k / 255))) == f"{k}/255"
    said = {
        0.5 / 255: "0.5/255",
        0: "0",
        1: "1",
        0.1: "0.1",
        0.2: "0.2",
        0.007: "0.007",
        0.031: "0.031",
        0.3 / 7: "0.04286",
    }
    assert {eps: eps_text(eps) for eps in said} == said
    assert execute(ANCRA, "--help") == 0
    assert "(default: 8/255; digits: 0.1)" in " ".join(capsys.readouterr().out.split())
