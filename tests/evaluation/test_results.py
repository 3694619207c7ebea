"""Tables of evaluations: names, worst cases, and rows that were found one after the other."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy import stats

from tests.evaluation.test_robustness import accuracy, evaluate, right
from tests.helpers import digits_checkpoint
from utils.evaluation import report, results

FEW = ("--n-examples=40", "--num-steps=3", "--restarts=1", "--apgd-steps=5")
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No picture is drawn."""
    monkeypatch.setattr(report, "save_or_note", lambda draw, file: "")


def record(network=None, **attacks):
    """What an evaluation leaves, as far as the tables need it."""
    return {
        "format": results.FORMAT,
        "checkpoint": f"{next(_numbers)}/best_adv_model.pt",
        "settings": {},
        "network": {"method": "TRADES", "arch": "ResNet18"} | (network or {}),
        "labels": [0, 1, 2, 3],
        "attacks": {name: {"verdicts": verdicts} for name, verdicts in attacks.items()},
    }


def write(folder, content):
    """Write a record into a run's folder, and return that as a command line names it."""
    folder.mkdir(exist_ok=True)
    (folder / results.FILE).write_text(json.dumps(content))
    return str(folder)


def table_of(*records):
    """The table's rows as lists of cells, and the lines below it."""
    lines = list(results.table(results.grouped(list(records))))
    end = lines.index("")
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[2:end]]
    return rows, lines[end + 1 :]


# Worst cases


def test_the_worst_case_is_the_lowest_of_the_attacks_that_all_have_image_by_image():
    first = record(natural="1111", PGD="1110", **{"adaptive: final": "1110", "worst case": "0000"})
    views = {"adaptive: a": "1011", "adaptive: b": "1101"}
    recipes = [{"method": "MART", "recipe": {"seed": seed}} for seed in (1, 2)]
    second = record(recipes[0], natural="1111", PGD="1110", AutoAttack="0000", **views)
    third = record(recipes[1], natural="1111", PGD="1111", **{"adaptive: final": "1111"})
    (one, two), _ = table_of(first, second, third)
    assert one == ["TRADES", "1", "100.00", "75.00", "75.00", "", "**75.00**", ""]
    assert two[4:7] == ["75.00 ± 35.36", "0.00, 1 of 2 runs", "**62.50 ± 53.03**"]
    assert two[7].startswith("-12.5 (")


@pytest.mark.parametrize(
    ("gate", "more", "worst"),
    [
        ("label", {}, "needs adaptive"),
        ("soft", {}, "**75.00**"),
        ("none", {}, "**75.00**"),
        ("label", {"adaptive: final": "1100"}, "**50.00**"),
    ],
)
def test_a_hard_gate_has_a_worst_case_only_where_all_runs_have_the_adaptive_attack(
    gate, more, worst
):
    attacks = {"natural": "1111", "PGD": "1110", **more}
    gated = {"method": "ANCRA-TRADES", "reverse_attention": True, "gate": gate}
    rows, below = table_of(record(**attacks), record(gated, **attacks))
    assert rows[0][-2].startswith("**")
    assert rows[1][-2] == worst
    is_missing = worst == "needs adaptive"
    assert (rows[1][-1] == "") == is_missing
    assert any("--attacks adaptive" in line for line in below) == is_missing


# Differences


def verdicts_of_two_rows(random, seeds, images=300, between_seeds=0.0, gain=0.0, shared=0.0):
    """Draw the verdicts of two rows of runs, (2, seeds, images), and return the true difference.

    An image is right where gain, ease of the image, luck of the run and chance, all normal, sum up
    to more than 0. shared: the part of the runs' variance that runs of the same seed share.
    """
    of_seed = random.normal(size=(1, seeds, 1)) * np.sqrt(shared)
    of_run = random.normal(size=(2, seeds, 1)) * np.sqrt(1 - shared)
    ease = random.normal(1.5, 3, images) + random.normal(0, 0.7, (2, 1, images))
    chance = random.normal(0, 0.5, (2, seeds, images))
    score = ease + between_seeds * (of_seed + of_run) + chance
    score[0] += gain
    deviation = np.sqrt(3**2 + 0.7**2 + 0.5**2 + between_seeds**2)
    one, other = stats.norm.cdf([1.5 + gain, 1.5], scale=deviation)
    return score > 0, 100 * (one - other)


def test_the_interval_of_images_is_the_normal_one_and_that_of_seeds_is_student_s():
    """Each alone is SciPy's: seeds that agree on each image, and images that are all alike."""
    agreeing = np.tile(np.arange(200) % 3 > 0, (4, 1))
    _, *interval = results.difference(agreeing, 0 * agreeing, paired=True, level=0.9)
    error = 100 * stats.sem(agreeing[0])
    assert interval == pytest.approx(stats.norm.interval(0.9, 100 * agreeing.mean(), error))

    alike = np.array([[1], [0], [1], [1]]).repeat(200, axis=1)
    _, *interval = results.difference(alike, 0 * alike, paired=True)
    student = stats.ttest_1samp(100 * alike[:, 0], 0).confidence_interval()
    assert interval == pytest.approx(student)

    _, low, high = results.difference(alike, agreeing)
    half = np.hypot(student.high - student.low, 2 * stats.norm.ppf(0.975) * error) / 2
    assert (high - low) / 2 == pytest.approx(half)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between_seeds", [0, 0.1, 0.4])
@pytest.mark.parametrize(("paired", "shared"), [(False, 0), (True, 0), (True, 0.8)])
def test_an_interval_of_95_percent_covers_the_truth_as_often(seeds, between_seeds, paired, shared):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        rows, truth = verdicts_of_two_rows(random, seeds, 300, between_seeds, 0.3, shared)
        _, low, high = results.difference(*rows, paired)
        covered += low <= truth <= high
    assert 0.94 <= covered / 400 < 1


def test_a_study_of_as_many_images_as_it_takes_sees_the_difference():
    random = np.random.default_rng(0)
    rows, gain = verdicts_of_two_rows(random, 100, 3000, between_seeds=0.2, gain=0.6)
    measured = results.variances(*rows)
    images = results.images_needed(gain, 10, *measured)
    seen = 0
    for _ in range(200):
        rows, _ = verdicts_of_two_rows(random, 10, images, between_seeds=0.2, gain=0.6)
        _, low, _ = results.difference(*rows, paired=True)
        seen += low > 0
    assert 0.75 < seen / 200 < 0.9
    assert results.images_needed(gain / 10, 3, *measured) is None


def test_seeds_that_differ_by_chance_alone_have_no_variance_of_their_own():
    rows, _ = verdicts_of_two_rows(np.random.default_rng(0), 100, 300)
    of_seeds, _, rest = results.variances(*rows)
    assert of_seeds < 0.5 * rest / 300


def test_a_table_pairs_equal_seeds_and_says_what_more_would_show():
    """Runs come in any order, and each is compared with that of its seed."""
    verdicts = {1: "1100110010", 2: "1111110000", 3: "1000110001", 4: "1111111000"}

    def row(method, *seeds):
        networks = {seed: {"method": method, "recipe": {"seed": seed}} for seed in seeds}
        return [record(networks[seed], natural=verdicts[seed]) for seed in seeds]

    rows, below = table_of(*row("A", 1, 2, 3), *row("B", 3, 1, 2))
    assert rows[0][2] == "50.00 ± 10.00"
    assert rows[1][-1] == "+0.0 (+0.0 to +0.0)"
    assert below[-1].startswith("Power: a difference of one point is seen in 80 % of studies")

    rows, _ = table_of(*row("A", 1, 2, 3), *row("B", 2, 3, 4))
    assert rows[1][-1].startswith("+6.7 (-")
    rows, below = table_of(*row("A", 1, 2, 3), *row("B", 1))
    assert "images alone" in rows[1][-1]
    assert below[-1].startswith("Power: unknown")


def test_other_images_are_not_compared():
    other = record({"method": "MART"}, PGD="1110") | {"image_numbers": [3, 1, 2, 0]}
    rows, _ = table_of(record(PGD="1110"), other)
    assert rows[1][-1] == "other images, norm or eps"


# Names and files


def test_runs_of_several_seeds_share_a_row_and_names_tell_recipes_apart():
    plain = {"no_anc": True, "no_ra": True, "lr": 0.03}
    records = [record({"method": "FILE", "recipe": None}, PGD="1100")]
    for change in ({"seed": 1}, {"seed": 2, "zeta": 9}, {"lr": 0.09}):
        records.append(record({"recipe": plain | change, "epoch": len(records)}, PGD="1100"))
    rows, _ = table_of(*records)
    assert [row[:2] for row in rows] == [
        ["FILE", "1"],
        ["TRADES, lr 0.03", "2"],
        ["TRADES, lr 0.09", "1"],
    ]


def test_a_run_that_is_there_twice_is_refused(tmp_path, capsys):
    content = record(PGD="1100")
    a = write(tmp_path / "a", content)
    b = write(tmp_path / "b", content | {"checkpoint": "elsewhere/model-wrn-last.pt"})
    assert results.main([a, a]) == 2
    assert "twice" in capsys.readouterr().err
    assert results.main([a, b]) == 0
    assert capsys.readouterr().out.count("| TRADES, ") == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}'])
def test_what_is_no_evaluation_is_refused(content, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    assert results.main([str(bad)]) == 2
    assert str(bad) in capsys.readouterr().err


def test_settings_of_the_evaluation_are_below_the_table_and_in_no_name():
    records = []
    for i, method in enumerate(("TRADES", "TRADES", "MART")):
        records.append(record({"method": method, "recipe": {"seed": i}}, PGD="10"))
        records[i]["attacks"]["PGD"]["settings"] = {"start": "uniform", "step_size": i}
    rows, below = table_of(*records)
    assert [row[:2] for row in rows] == [["TRADES", "2"], ["MART", "1"]]
    (line,) = [line for line in below if line.startswith("Evaluated with")]
    assert line == "Evaluated with PGD's step_size 0 for TRADES; 1 for TRADES; 2 for MART."


def test_a_network_of_ones_own_is_named_once(tmp_path):
    evaluate(tmp_path, "robust", "--attacks=natural", "--n-examples=9")
    lines = (tmp_path / "test.log").read_text().splitlines()
    (described,) = (line for line in lines if ": digits, " in line)
    assert described.count("tiny_networks:robust") == 1


# Evaluations of one network, one after the other


def test_a_smaller_evaluation_keeps_what_an_earlier_one_found(tmp_path):
    file = tmp_path / "run" / "best_adv_model.pt"
    run = digits_checkpoint(file, recipe={"method": "trades"}).parent
    first = evaluate(run, file, *FEW, "--attacks=natural,pgd,adaptive")
    again = evaluate(run, file, *FEW, "--attacks=natural,fgsm")
    assert set(again["attacks"]) == {*first["attacks"], "FGSM"}
    made = again["attacks"]["adaptive: final"]["made"]
    assert made == f"{first['provenance']['started']}, cpu"
    rows = [right(again, name) for name in again["attacks"] if name != "worst case"]
    assert right(again, "worst case").equal(torch.stack(rows).all(0))
    assert accuracy(again, "worst case") < accuracy(again, "FGSM")


def test_a_quick_look_at_few_images_does_not_hide_a_whole_table(tmp_path):
    whole = evaluate(tmp_path, "robust", "--attacks=fgsm", "--n-examples=30")
    evaluate(tmp_path, "robust", "--attacks=natural", "--n-examples=10")
    assert results.read(str(tmp_path))["attacks"] == whole["attacks"]
    evaluate(tmp_path, "with_ra", "--attacks=natural", "--n-examples=10")
    assert len(results.read(str(tmp_path))["labels"]) == 10


def test_a_weaker_search_does_not_hide_a_stronger_one(tmp_path):
    flags = ("--attacks=pgd", "--n-examples=40", "--num-steps=5", "--epsilon=0.2")
    strong = evaluate(tmp_path, "robust", *flags)
    weak = evaluate(tmp_path, "robust", *flags, "--step-size=0.001")
    (kept,) = (name for name in weak["attacks"] if name.startswith("PGD-5 ("))
    assert "step_size 0.02" in kept
    assert right(weak, kept).equal(right(strong, "PGD-5"))
    assert accuracy(weak, "PGD-5") > accuracy(weak, "worst case") == accuracy(strong, "PGD-5")


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("robust", ("--epsilon=0.05",)),
        ("robust", ("--epsilon=0.1", "--norm=L2")),
        ("robust", ("--n-examples=30",)),
        ("with_ra", ()),
    ],
)
def test_other_networks_images_and_balls_are_not_merged(tmp_path, model, flags):
    evaluate(tmp_path, "robust", *FEW, "--attacks=fgsm")
    other = evaluate(tmp_path, model, *FEW, "--attacks=natural", *flags)
    assert set(other["attacks"]) == {"natural"}


def test_the_table_of_a_gated_network_has_no_worst_case_without_the_adaptive_attack(tmp_path):
    record = evaluate(tmp_path, "with_ra", *FEW, "--attacks=fgsm,pgd")
    assert set(record["attacks"]) == {"natural", "FGSM", "PGD-3"}
    assert "no worst case" in (tmp_path / "test.log").read_text()
