"""The study's command runs, stops, goes on and counts as it says."""

import json

import numpy as np
import pytest

from tests import study


def evaluated(out, flags, seed, **attacks):
    """A run of the study as its evaluation leaves it."""
    run = study.commands(out, flags, seed)[0] / "run"
    run.mkdir(parents=True)
    record = {"attacks": {name: {"verdicts": verdicts} for name, verdicts in attacks.items()}}
    (run / "white_attack.json").write_text(json.dumps(record))


def test_the_table_counts_the_lowest_of_all_attacks_image_by_image(tmp_path):
    rows = {"first": ("--no-ra",), "second": (), "not there": ("--no-anc",)}
    evaluated(tmp_path, ("--no-ra",), 1, natural="1111", **{"PGD-40": "1110", "AutoAttack": "1110"})
    evaluated(tmp_path, (), 1, natural="1111", **{"PGD-40": "1110", "AutoAttack": "0111"})
    evaluated(tmp_path, (), 2, natural="1111", **{"PGD-40": "1111", "AutoAttack": "1111"})
    *_, first, second = study.table(tmp_path, rows, [1, 2, 3])
    assert first == "| first | 1 | 100.00 | 75.00 | 75.00 | **75.00**, 75.00 to 75.00 |  |"
    assert second.startswith("| second | 2 | 100.00 | 87.50 | 87.50 | **75.00**, 50.00 to 100.00 | +0.0 (-")


def test_a_difference_is_paired():
    """The same images fail in both but for one: far closer than two separate intervals would tell."""
    one = np.tile(np.arange(200) % 2, (3, 1))
    other = one.copy()
    other[:, 1] = 0
    value, low, high = study.difference(one, other)
    assert value == pytest.approx(0.5) and 0 <= low <= value <= high < 2


def test_every_row_s_command_is_understood(tmp_path, capsys):
    from utils.options import parse_training

    study.main(["--commands", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(rows()) for rows in study.TABLES.values())
    for line in lines:
        train = line.split(" && ")[0].split()[2:]
        parse_training("", {}, train)


@pytest.mark.slow
def test_a_table_is_made_and_kept(tmp_path, capfd):
    small = "--width=4 --epochs=1 --limit-train=24 --limit-test=6 --num-steps=1 --device=cpu"
    quick = "--n-examples=4 --num-steps=2 --restarts=1 --device=cpu"
    argv = ["controls", "--seeds", "1", "--out", str(tmp_path), "--flags", small, "--evaluation", quick]
    study.main(argv)
    table = capfd.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in table] == ["| TRADES", "| TRADES, lr 0.09", "| heads of weight 0"]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("white_attack.json")}
    study.main(argv)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("white_attack.json")}
    assert capfd.readouterr().out.splitlines()[-3:] == table
