"""Tables of evaluations: names, worst cases, and rows that were found one after the other."""

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


# Worst cases


def test_a_gated_network_has_a_worst_case_only_where_all_runs_have_the_adaptive_attack():
    attacks = {"natural": "1111", "PGD": "1110"}
    weak = record(GATED, **attacks)
    plain = record(**attacks)
    rows, below = rows_of([plain, weak])
    assert rows[0][-2:] == ["**75.00**", ""]
    assert rows[1][-2:] == ["needs adaptive", ""]
    assert any("--attacks adaptive" in line for line in below)

    adaptive = attacks | {"adaptive: final": "1100"}
    rows, below = rows_of([record(GATED, **adaptive), record(**adaptive)])
    assert [row[-2] for row in rows] == ["**50.00**", "**50.00**"]
    assert not any("--attacks adaptive" in line for line in below)


@pytest.mark.parametrize("gate", ["soft", "none"])
def test_a_smooth_gate_needs_no_adaptive_attack(gate):
    smooth = record(GATED | {"gate": gate}, natural="1111", PGD="1110")
    assert rows_of([smooth])[0][0][-2] == "**75.00**"


# Names


def test_settings_of_the_evaluation_are_below_the_table_and_in_no_name():
    records = []
    for i, method in enumerate(("TRADES", "TRADES", "MART")):
        made = record({"method": method, "recipe": {"seed": i}}, natural="11", PGD="10")
        made["attacks"]["PGD"]["settings"] = {"start": "uniform", "step_size": i}
        records.append(made)
    rows, below = rows_of(records)
    assert [row[:2] for row in rows] == [["TRADES", "2"], ["MART", "1"]]
    (line,) = [line for line in below if line.startswith("Evaluated with")]
    assert line == "Evaluated with PGD's step_size 0 for TRADES; 1 for TRADES; 2 for MART."


def test_a_network_of_ones_own_is_named_once(tmp_path):
    evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "9")
    lines = (tmp_path / "test.log").read_text().splitlines()
    (described,) = (line for line in lines if ": digits, " in line)
    assert described.count("tiny_networks:robust") == 1


# Evaluations of one network, one after the other


def test_a_smaller_evaluation_keeps_what_an_earlier_one_found(tmp_path, capsys):
    file = tmp_path / "run" / "best_adv_model.pt"
    run = digits_checkpoint(file, recipe={"method": "trades"}).parent
    first = evaluate(run, file, *FEW, "--attacks", "natural,pgd,adaptive")
    again = evaluate(run, file, *FEW, "--attacks", "natural,fgsm")
    assert set(again["attacks"]) == {*first["attacks"], "FGSM"}
    made = again["attacks"]["adaptive: final"]["made"]
    assert made == f"{first['provenance']['started']}, cpu"
    rows = [right(again, name) for name in again["attacks"] if name != "worst case"]
    assert right(again, "worst case").equal(torch.stack(rows).all(0))
    assert accuracy(again, "worst case") < accuracy(again, "FGSM")

    capsys.readouterr()
    assert results.main([str(run)]) == 0
    assert f"**{accuracy(again, 'worst case'):.2f}**" in capsys.readouterr().out


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
    assert "step_size 0.02" in kept
    assert right(weak, kept).equal(right(strong, "PGD-5"))
    assert accuracy(weak, "PGD-5") > accuracy(weak, "worst case") == accuracy(strong, "PGD-5")


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("robust", ("--epsilon", "0.05")),
        ("robust", ("--n-examples", "30")),
        ("with_ra", ()),
    ],
)
def test_other_networks_images_and_balls_are_not_merged(tmp_path, model, flags):
    evaluate(tmp_path, "robust", *FEW, "--attacks", "fgsm")
    other = evaluate(tmp_path, model, *FEW, "--attacks", "natural", *flags)
    assert set(other["attacks"]) == {"natural"}


def test_the_table_of_a_gated_network_has_no_worst_case_without_the_adaptive_attack(tmp_path):
    record = evaluate(tmp_path, "with_ra", *FEW, "--attacks", "fgsm,pgd")
    assert set(record["attacks"]) == {"natural", "FGSM", "PGD-3"}
    assert "no worst case" in (tmp_path / "test.log").read_text()


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
