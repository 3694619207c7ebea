"""test_white_attack.py: what its attacks find, what it caches, what it says."""

import itertools
import json
import re
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from tests import tiny_networks
from tests.helpers import (
    ATTACK,
    ROOT,
    digits_checkpoint,
    digits_content,
    digits_split,
    execute,
)
from tests.tiny_networks import robust, scaled, undefended, with_ra
from tests.tools.truth_networks import Cut
from utils.attacks import cross_entropy, image_noise, linf_pgd, noise, pgd
from utils.data.datasets import as_input, load_split, shuffled, subset
from utils.data.subject import load_subject
from utils.evaluation import results
from utils.evaluation.adaptive import ViewAPGD, ViewAPGDTargeted, adaptive, plain, views
from utils.evaluation.autoattack import square
from utils.evaluation.cache import BlockCache, Monitor, WorstImages
from utils.evaluation.diagnostics import Probe, diagnose
from utils.evaluation.report import draw_worst
from utils.evaluation.robustness import planned_attacks, white_attack
from utils.system.attack_copy import AttackCopy, SearchedInBfloat16, frozen
from utils.system.errors import RunError, Stopped, UsageError
from utils.system.options import parse
from utils.system.settings import Evaluation

EPS = 0.1  # of digits
SEED = 1  # the default
FULL_EPS = 0.015  # of `full`, whose network is not trained to be robust
FULL_STEP = 0.003


def settings_of(model, *flags):
    """The settings of an evaluation of one of the tiny networks, or of a checkpoint file."""
    source = ["--model", f"tests.tiny_networks:{model}"]
    if isinstance(model, Path):
        source = ["--ckpt_url", str(model)]
    return parse(Evaluation, "", [*source, "--dataset=digits", *map(str, flags)])


def evaluate(folder, model, *flags):
    """Run the script's job with its log in `folder` -> white_attack.json."""
    folder.mkdir(exist_ok=True)
    white_attack(settings_of(model, "--log_path", folder / "test.log", *flags))
    return json.loads((folder / "white_attack.json").read_text())


def right(record, name):
    """The verdicts of a row of the table, (N,) bool."""
    return torch.tensor([verdict == "1" for verdict in record["attacks"][name]["verdicts"]])


def verdicts_of(record):
    """The verdicts of all rows of the table, as the record has them."""
    return {name: attack["verdicts"] for name, attack in record["attacks"].items()}


def accuracy(record, name):
    """The robust accuracy of a row of the table, in percent."""
    return record["attacks"][name]["robust_accuracy"]


def digits(count):
    """Some test images of digits as networks take them, their labels and their numbers."""
    split = subset(digits_split(), count)
    return as_input(split.images), split.labels, split.numbers


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 25 images."""
    for module in ("robustness", "autoattack"):
        monkeypatch.setattr(f"utils.evaluation.{module}.BLOCK", 25)
    return 25


def shorten(patch):
    """Fewer steps in the library's attacks, for the script and for direct calls."""
    standard = AutoAttack._set_version

    def brief(self, version):
        standard(self, version)
        self.fab.n_iter = 5
        self.square.n_queries = 50
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = 6
            apgd.n_iter_orig = 6

    def shorter(attack):
        return lambda *args, **kwargs: attack(*args, **{**kwargs, "n_iter": 6})

    patch.setattr(AutoAttack, "_set_version", brief)
    for attack in (ViewAPGD, ViewAPGDTargeted):
        patch.setattr(f"utils.evaluation.adaptive.{attack.__name__}", shorter(attack))


def shorten_diagnostics(patch, **values):
    """Fewer balls, steps and starts in --diagnostics."""
    values = {"QUERIES": 20, "RADII": (2,), "RESTARTS": 2, "STEPS": (1, 40), **values}
    for name, value in values.items():
        patch.setattr(f"utils.evaluation.diagnostics.{name}", value)


@pytest.fixture
def brief_library(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Everything the script does, once, on a network with reverse attention."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        shorten_diagnostics(patch, QUERIES=100, STEPS=(1, 5, 40))
        shorten(patch)
        flags = ["--attacks=fgsm,pgd,cw,adaptive,noise", "--diagnostics", "--restarts=2"]
        flags += ["--n-examples=50", "--num-steps=20"]
        flags += ["--epsilon", FULL_EPS, "--step-size", FULL_STEP]
        evaluate(folder, "with_ra", "--attacks=natural", "--n-examples=50")
        record = evaluate(folder, "with_ra", *flags, "--save-adversarial", folder / "worst.npz")
    return record, folder


# AutoAttack


def same_as_directly(model, folder, count, eps, block, record, norm="Linf"):
    """Assert that the library, called on the right images of each block, finds the same."""
    x, y, _ = digits(count)
    found = x.clone()
    with frozen(model) as net:
        natural = net(x).argmax(1) == y
        for numbers in torch.arange(count).split(block):
            rows = numbers[natural[numbers]]
            library = AutoAttack(
                net, norm=norm, eps=eps, seed=SEED, version="standard", device="cpu"
            )
            found[rows], _ = library.run_standard_evaluation(x[rows], y[rows], batch_size=len(rows))
        expected = net(found).argmax(1) == y
    assert torch.equal(right(record, "AutoAttack"), expected)
    assert 0 < expected.sum() < natural.sum()
    found[expected] = x[expected]  # of images that no attack fools, the image itself
    with np.load(folder / "found.npz") as content:
        assert torch.equal(torch.from_numpy(content["images"]), found)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 1.5)])
def test_autoattack_through_the_script_is_autoattack_called_directly(
    tmp_path, brief_library, small_blocks, norm, eps
):
    flags = ("--attacks=autoattack", "--n-examples=45", "--norm", norm)
    record = evaluate(tmp_path, "robust", *flags, "--save-adversarial", tmp_path / "found.npz")
    same_as_directly(robust(), tmp_path, 45, eps, small_blocks, record, norm)

    parts = record["attacks"]["AutoAttack"]["parts"]
    left = [part["robust_accuracy"] for part in parts.values()]
    assert [*parts] == ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]
    assert left == sorted(left, reverse=True)
    assert left[0] < accuracy(record, "natural")
    assert left[-1] == pytest.approx(accuracy(record, "AutoAttack"))
    assert f"{left[0]:.2f} % after APGD-CE" in (tmp_path / "test.log").read_text()

    classes = record["classes"].values()
    worst = [shares["worst case"] for shares in classes]
    assert len(worst) == 10
    assert worst == sorted(worst)
    labels = torch.tensor(record["labels"])
    for name, row in (("natural", "natural"), ("worst case", "AutoAttack")):
        total = sum(shares["images"] * shares[name] for shares in classes)
        assert total == pytest.approx(45 * accuracy(record, row))
        answers = torch.tensor(record["predicted"][name])
        assert torch.equal(answers == labels, right(record, row))


@pytest.mark.slow
def test_the_whole_of_standard_autoattack_is_autoattack_called_directly(tmp_path, small_blocks):
    """With reverse attention, and no step of the library left out."""
    saved = tmp_path / "found.npz"
    flags = ("--attacks=autoattack", "--n-examples=30", "--epsilon=0.04")
    record = evaluate(tmp_path, "with_ra", *flags, "--save-adversarial", saved)
    same_as_directly(with_ra(), tmp_path, 30, 0.04, small_blocks, record)


@pytest.mark.parametrize("classes", [3, 7])
def test_few_classes_are_attacked_and_the_table_says_what_was_left_out(
    classes, tmp_path, monkeypatch, brief_library
):
    def few(dataset, part, data_dir, size, limit):
        split = load_split(dataset, part, data_dir, size)
        split = split.take((split.labels < classes).nonzero().squeeze(1))
        return subset(split._replace(classes=split.classes[:classes]), limit)

    monkeypatch.setattr("utils.data.subject.load_split", few)
    flags = ("--attacks=autoattack,adaptive", "--n-examples=30", "--restarts=1", "--epsilon=0.25")
    record = evaluate(tmp_path, f"first_{classes}", *flags)
    assert accuracy(record, "natural") > 80
    for name in ("AutoAttack", "adaptive: final"):
        assert accuracy(record, name) < accuracy(record, "natural") - 10
    log = (tmp_path / "test.log").read_text()
    assert f"target {classes - 1} of them" in log
    assert ("APGD-T left out" in log) == (classes < 4)


# What is cached

LONG = ("--n-examples=60", "--restarts=1", "--num-steps=5")


class Calls(list):
    """(attack, number of its first image), in order."""

    stop_at = None  # the number of the call that is stopped


@pytest.fixture
def no_pictures(monkeypatch):
    """No picture is drawn."""
    monkeypatch.setattr("utils.evaluation.report.save_or_note", lambda draw, file: "")


@pytest.fixture
def counted(monkeypatch, small_blocks, no_pictures):
    """One step of FGSM stands for every attack of the script, and is counted."""
    calls = Calls()

    def counting(name, *args, eps, **arguments):
        fgsm = pgd(cross_entropy, eps, eps, 1, start="image", seed=0)

        def attack(net, x, labels, numbers):
            calls.append((name, int(numbers[0])))
            if len(calls) == calls.stop_at:
                raise Stopped(signal.SIGTERM, "")
            return fgsm(net, x, labels, numbers)

        return attack

    for name in ("autoattack", "adaptive", "pgd", "noise", "square"):
        monkeypatch.setattr(f"utils.evaluation.robustness.{name}", partial(counting, name))
    return calls


def blocks(folder):
    """Names of the files of cached blocks."""
    return sorted(file.name for file in (folder / "white_attack.blocks").iterdir())


def test_a_stopped_evaluation_goes_on_to_the_same_table(tmp_path, counted):
    flags = (*LONG, "--attacks=pgd,adaptive")
    expected = evaluate(tmp_path / "whole", "robust", *flags)
    starts = digits(60)[2][::25].tolist()
    assert counted == [(name, start) for start in starts for name in ("pgd", "adaptive")]

    counted.clear()
    counted.stop_at = 4
    with pytest.raises(Stopped):
        evaluate(tmp_path, "robust", *flags)
    assert not (tmp_path / "white_attack.json").exists()

    counted.clear()
    counted.stop_at = None
    record = evaluate(tmp_path, "robust", *flags)
    assert [name for name, _ in counted] == ["adaptive", "pgd", "adaptive"]
    assert verdicts_of(record) == verdicts_of(expected)
    names = [name.rsplit("-", 1)[0] for name in blocks(tmp_path)]
    assert names == sorted(["pgd-5", "adaptive-final"] * 3)


def test_a_finished_autoattack_serves_later_commands(tmp_path, counted):
    """On the same network and images: other attacks, restarts, steps, batch size or start."""
    first = evaluate(tmp_path, "robust", *LONG, "--attacks=autoattack")
    assert [name for name, _ in counted] == ["autoattack"] * 3
    counted.clear()
    flags = ("--attacks=all", "--restarts=3", "--test-batch-size=7", "--random=False")
    record = evaluate(tmp_path, "robust", "--n-examples=60", *flags)
    assert "autoattack" not in dict(counted)
    assert torch.equal(right(record, "AutoAttack"), right(first, "AutoAttack"))
    note = record["attacks"]["AutoAttack"]["notes"][-1]
    assert note.startswith("3 of 3 blocks")
    assert first["provenance"]["started"] in note

    counted.clear()
    evaluate(tmp_path, "robust", "--n-examples=59", "--attacks=autoattack")
    assert len(counted) == 1  # only the last block is another one then


@pytest.mark.parametrize("network", ["trained", "robust"])
def test_attacks_search_in_bfloat16_and_float32_judges(network, trained, tmp_path, no_pictures):
    model = network
    net = robust()
    if network == "trained":
        net, _, model = trained
    flags = ("--n-examples=20", "--attacks=natural,pgd,noise", "--num-steps=2", "--step-size=0.1")
    file = tmp_path / "images.npz"
    in_float32 = evaluate(tmp_path, model, *flags)
    record = evaluate(tmp_path, model, *flags, "--precision=bf16", "--save-adversarial", file)

    x, y, numbers = digits(20)
    batch = (x, y, numbers)
    attack = pgd(cross_entropy, EPS, 0.1, 2, start="uniform", seed=SEED)
    adversarial = attack(AttackCopy(net, "bf16").net, *batch)
    natural = net(x).argmax(1) == y
    judged = net(adversarial).argmax(1) == y
    fooled = natural & ~judged
    assert fooled.any()
    assert torch.equal(right(record, "natural"), natural)
    assert torch.equal(right(record, "PGD-2"), natural & judged)
    with np.load(file) as content:
        assert np.array_equal(content["images"][fooled], adversarial[fooled])
    assert not torch.equal(attack(net, *batch)[fooled], adversarial[fooled])

    assert torch.equal(right(record, "PGD-2 (precision default)"), right(in_float32, "PGD-2"))
    assert torch.equal(right(record, "noise, 100 draws"), right(in_float32, "noise, 100 draws"))
    log = (tmp_path / "test.log").read_text()
    assert log.count("a first look: PGD-2 searched in bfloat16") == 1
    for evaluation in (in_float32, record):
        table = "\n".join(results.table(results.grouped([evaluation])))
        assert ("\nA first look" in table) == (evaluation is record)


def test_parts_of_an_attack_are_judged_in_float32_and_search_in_bfloat16(trained, tmp_path):
    """By a network to search that is always wrong, and a ball in which the judge stays right."""
    model = trained[0]
    x, y, numbers = digits(20)
    kept = model(x).argmax(1) == y
    net = SearchedInBfloat16(model, lambda x: model(x).roll(1, 1))
    monitor = Monitor(tmp_path / "parts", print)
    sizes = {"eps": 1e-4, "step_size": 1e-4, "steps": 2, "apgd_steps": 5}
    attack = adaptive(plain, **sizes, restarts=2, seed=SEED, monitor=monitor)
    attack(net, x[kept], y[kept], numbers[kept])
    assert [images for _, images, _ in monitor.parts] == [int(kept.sum())] * 4


def test_restarts_of_apgd_repeat_its_steps_at_each_target(trained, tmp_path):
    """In a ball that fools no image: PGD and APGD take all steps that they are allowed."""
    model = trained[0]
    x, y, numbers = digits(4)
    kept = model(x).argmax(1) == y
    batch = (x[kept], y[kept], numbers[kept])
    with_gradients = []

    def net(images):
        with_gradients.append(images.requires_grad)
        return model(images)

    sizes = {"eps": 1e-4, "step_size": 1e-4, "steps": 2, "restarts": 1, "apgd_steps": 5}
    for restarts in (1, 3):
        with_gradients.clear()
        monitor = Monitor(tmp_path / f"{restarts}", print)
        attack = adaptive(plain, **sizes, apgd_restarts=restarts, seed=SEED, monitor=monitor)
        attack(net, *batch)
        # APGD takes a gradient at its start, too.
        assert sum(with_gradients) == 2 + restarts * 10 * 6


VIEWS = {"adaptive: final", "adaptive: auxiliary 1", "adaptive: over heads", "adaptive: surrogate"}
FIRST_ORDER = {"FGSM", "PGD-40", "CW-20", "transfer PGD-40"}
KNOWN = {"AutoAttack", "Square", "noise, 100 draws"} | FIRST_ORDER | VIEWS


@pytest.fixture
def files_of_blocks(tmp_path):
    """Return the file of each attack's verdicts on a block, for an evaluation with some flags."""

    def files(*flags, network="one", image=0):
        attacks = "natural,fgsm,pgd,cw,noise,square,transfer,autoattack,adaptive"
        # the surrogate is given below, so --surrogate names no file
        flags = ("--surrogate=x", "--attacks", attacks, "--n-examples=10", *flags)
        settings = settings_of("with_ra", *flags)
        subject = load_subject(settings)
        subject.split.images[3] += image
        cache = BlockCache(tmp_path, network, "now")
        surrogate = undefended()
        view_by_name = views(True, 2.0, surrogate)
        plans = planned_attacks(settings, subject, surrogate, view_by_name)
        return {name: cache.file(name, plans[name].settings, subject.split) for name in KNOWN}

    return files


@pytest.mark.parametrize(
    ("flag", "other_files"),
    [
        ("--test-batch-size=7", set()),
        ("--epsilon=0.09", KNOWN),
        ("--random=False", FIRST_ORDER),
        ("--restarts=4", VIEWS),
        ("--apgd-restarts=2", VIEWS),
        ("--precision=bf16", KNOWN - {"noise, 100 draws", "Square", "transfer PGD-40"}),
    ],
)
def test_cached_verdicts_belong_to_settings(flag, other_files, files_of_blocks):
    """Whatever matters to an attack makes another file of its block, and nothing else does."""
    before = files_of_blocks()
    after = files_of_blocks(flag)
    assert {name for name in KNOWN if after[name] != before[name]} == other_files


def test_cached_verdicts_belong_to_network_images_and_version(files_of_blocks, monkeypatch):
    before = set(files_of_blocks().values())
    assert before.isdisjoint(files_of_blocks(network="another").values())
    assert before.isdisjoint(files_of_blocks(image=7).values())
    monkeypatch.setattr("utils.attacks.VERSION", 99)
    assert before.isdisjoint(files_of_blocks().values())


def test_cached_blocks_of_a_network_of_ones_own_end_with_its_weights(
    tmp_path, counted, monkeypatch
):
    """A callable has no weights to tell it apart; its answers do."""
    flags = (*LONG, "--attacks=adaptive")
    evaluate(tmp_path, "as_callable", *flags)
    counted.clear()
    evaluate(tmp_path, "as_callable", *flags)
    assert not counted
    monkeypatch.setattr(tiny_networks, "robust", undefended)  # the same name, other weights
    evaluate(tmp_path, "as_callable", *flags)
    assert len(counted) == 3


@pytest.mark.parametrize(
    ("attack", "row"), [("autoattack", "AutoAttack"), ("adaptive", "adaptive: final")]
)
def test_a_stop_inside_a_block_loses_one_part(
    attack, row, tmp_path, monkeypatch, brief_library, no_pictures
):
    """The figures are those of an evaluation that was never stopped."""
    monkeypatch.setattr("utils.evaluation.cache.WORTH_CACHING", 0)
    flags = ("--attacks", attack, "--n-examples=12", "--restarts=1", "--num-steps=4")

    def run(folder):
        saved = tmp_path / f"{folder}.npz"
        record = evaluate(tmp_path / folder, "robust", *flags, "--save-adversarial", saved)
        with np.load(saved) as content:
            return record, content["images"]

    def watched(cls, effect=None):
        effect = effect or cls.perturb
        return mock.patch.object(cls, "perturb", autospec=True, side_effect=effect)

    whole, images = run("whole")
    stop = Stopped(signal.SIGTERM, "")
    with watched(APGDAttack) as first, watched(APGDAttack_targeted, stop), pytest.raises(Stopped):
        run("stopped")
    assert first.call_count == 1

    with watched(APGDAttack) as first, watched(APGDAttack_targeted) as second:
        resumed, resumed_images = run("stopped")
    assert (first.call_count, second.call_count) == (0, 1)
    assert not [name for name in blocks(tmp_path / "stopped") if name.endswith(".parts")]
    assert verdicts_of(resumed) == verdicts_of(whole)
    assert np.array_equal(resumed_images, images)
    assert 0 < accuracy(whole, row) < accuracy(whole, "natural")
    parts = resumed["attacks"][row]["parts"]
    for name, part in whole["attacks"][row]["parts"].items():
        assert parts[name]["robust_accuracy"] == part["robust_accuracy"]


# Worst cases


def test_the_worst_case_is_the_worst_of_all_attacks_image_by_image(full):
    record, _ = full
    rows = {name: right(record, name) for name in record["attacks"]}
    worst = rows.pop("worst case")
    worst_view = rows.pop("adaptive, worst case")
    assert {"natural", "FGSM", "PGD-20", "CW-10", "diagnostics", "adaptive: final"} <= rows.keys()
    assert torch.equal(worst, torch.stack([*rows.values()]).all(0))
    assert len({tuple(row.tolist()) for row in rows.values()}) > 3  # so it says more than a row
    views = [row for name, row in rows.items() if name.startswith("adaptive: ")]
    assert len(views) >= 5
    assert torch.equal(worst_view, torch.stack(views).all(0))


def test_adaptive_finds_what_pgd_on_each_head_finds(full):
    record, _ = full
    x, y, numbers = digits(50)
    worst = right(record, "adaptive, worst case")
    rows = right(record, "natural").nonzero().squeeze(1)
    x = x[rows]
    y = y[rows]
    start = x + FULL_EPS * image_noise(x, numbers[rows], SEED, "Linf")

    def objective(z, head):
        heads = net(z, heads=True)
        return F.cross_entropy((heads.final, *heads.auxiliary)[head], y, reduction="sum")

    wrong = []
    with frozen(with_ra()) as net:
        for head in range(3):
            attacked = partial(objective, head=head)
            found = linf_pgd(x, attacked, FULL_EPS, FULL_STEP, 20, start)
            wrong.append(net(found).argmax(1) != y)
            assert not (worst[rows] & wrong[-1]).any()
    assert ((wrong[1] | wrong[2]) & ~wrong[0]).any()  # or the final head alone would do


def test_a_surrogate_is_one_more_view_and_an_attack_by_itself(trained, tmp_path, brief_library):
    flags = ("--restarts=1", "--n-examples=20", "--epsilon=0.2", "--num-steps=10")
    flags += ("--attacks=adaptive,transfer", "--surrogate", trained[2])
    record = evaluate(tmp_path, "robust", *flags)
    assert {"adaptive: final", "adaptive, worst case"} < record["attacks"].keys()
    for name in ("adaptive: surrogate", "transfer PGD-10"):
        assert accuracy(record, name) < accuracy(record, "natural")


def test_square_by_itself_needs_no_gradient(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr("utils.evaluation.robustness.square", partial(square, queries=60))
    record = evaluate(
        tmp_path, "in_steps", "--attacks=fgsm,square", "--n-examples=20", "--epsilon=0.3"
    )
    assert accuracy(record, "Square") < accuracy(record, "FGSM") == accuracy(record, "natural")


def test_several_runs_stand_side_by_side(tmp_path, capsys, no_pictures):
    runs = [tmp_path / "ra", tmp_path / "plain"]
    for run in runs:
        digits_checkpoint(run / "best_adv_model.pt", run.name == "ra")
    flags = ("--attacks=fgsm", "--n-examples=30", "--epsilon=0.2")
    assert execute(ATTACK, "--ckpt_url", *runs, *flags) == 0
    lines = capsys.readouterr().out
    assert results.main([str(run) for run in runs]) == 0  # afterwards, from what they wrote
    assert lines.endswith(capsys.readouterr().out)


# Planted frauds


def test_a_hardened_head_in_front_of_an_undefended_one_is_exposed(tmp_path, brief_library):
    """All attacks on the final logits are led astray; the auxiliary view is not."""
    record = evaluate(
        tmp_path, "decoy", "--attacks=pgd,adaptive", "--n-examples=40", "--restarts=1"
    )
    assert accuracy(record, "PGD-40") > 50
    assert accuracy(record, "adaptive: auxiliary 1") < 10
    assert accuracy(record, "adaptive, worst case") < 10


def test_what_diagnostics_find_is_in_the_worst_images(tmp_path, monkeypatch, no_pictures):
    """PGD on the final logits is led astray, the views of --diagnostics are not."""
    shorten_diagnostics(monkeypatch, RADII=(0.5,), RESTARTS=1)
    saved = tmp_path / "worst.npz"
    flags = ("--attacks=pgd", "--n-examples=15", "--diagnostics", "--save-adversarial", saved)
    record = evaluate(tmp_path, "decoy", *flags)
    by_eps = record["diagnostics"]["by_eps"]
    lowest = min(point["PGD on every view"] for point in by_eps if point["eps"] <= EPS)
    assert accuracy(record, "diagnostics") <= lowest < 10 < 50 < accuracy(record, "PGD-40")
    with np.load(saved) as content:
        throughout = right(record, "PGD-40") & right(record, "diagnostics")
        assert content["right"].tolist() == throughout.tolist()
        assert content["predicted"].tolist() == record["predicted"]["worst case"]


def test_vanishing_gradients_are_exposed(tmp_path):
    record = evaluate(
        tmp_path, "scaled", "--attacks=pgd,adaptive", "--n-examples=60", "--restarts=2"
    )
    assert accuracy(record, "PGD-40") > accuracy(record, "natural") - 20 > 50
    assert accuracy(record, "adaptive: final") < 10


def diagnosis(model, count, norm="Linf", eps=EPS):
    """Diagnosis of a plain network: the names of raised signs, and the diagnosis."""
    split = subset(digits_split(), count)
    x = as_input(split.images)
    with frozen(model) as net:
        logits = net(x).detach()
        natural = logits.argmax(1) == split.labels
        fooling = WorstImages(x, logits, split.labels)
        probe = Probe(net, split, natural, eps, eps / 5, SEED, count, fooling, str, norm)
        found = diagnose(probe, views(False, 2))
    return {sign.name for sign in found.signs if sign.raised}, found


def test_diagnostics_raise_signs_for_vanishing_gradients(monkeypatch):
    shorten_diagnostics(monkeypatch, QUERIES=300, RADII=(0.5, 2), RESTARTS=10)
    raised, _ = diagnosis(scaled(), 30)
    assert "gradients vanish" in raised
    assert "eps 1 leaves images right" in raised


def test_diagnostics_compare_square_with_all_attacks_by_gradients(monkeypatch):
    """Where only the cross-entropy underflows, PGD on the margin needs no Square."""
    shorten_diagnostics(monkeypatch, QUERIES=200)
    sign = "black-box finds what white-box misses"
    assert sign in diagnosis(Cut(), 15)[0]
    _, diagnosed = diagnosis(scaled(), 15)
    assert (sign, False, "0 of 15 images") in diagnosed.signs


@pytest.mark.parametrize(("fooled", "raised"), [(0, False), (2, False), (9, True)])
def test_a_few_images_are_no_sign(fooled, raised, monkeypatch):
    """Of 63 images 2 are 3.2 %, and their interval contains 1 %; that of 9 does not."""

    def attack(probe, name, *args, **kwargs):
        return (torch.arange(len(probe.rows)) < fooled) & (name == "Square")

    def pgd(probe, *args, **kwargs):
        return torch.zeros(len(probe.rows), 200, dtype=torch.bool)

    monkeypatch.setattr(Probe, "attack", attack)
    monkeypatch.setattr(Probe, "pgd", pgd)
    _, diagnosed = diagnosis(undefended(), 63)
    found = {sign.name: sign.raised for sign in diagnosed.signs}
    assert found["black-box finds what white-box misses"] == raised
    assert not found["random noise beats PGD"]


def test_diagnostics_in_l2_go_as_far_as_the_diagonal(monkeypatch):
    shorten_diagnostics(monkeypatch)
    _, diagnosed = diagnosis(undefended(), 20, "L2", 1.0)
    assert [eps for eps, *_ in diagnosed.by_eps] == pytest.approx([0, 1, 2, 768**0.5])
    assert diagnosed.by_eps[-1][1] == 0 < diagnosed.by_eps[0][1]
    assert ("eps 27.71 leaves images right", False, "0 of 20 images") in diagnosed.signs


@pytest.mark.slow
def test_diagnostics_of_an_honest_network(monkeypatch):
    """No sign is raised; accuracy falls with eps, to nothing at eps 1, and with steps."""
    monkeypatch.setattr("utils.evaluation.diagnostics.QUERIES", 300)
    raised, diagnosed = diagnosis(robust(), 100)
    assert not raised
    radii = [eps for eps, _, _ in diagnosed.by_eps]
    assert radii == sorted(set(radii))
    assert (radii[0], radii[-1]) == (0, 1)
    assert diagnosed.by_eps[0][1] > 80
    assert diagnosed.by_eps[-1][1] < 2
    for curve in (diagnosed.by_eps, diagnosed.by_steps):
        for before, after in itertools.pairwise(curve):
            assert after[1] <= before[1] + 1.5
            assert after[2] <= before[2] + 1.5


def test_a_network_that_is_never_right(tmp_path, brief_library):
    record = evaluate(tmp_path, "always_wrong", "--attacks=all", "--n-examples=20", "--diagnostics")
    assert {attack["robust_accuracy"] for attack in record["attacks"].values()} == {0.0}
    assert record["diagnostics"]["by_eps"] == []
    assert "SIGN: no image is right without an attack" in (tmp_path / "test.log").read_text()
    assert (tmp_path / "adversarial_examples.png").exists()


# Networks whose figures no attack can be trusted with


@pytest.mark.parametrize(
    ("model", "warning"),
    [
        ("in_training_mode", "alone is answered otherwise than in a batch"),
        ("at_random", "two calls answer differently, which"),
        ("probabilities", "answers are probabilities"),
        ("in_steps", "gradients are exactly zero at"),
        ("scaled", "gradients are exactly zero at"),
    ],
)
def test_what_leads_every_attack_astray_is_said_of_every_row(model, warning, tmp_path, no_pictures):
    record = evaluate(tmp_path, model, "--attacks=fgsm,noise", "--n-examples=20")
    log = (tmp_path / "test.log").read_text()
    (line,) = re.findall("! every attack: .*", log)
    assert warning in line
    assert log.count(" !\n") == len(record["attacks"])
    for row in record["attacks"].values():
        assert any(warning in note for note in row["notes"])


# Verdicts and images


def test_saved_adversarial_images_are_what_the_table_says(full):
    record, folder = full
    x, y, _ = digits(50)
    with np.load(folder / "worst.npz", allow_pickle=False) as content:
        images = torch.from_numpy(content["images"])
        stays_right = torch.from_numpy(content["right"])
        assert content["labels"].tolist() == y.tolist()
        assert content["eps"] == pytest.approx(FULL_EPS)
    assert images.dtype == torch.float32
    assert (images - x).abs().max() <= FULL_EPS + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(with_ra()(images).argmax(1) == y, stays_right)
    assert torch.equal(stays_right, right(record, "worst case"))
    natural = right(record, "natural")
    assert 0 < stays_right.sum() < natural.sum()
    unchanged = (images == x).flatten(1).all(1)  # unless an attack fools it
    assert torch.equal(unchanged, stays_right | ~natural)


def test_n_examples_are_the_first_after_a_fixed_shuffle(tmp_path):
    some = evaluate(tmp_path / "some", "robust", "--attacks=fgsm", "--n-examples=70")
    every = evaluate(tmp_path / "all", "robust", "--attacks=fgsm", "--n-examples=360")
    first = shuffled(360, 0)[:70]
    for name in ("natural", "FGSM"):  # whose start depends on an image's number in the test set
        assert torch.equal(right(some, name), right(every, name)[first])
    line = "70 of 360 test images, the first of a fixed shuffle"
    assert line in (tmp_path / "some" / "test.log").read_text()
    assert "shuffle" not in (tmp_path / "all" / "test.log").read_text()


def test_noise_stays_in_the_ball_and_counts_any_draw():
    x, y, numbers = digits(60)
    with frozen(undefended()) as net:
        attacked = noise(0.6, SEED, 20)(net, x, y, numbers)
        wrong = net(attacked).argmax(1) != y
        any_draw = net(x).argmax(1) != y
        for draw in range(20):
            noisy = (x + 0.6 * image_noise(x, numbers, SEED, "Linf", draw)).clamp(0, 1)
            any_draw |= net(noisy).argmax(1) != y
    assert (attacked - x).abs().max() <= 0.6 + 1e-6
    assert torch.equal(wrong, any_draw)
    assert 0 < wrong.sum() < 60


# What is written


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # the first is a textbook's, the others are the formula at p = 0 and 1
    [
        (9, 10, 59.58, 98.21),
        (0, 10, 0, 100 * 3.8414588 / 13.8414588),
        (50, 50, 100 * 50 / 53.8414588, 100),
    ],
)
def test_wilson_interval(count, of, low, high):
    assert results.wilson(count, of) == pytest.approx((low, high), abs=0.006)


def test_the_record_and_the_table_say_what_the_verdicts_say(full):
    record, folder = full
    log = (folder / "test.log").read_text()
    assert "! every attack" not in log
    _, table = log.rsplit("\nattack ", 1)
    lines = table.splitlines()[1:]
    for line, (name, attack) in zip(lines, record["attacks"].items(), strict=False):
        count = attack["verdicts"].count("1")
        assert len(attack["verdicts"]) == attack["images"] == record["images"] == 50
        assert attack["robust_accuracy"] == pytest.approx(2 * count)
        assert attack["interval_95"] == pytest.approx(results.wilson(count, 50))
        accuracy, low, _, high, images, _ = line.removeprefix(name).split()
        assert float(accuracy) == pytest.approx(2 * count, abs=0.005)
        assert [float(low), float(high)] == pytest.approx(attack["interval_95"], abs=0.005)
        assert images == "50"
    expected = {"eps": FULL_EPS, "step_size": FULL_STEP, "num_steps": 20, "restarts": 2}
    assert expected.items() <= record["settings"].items()


def test_pictures_and_their_curves(full):
    record, folder = full
    for name in ("adversarial_examples", "robust_vs_eps", "robust_vs_steps"):
        assert (folder / f"{name}.png").exists()
    by_eps = record["diagnostics"]["by_eps"]
    by_steps = record["diagnostics"]["by_steps"]
    radii = [point["eps"] for point in by_eps]
    assert radii == pytest.approx([0, FULL_EPS, 2 * FULL_EPS, 1])
    assert [point["steps"] for point in by_steps] == [1, 5, 40]
    for point in by_eps + by_steps:
        assert 0 <= point["PGD on every view"] <= point["PGD on the answer's logits"] <= 100
    log = (folder / "test.log").read_text()
    for sign in record["diagnostics"]["signs"]:
        assert (f"SIGN: {sign['name']} ({sign['figure']})" in log) == sign["raised"]


def test_examples_are_chosen_by_the_share_of_their_kind(tmp_path, monkeypatch):
    drawn = mock.Mock()
    monkeypatch.setattr("utils.evaluation.report.draw_examples", drawn)
    split = digits_split(count=80)
    logits = F.one_hot(split.labels, 10).float()
    wrong_logits = logits.roll(1, 1)
    logits[:20] = wrong_logits[:20]  # wrong without an attack
    worst = WorstImages(as_input(split.images), logits, split.labels)
    rows = torch.arange(20, 60)
    worst.take(rows, worst.images[rows], wrong_logits[rows])
    subject = SimpleNamespace(split=split, eps=8 / 255, norm="Linf", radius="eps 8/255")
    draw_worst(tmp_path / "x.png", subject, worst, ["fgsm"])
    _, _, fooled, labels, _, _, title, _ = drawn.call_args.args
    assert fooled.tolist() == [True] * 4 + [False] * 4
    assert labels[:4].tolist() == split.labels[[20, 31, 43, 54]].tolist()
    for words in ("50.0 % fooled", "25.0 % wrong", "25.0 % right", "fgsm"):
        assert words in title


# Foreign classifiers and wrong use


EVERY = "natural,fgsm,pgd,cw,autoattack,adaptive,noise,square"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("model", ["in_bfloat16", "saved_script"])
def test_every_attack_takes_logits_of_any_type_and_torchscript(
    model, tmp_path, monkeypatch, brief_library, no_pictures
):
    shorten_diagnostics(monkeypatch)
    monkeypatch.setattr("utils.evaluation.robustness.square", partial(square, queries=20))
    flags = ("--attacks", EVERY, "--n-examples=6", "--num-steps=2", "--restarts=1")
    record = evaluate(tmp_path, model, *flags, "--diagnostics")
    x, y, _ = digits(6)
    assert torch.equal(right(record, "natural"), robust()(x).argmax(1) == y)
    assert len(record["attacks"]) == 10
    worst = accuracy(record, "worst case")
    assert worst <= accuracy(record, "PGD-2") <= accuracy(record, "natural")


QUICK = ("--dataset=digits", "--n-examples=4", "--device=cpu")

FOREIGN = """
import torch
from torch import nn

def raises(): raise RuntimeError("weights are missing,\\nand much else")
def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
def larger(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
def flat(): return lambda x: torch.zeros(len(x), 10)
"""


@pytest.fixture
def beside_foreign(here, monkeypatch):
    """The current folder holds foreign_nets.py."""
    (here / "foreign_nets.py").write_text(FOREIGN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield here
    sys.modules.pop("foreign_nets", None)


THEIRS = {
    "models/__init__.py": "",
    "models/nets.py": """
import torch
from torch import nn
from torch.nn.utils import weight_norm
from utils.blocks import block

def plain(): return block(3)

def normed():  # neither its weight nor what its hook keeps can be copied
    net = block(3)
    net[0], net.seen = weight_norm(net[0]), []
    net[0].register_forward_hook(lambda module, inputs, output: net.seen.append(output))
    return net
""",
    "utils/blocks.py": """
import torch
from torch import nn

def block(channels):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
""",
}


@pytest.mark.parametrize(("model", "side"), [("models.nets:plain", 16), ("models.nets:normed", 28)])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_repository_with_models_and_utils_of_its_own(
    model, side, tmp_path, monkeypatch, no_pictures
):
    """One folder lands there, and afterwards our own names are ours again."""
    folder = tmp_path / "theirs"
    for name, source in THEIRS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    path = [*sys.path]
    ours = modules_of_ours()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    saved = tmp_path / "found.npz"
    flags = ("--dataset=digits", f"--image-size={side}", "--n-examples=6", "--attacks=fgsm")
    assert execute(ATTACK, "--model", model, *flags, "--save-adversarial", saved) == 0
    with np.load(saved) as content:
        assert content["images"].shape == (6, 3, side, side)
    assert sorted(file.name for file in folder.iterdir()) == ["evaluated", "models", "utils"]
    (log,) = folder.glob("evaluated/*/test.log")
    assert log.parent.name == model.replace(".", "-").replace(":", "-")
    assert log.with_name("white_attack.json").exists()
    assert sys.path == path
    now = modules_of_ours()
    assert ours.items() <= now.items()
    assert all(ROOT in Path(module.__file__).parents for module in now.values())


def test_a_file_may_import_from_the_current_folder(here, no_pictures):
    """The file lies in another folder than what it imports, and imports it by the folder's name."""
    (here / "nets").mkdir()
    (here / "common.py").write_text("import torch\nNET = torch.nn.Flatten()\n")
    code = "import torch, common\ndef build(): return torch.nn.Sequential(common.NET, LINEAR)\n"
    (here / "nets" / "a.py").write_text(code.replace("LINEAR", "torch.nn.Linear(768, 10)"))
    assert execute(ATTACK, "--model=nets/a.py:build", *QUICK, "--attacks=natural") == 0


def modules_of_ours():
    """Our own packages and their modules, as far as they are imported."""
    return {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ("models", "utils")
    }


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:net", "no_such_module"),
        ("foreign_nets:raises", "weights are missing"),
        ("foreign_nets:seven", "(N, 10)"),
        ("foreign_nets:larger", "768"),
        ("foreign_nets:flat", "gradient"),
    ],
)
def test_a_foreign_network_that_is_none(function, said, beside_foreign, refused):
    refused(ATTACK, "--model", function, *QUICK, "--attacks=fgsm", mentions=[said])


NAMES_OF_OURS = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.fc = torch.nn.Linear(2, 2), torch.nn.Linear(3 * 16 * 16, 10)
    def predict(self, x):
        return self(x).argmax(1)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""


def test_a_foreign_network_may_use_names_of_ours(here):
    (here / "named.py").write_text(NAMES_OF_OURS)
    assert execute(ATTACK, "--model=named.py:Net", *QUICK, "--attacks=fgsm") == 0


def test_a_network_without_gradients_is_looked_at_without_attacks(beside_foreign):
    flags = ("--model=foreign_nets:flat", *QUICK, "--attacks=natural,noise")
    assert execute(ATTACK, *flags) == 0
    assert {file.name for file in beside_foreign.iterdir()} == {"foreign_nets.py", "evaluated"}


def test_wrong_flags(refused, trained, tmp_path):
    file = trained[2]
    flags = ("--ckpt_url", file, "--n-examples=4", "--attacks=fgsm")
    refused(ATTACK, *flags, "--save-adversarial", file / "x.npz", mentions=["--save-adversarial"])
    refused(ATTACK, *flags, "--save-adversarial", tmp_path, mentions=["folder"])
    refused(ATTACK, *flags, "--diagnostics", "--epsilon=0", mentions=["--diagnostics"])


def test_a_surrogate_of_other_classes(tmp_path):
    weights = digits_content()["model"]
    weights |= {key: weights[key][:7] for key in ("fc.weight", "fc.bias")}
    classes = [*"0123456"]
    file = tmp_path / "seven.pt"
    digits_checkpoint(file, model=weights, num_classes=7, classes=classes)
    with pytest.raises(UsageError, match="7 classes"):
        evaluate(tmp_path, "robust", "--attacks=adaptive", "--surrogate", file)


def test_logits_that_are_not_finite_are_no_result(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        evaluate(tmp_path, "not_finite", "--attacks=fgsm", "--n-examples=10")
    assert not (tmp_path / "white_attack.json").exists()
