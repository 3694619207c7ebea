"""The study's command runs, stops, goes on and counts as it says; so does the table of any runs."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, environment, python
from tests.tools import study
from utils.evaluation import results
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation

_numbers = itertools.count()


def record(network=(), labels=(0, 1, 2, 3), **attacks):
    """What an evaluation leaves, as far as the tables need it."""
    return {
        "format": results.FORMAT,
        "checkpoint": f"{next(_numbers)}/best_adv_model.pt",
        "settings": {"restarts": 5},
        "network": {"method": "TRADES", "arch": "ResNet18"} | dict(network),
        "labels": list(labels),
        "attacks": {name.replace("_", " "): {"verdicts": verdicts} for name, verdicts in attacks.items()},
    }


def test_the_worst_case_is_the_lowest_of_the_attacks_that_all_have_image_by_image():
    first = record(natural="1111", PGD="1110", **{"adaptive: final": "1110", "worst case": "0000"})
    second = record(natural="1111", PGD="1110", AutoAttack="0000", **{"adaptive: a": "1011", "adaptive: b": "1101"})
    third = record(natural="1111", PGD="1111", **{"adaptive: final": "1111"})
    heads, _, one, two, _, note, intervals = results.table({"first": [first], "second": [second, third]})
    assert heads == "| network | runs | natural | PGD | adaptive | AutoAttack | worst case | less first |"
    assert one == "| first | 1 | 100.00 | 75.00 | 75.00 |  | **75.00** |  |" and "images alone" in intervals
    cells = two.split(" | ")
    assert (
        cells[:2] == ["| second", "2"]
        and cells[5] == "0.00, 1 of 2 runs"
        and cells[6] == "**62.50 (25.00 to 100.00)**, without AutoAttack"
    )
    assert cells[4] == "75.00 (50.00 to 100.00)" and cells[7].startswith("-12.5 (")
    assert cells[7].endswith(", images alone) |")
    lowest = "Worst case: image by image, the lowest of natural, PGD, adaptive"
    assert note == f"{lowest}; without AutoAttack, which not every run has."


def test_a_difference_is_paired():
    """The same images fail in both but for one: far closer than two separate intervals would tell."""
    one = np.tile(np.arange(200) % 2, (3, 1))
    other = one.copy()
    other[:, 1] = 0
    value, low, high = results.difference(one, other)
    assert value == pytest.approx(0.5) and 0 <= low <= value <= high < 2


def test_runs_of_several_seeds_share_a_row_and_names_tell_recipes_apart(tmp_path, capsys):
    """Settings that an older version did not have and those without an effect do not; nor the best epoch."""
    plain = {"no_anc": True, "no_ra": True, "lr": 0.03, "extra_data": "e.npz"}
    other = {"seed": 2, "attack_cr_beta": None, "zeta": 9, "extra_data": str(tmp_path / "e.npz")}
    recipes = [plain | {"seed": 1}, plain | other, plain | {"lr": 0.09}, None]
    for i, recipe in enumerate(recipes):
        (tmp_path / str(i)).mkdir()
        network = {"recipe": recipe, "method": "TRADES" if recipe else "FILE", "epoch": i}
        found = record(network, natural="1110", PGD=f"11{i % 2}0")
        (tmp_path / str(i) / results.FILE).write_text(json.dumps(found))
    paths = [str(tmp_path / str(i)) for i in range(4)]
    assert results.main(paths) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == [["| TRADES, lr 0.03", "2"], ["| TRADES, lr 0.09", "1"], ["| FILE", "1"]]
    assert results.main([*paths, paths[0]]) == 2
    assert "is there twice" in capsys.readouterr().err
    (tmp_path / "copy").mkdir()
    again = json.loads((tmp_path / "0" / results.FILE).read_text()) | {"checkpoint": "elsewhere/best_adv_model.pt"}
    (tmp_path / "copy" / results.FILE).write_text(json.dumps(again))
    assert results.main([paths[0], str(tmp_path / "copy")]) == 0
    assert "TRADES: runs of seeds 1, 1; one seed twice tells nothing of other seeds." in capsys.readouterr().out
    last = again | {"checkpoint": "elsewhere/model-wrn-last.pt"}
    (tmp_path / "copy" / results.FILE).write_text(json.dumps(last))
    assert results.main([paths[0], str(tmp_path / "copy")]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows == ["| TRADES, weights of the best epoch", "| TRADES, weights of epoch 0"]
    assert results.main([str(tmp_path)]) == 2 and "holds no white_attack.json" in capsys.readouterr().err


def test_other_images_are_not_compared():
    first, second = record(natural="1111", PGD="1110"), record(natural="1111", PGD="1110")
    *_, row, _, _, _ = results.table({"first": [first], "second": [second | {"image_numbers": [3, 1, 2, 0]}]})
    assert row.endswith("| other images or eps |")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "is no white_attack.json of today's"),
        ("[]", "is no white_attack.json"),
        (json.dumps(record(natural="11", PGD="1")), "is no white_attack.json"),
        (json.dumps(record(natural="12")), "is no white_attack.json"),
        (json.dumps(record(natural="11") | {"format": 2}), "is no white_attack.json"),
        (json.dumps(record(labels=(0, 1, 2), natural="1111")), "is no white_attack.json"),
        (json.dumps(record(PGD="1111")), "is no white_attack.json"),
        (json.dumps(record(natural="1111") | {"settings": None}), "is no white_attack.json"),
        ("[" * 100_000, "is no white_attack.json"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_a_line(content, said, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(record(natural="1111")))
    if content is not None:
        bad.write_text(content)
    assert results.main([str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_no_evaluation_at_all_is_a_line_too(capsys):
    with pytest.raises(SystemExit):
        results.main([])
    assert "required: RUN" in capsys.readouterr().err


def test_every_command_of_the_study_is_understood(capsys):
    study.main(["--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 70
    for line in lines:
        train, evaluate, measure = (command.split()[2:] for command in line.split(" && "))
        settings = parse_training("", {}, train).settings
        assert (settings.width, settings.epochs) == (8, 6)
        assert parse(Evaluation, "", evaluate).attacks[-1] in ("adaptive", "autoattack")
        assert parse(Distances, "", measure).target_label == "all"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing"], "unknown: nothing; known: gates"),
        (["--seeds", "x"], "--seeds takes numbers"),
        (["--jobs", "0"], "--jobs one of at least 1"),
        (["--print", "--out", "nowhere"], "nowhere holds no finished run"),
        (["--print", "--out", str(ROOT / "tests/golden/study.json"), "--seeds", "9"], "no finished run of gates"),
        (["--print", "--out", str(ROOT / "tests/golden/ResNet18.keys.json")], "is no study.json"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--print", "--out", "nowhere.json"], "No such file"),
        (["--out", "study.json"], "only printed"),
    ],
)
def test_wrong_use_of_the_study_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        study.main(argv)
    captured = capsys.readouterr()
    assert end.value.code == 2 and said in captured.err and not captured.out


def test_published_figures_are_those_of_the_published_verdicts(capsys):
    """README's rows and intervals are what its files of verdicts give, each row of the first table that has it."""
    interval = r"[+-]\d+\.\d \([+-][\d.]+ to [+-][\d.]+(?:, images alone)?\)"

    def rows(text, kind):
        cells = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(kind, line)]
        return {row[0]: next(cell for cell in row if re.search(kind, cell)) for row in reversed(cells)}

    readme, printed = (ROOT / "README.md").read_text(), {}
    more = ("contrast", "contrast_alone", "rate", "companions_trades", "companions_ancra")
    for name, tables in (("study_main", more), ("study", ())):
        study.main(["controls", "gates", *tables, "--print", "--out", str(ROOT / f"tests/golden/{name}.json")])
        printed[name] = capsys.readouterr().out
    shown, found = rows(readme, r"\*\*\d"), rows(printed["study_main"], r"\*\*\d")
    assert len(shown) >= 8 and shown == {name: found[name] for name in shown}
    told = re.findall(interval, readme)
    assert len(told) > 15 and not [one for one in told if not any(one in text for text in printed.values())]
    less, table = rows(printed["study_main"], interval), readme[readme.index("| less the row's method alone") :]
    one, other = (results.verdicts(record) for record in study.saved(ROOT / "tests/golden/study_cpu.json"))
    gains = [100 * (other[name].mean() - one[name].mean()) for name in ("AutoAttack", "adaptive")]
    assert "{:.1f} points become {:.1f}.".format(*gains) in " ".join(readme.split())
    assert all(less.get(name, cell) == cell for name, cell in rows(readme, interval).items() if name in shown)
    heads, _, *lines = (line.strip("| ").split(" | ") for line in table[: table.index("\n\n")].splitlines())
    assert len(lines) == 2 and heads[1:] == [f"+{word}" for word in study.ADDED]
    for name, *cells in lines:
        assert cells == [less[f"{name} {head}"] for head in heads[1:]]


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_and_a_run_is_that_of_its_command(tmp_path, capfd):
    small = "--width=4 --epochs=2 --milestones=none --limit-train=24 --limit-test=6 --num-steps=1 --device=cpu"
    quick = "--n-examples=4 --num-steps=2 --apgd-steps=5 --device=cpu"
    argv = ["best", "--seeds", "1", "--out", str(tmp_path / "study"), "--flags", small, "--evaluation", quick]

    def made():
        study.main(argv)
        lines = capfd.readouterr().out.splitlines()
        table = [line for line in lines if line.startswith("| gate")]
        return table, {file: file.stat().st_mtime_ns for file in tmp_path.rglob("white_attack.json")}

    began = [sys.executable, "-m", "tests.tools.study", *argv]
    with subprocess.Popen(began, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.rglob("last_state.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        assert b"stopped; the same command goes on" in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM

    first, again = made(), made()
    assert first == again and len(first[1]) == 4
    assert [row.split(" | ")[0] for row in first[0]] == [f"| {name}" for name in study.best()]

    with pytest.raises(SystemExit):
        study.main([*argv[:-1], f"{quick} --num-steps=3", "--print"])
    assert "is of another num_steps; give another --out" in capfd.readouterr().err
    wrong = f"--evaluation={quick} --epsilon=0.05", f"--flags={small} --extra-fraction=0.5"
    for other, said in zip(wrong, ("is of another eps;", "--extra-fraction is of --extra-data"), strict=True):
        with pytest.raises(SystemExit):
            study.main([*argv, other, "--print"])
        assert said in capfd.readouterr().err

    study.main(["--commands", *argv])
    train = shlex.split(capfd.readouterr().out.splitlines()[-1].split(" && ")[0])
    done = python(*train[1:-1], f"--model-dir={tmp_path / 'own' / 'run'}")
    assert done.returncode == 0, done.stderr
    (own,) = tmp_path.glob("own/run*/model-wrn-last.pt")
    (made_before,) = tmp_path.glob(f"study/*awp*ema*/{own.parent.name}/{own.name}")
    ours, theirs = (torch.load(file, weights_only=True) for file in (own, made_before))
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
