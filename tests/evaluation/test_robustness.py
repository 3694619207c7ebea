"""test_white_attack.py: what its attacks find, what it caches, what it says."""

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

from tests.helpers import (
    ATTACK,
    checkpoint,
    digits_checkpoint,
    digits_split,
    execute,
)
from tests.tiny_networks import robust, scaled, undefended, with_ra
from tests.tools.truth_networks import Cut
from utils.attacks import cross_entropy, image_noise, noise, pgd
from utils.data.datasets import as_input, load_split, shuffled, subset
from utils.data.subject import load_subject, percent, verdicts
from utils.evaluation import results
from utils.evaluation.adaptive import adaptive, plain, views
from utils.evaluation.autoattack import square
from utils.evaluation.cache import BlockCache, Monitor, WorstImages
from utils.evaluation.diagnostics import ANSWER, EVERY_VIEW, Probe, diagnose
from utils.evaluation.report import draw_worst
from utils.evaluation.robustness import planned_attacks, white_attack
from utils.system.attack_copy import SearchedInBfloat16, attack_copy, frozen
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
    flags = ("--apgd-steps=6", "--log_path", folder / "test.log", *flags)
    white_attack(settings_of(model, *flags))
    return json.loads((folder / "white_attack.json").read_text())


def right(record, name):
    """The verdicts of a row of the table, (N,) bool."""
    verdicts = record["attacks"][name]["verdicts"]
    return torch.tensor([verdict == "1" for verdict in verdicts])


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
    """Fewer steps in the parts of AutoAttack, for the script and for direct calls."""
    standard = AutoAttack._set_version

    def brief(self, version):
        standard(self, version)
        self.fab.n_iter = 5
        self.square.n_queries = 50
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = 6
            apgd.n_iter_orig = 6

    patch.setattr(AutoAttack, "_set_version", brief)


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
        flags = ["--attacks=fgsm,pgd,cw,adaptive,noise", "--diagnostics", "--restarts=2"]
        flags += ["--n-examples=50", "--num-steps=20"]
        flags += ["--epsilon", FULL_EPS, "--step-size", FULL_STEP]
        evaluate(folder, "with_ra", "--attacks=natural", "--n-examples=50")
        record = evaluate(folder, "with_ra", *flags, "--save-adversarial", folder / "worst.npz")
    return record, folder


# AutoAttack


def same_as_directly(model, folder, count, eps, block, record, norm="Linf"):
    """Assert that the library, called on each block, finds the same."""
    x, y, _ = digits(count)
    found = x.clone()
    with frozen(model) as net:
        for rows in torch.arange(count).split(block):
            library = AutoAttack(
                net, norm=norm, eps=eps, seed=SEED, version="standard", device="cpu"
            )
            batch = (x[rows], y[rows])
            found[rows], _ = library.run_standard_evaluation(*batch, batch_size=block)
        stays_right = net(found).argmax(1) == y
    assert torch.equal(right(record, "AutoAttack"), stays_right)
    assert 0 < stays_right.sum() < right(record, "natural").sum()
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
    assert [*parts] == ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]
    left = [part["robust_accuracy"] for part in parts.values()]
    assert left == sorted(left, reverse=True)
    assert left[0] < accuracy(record, "natural")
    assert left[-1] == pytest.approx(accuracy(record, "AutoAttack"))


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
    def few(*args):
        split = load_split(*args)
        split = split.take((split.labels < classes).nonzero().squeeze(1))
        return split._replace(classes=split.classes[:classes])

    monkeypatch.setattr("utils.data.subject.load_split", few)
    flags = ("--attacks=autoattack,adaptive", "--n-examples=60", "--restarts=1", "--epsilon=0.25")
    record = evaluate(tmp_path, f"first_{classes}", *flags)
    assert accuracy(record, "natural") > 80
    for name in ("AutoAttack", "adaptive: final"):
        assert accuracy(record, name) < accuracy(record, "natural") - 10
    log = (tmp_path / "test.log").read_text()
    assert f"target {classes - 1} classes" in log
    assert "adaptive attack: 1 x PGD and 1 x APGD of 6 steps" in log
    assert ("APGD-T left out" in log) == (classes < 4)


# What is cached


def test_a_stopped_evaluation_goes_on_to_the_same_table(
    tmp_path, monkeypatch, small_blocks, no_pictures
):
    """One step of FGSM stands for each attack on each block; the tenth is stopped."""
    calls = []

    def counting(name, *args, eps, **arguments):
        fgsm = pgd(cross_entropy, eps, eps, 1, start="image", seed=0)

        def attack(*batch):
            calls.append(name)
            if len(calls) == 10:
                raise Stopped(signal.SIGTERM, "")
            return fgsm(*batch)

        return attack

    for name in ("adaptive", "pgd"):
        monkeypatch.setattr(f"utils.evaluation.robustness.{name}", partial(counting, name))
    flags = ("--attacks=pgd,adaptive", "--n-examples=60", "--num-steps=5")
    expected = evaluate(tmp_path / "whole", "robust", *flags)
    assert calls == ["pgd", "adaptive"] * 3

    with pytest.raises(Stopped):
        evaluate(tmp_path, "robust", *flags)
    assert not (tmp_path / "white_attack.json").exists()

    record = evaluate(tmp_path, "robust", *flags)
    assert calls[10:] == ["adaptive", "pgd", "adaptive"]
    assert verdicts_of(record) == verdicts_of(expected)
    for name, cached in (("PGD-5", 2), ("adaptive: final", 1)):
        (note,) = record["attacks"][name]["notes"]
        assert note.startswith(f"{cached} of 3 blocks")


def test_attacks_search_in_bfloat16_and_float32_judges(tmp_path, no_pictures):
    flags = ("--n-examples=20", "--attacks=natural,pgd", "--num-steps=2", "--step-size=0.1")
    file = tmp_path / "images.npz"
    in_float32 = evaluate(tmp_path, "robust", *flags)
    record = evaluate(tmp_path, "robust", *flags, "--precision=bf16", "--save-adversarial", file)

    net = robust()
    batch = digits(20)
    x, y, _ = batch
    attack = pgd(cross_entropy, EPS, 0.1, 2, start="uniform", seed=SEED)
    adversarial = attack(attack_copy(net, "bf16"), *batch)
    natural = right(record, "natural")
    judged = net(adversarial).argmax(1) == y
    fooled = natural & ~judged
    assert fooled.any()
    assert torch.equal(natural, net(x).argmax(1) == y)
    assert torch.equal(right(record, "PGD-2"), natural & judged)
    with np.load(file) as content:
        assert np.array_equal(content["images"][fooled], adversarial[fooled])
    from_float32 = attack(net, *batch)
    assert not torch.equal(from_float32[fooled], adversarial[fooled])

    assert torch.equal(right(record, "PGD-2 (precision default)"), right(in_float32, "PGD-2"))
    log = (tmp_path / "test.log").read_text()
    assert log.count("PGD-2: a first look, searched in bfloat16") == 1
    table = results.table(results.grouped([record]))
    assert any("precision bf16" in line for line in table)


@pytest.fixture
def unmoved(trained):
    """Run the adaptive attack on right images, in a ball that fools none of them."""
    model, _, _ = trained
    x, y, numbers = digits(4)
    kept = model(x).argmax(1) == y
    batch = (x[kept], y[kept], numbers[kept])

    def run(net, monitor, **sizes):
        sizes = {"eps": 1e-4, "step_size": 1e-4, "steps": 2, "apgd_steps": 5, **sizes}
        attack = adaptive(plain, **sizes, seed=SEED, monitor=monitor)
        attack(net, *batch)
        return len(batch[0])

    return run


def test_parts_of_an_attack_are_judged_in_float32_and_search_in_bfloat16(
    trained, unmoved, tmp_path
):
    """By a network to search that is always wrong; the judge stays right."""
    model = trained[0]
    net = SearchedInBfloat16(model, lambda x: model(x).roll(1, 1))
    monitor = Monitor(tmp_path / "parts", print)
    count = unmoved(net, monitor, restarts=2)
    assert len(monitor.parts) == 4
    assert all(images == count for _, images, _ in monitor.parts)


@pytest.mark.parametrize("restarts", [1, 3])
def test_restarts_of_apgd_repeat_its_steps_at_each_target(restarts, trained, unmoved, tmp_path):
    """PGD and APGD take all steps that they are allowed; APGD takes a gradient at its start too."""
    with_gradients = []

    def net(images):
        with_gradients.append(images.requires_grad)
        return trained[0](images)

    unmoved(net, Monitor(tmp_path / "parts", print), restarts=1, apgd_restarts=restarts)
    assert sum(with_gradients) == 2 + restarts * 10 * 6


VIEWS = {"adaptive: final", "adaptive: auxiliary 1", "adaptive: over heads", "adaptive: surrogate"}
FIRST_ORDER = {"FGSM", "PGD-40", "CW-20", "transfer PGD-40"}
KNOWN = {"AutoAttack", "Square", "noise, 100 draws"} | FIRST_ORDER | VIEWS


@pytest.fixture
def files_of_blocks(tmp_path):
    """Return the file of each attack's verdicts on a block, for an evaluation with some flags."""

    def files_of(*flags, network="one", image=0):
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
        files = {}
        for name in KNOWN:
            files[name] = cache.file(name, plans[name].settings, subject.split)
        return files

    return files_of


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
    changed = {name for name in KNOWN if after[name] != before[name]}
    assert changed == other_files


def test_cached_verdicts_belong_to_network_images_and_version(files_of_blocks, monkeypatch):
    before = set(files_of_blocks().values())
    assert before.isdisjoint(files_of_blocks(network="another").values())
    assert before.isdisjoint(files_of_blocks(image=7).values())
    monkeypatch.setattr("utils.attacks.VERSION", 99)
    assert before.isdisjoint(files_of_blocks().values())


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
    assert not list((tmp_path / "stopped").glob("*/*.parts"))
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
    views = [row for name, row in rows.items() if name.startswith("adaptive: ")]
    assert torch.equal(worst_view, torch.stack(views).all(0))
    assert worst_view.sum() < max(row.sum() for row in views)


def test_adaptive_finds_what_pgd_on_each_head_finds(full):
    record, _ = full
    natural = right(record, "natural")
    worst = right(record, "adaptive, worst case")

    def objective(net, labels, head):
        def loss(x):
            heads = net(x, heads=True)
            logits = (heads.final, *heads.auxiliary)[head]
            return F.cross_entropy(logits, labels, reduction="sum")

        return loss

    stays_right = []
    with frozen(with_ra()) as net:
        for head in range(3):
            of_head = partial(objective, head=head)
            attack = pgd(of_head, FULL_EPS, FULL_STEP, 20, start="uniform", seed=SEED)
            stays_right.append(verdicts(net, subset(digits_split(), 50), 50, attack, natural))
            assert (stays_right[-1] >= worst).all()
    final, *auxiliary = stays_right
    assert (final & ~(auxiliary[0] & auxiliary[1])).any()  # or the final head alone would do


def test_a_surrogate_is_one_more_view_and_an_attack_by_itself(trained, tmp_path):
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
    results.main([str(run) for run in runs])  # afterwards, from what they wrote
    assert lines.endswith(capsys.readouterr().out)


# Planted frauds


@pytest.mark.parametrize(
    ("model", "view"),
    [
        ("decoy", "adaptive: auxiliary 1"),  # all attacks on its final logits are led astray
        ("scaled", "adaptive: final"),  # gradients of its cross-entropy vanish
    ],
)
def test_frauds_that_withstand_pgd_are_exposed(model, view, tmp_path, no_pictures):
    flags = ("--attacks=pgd,adaptive", "--n-examples=40", "--restarts=2")
    record = evaluate(tmp_path, model, *flags)
    assert accuracy(record, "PGD-40") > 50
    assert accuracy(record, view) < 10
    assert accuracy(record, "worst case") < 10


def test_what_diagnostics_find_is_in_the_worst_images(tmp_path, monkeypatch, no_pictures):
    """PGD on the final logits is led astray, the views of --diagnostics are not."""
    shorten_diagnostics(monkeypatch, RADII=(0.5,), RESTARTS=1)
    saved = tmp_path / "worst.npz"
    flags = ("--attacks=pgd", "--n-examples=15", "--diagnostics", "--save-adversarial", saved)
    record = evaluate(tmp_path, "decoy", *flags)
    by_eps = record["diagnostics"]["by_eps"]
    lowest = min(point[EVERY_VIEW] for point in by_eps if point["eps"] <= EPS)
    assert accuracy(record, "diagnostics") <= lowest < 10 < 50 < accuracy(record, "PGD-40")
    throughout = right(record, "PGD-40") & right(record, "diagnostics")
    with np.load(saved) as content:
        assert content["right"].tolist() == throughout.tolist()


def diagnosis(model, count, norm="Linf", eps=EPS):
    """Diagnosis of a plain network: the names of raised signs, and the diagnosis."""
    split = subset(digits_split(), count)
    x = as_input(split.images)
    with frozen(model) as net:
        logits = net(x).detach()
        natural = logits.argmax(1) == split.labels
        fooling = WorstImages(x, logits, split.labels)
        probe = Probe(net, split, natural, eps, eps / 5, SEED, count, fooling, int, norm)
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


@pytest.mark.parametrize(
    ("fooled", "raised"),
    [
        (0, False),
        (2, False),
        (9, True),
    ],
)
def test_a_few_images_are_no_sign(fooled, raised, monkeypatch):
    """Of 63 images 2 are 3.2 %, and their interval contains 1 %; that of 9 does not."""

    def attack(probe, attack):
        return (torch.arange(len(probe.rows)) < fooled) & (attack == "Square")

    def pgd(probe, *args, **kwargs):
        return torch.zeros(len(probe.rows), 200, dtype=torch.bool)

    monkeypatch.setattr("utils.evaluation.diagnostics.square", lambda *args: "Square")
    monkeypatch.setattr(Probe, "attack", attack)
    monkeypatch.setattr(Probe, "pgd", pgd)
    signs, _ = diagnosis(undefended(), 63)
    assert ("black-box finds what white-box misses" in signs) == raised
    assert "random noise beats PGD" not in signs


def test_diagnostics_in_l2_go_as_far_as_the_diagonal(monkeypatch):
    shorten_diagnostics(monkeypatch)
    _, diagnosed = diagnosis(undefended(), 20, "L2", 1.0)
    assert [point["eps"] for point in diagnosed.by_eps] == pytest.approx([0, 1, 2, 768**0.5])
    assert diagnosed.by_eps[-1][ANSWER] == 0 < diagnosed.by_eps[0][ANSWER]
    assert ("eps 27.71 leaves images right", False, "0 of 20 images") in diagnosed.signs


@pytest.mark.slow
def test_diagnostics_of_an_honest_network(monkeypatch):
    """No sign is raised, also none of an accuracy that rises with eps, and it falls to nothing."""
    monkeypatch.setattr("utils.evaluation.diagnostics.QUERIES", 300)
    raised, diagnosed = diagnosis(robust(), 100)
    assert not raised
    radii = [point["eps"] for point in diagnosed.by_eps]
    assert radii == sorted(set(radii))
    assert (radii[0], radii[-1]) == (0, 1)
    assert diagnosed.by_eps[0][ANSWER] > 80
    assert diagnosed.by_eps[-1][ANSWER] < 2
    every = [point[EVERY_VIEW] for point in diagnosed.by_eps]
    assert every == sorted(every, reverse=True)


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
        arrays = dict(content)
    assert arrays["labels"].tolist() == y.tolist() == record["labels"]
    assert arrays["predicted"].tolist() == record["predicted"]["worst case"]
    assert arrays["eps"] == pytest.approx(FULL_EPS)
    images = torch.from_numpy(arrays["images"])
    assert images.dtype == torch.float32
    assert (images - x).abs().max() <= FULL_EPS + 1e-6
    assert 0 <= images.min() <= images.max() <= 1

    natural = right(record, "natural")
    answers = torch.tensor(record["predicted"]["natural"])
    assert torch.equal(answers == y, natural)
    stays_right = right(record, "worst case")
    assert 0 < stays_right.sum() < natural.sum()
    assert arrays["right"].tolist() == stays_right.tolist()
    assert torch.equal(with_ra()(images).argmax(1) == y, stays_right)
    unchanged = (images == x).flatten(1).all(1)  # unless an attack fools it
    assert torch.equal(unchanged, stays_right | ~natural)


def test_n_examples_are_the_first_after_a_fixed_shuffle(tmp_path):
    some = evaluate(tmp_path / "some", "robust", "--attacks=fgsm", "--n-examples=70")
    every = evaluate(tmp_path / "all", "robust", "--attacks=fgsm", "--n-examples=360")
    first = shuffled(360, 0)[:70]
    for name in ("natural", "FGSM"):  # whose start depends on an image's number in the test set
        assert torch.equal(right(some, name), right(every, name)[first])
    log = (tmp_path / "some" / "test.log").read_text()
    assert "70 of 360 test images, the first of a fixed shuffle" in log


def test_noise_stays_in_the_ball_and_counts_any_draw():
    x, y, numbers = digits(60)
    with frozen(undefended()) as net:
        attacked = noise(0.6, SEED, 20)(net, x, y, numbers)
        wrong = net(attacked).argmax(1) != y
        any_draw = net(x).argmax(1) != y
        for draw in range(20):
            noisy = x + 0.6 * image_noise(x, numbers, SEED, "Linf", draw)
            any_draw |= net(noisy.clamp(0, 1)).argmax(1) != y
    assert (attacked - x).abs().max() <= 0.6 + 1e-6
    assert torch.equal(wrong, any_draw)
    assert 0 < wrong.sum() < 60


# What is written


def test_wilson_s_interval_is_a_textbook_s():
    """Of 9 right images of 10, in percent."""
    assert results.wilson(9, 10) == pytest.approx((59.58, 98.21), abs=0.01)


def test_the_record_and_the_table_say_what_the_verdicts_say(full):
    record, folder = full
    log = (folder / "test.log").read_text()
    assert "! every attack" not in log
    _, table = log.rsplit("\nattack ", 1)
    lines = table.splitlines()[1:]
    for line, (name, attack) in zip(lines, record["attacks"].items(), strict=False):
        assert len(attack["verdicts"]) == record["images"] == 50
        count = attack["verdicts"].count("1")
        low, high = results.wilson(count, 50)
        assert attack["robust_accuracy"] == pytest.approx(2 * count)
        assert attack["interval_95"] == pytest.approx([low, high])
        figures = f"{2 * count:.2f} {low:.2f} - {high:.2f} 50".split()
        assert line.removeprefix(name).split()[:-1] == figures
    expected = {"eps": FULL_EPS, "step_size": FULL_STEP, "num_steps": 20, "restarts": 2}
    assert expected.items() <= record["settings"].items()


def test_classes_have_their_accuracies_and_the_weakest_comes_first(full):
    record, _ = full
    labels = torch.tensor(record["labels"])
    classes = record["classes"]
    assert sorted(classes) == [*"0123456789"]
    for name, shares in classes.items():
        of_class = labels == int(name)
        assert shares["images"] == of_class.sum()
        for row in ("natural", "worst case"):
            assert shares[row] == percent(right(record, row)[of_class])
    worst = [shares["worst case"] for shares in classes.values()]
    assert worst == sorted(worst)


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
        assert 0 <= point[EVERY_VIEW] <= point[ANSWER] <= 100


def test_examples_are_evenly_spaced_and_their_share_of_fooled_ones_is_told(tmp_path, monkeypatch):
    drawn = mock.Mock()
    monkeypatch.setattr("utils.evaluation.report.draw_examples", drawn)
    split = digits_split(count=71)
    logits = F.one_hot(split.labels, 10).float()
    worst = WorstImages(as_input(split.images), logits, split.labels)
    rows = torch.arange(20, 60)
    worst.take(rows, worst.images[rows], logits[rows].roll(1, 1))
    subject = SimpleNamespace(split=split, radius="eps 8/255")
    draw_worst(tmp_path / "x.png", subject, worst, ["fgsm"])
    _, (_, answers), labels, _, title, _ = drawn.call_args.args
    assert labels.equal(split.labels[::10])
    assert torch.equal(answers.argmax(1) != labels, worst.fooled[::10])
    assert "8 of 71" in title and "56.3 %" in title and "fgsm" in title


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
    answers = robust()(x).argmax(1)
    assert torch.equal(right(record, "natural"), answers == y)
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
    name = model.replace(".", "-").replace(":", "-")
    assert (folder / "evaluated" / name / "white_attack.json").exists()
    assert sys.path == path
    now = modules_of_ours()
    assert ours.items() <= now.items()
    assert not any(module.__file__.startswith(str(folder)) for module in now.values())


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
import torch, common
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.fc = torch.nn.Linear(2, 2), torch.nn.Linear(3 * 16 * 16, 10)
    def predict(self, x):
        return self(x).argmax(1)
    def forward(self, x):
        return self.fc(common.FLATTEN(x))
"""


def test_a_file_may_use_names_of_ours_and_import_from_the_current_folder(here, no_pictures):
    """The file lies in another folder than what it imports, and imports it by the folder's name."""
    (here / "nets").mkdir()
    (here / "nets" / "named.py").write_text(NAMES_OF_OURS)
    (here / "common.py").write_text("import torch\nFLATTEN = torch.nn.Flatten()\n")
    assert execute(ATTACK, "--model=nets/named.py:Net", *QUICK, "--attacks=fgsm") == 0


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
    file = checkpoint(tmp_path / "seven.pt", num_classes=7)
    with pytest.raises(UsageError, match="7 classes"):
        evaluate(tmp_path, "robust", "--attacks=adaptive", "--surrogate", file)


def test_logits_that_are_not_finite_are_no_result(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        evaluate(tmp_path, "not_finite", "--attacks=fgsm", "--n-examples=10")
    assert not (tmp_path / "white_attack.json").exists()
