"""The study's command runs, stops, goes on and counts as it says; so does the table of any runs."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, environment, python
from tests.tools import study
from utils.evaluation import results
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation

GOLDEN = ROOT / "tests/golden"
_numbers = itertools.count()


def record(network=(), labels=(0, 1, 2, 3), **attacks):
    """What an evaluation leaves, as far as the tables need it."""
    return {
        "format": results.FORMAT,
        "checkpoint": f"{next(_numbers)}/best_adv_model.pt",
        "settings": {"restarts": 5},
        "network": {"method": "TRADES", "arch": "ResNet18"} | dict(network),
        "labels": list(labels),
        "attacks": {name: {"verdicts": verdicts} for name, verdicts in attacks.items()},
    }


def write(folder, content):
    """Write a record into a run's folder."""
    folder.mkdir(exist_ok=True)
    (folder / results.FILE).write_text(json.dumps(content))


def first_cells(text, count=1):
    """The first cells of each row of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ")[:count] for line in lines[1:]]


def test_the_worst_case_is_the_lowest_of_the_attacks_that_all_have_image_by_image():
    first = record(natural="1111", PGD="1110", **{"adaptive: final": "1110", "worst case": "0000"})
    views = {"adaptive: a": "1011", "adaptive: b": "1101"}
    second = record(natural="1111", PGD="1110", AutoAttack="0000", **views)
    third = record(natural="1111", PGD="1111", **{"adaptive: final": "1111"})
    _, _, one, two, *_ = results.table({"first": [first], "second": [second, third]})
    assert one == "| first | 1 | 100.00 | 75.00 | 75.00 |  | **75.00** |  |"
    cells = two.split(" | ")
    assert cells[4] == "75.00 ± 35.36"
    assert cells[5] == "0.00, 1 of 2 runs"
    assert cells[6] == "**62.50 ± 53.03**"
    assert cells[7].startswith("-12.5 (")


def test_runs_of_several_seeds_share_a_row_and_names_tell_recipes_apart(tmp_path, capsys):
    plain = {"no_anc": True, "no_ra": True, "lr": 0.03}
    recipes = [plain | {"seed": 1}, plain | {"seed": 2, "zeta": 9}, plain | {"lr": 0.09}, None]
    for i, recipe in enumerate(recipes):
        network = {"recipe": recipe, "method": "TRADES" if recipe else "FILE", "epoch": i}
        write(tmp_path / str(i), record(network, natural="1110", PGD="1100"))
    paths = [str(tmp_path / str(i)) for i in range(4)]
    assert results.main(paths) == 0
    rows = first_cells(capsys.readouterr().out, 2)
    assert rows == [["TRADES, lr 0.03", "2"], ["TRADES, lr 0.09", "1"], ["FILE", "1"]]


def test_a_run_that_is_there_twice_is_refused(tmp_path, capsys):
    content = record({"recipe": {"seed": 1}}, natural="1110", PGD="1100")
    write(tmp_path / "a", content)
    write(tmp_path / "b", content | {"checkpoint": "elsewhere/model-wrn-last.pt"})
    a, b = (str(tmp_path / name) for name in "ab")
    assert results.main([a, a]) == 2
    assert "twice" in capsys.readouterr().err
    assert results.main([a, b]) == 0
    assert len(first_cells(capsys.readouterr().out)) == 2


def test_other_images_are_not_compared():
    first = record(natural="1111", PGD="1110")
    second = record(natural="1111", PGD="1110") | {"image_numbers": [3, 1, 2, 0]}
    row = list(results.table({"first": [first], "second": [second]}))[3]
    assert row.endswith("| other images, norm or eps |")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}'])
def test_what_is_no_evaluation_is_refused(content, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    assert results.main([str(bad)]) == 2
    assert str(bad) in capsys.readouterr().err


def test_every_command_of_the_study_is_understood(capsys):
    study.main(["--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) > 70
    for line in lines:
        train, evaluate, measure = (command.split()[2:] for command in line.split(" && "))
        settings = parse_training("", {}, train).settings
        assert (settings.width, settings.epochs) == (8, 6)
        assert parse(Evaluation, "", evaluate).attacks[-1] in ("adaptive", "autoattack")
        assert parse(Distances, "", measure).target_label == "all"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing"], "unknown: nothing"),
        (["--seeds", "x"], "--seeds"),
        (["--print", "--out", "nowhere"], "nowhere"),
        (["--print", "--out", str(GOLDEN / "ResNet18.keys.json")], "study.json"),
        (["--out", "study.json"], "--print"),
    ],
)
def test_wrong_use_of_the_study_is_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        study.main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


SMALL = (
    "--width=4 --epochs=2 --milestones=none --limit-train=24 --limit-test=6 --num-steps=1 "
    "--device=cpu"
)
QUICK = "--n-examples=4 --num-steps=2 --apgd-steps=5 --device=cpu"


def study_of(tmp_path):
    """The arguments of a study of four quick runs."""
    out = str(tmp_path / "study")
    return ["best", "--seeds", "1", "--out", out, "--flags", SMALL, "--evaluation", QUICK]


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_and_a_run_is_that_of_its_command(tmp_path, capfd):
    argv = study_of(tmp_path)
    began = [sys.executable, "-m", "tests.tools.study", *argv]
    with subprocess.Popen(began, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as process:
        while not list(tmp_path.rglob("last_state.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        assert b"goes on" in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM

    capfd.readouterr()
    study.main(argv)
    rows = first_cells(capfd.readouterr().out)
    assert [name for (name,) in rows[: len(study.best())]] == list(study.best())
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob(results.FILE)}
    assert len(times) == 4
    study.main(argv)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob(results.FILE)}

    capfd.readouterr()
    with pytest.raises(SystemExit):
        study.main([*argv[:-1], f"{QUICK} --num-steps=3", "--print"])
    assert "num_steps" in capfd.readouterr().err

    study.main(["--commands", *argv])
    train = shlex.split(capfd.readouterr().out.splitlines()[-1].split(" && ")[0])
    done = python(*train[1:-1], f"--model-dir={tmp_path / 'alone' / 'run'}")
    assert done.returncode == 0, done.stderr
    (alone,) = tmp_path.glob("alone/run*/model-wrn-last.pt")
    (of_study,) = tmp_path.glob(f"study/*awp*ema*/{alone.parent.name}/{alone.name}")
    weights = torch.load(alone, weights_only=True)["model"]
    for key, value in torch.load(of_study, weights_only=True)["model"].items():
        assert torch.equal(weights[key], value)
