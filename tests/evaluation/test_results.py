"""Tables of evaluations: names, worst cases, and rows that were found one after the other."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tests.evaluation.test_robustness import accuracy, evaluate, right
from tests.helpers import digits_checkpoint
from utils.evaluation import results
from utils.system.errors import UsageError

FEW = ("--n-examples=40", "--num-steps=3", "--restarts=1")
_numbers = itertools.count()
pytestmark = pytest.mark.usefixtures("no_pictures")


def record(network=None, **attacks):
    """What an evaluation leaves, as far as the tables need it."""
    return {
        "format": results.FORMAT,
        "checkpoint": f"{next(_numbers)}/best_adv_model.pt",
        "settings": {},
        "earlier": [],
        "network": {"method": "TRADES", "arch": "ResNet18"} | (network or {}),
        "labels": [0, 1, 2, 3],
        "attacks": {name: {"verdicts": verdicts} for name, verdicts in attacks.items()},
    }


def mart(seed):
    """What a record has of a network that was trained by MART."""
    return {"method": "MART", "recipe": {"seed": seed}}


def table_of(*records):
    """The table's rows as lists of cells, and the text below it."""
    groups = results.grouped([*records])
    text = "\n".join(results.table(groups))
    table, below = text.split("\n\n")
    _, _, *lines = table.splitlines()
    rows = [line[2:-2].split(" | ") for line in lines]
    return rows, below


# Worst cases


def test_the_worst_case_is_the_lowest_of_the_attacks_that_all_have_image_by_image():
    trades = {
        "natural": "1111",
        "PGD": "1110",
        "adaptive: final": "1110",
        "worst case": "0000",
    }
    mart_1 = {
        "natural": "1111",
        "PGD": "1110",
        "AutoAttack": "0000",
        "adaptive: a": "1011",
        "adaptive: b": "1101",
    }
    mart_2 = {
        "natural": "1111",
        "PGD": "1111",
        "adaptive: final": "1111",
    }
    runs = (record(**trades), record(mart(1), **mart_1), record(mart(2), **mart_2))
    (one, two), _ = table_of(*runs)
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
    plain_run = record(**attacks)
    gated_run = record(gated, **attacks)
    rows, below = table_of(plain_run, gated_run)
    *_, worst_case, gain = rows[1]
    assert worst_case == worst
    is_missing = worst == "needs adaptive"
    assert (gain == "") == is_missing
    assert ("--attacks adaptive" in below) == is_missing


# Differences


def verdicts_of_two_rows(random, seeds, images=300, *, between_seeds=0.0, gain=0.0, shared=0.0):
    """Draw the verdicts of two rows of runs, (2, seeds, images), whose true difference is `gain`.

    A verdict is right with a probability: that of the row for this image, plus the luck of the run.
    shared: the part of the luck's variance that runs of the same seed share.
    """
    of_seed = random.normal(size=(1, seeds, 1))
    of_run = random.normal(size=(2, seeds, 1))
    luck = np.sqrt(shared) * of_seed + np.sqrt(1 - shared) * of_run
    of_image = random.uniform(0.2, 0.8, (2, 1, images))
    probability = of_image + between_seeds * luck
    probability[0] += gain
    return random.random(probability.shape) < probability


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between_seeds", [0, 0.01, 0.04])
@pytest.mark.parametrize(
    ("paired", "shared"),
    [(False, 0), (True, 0), (True, 0.8)],
)
def test_an_interval_of_95_percent_covers_the_truth_as_often(seeds, between_seeds, paired, shared):
    random = np.random.default_rng(0)
    setting = {"between_seeds": between_seeds, "gain": 0.03, "shared": shared}
    covered = 0
    for _ in range(400):
        rows = verdicts_of_two_rows(random, seeds, **setting)
        _, low, high = results.difference(*rows, paired)
        covered += low <= 3 <= high
    assert 0.94 <= covered / 400 < 1


def test_the_interval_is_the_normal_one_of_images_and_student_s_of_seeds():
    """Where seeds agree on each image only images count, and where images are alike only seeds."""
    agreeing = np.ones((4, 200))
    agreeing[:, ::3] = 0
    alike = np.ones((4, 200))
    alike[1] = 0
    error = stats.sem(100 * agreeing[0])
    of_images = stats.norm.ppf(0.975) * error
    student = stats.ttest_1samp(100 * alike[:, 0], 0).confidence_interval()
    of_seeds = (student.high - student.low) / 2
    half = np.hypot(of_images, of_seeds)

    mean, low, high = results.difference(alike, agreeing)
    assert mean == pytest.approx(75 - 100 * agreeing.mean())
    assert mean - low == pytest.approx(half)
    assert high - mean == pytest.approx(half)


def test_a_study_of_as_many_images_as_it_takes_sees_the_difference():
    random = np.random.default_rng(0)
    truth = {"between_seeds": 0.02, "gain": 0.04}
    rows = verdicts_of_two_rows(random, 100, 3000, **truth)
    measured = results.variances(*rows)
    images = results.images_needed(4, 10, *measured)
    seen = 0
    for _ in range(200):
        rows = verdicts_of_two_rows(random, 10, images, **truth)
        _, low, _ = results.difference(*rows, paired=True)
        seen += low > 0
    assert 0.75 < seen / 200 < 0.9
    assert results.images_needed(0.4, 3, *measured) is None


def test_seeds_that_differ_by_chance_alone_have_no_variance_of_their_own():
    rows = verdicts_of_two_rows(np.random.default_rng(0), 100)
    of_seeds, _, rest = results.variances(*rows)
    assert of_seeds < 0.5 * rest / 300


def test_a_table_pairs_equal_seeds_and_says_what_more_would_show():
    """Runs come in any order, and each is compared with that of its seed."""
    verdicts = {1: "1100110010", 2: "1111110000", 3: "1000110001", 4: "1111111000"}

    def compared(*seeds_of_b):
        """Return the row of B, and the text below the table."""
        runs = []
        for method, seeds in (("A", (1, 2, 3)), ("B", seeds_of_b)):
            for seed in seeds:
                network = {"method": method, "recipe": {"seed": seed}}
                runs.append(record(network, natural=verdicts[seed]))
        rows, below = table_of(*runs)
        return rows[1], below

    row, below = compared(3, 1, 2)
    assert row[2] == "50.00 ± 10.00"
    assert row[-1] == "+0.0 (+0.0 to +0.0)"
    assert "\nPower: a difference of one point is seen in 80 % of studies" in below

    row, _ = compared(2, 3, 4)
    assert row[-1].startswith("+6.7 (-")
    row, below = compared(1)
    assert "images alone" in row[-1]
    assert "\nPower: unknown" in below


def test_other_images_are_not_compared():
    other = record(mart(1), PGD="1110")
    other["image_numbers"] = [3, 1, 2, 0]
    rows, _ = table_of(record(PGD="1110"), other)
    assert rows[1][-1] == "other images, norm or eps"


# Names and files


def test_runs_of_several_seeds_share_a_row_and_names_tell_recipes_apart():
    plain = {"no_anc": True, "no_ra": True, "lr": 0.03}
    records = [record({"method": "FILE", "recipe": None}, PGD="1100")]
    for change in ({"seed": 1}, {"seed": 2, "zeta": 9}, {"lr": 0.09}):
        network = {"recipe": plain | change, "epoch": len(records)}
        records.append(record(network, PGD="1100"))
    rows, _ = table_of(*records)
    assert [row[:2] for row in rows] == [
        ["FILE", "1"],
        ["TRADES, lr 0.03", "2"],
        ["TRADES, lr 0.09", "1"],
    ]


def test_a_run_that_is_there_twice_is_refused():
    run = record(PGD="1100")
    with pytest.raises(UsageError, match="twice"):
        table_of(run, run)
    rows, _ = table_of(run, run | {"checkpoint": "elsewhere/model-wrn-last.pt"})
    assert len(rows) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}'])
def test_what_is_no_evaluation_is_refused(content, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        results.main([str(bad)])
    assert str(bad) in capsys.readouterr().err


def test_settings_of_the_evaluation_are_below_the_table_and_in_no_name():
    records = []
    for seed, method in enumerate(("TRADES", "TRADES", "MART")):
        run = record({"method": method, "recipe": {"seed": seed}}, PGD="10")
        run["attacks"]["PGD"]["settings"] = {"start": "uniform", "step_size": seed}
        records.append(run)
    rows, below = table_of(*records)
    assert [row[:2] for row in rows] == [["TRADES", "2"], ["MART", "1"]]
    assert "\nEvaluated with PGD's step_size 0 for TRADES; 1 for TRADES; 2 for MART.\n" in below
    assert below.count("Evaluated with") == 1


# Evaluations of one network, one after the other


def test_a_smaller_evaluation_keeps_what_an_earlier_one_found(tmp_path):
    file = tmp_path / "run" / "best_adv_model.pt"
    run = digits_checkpoint(file, recipe={"method": "trades"}).parent
    first = evaluate(run, file, *FEW, "--attacks=natural,pgd,adaptive")
    again = evaluate(run, file, *FEW, "--attacks=natural,fgsm")
    assert set(again["attacks"]) == {*first["attacks"], "FGSM"}
    made = again["attacks"]["adaptive: final"]["made"]
    assert made == f"{first['provenance']['started']}, cpu"
    names = again["attacks"].keys() - {"worst case"}
    worst = torch.stack([right(again, name) for name in names]).all(0)
    assert right(again, "worst case").equal(worst)
    assert worst.sum() < right(again, "FGSM").sum()


def test_a_quick_look_at_few_images_does_not_hide_a_whole_table(tmp_path):
    quick = ("--attacks=natural", "--n-examples=10")
    whole = evaluate(tmp_path, "robust", "--attacks=fgsm", "--n-examples=30")
    evaluate(tmp_path, "robust", *quick)
    read = results.read(str(tmp_path))
    assert read["attacks"] == whole["attacks"]
    evaluate(tmp_path, "with_ra", *quick)
    read = results.read(str(tmp_path))
    assert len(read["labels"]) == 10


def test_a_weaker_search_does_not_hide_a_stronger_one(tmp_path):
    flags = ("--attacks=pgd", "--n-examples=40", "--num-steps=5", "--epsilon=0.2")
    strong = evaluate(tmp_path, "robust", *flags)
    weak = evaluate(tmp_path, "robust", *flags, "--step-size=0.001")
    earlier = right(weak, "PGD-5 (step_size 0.02)")
    assert earlier.equal(right(strong, "PGD-5"))
    assert right(weak, "worst case").equal(earlier)
    assert accuracy(weak, "PGD-5") > accuracy(weak, "worst case")


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
