"""The study's command runs, stops, goes on and counts as it says."""

import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, environment
from tests.tools import study
from utils.evaluation.adaptive import views
from utils.system.errors import UsageError
from utils.system.options import parse, parse_training
from utils.system.settings import Evaluation


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_command_of_a_study_is_understood(name, capsys):
    assert study.main([name, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = study.STUDIES[name].rows().values()
    seeds = [row.seeds for row in rows]
    assert len(set(lines)) == sum(seeds)
    assert len({row.flags for row in rows}) == len(rows)
    # Further seeds differ from the first in nothing else.
    firsts = [line for line in lines if "--seed=1 " in line]
    assert len(firsts) == len(rows)
    for line in firsts:
        commands = [command.split() for command in line.split(" && ")]
        train, *attacks = [words[2:] for words in commands]
        parse_training("", {}, train)
        settings = [parse(Evaluation, "", attack) for attack in attacks]
        assert settings[0].attacks[-1] == "adaptive"
        assert settings[0].restarts == settings[0].apgd_restarts


def test_each_network_gets_as_many_starts_as_a_plain_one_or_more():
    for name in ("digits", "fashion-mnist"):
        for row in study.STUDIES[name].rows().values():
            settings = parse_training("", {}, row.flags).settings
            gates = {"gate": settings.gate, "classifier": settings.classifier}
            assert row.views == len(views(not settings.no_ra, 2, **gates))
            run = study.run_of(study.STUDIES[name], row, 1, ROOT)
            attack = [*run.attacks[0][1:], "--ckpt_url=x"]
            starts = parse(Evaluation, "", attack).restarts
            assert starts * row.views >= study.STARTS


def verdicts_of(row, seed, right, **more):
    """A record of a study: a row's run, and which images it gets right."""
    attacks = {"natural": {"verdicts": "1111"}, "adaptive": {"verdicts": right}}
    record = {"row": list(row), "seed": seed, "machine": "CPU", "attacks": attacks}
    return record | more


def test_a_file_holds_what_was_saved_and_machines_are_not_mixed(tmp_path):
    records = [verdicts_of(["--no-ra"], seed, "1100") for seed in (1, 2)]
    study.save(records, tmp_path / "study.json")
    assert study.saved(tmp_path / "study.json") == records
    with pytest.raises(UsageError, match="--file"):
        study.require_same_machine(verdicts_of([], 1, "1111", machine="a card"), records)


@pytest.mark.parametrize("name", study.STUDIES)
def test_no_table_of_a_study_has_the_name_of_a_row_of_another(name):
    whole = study.STUDIES[name]
    assert len(whole.rows()) == sum(map(len, whole.tables.values()))


def test_claims_have_wider_intervals_than_other_differences():
    rows = study.STUDIES["digits-epyc"].rows()
    records = []
    for name, rights in (("TRADES", ("1000", "1000")), ("gate none", ("1100", "1110"))):
        for seed, right in enumerate(rights, 1):
            records.append(verdicts_of(rows[name].flags, seed, right))
    ((name, row, baseline, corrected),) = study.claimed({"digits-epyc": records})
    assert (name, row, baseline) == ("digits-epyc", "gate none", "TRADES")
    groups = study.groups_of(rows, records)
    mean, low, high = study.gain(groups[row], groups[baseline])
    assert mean == corrected[0] == 37.5
    assert corrected[1] < low < high < corrected[2]


TINY = study.Study(
    (
        "--dataset=digits",
        "--width=4",
        "--epochs=2",
        "--milestones=none",
        "--limit-train=24",
        "--limit-test=6",
        "--num-steps=1",
        "--device=cpu",
    ),
    ("--n-examples=4", "--num-steps=2", "--apgd-steps=5", "--device=cpu"),
    {
        "one": {
            "TRADES": study.Row(study.PLAIN, 2),
            "gate none": study.Row(("--gate=none",), 1, 4),
        }
    },
)
BEGIN = """
import sys
from tests import test_study
test_study.study.STUDIES["digits"] = test_study.TINY
sys.exit(test_study.study.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch):
    file = tmp_path / "study.json"
    argv = ["digits", "--out", str(tmp_path), "--file", str(file), "--jobs", "2"]
    began = [sys.executable, "-c", BEGIN, *argv]
    with subprocess.Popen(began, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as process:
        while not list(tmp_path.rglob("last_state.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        assert b"goes on" in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM

    monkeypatch.setitem(study.STUDIES, "digits", TINY)
    assert study.main(argv) == 0
    table = capsys.readouterr().out
    assert "| TRADES | 2 |" in table
    assert "| gate none | 1 |" in table
    records = study.saved(file)
    assert [len(record["commands"]) for record in records] == [3, 3, 2]
    assert ["AutoAttack" in record["attacks"] for record in records] == [True, True, False]

    before = file.stat().st_mtime_ns
    assert study.main(argv) == 0
    assert file.stat().st_mtime_ns == before
