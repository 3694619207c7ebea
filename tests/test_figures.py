"""What is drawn: draw_hist.py, draw_umap.py and the style they share."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT, RunsCode, checkpoint, digits_checkpoint, digits_split, execute, image_folder, python
from utils.errors import UsageError
from utils.features import METRICS, PAIRS, refuse_few
from utils.figures import BINS, COLUMN, draw_embedding, draw_histogram, save_figure
from utils.files import read_arrays, write_arrays
from utils.recipes import FEATURES

HIST, UMAP = "draw_hist.py", "draw_umap.py"
MEASURED = [("weighted", "natural", 0.5, 0.875), ("unweighted", "natural", -0.25, 0.5)]


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
    assert 5_000 < len(png.read_bytes()) < 200_000 and 3_000 < len(content) < 200_000


# histograms


@pytest.mark.parametrize("methods", [1, 4, 9])
def test_a_histogram_has_the_same_bins_densities_and_means_for_all_methods(tmp_path, methods):
    values = {f"method {i}": np.random.default_rng(i).normal(i, 1, 200) for i in range(methods)}
    figure = draw_histogram(values, "L2 distance", "some title")
    (axes,) = figure.axes
    assert "L2 distance" in axes.get_xlabel() and axes.get_ylabel() == "density" and axes.get_title() == "some title"
    every = np.concatenate(list(values.values()))
    filled, outlines = axes.patches[::2], axes.patches[1::2]
    assert len(filled) == len(outlines) == methods
    for patch in axes.patches:
        heights, edges, _ = patch.get_data()
        assert len(edges) == BINS + 1 and edges[0] == every.min() and edges[-1] == every.max()
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    assert [line.get_xdata()[0] for line in axes.lines] == [v.mean() for v in values.values()]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(values)
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == methods
    save_figure(figure, tmp_path / "hist")
    assert_printable(tmp_path / "hist")
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_no_argument_draws_everything_in_distances(here, capsys):
    for seed, method in enumerate(("PGD-AT", "TRADES", "ANCRA-TRADES")):
        for target in (0, 3):
            distances(here / "distances" / f"{method}-{target}.npz", seed, method=method, target=target)
    assert execute(HIST) == 0
    stems = [f"hist-digits-{k}-{pair}-{metric}" for k in (0, 3) for pair in PAIRS for metric in METRICS]
    assert sorted(f.name for f in here.glob("figure/*")) == sorted(s + e for s in stems for e in (".pdf", ".png"))
    assert capsys.readouterr().out.count("saved") == 8
    assert_printable(here / "figure" / stems[0])


def test_files_and_labels_are_drawn_as_named(here, monkeypatch):
    import utils.features

    drawn = []
    monkeypatch.setattr(utils.features, "draw_histogram", lambda *args: drawn.append(args) or draw_histogram(*args))
    a, b = distances(here / "a.npz", 1, method="TRADES"), distances(here / "b.npz", 2, method="TRADES")
    assert execute(HIST, "--distances", b, a, "--labels", "B", "A", "--features", "unweighted", "--out", "out") == 0
    assert len(drawn) == 4 and len(list(here.glob("out/*-unweighted.png"))) == 4
    values, xlabel, title, _ = drawn[2]
    assert (list(values), xlabel) == (["B", "A"], "cosine similarity")
    assert "NP" in title and "class three" in title and "unweighted" in title
    assert np.array_equal(values["B"], read_arrays(b)[1]["unweighted_NP_cosine"])
    assert execute(HIST, "--distances", a, b) == 0
    assert list(drawn[-1][0]) == ["a", "b"]  # two runs of one method are told apart by their names


def test_equal_values_can_be_drawn(tmp_path):
    save_figure(draw_histogram({"eps 0": np.ones(9)}, "cosine similarity", "PP"), tmp_path / "one")
    assert_printable(tmp_path / "one")


def test_letters_that_the_font_lacks_are_one_line_a_file(tmp_path, capsys, recwarn):
    save_figure(draw_histogram({"模型": np.ones(9)}, "cosine similarity", "PP"), tmp_path / "one")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in said] == [" one.png", " one.pdf"] and not recwarn.list


def test_nothing_opens_a_window_or_imports_what_could(here):
    distances(here / "distances" / "a-3.npz")
    code = f"import runpy, sys; sys.argv = ['{HIST}']\ntry: runpy.run_path(r'{ROOT / HIST}', run_name='__main__')\n"
    code += "except SystemExit as stop: sys.exit(stop.code or 'matplotlib.pyplot' in sys.modules)"
    assert python("-c", code, cwd=here).returncode == 0


@pytest.mark.parametrize("script", [HIST, UMAP])
def test_show_without_a_display_is_refused(here, refused, monkeypatch, script):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "get_backend", lambda: "agg")
    distances(here / "distances" / "a-3.npz")
    flags = ("--model_dir", checkpoint(here / "run.pt"), "--n-examples", "30") if script == UMAP else ()
    refused(script, "--show", *flags, mentions=["--show", "display"])


def test_show_opens_the_figures_that_were_saved(here, monkeypatch):
    import matplotlib.pyplot as plt

    import utils.features

    shown = []
    monkeypatch.setattr(utils.features, "require_display", lambda: None)
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    plt.close("all")
    distances(here / "distances" / "a-3.npz")
    assert execute(HIST, "--show") == 0
    assert len(shown) == 4 and len(list(here.glob("figure/*.png"))) == 4
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
    assert not (here / "ran").exists() and not (here / "figure").exists()


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
        (("--distances", "a.npz", "--labels", r"$\nothing$"), "formula"),
    ],
)
def test_bad_input_of_draw_hist(here, refused, flags, said):
    distances(here / "a.npz")
    if "formula" in said:
        (here / "figure").mkdir()
    refused(HIST, *flags, mentions=[said])


# embeddings


@pytest.mark.parametrize("classes, entries, kinds", [(2, 2, 1), (10, 10, 2), (15, 15, 1), (15, 15, 2), (200, 10, 2)])
def test_every_point_of_an_embedding_is_drawn_once(tmp_path, classes, entries, kinds):
    kinds = ["natural", "PGD-10"][:kinds]
    rng = np.random.default_rng(0)
    labels, names = np.arange(400) % classes, [f"name {i}" for i in range(classes)]
    panels = [(f"run {i}", rng.normal(size=(400 * len(kinds), 2)), MEASURED) for i in range(3)]
    figure = draw_embedding(panels, labels, names, kinds, "unweighted features")
    assert len(figure.axes) == 3
    for axes, (name, points, _) in zip(figure.axes, panels, strict=True):
        drawn = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections])
        assert np.array_equal(np.sort(drawn, 0), np.sort(points, 0))
        assert axes.get_title().splitlines() == [name, "weighted: s 0.50, a 87.5", "unweighted: s -0.25, a 50.0"]
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert len(said) == entries + (len(kinds) if len(kinds) > 1 else 0) and set(said) <= {*names, *kinds}
    assert "unweighted features" in legend.get_title().get_text()
    assert ("200 classes" in legend.get_title().get_text()) == (classes == 200)
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == len(said)
    save_figure(figure, tmp_path / "umap")
    assert_printable(tmp_path / "umap")
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert axes.title.get_window_extent().y1 <= figure.bbox.y1
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1


def test_natural_and_adversarial_points_have_their_own_marks():
    points = np.arange(80.0).reshape(40, 2)
    measured = [("weighted", "natural", 0.5, 0.9), ("weighted", "PGD-10", 0.25, 0.4)]
    figure = draw_embedding([("run", points, measured)], np.arange(20) % 2, "ab", ["natural", "PGD-10"], "features")
    paths = [c.get_paths()[0].vertices.shape for c in figure.axes[0].collections]
    assert paths[0] == paths[1] != paths[2] == paths[3]
    assert figure.axes[0].get_title() == "run\nweighted: s 0.50 / 0.25, a 90 / 40"
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
        ((), "--model_dir is required"),
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
    (here / "figure").mkdir()
    write_arrays(here / "figure" / "mine.npz", {"checkpoints": ["b.pt"]})
    refused(UMAP, "--model_dir", "a.pt", "--name", "mine", "--n-examples", "30", mentions=["mine.npz", "--name"])


def test_few_classes_form_no_clusters():
    for labels, said in ((torch.zeros(30), "1 class "), (torch.arange(30), "30 classes"), (torch.zeros(5), "not 5")):
        with pytest.raises(UsageError, match=said):
            refuse_few(labels)
    refuse_few(torch.arange(30) // 2)
