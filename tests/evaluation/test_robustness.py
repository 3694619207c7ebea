"""test_white_attack.py: what its attacks find, what it keeps, what it says. Networks: tests/tiny_networks.py."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from PIL import Image
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

import utils.attacks
import utils.data.subject
import utils.evaluation.adaptive
import utils.evaluation.autoattack
import utils.evaluation.diagnostics
import utils.evaluation.report
import utils.evaluation.robustness
from tests import tiny_networks
from tests.helpers import ATTACK, ROOT, RunsCode, digits_checkpoint, digits_split, environment, execute
from tests.tiny_networks import robust, scaled, undefended, with_ra
from utils.attacks import cross_entropy, image_noise, linf_pgd, noise, pgd
from utils.data.datasets import as_input, load_split, shuffled, subset
from utils.data.subject import foreign_subject, percent, verdicts
from utils.evaluation import results
from utils.evaluation.adaptive import views
from utils.evaluation.diagnostics import Diagnosis, diagnose
from utils.evaluation.report import wilson
from utils.evaluation.robustness import (
    Found,
    Kept,
    KeptParts,
    even_batches,
    fingerprint,
    joined_row,
    planned_attacks,
    white_attack,
)
from utils.system.attack_copy import frozen
from utils.system.checkpoints import load_model
from utils.system.errors import RunError, Stopped, UsageError
from utils.system.options import parse
from utils.system.settings import ATTACKS, Evaluation

EPS, SEED = 0.1, 1  # those of digits, and the default
FULL_EPS, FULL_STEP = 0.015, 0.003  # of `full`, whose network is not trained to be robust


def settings_of(model, *flags):
    """The settings of an evaluation of one of the tiny networks, or of a checkpoint file."""
    what = ("--ckpt_url", model) if os.sep in str(model) else ("--model", f"tests.tiny_networks:{model}")
    return parse(Evaluation, "", [*map(str, (*what, "--dataset", "digits", *flags))])


def evaluate(folder, model, *flags):
    """Run the script's job with its log in `folder` -> white_attack.json."""
    folder.mkdir(exist_ok=True)
    white_attack(settings_of(model, "--log_path", folder / "test.log", *flags))

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads((folder / "white_attack.json").read_text(), parse_constant=refuse)


def right(record, name):
    """The verdicts of a row of the table, (N,) bool."""
    return torch.tensor([verdict == "1" for verdict in record["attacks"][name]["verdicts"]])


def accuracy(record, name):
    return record["attacks"][name]["robust_accuracy"]


def digits(count):
    split = subset(digits_split(), count)
    return split, as_input(split.images)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 25 images."""
    for module in (utils.evaluation.robustness, utils.evaluation.autoattack):
        monkeypatch.setattr(module, "BLOCK", 25)
    return 25


def shorten(patch):
    """Fewer steps in the library's attacks, for the script and for whoever else calls the library."""
    standard = AutoAttack._set_version

    def brief(self, version):
        standard(self, version)
        self.fab.n_iter, self.square.n_queries = 5, 50
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = 6

    patch.setattr(AutoAttack, "_set_version", brief)
    for name in ("ViewAPGD", "ViewAPGDTargeted"):
        of_view = getattr(utils.evaluation.adaptive, name)
        patch.setattr(
            utils.evaluation.adaptive, name, lambda *args, of_view=of_view, **kwargs: of_view(*args, **kwargs | {"n_iter": 6})
        )


@pytest.fixture
def brief_library(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Everything the script does, once, on a network with reverse attention: record, folder, npz."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.evaluation.diagnostics, "QUERIES", 100)
        patch.setattr(utils.evaluation.diagnostics, "RADII", (2,))
        patch.setattr(utils.evaluation.diagnostics, "RESTARTS", 2)
        patch.setattr(utils.evaluation.diagnostics, "STEPS", (1, 5, 40))
        shorten(patch)
        flags = ["--attacks", "fgsm,pgd,cw,adaptive,noise", "--n-examples", "50", "--restarts", "2", "--diagnostics"]
        flags += ["--epsilon", FULL_EPS, "--step-size", FULL_STEP, "--num-steps", "20"]
        evaluate(folder, "with_ra", "--attacks", "natural", "--n-examples", "50")
        record = evaluate(folder, "with_ra", *flags, "--save-adversarial", folder / "worst.npz")
    return record, folder


# AutoAttack


def same_as_directly(model, folder, count, eps, block, record):
    """The library, called on the images that are right without an attack, block by block, finds the same images."""
    split, x = digits(count)
    found = x.clone()
    with frozen(model) as net:
        natural = net(x).argmax(1) == split.labels
        for here in torch.arange(count).split(block):
            rows = here[natural[here]]
            library = AutoAttack(net, norm="Linf", eps=eps, seed=SEED, version="standard", device="cpu")
            found[rows], _ = library.run_standard_evaluation(x[rows], split.labels[rows], batch_size=len(rows))
        expected = net(found).argmax(1) == split.labels
    assert torch.equal(right(record, "AutoAttack"), expected)
    assert 0 < accuracy(record, "AutoAttack") < accuracy(record, "natural")
    found[expected] = x[expected]  # of images that are left right, and of those wrong from the start, the natural one
    with np.load(folder / "found.npz") as content:
        assert torch.equal(torch.from_numpy(content["images"]), found)


def test_autoattack_through_the_script_is_autoattack_called_directly(tmp_path, brief_library, small_blocks):
    flags = ("--attacks", "autoattack", "--n-examples", "45", "--save-adversarial", tmp_path / "found.npz")
    record = evaluate(tmp_path, "robust", *flags)
    same_as_directly(robust(), tmp_path, 45, EPS, small_blocks, record)
    parts = record["attacks"]["AutoAttack"]["parts"]
    assert [*parts] == ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]
    left = [part["robust_accuracy"] for part in parts.values()]
    assert left == sorted(left, reverse=True) and left[-1] == pytest.approx(accuracy(record, "AutoAttack"))
    assert left[0] < accuracy(record, "natural")
    assert f"note, AutoAttack: {left[0]:.2f} % after APGD-CE, " in (tmp_path / "test.log").read_text()
    by_class = record["classes"]
    assert sum(c["images"] * c["natural"] for c in by_class.values()) == pytest.approx(45 * accuracy(record, "natural"))
    worst = [c["worst case"] for c in by_class.values()]
    assert len(worst) == 10 and worst == sorted(worst)
    assert sum(c["images"] * c["worst case"] for c in by_class.values()) == pytest.approx(45 * accuracy(record, "AutoAttack"))
    for name, row in (("natural", "natural"), ("worst case", "AutoAttack")):
        found = torch.tensor(record["predicted"][name]) == torch.tensor(record["labels"])
        assert torch.equal(found, right(record, row))
    assert record["threat_model"] == "Linf, eps 0.1 on images in [0, 1]"


@pytest.mark.slow
def test_the_whole_of_standard_autoattack_is_autoattack_called_directly(tmp_path, small_blocks):
    """With reverse attention, and no step of the library left out."""
    flags = ("--attacks", "autoattack", "--n-examples", "30", "--save-adversarial", tmp_path / "found.npz")
    record = evaluate(tmp_path, "with_ra", *flags, "--epsilon", "0.04")
    same_as_directly(with_ra(), tmp_path, 30, 0.04, small_blocks, record)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_few_classes_are_attacked_and_the_table_says_what_was_left_out(classes, tmp_path, monkeypatch, brief_library):
    def few(*args):
        split = load_split(*args[:4])
        split = split.take((split.labels < classes).nonzero().squeeze(1))._replace(classes=split.classes[:classes])
        return subset(split, args[4])

    monkeypatch.setattr(utils.data.subject, "load_split", few)
    flags = ("--attacks", "autoattack,adaptive", "--n-examples", "30", "--restarts", "1", "--epsilon", "0.25")
    record = evaluate(tmp_path, f"first_{classes}", *flags)
    assert accuracy(record, "natural") > 80
    for name in ("AutoAttack", "adaptive: final"):
        assert accuracy(record, name) < accuracy(record, "natural") - 10
    notes = " ".join(record["attacks"]["AutoAttack"]["notes"])
    assert f"APGD-T and FAB-T target {classes - 1} of them" in notes
    assert ("APGD-T left out" in notes) == (classes < 4)
    assert f"note, AutoAttack: {classes} classes: APGD-T and FAB-T target" in (tmp_path / "test.log").read_text()


# What is kept

LONG = ("--n-examples", "60", "--restarts", "1", "--num-steps", "5")


class Calls(list):
    """(attack, number of its first image), in order. `stop`: (n, error) raises in call n."""

    stop = None


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("draw_examples", "draw_robustness"):
        monkeypatch.setattr(utils.evaluation.report, name, lambda *args: args[-1].write_bytes(b""))


@pytest.fixture
def counted(monkeypatch, small_blocks, no_pictures):
    """One step of FGSM stands for every attack of the script, and is counted; no library is called, nothing drawn."""
    calls = Calls()

    def counting(name):
        def build(*args, eps, **how):
            fgsm = pgd(cross_entropy, eps, eps, 1, start="image", seed=0)

            def attack(net, x, labels, numbers):
                calls.append((name, int(numbers[0])))
                if calls.stop and len(calls) == calls.stop[0]:
                    raise calls.stop[1]
                return fgsm(net, x, labels, numbers)

            return attack

        return build

    for name in ("autoattack", "adaptive", "pgd", "noise", "square"):
        monkeypatch.setattr(utils.evaluation.robustness, name, counting(name))
    monkeypatch.setattr(utils.evaluation.report, "save_or_note", lambda draw, file: "")
    return calls


def blocks(folder):
    return sorted(file.name for file in (folder / "white_attack.blocks").iterdir())


def stopped(folder, counted, error=None, model="robust", attack="adaptive"):
    """An evaluation that is stopped in its second block."""
    error = error or KeyboardInterrupt()
    counted.stop = (2, error)
    with pytest.raises(type(error)):
        evaluate(folder, model, *LONG, "--attacks", attack)
    assert len(counted) == 2 and not (folder / "white_attack.json").exists()
    assert [name.startswith("natural") for name in blocks(folder)] == [False, True, True]
    counted.clear()
    counted.stop = None


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM, ""), KeyboardInterrupt()], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_evaluation_goes_on_to_the_same_table(error, tmp_path, counted):
    expected = evaluate(tmp_path / "whole", "robust", *LONG, "--attacks", "pgd,adaptive")
    assert counted == [(name, number) for number in digits(60)[0].numbers[::25].tolist() for name in ("pgd", "adaptive")]
    counted.clear()
    stopped(tmp_path, counted, error)
    record = evaluate(tmp_path, "robust", *LONG, "--attacks", "pgd,adaptive")
    assert [name for name, _ in counted].count("adaptive") == 2  # the finished block is not attacked again
    assert list(record["attacks"]) == list(expected["attacks"])
    for name in record["attacks"]:
        assert torch.equal(right(record, name), right(expected, name))
    # one file an attack and block, which stay
    assert [name.rsplit("-", 1)[0] for name in blocks(tmp_path)] == sorted(["natural", "pgd-5", "adaptive-final"] * 3)


def test_a_finished_autoattack_serves_every_later_command(tmp_path, counted, monkeypatch):
    """On the same network and images: other attacks, restarts, steps, batch size, start, diagnostics or not."""
    monkeypatch.setattr(utils.evaluation.report, "diagnose", lambda *args, **how: Diagnosis([], [], []))
    first = evaluate(tmp_path, "robust", *LONG, "--attacks", "autoattack", "--diagnostics")
    assert [name for name, _ in counted] == ["autoattack"] * 3
    assert not any("kept" in note for note in first["attacks"]["AutoAttack"]["notes"])
    for flags in (
        ("--attacks", "all"),
        ("--attacks", "autoattack,adaptive", "--restarts", "3", "--num-steps", "7"),
        ("--attacks", "natural,fgsm,autoattack", "--random", "False", "--step-size", "0.01", "--diagnostics"),
        ("--attacks", "autoattack", "--test-batch-size", "7", "--save-adversarial", tmp_path / "images.npz"),
    ):
        counted.clear()
        record = evaluate(tmp_path, "robust", *LONG[:2], *flags)
        assert ("autoattack" in dict(counted)) is False
        assert torch.equal(right(record, "AutoAttack"), right(first, "AutoAttack"))
        said = f"3 of 3 blocks of 25 images kept from an earlier evaluation ({first['provenance']['started']}, "
        assert record["attacks"]["AutoAttack"]["notes"][-1].startswith(said)
        assert f"note, AutoAttack: {said}" in (tmp_path / "test.log").read_text()
    with np.load(tmp_path / "images.npz") as content:  # images are kept too
        assert content["right"].tolist() == right(record, "AutoAttack").tolist()
    assert not counted
    for flags in (("--seed", "2"), ("--epsilon", "0.09"), ("--n-examples", "59")):
        counted.clear()
        record = evaluate(tmp_path, "robust", *LONG, "--attacks", "autoattack", *flags)
        assert len(counted) == (1 if "59" in flags else 3)  # the last block alone is another then
    counted.clear()
    evaluate(tmp_path, "undefended", *LONG, "--attacks", "autoattack")
    assert len(counted) == 3


QUICK = {"FGSM", "PGD-40", "CW-20"}
VIEWS = {"final", "auxiliary 1", "auxiliary 2", "mean auxiliary", "over heads", "smooth gates", "surrogate"}
VIEWS = {f"adaptive: {view}" for view in VIEWS}
ALL = {"natural", "noise, 100 draws", "AutoAttack", "Square", "transfer PGD-40"} | QUICK | VIEWS
TRANSFERRED = {"transfer PGD-40", "adaptive: surrogate"}


@pytest.mark.parametrize(
    ("flags", "anew"),
    [
        (("--test-batch-size", "7"), set()),
        (("--attacks", "natural,autoattack,adaptive,fgsm,pgd,cw,noise", "--diagnostics"), set()),
        (("--save-adversarial", "images.npz"), set()),
        (("--epsilon", "0.09"), ALL - {"natural"}),
        (("--seed", "2"), ALL - {"natural"}),
        (("--random", "False"), {"transfer PGD-40"} | QUICK),
        (("--step-size", "0.01"), {"PGD-40", "CW-20", "transfer PGD-40"} | VIEWS),
        (("--num-steps", "41"), {"PGD-41", "transfer PGD-41"} | VIEWS),
        (("--restarts", "4"), VIEWS),
        (("--apgd-steps", "20"), VIEWS),
        (("--apgd-steps", "100"), set()),
        ("auxiliary weight", {"adaptive: over heads"}),
        ("surrogate", TRANSFERRED),
        ("version of what all attacks use", ALL),
        ("version of AutoAttack", {"AutoAttack", "Square"}),
        ("version of the adaptive attack", VIEWS),
        ("another image", ALL),
        ("another label", ALL),
        ("another number", ALL),
        ("another network", ALL),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_what_is_kept_belongs_to_network_images_attack_and_its_settings(flags, anew, tmp_path, monkeypatch):
    """Whatever matters to an attack makes another file of its block, and nothing else does."""

    def files(*flags, weight=2.0, surrogate=1.0, network="one", **changes):
        settings = settings_of("with_ra", "--attacks", "all", "--n-examples", "10", *flags)
        settings = settings if "--attacks" in flags else replace(settings, attacks=ATTACKS)
        subject = foreign_subject(settings)
        subject = subject._replace(info=subject.info | {"recipe": {"cr_beta": weight}})
        other = nn.Conv2d(3, 3, 1)
        nn.init.constant_(other.weight, surrogate)
        nn.init.zeros_(other.bias)
        plans = planned_attacks(settings, subject, views(True, weight, other), other)
        block = subject.split._replace(**{key: change(getattr(subject.split, key)) for key, change in changes.items()})
        kept = Kept(tmp_path, network, "now")
        return {name: kept.file(name, plan, block) for name, plan in plans.items()}

    changes = {
        "auxiliary weight": {"weight": 3.0},
        "surrogate": {"surrogate": 1.1},
        "another image": {"images": lambda images: images.clone().index_fill_(0, torch.tensor([3]), 7)},
        "another label": {"labels": lambda labels: labels.clone().index_fill_(0, torch.tensor([3]), 7)},
        "another number": {"numbers": lambda numbers: numbers + 1},
        "another network": {"network": "another"},
    }
    versions = {  # raised by hand, beside each attack
        "version of what all attacks use": (utils.attacks, "VERSION"),
        "version of AutoAttack": (utils.evaluation.robustness, "AUTOATTACK_VERSION"),
        "version of the adaptive attack": (utils.evaluation.robustness, "ADAPTIVE_VERSION"),
    }
    before = files()
    if flags in versions:
        monkeypatch.setattr(*versions[flags], 99)
    after = files(*flags) if isinstance(flags, tuple) else files(**changes.get(flags, {}))
    assert before.keys() == ALL and len({*before.values()}) == len(ALL)
    assert {name for name, file in after.items() if file not in before.values()} == anew


NET = '''
from torch import nn

class Net(nn.Module):
    """Documented."""  # commented

    gate = "label"

    def __init__(self, scale=1):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), scale
        nn.init.constant_(self.conv.weight, 0.5)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.scale * self.conv(x).mean((2, 3))
'''


def test_a_fingerprint_covers_weights_and_code_but_no_comment(tmp_path, monkeypatch):
    """Two networks of equal weights and another gate differ; a comment or a docstring discards nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def of(name, *changes, scale=1):
        source = NET
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(source)
        return fingerprint(__import__(name).Net(scale))

    same = of("net_1")
    assert of("net_2", ("# commented", "# said otherwise"), ("Documented.", "Explained."), ("):\n", "):  # more\n")) == same
    others = [
        of("net_3", ('gate = "label"', 'gate = "none"')),
        of("net_4", ("self.conv(x).mean", "self.conv(x).relu().mean")),
        of("net_5", ("0.5", "0.50001")),
        of("net_6", scale=2),
    ]
    gated = []
    for ra in (True, False):
        model = tiny_networks.Tiny(ra)
        model.load_state_dict(with_ra().state_dict())
        gated.append(fingerprint(model.eval()))
    assert len({same, *others, *gated}) == 7
    # foreign: also the code of the module that builds it, its answers to some images, and their gradients
    x, flat = torch.rand(2, 3, 16, 16), lambda x: x.detach()
    foreign = [
        fingerprint(utils.data.subject._Callable(function), name, x)
        for name, function in (("net_1", lambda x: x), ("net_2", lambda x: 1 * x), ("net_3", lambda x: x),
                               ("net_1", lambda x: 2 * x), ("net_1", flat))
    ]  # fmt: skip
    assert foreign[0] == foreign[1] and len({*foreign}) == 4
    for name in [name for name in sys.modules if name.startswith("net_")]:
        del sys.modules[name]


def test_blocks_of_one_callable_do_not_serve_another(tmp_path, counted, monkeypatch):
    """Callables have no weights to tell them apart; they are known by their answers."""
    stopped(tmp_path, counted, model="as_callable")
    monkeypatch.setattr(tiny_networks, "robust", undefended)  # the same name, edited in between
    evaluate(tmp_path, "as_callable", *LONG, "--attacks", "adaptive")
    assert len(counted) == 3


def test_damaged_and_foreign_blocks_are_attacked_anew(tmp_path, counted):
    expected = evaluate(tmp_path, "robust", *LONG, "--attacks", "adaptive")
    assert len(counted) == 3
    file, *_ = (tmp_path / "white_attack.blocks").glob("adaptive-final-*.npz")
    whole = file.read_bytes()
    with np.load(file) as content:
        arrays = dict(content)
    fooled = len(arrays["margins"])
    assert fooled > 1 and len(blocks(tmp_path)) == 6
    for damage in (
        whole[:-200],
        b"",
        b"none of ours",
        {"right": arrays["right"][:-1]},
        {"right": np.ones_like(arrays["right"])},
        {"images": arrays["images"][1:]},
        {"images": arrays["images"][:, :1]},
        {"images": np.array([RunsCode(tmp_path / "ran")], dtype=object)},
        {"margins": arrays["margins"][1:]},
        {"margins": np.array(["a"] * fooled)},
        {"settings": json.dumps({"seconds": 1, "made": "now"})},
        {"settings": json.dumps({"seconds": None, "notes": [], "made": "now"})},
        {"settings": json.dumps({"seconds": 1, "notes": 3, "made": "now"})},
        {"settings": json.dumps({"seconds": 1, "notes": [], "made": "now", "parts": [5]})},
    ):
        if isinstance(damage, bytes):
            file.write_bytes(damage)
        else:
            np.savez(file, **arrays | damage)
        counted.clear()
        record = evaluate(tmp_path, "robust", *LONG, "--attacks", "adaptive")
        assert len(counted) == 1, damage
        assert torch.equal(right(record, "adaptive: final"), right(expected, "adaptive: final"))
    assert not (tmp_path / "ran").exists() and len(blocks(tmp_path)) == 6


def test_images_of_attacks_that_are_not_in_the_table_are_not_saved(tmp_path, counted, monkeypatch):
    """An evaluation with more attacks was stopped; the one that follows saves what its own attacks found."""
    stopped(tmp_path, counted, attack="autoattack")
    monkeypatch.setattr(utils.evaluation.robustness, "adaptive", lambda *args, **how: lambda net, x, labels, numbers: x)
    flags = ("--attacks", "adaptive", "--save-adversarial", tmp_path / "found.npz")
    record = evaluate(tmp_path, "robust", *LONG, *flags)
    with np.load(tmp_path / "found.npz") as content:
        assert content["right"].tolist() == right(record, "adaptive: final").tolist()
        assert np.array_equal(content["images"], digits(60)[1].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["autoattack", "adaptive"])
def test_sigterm_in_the_middle_and_again(attack, tmp_path):
    small = "import runpy, sys, utils.evaluation.robustness as r, utils.evaluation.autoattack as a; r.BLOCK = a.BLOCK = 10; "
    small += "sys.argv = ['test_white_attack.py', *sys.argv[1:]]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--model", "tests.tiny_networks:with_ra", "--dataset", "digits", "--n-examples", "30", "--restarts", "1"]
    flags += ["--attacks", attack, "--epsilon", "0.08"]

    def start(folder):
        folder.mkdir(exist_ok=True)
        argv = [sys.executable, "-c", small, *flags, "--log_path", str(folder / "test.log")]
        return subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)

    def table(folder):
        record = json.loads((folder / "white_attack.json").read_text())["attacks"]
        return {name: row["verdicts"] for name, row in record.items()}

    whole, job = start(tmp_path / "whole"), start(tmp_path / "stopped")
    while not list((tmp_path / "stopped").glob(f"white_attack.blocks/{attack}-*.npz")) and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate()
    assert job.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1].startswith("test_white_attack.py: stopped; finished blocks are kept, and the same")
    assert not (tmp_path / "stopped" / "white_attack.json").exists()
    again = start(tmp_path / "stopped")
    for process in (again, whole):
        process.communicate()
        assert process.returncode == 0
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    assert "kept from an earlier evaluation" in (tmp_path / "stopped" / "test.log").read_text()


def parts_of_block(folder):
    return [file for file in (folder / "white_attack.blocks").iterdir() if file.suffix == ".parts"]


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM, ""), KeyboardInterrupt()], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("attack", ["autoattack", "adaptive"])
def test_a_stop_inside_a_block_loses_one_part(attack, error, tmp_path, monkeypatch, brief_library, no_pictures):
    """Its earlier parts are not attacked again, and the figures are those of an evaluation that was never stopped."""
    monkeypatch.setattr(utils.evaluation.robustness, "WORTH_KEEPING", 0)
    flags = ("--attacks", attack, "--n-examples", "12", "--restarts", "1", "--num-steps", "4")
    called = []

    def noted(cls, raises=None):
        perturb = cls.perturb

        def noting(self, x, y):
            called.append(cls)
            if raises is not None:
                raise raises
            return perturb(self, x, y)

        return mock.patch.object(cls, "perturb", noting)

    whole = evaluate(tmp_path / "whole", "robust", *flags, "--save-adversarial", tmp_path / "whole.npz")
    with noted(APGDAttack), noted(APGDAttack_targeted, error), pytest.raises(type(error)):
        evaluate(tmp_path / "stopped", "robust", *flags)
    assert called == [APGDAttack, APGDAttack_targeted] and len(parts_of_block(tmp_path / "stopped")) == 1
    called.clear()
    with noted(APGDAttack), noted(APGDAttack_targeted):
        resumed = evaluate(tmp_path / "stopped", "robust", *flags, "--save-adversarial", tmp_path / "resumed.npz")
    assert called == [APGDAttack_targeted] and not parts_of_block(tmp_path / "stopped")
    for name, row in whole["attacks"].items():
        assert resumed["attacks"][name]["verdicts"] == row["verdicts"]
        standing = [part["robust_accuracy"] for part in (row["parts"] or {}).values()]
        assert [part["robust_accuracy"] for part in (resumed["attacks"][name]["parts"] or {}).values()] == standing
    with np.load(tmp_path / "whole.npz") as one, np.load(tmp_path / "resumed.npz") as other:
        assert np.array_equal(one["images"], other["images"])
    assert 0 < accuracy(whole, [*whole["attacks"]][-1]) < accuracy(whole, "natural")


def test_kept_parts_belong_to_their_images_and_a_damaged_file_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.evaluation.robustness, "WORTH_KEEPING", 0)
    file, x, labels = tmp_path / "block.npz", torch.rand(3, 3, 4, 4), torch.arange(3)
    parts = KeptParts(file)
    assert torch.equal(parts("APGD", lambda x, labels: x + 1, x, labels), x + 1)

    def refuse(x, labels):
        raise AssertionError("is attacked again")

    again = KeptParts(file)
    assert torch.equal(again("APGD", refuse, x, labels), x + 1) and again.replayed["APGD"] >= 0
    for other in (
        ("FAB", x, labels),
        ("APGD", x[:2], labels[:2]),
        ("APGD", x + 1, labels),
        ("APGD", x, labels.flip(0)),
    ):
        assert torch.equal(KeptParts(file)(other[0], lambda x, labels: x + 2, *other[1:]), other[1] + 2)
    content = again.file.read_bytes()
    again.file.write_bytes(content[: len(content) // 2])
    assert torch.equal(KeptParts(file)("APGD", lambda x, labels: x + 3, x, labels), x + 3)


def test_short_parts_are_not_written(tmp_path):
    parts = KeptParts(tmp_path / "block.npz")
    parts("APGD", lambda x, labels: x, torch.rand(3, 3, 4, 4), torch.arange(3))
    assert not list(tmp_path.iterdir())


def test_batches_of_a_block_are_even(tmp_path, small_blocks, no_pictures, monkeypatch):
    assert [even_batches(250, most) for most in (200, 250, 1000, 125, 120, 1)] == [125, 250, 250, 125, 84, 1]
    sizes = []

    def noting(*args, **how):
        def attack(net, x, labels, numbers):
            sizes.append(len(x))
            return x

        return attack

    monkeypatch.setattr(utils.evaluation.robustness, "pgd", noting)
    flags = ("--attacks", "pgd", "--n-examples", "25")
    natural = evaluate(tmp_path, "robust", *flags, "--test-batch-size", "20")["attacks"]["natural"]["verdicts"]
    assert len(sizes) == 2 and sum(sizes) == natural.count("1") > 20 and abs(sizes[0] - sizes[1]) <= 1


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
def test_ranks_share_a_card(tmp_path):
    """Two blocks by two ranks on the first device find what one process finds."""
    found = []
    for count in (1, 2):
        file = digits_checkpoint(tmp_path / str(count) / "net.pt")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", str(ROOT / ATTACK)]
        command += ["--ckpt_url", str(file), "--attacks", "pgd", "--device", "cuda:0"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((file.parent / "white_attack.json").read_text()))
    assert (right(found[0], "PGD-40") != right(found[1], "PGD-40")).float().mean() <= 0.005


# What is said meanwhile


def test_the_time_left_is_that_of_the_first_block(tmp_path, counted, monkeypatch):
    """Measured, not estimated: here each attack takes a minute."""
    now = [0.0]
    monkeypatch.setattr(utils.evaluation.robustness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    counted_adaptive = utils.robustness.adaptive

    def slow(*args, **how):
        now[0] += 60
        return counted_adaptive(*args, **how)

    monkeypatch.setattr(utils.evaluation.robustness, "adaptive", slow)
    for said in (["block 1 of 3 is done; about 2 min more, less what is kept already"], []):  # all is kept then
        (tmp_path / "test.log").unlink(missing_ok=True)
        record = evaluate(tmp_path, "robust", *LONG, "--attacks", "adaptive")
        lines = (tmp_path / "test.log").read_text().splitlines()
        assert [line for line in lines if "min more" in line] == said
    assert record["attacks"]["adaptive: final"]["seconds"] == 180  # what it took when it was computed
    evaluate(tmp_path / "one", "robust", "--n-examples", "20", "--attacks", "adaptive")
    assert "min more" not in (tmp_path / "one" / "test.log").read_text()


def found(notes, made=""):
    return Found(torch.tensor([True, False]), torch.zeros(0), torch.zeros(0), 1.5, notes, made)


def test_notes_alike_but_for_numbers_are_said_once():
    row = joined_row([found(["3 of 9 points", "other"]), found(["12 of 9 points", "5 of 8 points"]), found([])])
    assert row.notes == ["in 2 of 3 blocks, first: 3 of 9 points", "in 1 of 3 blocks, first: other"]
    assert joined_row([found(["3 points"])]).notes == ["3 points"]
    row = joined_row([found([], made="yesterday, cpu"), found([])])
    assert row.notes == ["1 of 2 blocks of 250 images kept from an earlier evaluation (yesterday, cpu)"]
    assert row.seconds == 3 and row.right.tolist() == [True, False, True, False]
    blocks = [found([])._replace(parts=parts) for parts in ({"A": (2, 1.0), "B": (1, 2.0)}, {"A": (0, 3.0)})]
    row = joined_row(blocks)  # a block of which nothing is left ends AutoAttack early
    assert row.parts == {"A": {"robust_accuracy": 50, "seconds": 4}, "B": {"robust_accuracy": 25, "seconds": 2}}
    assert row.notes == ["50.00 % after A, 4.0 s", "25.00 % after B, 2.0 s"]
    assert joined_row([*blocks, found([])]).notes == []  # one kept by the first release, which says nothing of parts


# Worst cases


def test_the_worst_case_is_no_better_than_any_attack_image_by_image(full):
    record, _ = full
    worst = right(record, "worst case")
    names = [name for name in record["attacks"] if "worst case" not in name]
    assert {"natural", "FGSM", "PGD-20", "CW-10", "adaptive: final", "adaptive: auxiliary 1"} <= set(names)
    views_ = torch.stack([right(record, name) for name in names if name.startswith("adaptive: ")])
    assert len(views_) >= 5
    assert torch.equal(right(record, "adaptive, worst case"), views_.all(0))
    assert torch.equal(worst, torch.stack([right(record, name) for name in names]).all(0))
    assert "diagnostics" in names
    assert record["attacks"]["worst case"]["notes"] == [f"image by image, over {'; '.join(list(record['attacks'])[:-2])}"]
    assert len({record["attacks"][name]["verdicts"] for name in names}) > 3  # they differ, so the worst case says more


def test_adaptive_finds_what_pgd_on_each_head_finds(full):
    record, _ = full
    split, x = digits(50)
    worst = right(record, "adaptive, worst case")
    rows = right(record, "natural").nonzero().squeeze(1)
    x, y = x[rows], split.labels[rows]
    start = x + FULL_EPS * image_noise(x, split.numbers[rows], SEED, "uniform")
    wrong = []
    with frozen(with_ra()) as net:
        for head in (lambda heads: heads.final, lambda heads: heads.auxiliary[0], lambda heads: heads.auxiliary[1]):

            def objective(z, head=head):
                return F.cross_entropy(head(net(z, heads=True)), y, reduction="sum")

            wrong.append(net(linf_pgd(x, objective, FULL_EPS, FULL_STEP, 20, start)).argmax(1) != y)
            assert not (worst[rows] & wrong[-1]).any()
    assert ((wrong[1] | wrong[2]) & ~wrong[0]).any()  # or the final head alone would do


def test_a_surrogate_is_one_more_view_and_an_attack_by_itself(trained, tmp_path, brief_library):
    flags = ("--restarts", "1", "--n-examples", "20", "--epsilon", "0.2", "--num-steps", "10")
    record = evaluate(tmp_path, "robust", *flags, "--attacks", "adaptive,transfer", "--surrogate", trained[2])
    assert {"adaptive: final", "adaptive: surrogate", "adaptive, worst case"} <= set(record["attacks"])
    assert accuracy(record, "adaptive: surrogate") < accuracy(record, "natural")
    assert accuracy(record, "transfer PGD-10") < accuracy(record, "natural")


def test_square_by_itself_needs_no_gradient(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(utils.evaluation.robustness, "square", partial(utils.evaluation.autoattack.square, queries=60))
    record = evaluate(tmp_path, "in_steps", "--attacks", "fgsm,square", "--n-examples", "20", "--epsilon", "0.3")
    assert accuracy(record, "Square") < accuracy(record, "FGSM") == accuracy(record, "natural")


def test_several_runs_stand_side_by_side(tmp_path, capsys, no_pictures):
    runs = [digits_checkpoint(tmp_path / name / "best_adv_model.pt", name == "ra").parent for name in ("ra", "plain")]
    flags = ("--attacks", "fgsm", "--n-examples", "30", "--epsilon", "0.2")
    assert execute(ATTACK, "--ckpt_url", *runs, *flags) == 0
    table = capsys.readouterr().out.splitlines()[-8:]
    found = [json.loads((run / "white_attack.json").read_text()) for run in runs]
    both = [[f"{accuracy(record, name):.2f}" for name in ("natural", "FGSM")] for record in found]
    assert [line.split(" | ")[2:4] for line in table[2:4]] == both and both[0] != both[1]

    assert results.main([str(run) for run in runs]) == 0  # afterwards, from what they wrote
    assert capsys.readouterr().out.splitlines() == table
    documented = set(re.findall(r"^(\w+)", results.__doc__.split("stable")[1], re.MULTILINE)) | {"labels", "format"}
    assert all(documented <= record.keys() for record in found) and len(documented) > 7


# Planted frauds


def test_a_hardened_head_in_front_of_an_undefended_one_is_exposed(tmp_path, brief_library):
    """All attacks on the final logits are led astray; the auxiliary view is not."""
    record = evaluate(tmp_path, "decoy", "--attacks", "pgd,adaptive", "--n-examples", "40", "--restarts", "1")
    assert accuracy(record, "PGD-40") > 50
    assert accuracy(record, "adaptive: auxiliary 1") < 10
    assert accuracy(record, "adaptive, worst case") < 10


def test_what_diagnostics_find_is_in_the_worst_images(tmp_path, monkeypatch, no_pictures):
    """Of table, picture and npz: PGD on the final logits is led astray, the views of --diagnostics are not."""
    for name, value in (("QUERIES", 5), ("RADII", (0.5,)), ("RESTARTS", 1), ("STEPS", (1, 40))):
        monkeypatch.setattr(utils.evaluation.diagnostics, name, value)
    saved = tmp_path / "worst.npz"
    flags = ("--attacks", "pgd", "--n-examples", "15", "--diagnostics", "--save-adversarial", saved)
    record = evaluate(tmp_path, "decoy", *flags)
    lowest = min(row["PGD on every view"] for row in record["diagnostics"]["by_eps"] if row["eps"] <= EPS)
    assert accuracy(record, "diagnostics") <= lowest < 10 < 50 < accuracy(record, "PGD-40")
    with np.load(saved) as content:
        assert content["right"].tolist() == (right(record, "PGD-40") & right(record, "diagnostics")).tolist()
        assert content["predicted"].tolist() == record["predicted"]["worst case"]


def test_vanishing_gradients_are_exposed(tmp_path):
    record = evaluate(tmp_path, "scaled", "--attacks", "pgd,adaptive", "--n-examples", "60", "--restarts", "2")
    assert accuracy(record, "PGD-40") > accuracy(record, "natural") - 20 > 50
    assert accuracy(record, "adaptive: final") < 10


def signs(model, count, monkeypatch):
    """Diagnosis of a plain network: the names of raised signs, and the diagnosis."""
    monkeypatch.setattr(utils.evaluation.diagnostics, "QUERIES", 300)
    split, _ = digits(count)
    how = dict(eps=EPS, step_size=EPS / 5, seed=SEED, batch_size=count)
    with frozen(model) as net:
        found = diagnose(net, split, verdicts(net, split, count), views(False, 2), **how)
    return {sign.name for sign in found.signs if sign.raised}, found


def test_diagnostics_raise_signs_for_vanishing_gradients(monkeypatch):
    monkeypatch.setattr(utils.evaluation.diagnostics, "RADII", (0.5, 2))
    monkeypatch.setattr(utils.evaluation.diagnostics, "STEPS", (1, 40))
    raised, found = signs(scaled(), 30, monkeypatch)
    assert {"gradients vanish", "eps 1 leaves images right", "black-box finds what white-box misses"} <= raised
    assert all(sign.figure for sign in found.signs)


@pytest.mark.slow
def test_diagnostics_of_an_honest_network(monkeypatch):
    """No sign is raised; accuracy falls with eps, to nothing at eps 1, and with steps until it stays."""
    raised, found = signs(robust(), 100, monkeypatch)
    assert not raised
    assert [row[0] for row in found.by_eps] == sorted({row[0] for row in found.by_eps})
    assert found.by_eps[0][0] == 0 and found.by_eps[-1][0] == 1
    assert found.by_eps[0][1] > 80 and found.by_eps[-1][1] < 2 and found.by_eps[-1][2] < 2
    for before, after in itertools.pairwise(found.by_eps):
        assert after[1] <= before[1] + 1.5 and after[2] <= before[2] + 1.5
    for before, after in itertools.pairwise(found.by_steps):
        assert after[2] <= before[2] and after[1] <= before[1] + 1.5
    assert [row[0] for row in found.by_steps] == [1, 2, 5, 10, 20, 40, 100, 200]
    assert found.by_steps[0][1] > found.by_steps[-1][1] + 5
    assert found.by_steps[-3][1] - found.by_steps[-1][1] < 1.5
    assert all(adaptive <= final for _, final, adaptive in (*found.by_eps, *found.by_steps))


def test_a_network_that_is_never_right(tmp_path, brief_library):
    record = evaluate(tmp_path, "always_wrong", "--attacks", "all", "--n-examples", "20", "--diagnostics")
    assert {attack["robust_accuracy"] for attack in record["attacks"].values()} == {0.0}
    assert record["diagnostics"]["by_eps"] == []
    assert "no image is right without an attack: SIGN" in (tmp_path / "test.log").read_text()
    assert (tmp_path / "adversarial_examples.png").exists()


def test_eps_0(tmp_path, brief_library):
    """Attacks that may change nothing change nothing."""
    flags = ("--epsilon", "0", "--n-examples", "20", "--restarts", "1", "--attacks", "fgsm,pgd,noise,adaptive")
    record = evaluate(tmp_path, "robust", *flags)
    assert len({attack["verdicts"] for attack in record["attacks"].values()}) == 1


# Networks whose figures no attack can be trusted with


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("in_training_mode", "alone is answered otherwise than in a batch"),
        ("at_random", "two calls answer differently"),
        ("probabilities", "answers are probabilities"),
        ("in_steps", "gradients are exactly zero at"),
        ("scaled", "gradients are exactly zero at"),
        ("robust", None),
        ("with_ra", None),
    ],
)
def test_what_leads_every_attack_astray_is_said_of_every_line(model, said, tmp_path, no_pictures):
    record = evaluate(tmp_path, model, "--attacks", "fgsm,pgd,noise", "--num-steps", "1", "--n-examples", "20")
    lines = (tmp_path / "test.log").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("attack ")]
    marked = [line.endswith("!") for line in lines[start + 1 : start + 6]]
    assert marked == [said is not None] * 5
    assert [said in line for line in lines if line.startswith("! every attack: ")] == [True] * (said is not None)
    assert lines[-2].count("!") == 5 * (said is not None)  # the row in Markdown, which is copied without its notes
    for row in record["attacks"].values():
        assert any(said in note for note in row["notes"]) if said else not any("call" in note for note in row["notes"])


def test_no_gradient_no_note_of_it(tmp_path):
    assert "exactly zero" not in str(evaluate(tmp_path, "in_steps", "--attacks", "natural,noise", "--n-examples", "9"))


def test_autoattack_names_no_version_that_is_not_offered(tmp_path, brief_library, no_pictures):
    record = evaluate(tmp_path, "at_random", "--attacks", "autoattack", "--n-examples", "9")
    notes = " ".join(record["attacks"]["AutoAttack"]["notes"])
    assert "randomized" in notes and "version=" not in notes


# Verdicts and images


def test_saved_adversarial_images_are_what_the_table_says(full):
    record, folder = full
    split, x = digits(50)
    with np.load(folder / "worst.npz", allow_pickle=False) as content:
        images, labels = torch.from_numpy(content["images"]), torch.from_numpy(content["labels"])
        said, eps = torch.from_numpy(content["right"]), float(content["eps"])
    assert images.dtype == torch.float32 and images.shape == x.shape
    assert eps == pytest.approx(FULL_EPS) and (images - x).abs().max() <= FULL_EPS + 1e-6
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(labels, split.labels)
    with torch.no_grad():
        fooled = with_ra()(images).argmax(1) != labels
    assert torch.equal(fooled, ~said)
    assert torch.equal(said, right(record, "worst case"))
    natural = right(record, "natural")
    assert 0 < said.sum() < natural.sum()
    as_they_were = (images == x).flatten(1).all(1)
    assert torch.equal(as_they_were, said | ~natural)  # an image that no attack fools is saved as it is


def test_n_examples_are_the_first_after_a_fixed_shuffle(tmp_path):
    some = evaluate(tmp_path / "some", "robust", "--attacks", "fgsm", "--n-examples", "70")
    every = evaluate(tmp_path / "all", "robust", "--attacks", "fgsm", "--n-examples", "360")
    for name in ("natural", "FGSM"):  # the start noise of an image depends on its number in the whole test set
        assert some["attacks"][name]["images"] == some["images"] == 70
        assert torch.equal(right(some, name), right(every, name)[shuffled(360, 0)[:70]])
    said = (tmp_path / "some" / "test.log").read_text()
    assert "70" in said and "of 360" in said and "shuffle" in said
    assert "shuffle" not in (tmp_path / "all" / "test.log").read_text()


def test_noise_stays_in_the_ball_and_counts_any_draw():
    split, x = digits(60)
    rows = torch.arange(60)
    with frozen(undefended()) as net:
        attacked = noise(0.6, SEED, 20)(net, x, split.labels, rows)
        wrong = net(attacked).argmax(1) != split.labels
        noises = [(x + 0.6 * image_noise(x, rows, SEED, "uniform", draw)).clamp(0, 1) for draw in range(20)]
        draws = [net(noisy).argmax(1) != split.labels for noisy in noises]
        natural = net(x).argmax(1) != split.labels
    assert (attacked - x).abs().max() <= 0.6 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(wrong, torch.stack([*draws, natural]).any(0))
    assert wrong.sum() > max(draw.sum() for draw in draws)


# What is written


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # the first is a textbook's; the others: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) at p = 0 and 1
    [(9, 10, 59.58, 98.21), (0, 10, 0, 100 * 3.8414588 / 13.8414588), (50, 50, 100 * 50 / 53.8414588, 100)],
)
def test_wilson_interval(hits, n, low, high):
    found = wilson(torch.arange(n) < hits)
    assert found == pytest.approx((low, high), abs=0.006)
    assert 0 <= found[0] <= 100 * hits / n <= found[1] <= 100


def test_json_says_what_the_verdicts_say(full):
    record, _ = full
    for name, attack in record["attacks"].items():
        verdicts_ = attack["verdicts"]
        assert len(verdicts_) == attack["images"] == record["images"] == 50 and set(verdicts_) <= {"0", "1"}
        assert attack["robust_accuracy"] == pytest.approx(100 * verdicts_.count("1") / 50)
        assert attack["interval_95"] == pytest.approx(wilson(right(record, name)))
        assert attack["seconds"] >= 0
        assert len(attack["notes"]) == (name == "natural" or "worst case" in name)  # kept; what it covers
    assert record["dataset"] == "digits" and record["network"]["reverse_attention"] is True
    expected = {"eps": FULL_EPS, "step_size": FULL_STEP, "num_steps": 20, "random": True, "restarts": 2, "seed": SEED}
    assert expected.items() <= record["settings"].items()
    assert {"torch", "pyautoattack", "python"} <= set(record["provenance"]["versions"])


def test_json_keeps_the_evaluations_before_and_replaces_what_is_none(tmp_path):
    flags = ("--attacks", "natural", "--n-examples", "10")
    for content in ("[1, 2]", '{"earlier": 5}', "{", "7", '{"earlier": null}'):
        (tmp_path / "white_attack.json").write_text(content)
        assert accuracy(evaluate(tmp_path, "robust", *flags), "natural") > 50
    (tmp_path / "white_attack.json").unlink()
    for seed in (1, 2, 3):
        record = evaluate(tmp_path, "robust", *flags, "--seed", seed)
    assert record["settings"]["seed"] == 3
    assert [earlier["settings"]["seed"] for earlier in record["earlier"]] == [1, 2]
    assert all("earlier" not in earlier for earlier in record["earlier"])


def test_table_and_markdown_row_say_the_same(full):
    record, folder = full
    lines = (folder / "test.log").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("attack") and "95 %" in line][1:]
    (before,) = [line for line in lines[:start] if "take long" in line]
    assert "--n-examples N" in before and "white_attack.blocks" in before  # the way out, and what is kept
    head, rule, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|"))
    assert head[1:] == list(record["attacks"]) and set(rule) == {"---"} and len(head) == len(rule) == len(row)
    for name, figure, line in zip(head[1:], row[1:], lines[start + 1 :], strict=False):
        attack = record["attacks"][name]
        low, high = attack["interval_95"]
        assert float(figure) == pytest.approx(attack["robust_accuracy"], abs=0.005)
        assert line.startswith(f"{name}  ")
        assert line[len(name) :].split()[:5] == [figure, f"{low:.2f}", "-", f"{high:.2f}", "50"]


def test_pictures_and_their_curves(full):
    record, folder = full
    for name in ("adversarial_examples.png", "robust_vs_eps.png", "robust_vs_steps.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            assert 400 < picture.width < 2000 and 300 < picture.height < 1500
            assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 20  # not blank
        assert (folder / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    found = record["diagnostics"]
    assert [row["eps"] for row in found["by_eps"]] == pytest.approx([0, FULL_EPS, 2 * FULL_EPS, 1])
    assert [row["steps"] for row in found["by_steps"]] == [1, 5, 40]
    for row in (*found["by_eps"], *found["by_steps"]):
        assert 0 <= row["PGD on every view"] <= row["PGD on the answer's logits"] <= 100
    lines = (folder / "test.log").read_text().splitlines()
    for sign in found["signs"]:  # what holds, and a sign's name only where it is raised
        assert f"{sign['figure']}: {'SIGN, ' + sign['name'] if sign['raised'] else 'ok'}" in lines
    assert {sign["raised"] for sign in found["signs"]} == {True, False}


def test_pictures_that_cannot_be_drawn_end_no_evaluation(tmp_path):
    (tmp_path / "adversarial_examples.png").mkdir()
    flags = ("--attacks", "fgsm", "--n-examples", "10", "--epsilon", "8/255", "--save-adversarial", tmp_path / "x.npz")
    assert "FGSM" in evaluate(tmp_path, "robust", *flags)["attacks"] and (tmp_path / "x.npz").exists()
    log = (tmp_path / "test.log").read_text()
    assert log.count("note: ") == 2 and "adversarial_examples.png is not drawn (IsADirectoryError" in log
    assert log.count("eps 8/255, ") == 2  # above the attacks, and in the row in Markdown


# Against others, and from Python


def test_fgsm_and_pgd_agree_with_torchattacks_and_foolbox(trained):
    model, _ = load_model(trained[2])  # as the README says, without `frozen`
    split, x = digits(100)
    step, steps = 0.02, 10
    y, other = split.labels, foolbox.PyTorchModel(model, bounds=(0, 1))
    fgsm = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    many = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)
    theirs = {
        (EPS, 1): (torchattacks.FGSM(model, eps=EPS)(x, y), fgsm(other, x, y, epsilons=EPS)[1]),
        (step, steps): (
            torchattacks.PGD(model, eps=EPS, alpha=step, steps=steps, random_start=False)(x, y),
            many(other, x, y, epsilons=EPS)[1],
        ),
    }
    with frozen(model) as net:
        natural = verdicts(net, split, 100)
        for how, found in theirs.items():
            ours = verdicts(net, split, 50, pgd(cross_entropy, EPS, *how, start="image", seed=SEED))
            assert 0 < ours.sum() < natural.sum()
            for images in found:
                assert abs(percent(ours) - percent(model(images).argmax(1) == y)) <= 1, how


# Foreign classifiers and wrong use


@pytest.mark.slow
def test_a_module_and_a_callable_give_the_same_table(tmp_path):
    flags = ("--attacks", "fgsm,pgd,adaptive", "--n-examples", "30", "--num-steps", "5", "--restarts", "1")
    records = [evaluate(tmp_path, model, *flags) for model in ("robust", "as_callable")]
    for name in ("natural", "FGSM", "PGD-5", "adaptive: final"):
        assert torch.equal(*(right(record, name) for record in records))
    assert records[1]["network"]["arch"] == "tests.tiny_networks:as_callable"


def test_a_network_that_uses_view(tmp_path):
    evaluate(tmp_path, "viewing", "--attacks", "fgsm", "--n-examples", "10")


EVERY = "natural,fgsm,pgd,cw,autoattack,adaptive,noise,square"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("model", ["in_bfloat16", "in_half", "in_double", "scripted", "saved_script", "frozen_script", "traced"])
def test_every_attack_takes_logits_of_any_type_and_torchscript(model, tmp_path, monkeypatch, brief_library, no_pictures):
    for name, value in {"QUERIES": 20, "RADII": (2,), "RESTARTS": 2, "STEPS": (1, 40)}.items():
        monkeypatch.setattr(utils.evaluation.diagnostics, name, value)
    square = utils.evaluation.autoattack.square
    monkeypatch.setattr(utils.evaluation.robustness, "square", partial(square, queries=20))
    flags = ("--attacks", EVERY, "--n-examples", "6", "--num-steps", "2", "--restarts", "1", "--diagnostics")
    record = evaluate(tmp_path, model, *flags)
    split, x = digits(6)
    assert torch.equal(right(record, "natural"), robust()(x).argmax(1) == split.labels)
    assert len(record["attacks"]) == 10
    assert accuracy(record, "worst case") <= accuracy(record, "PGD-2") <= accuracy(record, "natural")


def test_a_network_that_wants_images_of_another_type_is_told_of_it(beside_foreign, refused):
    flags = ("--dataset", "digits", "--n-examples", "4", "--attacks", "fgsm", "--device", "cpu")
    refused(ATTACK, "--model", "foreign_nets:wants_double", *flags, mentions=["float32", "float64"])


FOREIGN = """
import torch
from torch import nn

def needs_argument(x): return None
def raises(): raise RuntimeError("weights are missing,\\nand much else")
def no_file(): return torch.load("weights.pt")
def no_key(): return {}["weights"]
def number(): return 3
def nothing(): return None
def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
def maps(): return nn.Conv2d(3, 10, 3)
def pair(): return lambda x: (x, x)
def larger(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
def flat(): return lambda x: torch.zeros(len(x), 10)
def wants_double(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).double()
def one_fails():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.BatchNorm1d(10))
    return lambda x: net(x)
"""


@pytest.fixture
def beside_foreign(here, monkeypatch):
    """The current folder holds foreign_nets.py and broken_nets.py."""
    (here / "foreign_nets.py").write_text(FOREIGN)
    (here / "broken_nets.py").write_text("def net(:\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield here
    for name in ("foreign_nets", "broken_nets"):
        sys.modules.pop(name, None)


THEIRS = {
    "models/__init__.py": "",
    "models/nets.py": """
import torch
from torch import nn
from torch.nn.utils import weight_norm
from utils.blocks import block

def plain(): return block(3)
def grey(): return block(1)

def normed():  # neither its weight nor what its hook keeps can be copied
    net = block(3)
    net[0], net.seen = weight_norm(net[0]), []
    net[0].register_forward_hook(lambda module, inputs, output: net.seen.append(output))
    return net

class Late(nn.Module):
    def forward(self, x):
        from utils import late
        return late.answer(x)

late = Late
""",
    "utils/blocks.py": """
import torch
from torch import nn

def block(channels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
""",
    "utils/late.py": "def answer(x): return x.flatten(1)[:, :10]\n",
}


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("models.nets:plain", (3, 16, 16)),
        ("models.nets:grey", (1, 16, 16)),
        ("models.nets:late", (3, 16, 16)),
        ("models.nets:normed", (3, 28, 28)),
        ("models/nets.py:plain", (3, 17, 17)),
        ("../theirs/models/nets.py:late", (3, 9, 9)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_repository_with_models_and_utils_of_its_own(model, shape, tmp_path, monkeypatch, request):
    """From there, or by a file's path; one folder lands there, and afterwards our own names are ours again."""
    for name, source in THEIRS.items():
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(source)
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / ("elsewhere" if model.startswith("..") else "theirs")
    before, path = {*folder.iterdir()}, [*sys.path]
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("models", "utils")}
    if shape != (1, 16, 16):  # the picture of grey images is drawn
        request.getfixturevalue("no_pictures")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    flags = (
        "--dataset",
        "digits",
        "--image-size",
        shape[-1],
        "--n-examples",
        "6",
        "--attacks",
        "fgsm",
        "--device",
        "cpu",
    )
    assert execute(ATTACK, "--model", model, *flags, "--save-adversarial", tmp_path / "found.npz") == 0
    with np.load(tmp_path / "found.npz") as content:
        assert content["images"].shape == (6, *shape)
    (out,) = {*folder.iterdir()} - before
    assert out.name == "evaluated" and len([*out.glob("*/test.log")]) == len([*out.glob("*/white_attack.json")]) == 1
    now = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("models", "utils")}
    assert now | ours == now and all(ROOT in Path(module.__file__).parents for module in now.values())
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:net", "no_such_module"),
        ("no_such_file.py:net", "no_such_file"),
        ("foreign_nets.py:absent", "absent"),
        ("foreign_nets:one_fails", "(1, 3, 16, 16)"),
        ("broken_nets:net", "invalid syntax"),
        ("foreign_nets:absent", "absent"),
        ("foreign_nets", "package.module:function"),
        (":net", "package.module:function"),
        ("foreign_nets:needs_argument", "argument"),
        ("foreign_nets:raises", "weights are missing"),
        ("foreign_nets:no_file", "weights.pt"),
        ("foreign_nets:no_key", "weights"),
        ("foreign_nets:number", "int"),
        ("foreign_nets:nothing", "NoneType"),
        ("foreign_nets:seven", "(N, 10)"),
        ("foreign_nets:maps", "(N, 10)"),
        ("foreign_nets:pair", "tuple"),
        ("foreign_nets:larger", "768"),
        ("foreign_nets:flat", "gradient"),
    ],
)
def test_a_foreign_network_that_is_none(function, said, beside_foreign, refused):
    flags = ("--model", function, "--dataset", "digits", "--n-examples", "4", "--attacks", "fgsm", "--device", "cpu")
    refused(ATTACK, *flags, mentions=[said])


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
    flags = ("--dataset", "digits", "--image-size", "16", "--n-examples", "4", "--attacks", "fgsm", "--device", "cpu")
    assert execute(ATTACK, "--model", "named.py:Net", *flags) == 0


def test_a_network_without_gradients_is_looked_at_without_attacks(beside_foreign):
    flags = ("--model", "foreign_nets:flat", "--dataset", "digits", "--n-examples", "4", "--device", "cpu")
    assert execute(ATTACK, *flags, "--attacks", "natural,noise") == 0
    assert {file.name for file in beside_foreign.iterdir()} == {"foreign_nets.py", "broken_nets.py", "evaluated"}


def test_wrong_flags(refused, trained, tmp_path):
    file = trained[2]
    flags = ("--ckpt_url", file, "--n-examples", "4", "--attacks", "fgsm")
    refused(ATTACK, "--ckpt_url", file, "--attacks", "natural,nonsense", mentions=["nonsense"])
    refused(ATTACK, "--ckpt_url", file, "--model", "foreign_nets:seven", mentions=["--model"])
    refused(ATTACK, "--attacks", "natural", mentions=["--ckpt_url"])
    refused(ATTACK, "--ckpt_url", file, "--n-examples", "0", mentions=["0"])
    refused(ATTACK, *flags, "--save-adversarial", file / "images.npz", mentions=["--save-adversarial", "images.npz"])
    refused(ATTACK, *flags, "--save-adversarial", tmp_path, mentions=["--save-adversarial", "folder"])
    refused(ATTACK, *flags, "--diagnostics", "--epsilon", "0", mentions=["--diagnostics"])
    refused(ATTACK, *flags[:4], "--attacks", "transfer", mentions=["--surrogate"])
    refused(ATTACK, "--ckpt_url", file, file, mentions=["--ckpt_url"])
    refused(ATTACK, "--ckpt_url", file, tmp_path, "--save-adversarial", "x.npz", mentions=["--save-adversarial"])
    refused(ATTACK, *flags, "--image-size", "20", mentions=["--image-size 20"])


def test_a_surrogate_of_other_classes(tmp_path):
    seven = {"num_classes": 7, "classes": list("0123456")}
    model = digits_checkpoint(tmp_path / "ten.pt")
    weights = torch.load(model, weights_only=True)["model"]
    weights |= {key: weights[key][:7] for key in ("fc.weight", "fc.bias")}
    digits_checkpoint(tmp_path / "seven.pt", model=weights, **seven)
    for name, said in (("seven.pt", "7 classes"), ("absent.pt", "does not exist")):
        with pytest.raises(UsageError, match=said):
            evaluate(tmp_path, "robust", "--attacks", "adaptive", "--surrogate", tmp_path / name)


def test_logits_that_are_not_finite_are_no_result(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        evaluate(tmp_path, "not_finite", "--attacks", "fgsm", "--n-examples", "10")
    assert not (tmp_path / "white_attack.json").exists()
