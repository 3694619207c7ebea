"""Tables of evaluations: names, worst cases, and rows that were found one after the other."""

import re

import pytest
import torch

from tests.evaluation.test_robustness import accuracy, evaluate, right
from tests.helpers import digits_checkpoint
from tests.test_study import record
from utils.evaluation import report, results
from utils.system.options import parse_training
from utils.training.runs import run_folder

FEW = ("--n-examples", "40", "--num-steps", "3", "--restarts", "1", "--apgd-steps", "5")
GATED = {"method": "ANCRA-TRADES", "reverse_attention": True, "gate": "label"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No picture is drawn."""
    monkeypatch.setattr(report, "save_or_note", lambda draw, file: "")


def rows_of(records):
    """The table's rows as lists of cells, and the lines below it."""
    lines = [*results.table(results.grouped(records))]
    end = lines.index("")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]
    return rows, lines[end + 1 :]


def with_settings(network, attack, settings, **verdicts):
    """A record whose attack was run with these settings."""
    made = record(network, **verdicts)
    made["attacks"][attack]["settings"] = settings
    return made


# Worst cases


@pytest.mark.parametrize("gate", ["label", None])
def test_a_gated_network_without_the_adaptive_attack_has_no_worst_case(gate):
    """And takes it from no other network of the table."""
    weak = record(GATED | {"gate": gate}, natural="1111", PGD="1110")
    plain = record(natural="1111", PGD="1110", **{"adaptive: final": "1100"})
    rows, below = rows_of([plain, weak])
    assert rows[0][-2:] == ["**50.00**", ""]
    assert rows[1][-2:] == ["needs adaptive", ""]
    assert any("ANCRA-TRADES" in line and "--attacks adaptive" in line for line in below)
    assert rows_of([weak])[0][0][-2:] == ["needs adaptive", ""]


@pytest.mark.parametrize("gate", ["soft", "none"])
def test_a_smooth_gate_needs_no_adaptive_attack(gate):
    smooth = record(GATED | {"gate": gate}, natural="1111", PGD="1110")
    assert rows_of([smooth])[0][0][-2] == "**75.00**"


def test_a_gated_networks_worst_case_keeps_the_adaptive_attack_that_another_run_lacks():
    gated = record(GATED, natural="1111", PGD="1110", **{"adaptive: final": "1100"})
    plain = record(natural="1111", PGD="1110")
    rows, _ = rows_of([gated, plain])
    assert rows[0][-2:] == ["**50.00**, with adaptive", ""]
    assert rows[1][-2:] == ["**75.00**", "other attacks"]


# Names


def test_settings_of_the_evaluation_are_below_the_table_and_in_no_name():
    network = {"method": "TRADES", "recipe": {"lr": 0.03}}
    attacks = {"natural": "1111", "adaptive: final": "1100"}
    first = with_settings(network, "adaptive: final", {"restarts": 5, "steps": 40}, **attacks)
    second = with_settings(network, "adaptive: final", {"restarts": 1, "steps": 40}, **attacks)
    rows, below = rows_of([first, second])
    assert [row[0] for row in rows] == ["TRADES", "TRADES, evaluation 2"]
    (line,) = [line for line in below if line.startswith("Evaluated with")]
    assert "restarts" in line and "5 for TRADES; 1 for TRADES, evaluation 2" in line


def test_settings_of_attacks_that_a_run_lacks_do_not_tell_it_apart():
    network = {"method": "TRADES", "recipe": {"lr": 0.03}}
    attacks = {"natural": "1111", "adaptive: final": "1100"}
    first = with_settings(network, "adaptive: final", {"restarts": 5}, **attacks)
    rows, _ = rows_of([first, record(network, natural="1111")])
    assert [row[:2] for row in rows] == [["TRADES", "2"]]


def test_a_network_of_ones_own_is_named_once(tmp_path):
    evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "9")
    lines = (tmp_path / "test.log").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| tests."))
    (described,) = (line for line in lines if ": digits, " in line)
    assert row.count("tiny_networks:robust") == described.count("tiny_networks:robust") == 1


# Evaluations of one network, one after the other


def test_a_smaller_evaluation_keeps_what_an_earlier_one_found(tmp_path, capsys):
    file = tmp_path / "run" / "best_adv_model.pt"
    run = digits_checkpoint(file, recipe={"method": "trades"}).parent
    first = evaluate(run, file, *FEW, "--attacks", "natural,pgd,adaptive")
    again = evaluate(run, file, *FEW, "--attacks", "natural,fgsm")
    assert set(again["attacks"]) == {*first["attacks"], "FGSM"}
    for name in set(first["attacks"]) - {"natural", "worst case"}:
        assert right(again, name).equal(right(first, name))
    rows = [right(again, name) for name in again["attacks"] if name != "worst case"]
    assert right(again, "worst case").equal(torch.stack(rows).all(0))
    assert accuracy(again, "worst case") < accuracy(again, "FGSM")
    made = again["attacks"]["adaptive: final"]["made"]
    assert made == f"{first['provenance']['started']}, cpu"
    assert "earlier evaluation" in (run / "test.log").read_text()

    capsys.readouterr()
    assert results.main([str(run)]) == 0
    assert f"**{accuracy(again, 'worst case'):.2f}**" in capsys.readouterr().out


def test_what_was_weaker_is_said_as_long_as_its_rows_are_there(tmp_path):
    weak = ("--restarts", "1", "--num-steps", "3", "--apgd-steps", "5", "--n-examples", "10")
    evaluate(tmp_path, "robust", *weak, "--attacks", "adaptive")
    again = evaluate(tmp_path, "robust", "--n-examples", "10", "--attacks", "natural")
    (note,) = (note for note in again["notes"] if "weaker adaptive attack" in note)
    assert "restarts 1 for 5, steps 3 for 40, apgd_steps 5 for 100" in note
    adaptive = ("--attacks", "adaptive", "--n-examples", "10")
    strong = evaluate(tmp_path, "robust", *adaptive)
    assert not any("weaker adaptive attack" in note for note in strong["notes"])


def test_a_quick_look_at_few_images_does_not_hide_a_whole_table(tmp_path):
    whole = evaluate(tmp_path, "robust", "--attacks", "fgsm", "--n-examples", "30")
    evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "10")
    assert results.read(str(tmp_path))["attacks"] == whole["attacks"]
    evaluate(tmp_path, "with_ra", "--attacks", "natural", "--n-examples", "10")
    assert len(results.read(str(tmp_path))["labels"]) == 10


def test_a_weaker_search_does_not_hide_a_stronger_one(tmp_path):
    flags = ("--attacks", "pgd", "--n-examples", "40", "--num-steps", "5", "--epsilon", "0.2")
    strong = evaluate(tmp_path, "robust", *flags)
    weak = evaluate(tmp_path, "robust", *flags, "--step-size", "0.001")
    (kept,) = (name for name in weak["attacks"] if name.startswith("PGD-5 ("))
    assert "step_size 0.02" in kept and right(weak, kept).equal(right(strong, "PGD-5"))
    assert accuracy(weak, "PGD-5") > accuracy(weak, "worst case") == accuracy(strong, "PGD-5")
    third = evaluate(tmp_path, "robust", *flags)
    assert {re.sub(" .*", "", name) for name in third["attacks"]} == {"natural", "PGD-5", "worst"}
    assert len(third["attacks"]) == 4 and right(third, "PGD-5").equal(right(strong, "PGD-5"))


@pytest.mark.parametrize(
    "flags", [("--epsilon", "0.05"), ("--n-examples", "30"), ("another network",)]
)
def test_other_networks_images_and_balls_are_not_merged(tmp_path, flags):
    evaluate(tmp_path, "robust", *FEW, "--attacks", "fgsm")
    model, flags = ("with_ra", ()) if flags == ("another network",) else ("robust", flags)
    assert set(evaluate(tmp_path, model, *FEW, "--attacks", "natural", *flags)["attacks"]) == {
        "natural"
    }
    both = evaluate(
        tmp_path, "robust", *FEW, "--attacks", "natural"
    )  # and the first one's are still found
    assert set(both["attacks"]) == {"natural", "FGSM"}


def test_the_table_of_a_gated_network_has_no_worst_case_without_the_adaptive_attack(tmp_path):
    found = evaluate(tmp_path, "with_ra", *FEW, "--attacks", "fgsm,pgd")
    assert set(found["attacks"]) == {"natural", "FGSM", "PGD-3"}
    assert not any("worst case" in shares for shares in found["classes"].values())
    log = (tmp_path / "test.log").read_text()
    assert "no worst case" in log and "natural/these attacks" in log


# Names of folders


@pytest.mark.parametrize(
    ("folder", "method", "name"),
    [
        ("./model/TRADES-ResNet18", "mart", "MART-ResNet18-"),
        ("./model/ANCRA-WideResNet34-TRADES", "mart", "ANCRA-WideResNet34-MART-"),
    ],
)
def test_a_run_folder_begins_with_its_method(folder, method, name):
    plain = {} if "ANCRA" in folder else {"no_ra": True, "no_anc": True}
    command = parse_training("", {"model_dir": folder, **plain}, ["--method", method])
    assert run_folder(command).name.startswith(name)
