"""Settings from a file: --config takes JSON, YAML and the run.json of a run."""

import json
import sys

import pytest

from tests.helpers import ANCRA, PLAIN, RA
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation, Umap, stored
from utils.training.runs import run_folder

FLAGS = (
    "--dataset=digits --method=mart --gate=soft --epsilon=4/255 --milestones=3,5 --lr=1e-3 "
    "--no-anc --compile --cuda_graph=False --attack-cr-beta=0.1 --tag=-x --val-size=50"
)


def written(path, values):
    """Write values as JSON, and return the flags that take them."""
    path.write_text(json.dumps(values))
    return ["--config", str(path)]


@pytest.mark.parametrize("recipe", [RA, PLAIN | {"model_dir": "./model/TRADES"}])
def test_a_run_s_file_gives_all_its_settings_and_the_name_of_its_folder(tmp_path, recipe):
    argv = FLAGS.split()
    command = parse_training("", recipe, argv)
    from_file = written(tmp_path / "run.json", {"settings": stored(command.settings)})
    for further in ([], ["--seed=2", "--milestones=none", "--model-dir=here"]):
        expected = parse_training("", recipe, argv + further)
        again = parse_training("", recipe, from_file + further)
        assert stored(again.settings) == stored(expected.settings)
        assert run_folder(again) == run_folder(expected)


def test_flags_win_over_a_file_and_a_file_over_defaults(tmp_path):
    values = {"dataset": "digits", "batch-size": 64, "epsilon": "8/255", "lr": 1, "width": None}
    flags = written(tmp_path / "x.json", values | {"no_ra": False, "cuda_graph": False})
    command = parse_training("", PLAIN, [*flags, "--lr=0.5"])
    assert command.given == {
        "dataset": "digits",
        "batch_size": 64,
        "epsilon": 8 / 255,
        "lr": 0.5,
        "no_ra": False,
        "cuda_graph": False,
        "config": flags[1],
    }
    assert (command.settings.width, command.settings.epochs) == (12, 16)
    assert (command.settings.no_ra, command.settings.no_anc) == (False, True)


@pytest.mark.parametrize(
    ("cls", "values", "argv"),
    [
        (
            Evaluation,
            {"ckpt_url": ["a", "b"], "mean": "cifar10", "std": [1, 0.5, 1], "random": False},
            "--ckpt_url a b --mean=cifar10 --std=1,0.5,1 --random=False",
        ),
        (Distances, {"model-dir": "r", "target_label": 3}, "--model-dir=r --target_label=3"),
        (Umap, {"model_dir": ["run"], "labels": ["one"]}, "--model_dir run --labels one"),
    ],
)
def test_other_scripts_take_lists_and_required_flags_from_a_file(tmp_path, cls, values, argv):
    from_file = parse(cls, "", written(tmp_path / "x.json", values))
    assert stored(from_file) == stored(parse(cls, "", argv.split()))


# What files hold, and a word of what is said of them
WRONG = {
    '{"lr": "fast"}': "--lr: could not convert string to float: 'fast'",
    '{"lr": 0}': "--lr",
    '{"epochs": 3.5}': "3.5",
    '{"epochs": true}': "True",
    '{"no-ra": "maybe"}': "maybe",
    '{"milestones": [3, "x"]}': "'x'",
    '{"tag": "a/\\nb"}': "no file name",
    '{"bogus": 1}': "--bogus",
    '{"settings": 1}': "map names",
    '{"tag": {"a": 1}}': "a number, a word",
    '{"lr': "line 1",
    "\xff": "utf-8",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_refused(here, refused, text):
    (here / "x.json").write_text(text, encoding="latin-1")
    refused(ANCRA, "--config", "x.json", mentions=["error: --config x.json: ", WRONG[text]])


def test_a_file_is_refused_that_is_missing_or_another_script_s(here, refused):
    refused(ANCRA, "--config", "x.json", mentions=["--config x.json", "No such file"])
    written(here / "run.json", {"settings": {"method": "mart"}})
    refused("test_white_attack.py", "--config=run.json", mentions=["--method", "--config run.json"])


def test_yaml_says_the_same_as_json(here, refused):
    pytest.importorskip("yaml")
    file = here / "x.yaml"
    file.write_text("# mine\nlr: 1e-3\nno-ra: yes\nmilestones: [3, 5]\nepsilon: 8/255\ntag:\n")
    settings = parse_training("", RA, ["--config", "x.yaml"]).settings
    assert (settings.lr, settings.no_ra, settings.milestones) == (1e-3, True, (3, 5))
    assert (settings.epsilon, settings.tag) == (8 / 255, None)
    file.write_text("lr: [")
    refused(ANCRA, "--config", "x.yaml", mentions=["x.yaml", "line 1"])


def test_yaml_without_its_package_is_refused(here, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (here / "x.yml").write_text("lr: 1")
    refused(ANCRA, "--config", "x.yml", mentions=["x.yml", "pip install pyyaml"])
