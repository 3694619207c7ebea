"""Tables of evaluations: names, worst cases, and rows that were found one after the other."""

import json
import re

import pytest
import torch

from tests.evaluation.test_robustness import accuracy, evaluate, right
from tests.helpers import digits_checkpoint
from tests.test_study import record
from utils.evaluation import report, results, robustness
from utils.system.options import parse_training
from utils.system.settings import Training
from utils.training.runs import run_folder

FEW = ("--n-examples", "40", "--num-steps", "3", "--restarts", "1", "--apgd-steps", "5")
GATED = {"method": "ANCRA-TRADES", "reverse_attention": True, "gate": "label"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "save_or_note", lambda draw, file: "")


def rows_of(records):
    """The table's rows as lists of cells, and the lines below it."""
    lines = [*results.table(results.grouped(records))]
    end = lines.index("")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]], lines[end + 1 :]


# Worst cases


@pytest.mark.parametrize("gate", ["label", "predicted", None])
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


def test_what_the_evaluation_was_told_is_below_the_table_and_in_no_name():
    attacks = {"natural": "1111", "adaptive: final": "1100"}
    first = record(network := {"method": "TRADES", "recipe": {"lr": 0.03}}, **attacks)
    second = record(network, **attacks) | {"settings": {"restarts": 1, "num_steps": 20}}
    rows, below = rows_of([first | {"settings": {"restarts": 5, "num_steps": 40}}, second])
    assert [row[0] for row in rows] == ["TRADES", "TRADES, evaluation 2"]
    (restarts,) = (line for line in below if "restarts" in line)
    assert "5 for TRADES; 1 for TRADES, evaluation 2" in restarts


def test_settings_of_attacks_that_a_run_has_not_do_not_tell_it_apart():
    network = {"method": "TRADES", "recipe": {"lr": 0.03}}
    records = [record(network, natural="1111") | {"settings": {"restarts": n, "num_steps": n}} for n in (1, 5)]
    assert [row[:2] for row in rows_of(records)[0]] == [["TRADES", "2"]]


def test_a_network_of_ones_own_is_named_once(tmp_path):
    evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "9")
    lines = (tmp_path / "test.log").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| tests."))
    (described,) = (line for line in lines if "reverse attention, digits" in line)
    assert row.count("tiny_networks:robust") == described.count("tiny_networks:robust") == 1


def test_a_folder_of_evaluations_begins_and_ends_with_a_letter():
    named = {"../nets.py:make": "nets-py-make", "a.b:c": "a-b-c", "-x": "x", "::": "network"}
    assert {model: robustness.folder_name(model) for model in named} == named


@pytest.mark.parametrize(
    ("script", "method", "begins"),
    [
        ("./model/TRADES-ResNet18", "trades", "TRADES-ResNet18-seed-1"),
        ("./model/TRADES-ResNet18", "mart", "MART-ResNet18-seed-1"),
        ("./model/TRADES-PreAct", "pgd", "PGD-PreAct-seed-1"),
        ("./model/ANCRA-WideResNet34-TRADES", "mart", "ANCRA-WideResNet34-MART-strategy-random_adv"),
        ("./model/ANCRA", "trades", "ANCRA-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1"),
    ],
)
def test_a_run_folder_begins_with_its_method(script, method, begins):
    recipe = {"model_dir": script} | ({} if "ANCRA" in script else {"no_ra": True, "no_anc": True})
    name = run_folder(parse_training("", recipe, ["--method", method])).name
    assert name.startswith(begins.replace("-seed-1", "")) and name.endswith("seed-1")


def test_a_folder_that_the_user_names_stays_as_named():
    recipe = {"model_dir": "./model/TRADES-ResNet18"}
    name = run_folder(parse_training("", recipe, ["--method", "mart", "--model-dir", "TRADES-mine"])).name
    assert name.startswith("TRADES-mine-") and "-mart" in name
    name = run_folder(parse_training("", {"model_dir": "./model/ANCRA"}, ["--method", "mart"])).name
    assert name.startswith("ANCRA-strategy") and name.endswith("-mart")


def test_no_help_says_none(capsys):
    with pytest.raises(SystemExit):
        parse_training("", {}, ["--help"])
    assert Training.width is None
    assert "default: None" not in capsys.readouterr().out


# Evaluations of one network, one after the other


def of_record(found, *names):
    return torch.stack([right(found, name) for name in names]).all(0)


def test_a_smaller_evaluation_keeps_what_an_earlier_one_found(tmp_path, capsys):
    run = digits_checkpoint(tmp_path / "run" / "best_adv_model.pt", recipe={"method": "trades"}).parent
    first = evaluate(run, run / "best_adv_model.pt", *FEW, "--attacks", "natural,pgd,adaptive")
    again = evaluate(run, run / "best_adv_model.pt", *FEW, "--attacks", "natural,fgsm")
    assert set(again["attacks"]) == {*first["attacks"], "FGSM"}
    for name in set(first["attacks"]) - {"natural", "worst case"}:
        assert right(again, name).equal(right(first, name))
    assert right(again, "worst case").equal(of_record(again, *set(again["attacks"]) - {"worst case"}))
    assert accuracy(again, "worst case") <= accuracy(first, "worst case") < accuracy(again, "FGSM")
    made = {attack["made"] for name, attack in again["attacks"].items() if name.startswith("adaptive: ")}
    assert made == {f"{first['provenance']['started']}, cpu"}
    assert "earlier evaluation" in (run / "test.log").read_text()
    for attack in again["attacks"].values():  # as where it was found
        assert attack["robust_accuracy"] == pytest.approx(100 * attack["verdicts"].count("1") / 40)
    capsys.readouterr()
    assert results.main([str(run)]) == 0
    cells = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert f"**{accuracy(again, 'worst case'):.2f}**" in cells


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


@pytest.mark.parametrize("flags", [("--epsilon", "0.05"), ("--n-examples", "30"), ("another network",)])
def test_other_networks_images_and_balls_are_not_merged(tmp_path, flags):
    evaluate(tmp_path, "robust", *FEW, "--attacks", "fgsm")
    model, flags = ("with_ra", ()) if flags == ("another network",) else ("robust", flags)
    assert set(evaluate(tmp_path, model, *FEW, "--attacks", "natural", *flags)["attacks"]) == {"natural"}
    both = evaluate(tmp_path, "robust", *FEW, "--attacks", "natural")  # and the first one's are still found
    assert set(both["attacks"]) == {"natural", "FGSM"}


def test_what_is_no_record_is_not_merged(tmp_path):
    first = evaluate(tmp_path, "robust", *FEW, "--attacks", "fgsm")
    first["attacks"]["FGSM"].pop("verdicts")
    for content in (json.dumps(first), "[1]", "{", '{"earlier": 5}'):
        (tmp_path / "white_attack.json").write_text(content)
        assert set(evaluate(tmp_path, "robust", *FEW, "--attacks", "natural")["attacks"]) == {"natural"}


def test_the_table_of_a_gated_network_has_no_worst_case_without_the_adaptive_attack(tmp_path):
    found = evaluate(tmp_path, "with_ra", *FEW, "--attacks", "fgsm,pgd")
    assert set(found["attacks"]) == {"natural", "FGSM", "PGD-3"}
    assert not any("worst case" in shares for shares in found["classes"].values())
    log = (tmp_path / "test.log").read_text()
    assert "no worst case" in log and "natural/these attacks" in log
