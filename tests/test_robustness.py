"""test_white_attack.py's long attacks: what they find, what they keep, what they say. Networks: tiny ones of digits."""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from PIL import Image
from pyautoattack import AutoAttack
from torch import nn

import utils.adaptive
import utils.autoattack
import utils.diagnostics
import utils.robustness
from models import Heads, ReverseAttentionNetwork, build_model
from tests.helpers import ATTACK, ROOT, execute
from utils.adaptive import views
from utils.attacks import cross_entropy, frozen, image_noise, linf_pgd
from utils.checkpoints import load_model
from utils.data import as_input, load_split, shuffled
from utils.diagnostics import diagnose
from utils.evaluation import noise, percent, subset, verdicts, white_box
from utils.options import Stopped, UsageError, parse_evaluation
from utils.robustness import white_attack, wilson

EPS, SEED = 0.1, 1  # those of digits, and the default
FULL_EPS, FULL_STEP = 0.015, 0.003  # of `full`, whose network is not trained to be robust


class Tiny(ReverseAttentionNetwork):
    """Three convolutions, the last two of them the blocks that carry reverse attention."""

    def __init__(self, reverse_attention):
        super().__init__()
        self.reverse_attention = reverse_attention
        self.stem = nn.Conv2d(3, 12, 4, 2, 1)
        block = nn.Sequential(nn.Conv2d(12, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.Sequential(block, nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU()))
        self.fc = nn.Linear(24, 10)

    def trunk(self, x):
        return F.relu(self.stem(x))

    def last_blocks(self):
        return self.blocks


def fit(reverse_attention, eps, epochs):
    """Train a tiny network on digits, under an attack of radius eps unless that is 0."""
    torch.manual_seed(0)
    model, split = Tiny(reverse_attention), load_split("digits", "train", "", 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).split(64):
            x, y = as_input(split.images[rows]), split.labels[rows]
            if eps:
                with frozen(model) as net:
                    x = linf_pgd(x, cross_entropy(net, y), eps, eps / 2, 3, x)
            heads = model(x, y, heads=True)
            loss = F.cross_entropy(heads.final, y) + 2 * sum(F.cross_entropy(logits, y) for logits in heads.auxiliary)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


# Networks for --model tests.test_robustness:NAME
@functools.cache
def robust():
    return fit(False, EPS, 6)


@functools.cache
def undefended():
    return fit(False, 0, 4)


@functools.cache
def with_ra():
    return fit(True, 0, 4)


def as_callable():
    return lambda x: robust()(x)


class First(nn.Module):
    """The logits of the first classes only."""

    def __init__(self, classes):
        super().__init__()
        self.net, self.classes = robust(), classes

    def forward(self, x):
        return self.net(x)[:, : self.classes]


def first_2():
    return First(2)


def first_3():
    return First(3)


def first_7():
    return First(7)


class Scaled(nn.Module):
    """Fraud: an undefended network whose logits are so large that the cross-entropy has no gradient in float32."""

    def __init__(self, scale):
        super().__init__()
        self.net, self.scale = undefended(), scale

    def forward(self, x):
        return self.scale * self.net(x)


def scaled():
    return Scaled(1e4)


def always_wrong():
    return Scaled(-1)


class Decoy(nn.Module):
    """Fraud: an undefended network decides; final logits repeat that with gradients of something else."""

    reverse_attention = True

    def __init__(self):
        super().__init__()
        self.net = undefended()
        self.decoy = nn.Linear(768, 10)

    def forward(self, x, gate=None, heads=False):
        auxiliary = self.net(x)
        final = 20 * F.one_hot(auxiliary.argmax(1), 10) + self.decoy(x.flatten(1)).tanh()
        return Heads(final, (auxiliary, auxiliary), auxiliary) if heads else final


@functools.cache
def decoy():
    torch.manual_seed(3)
    return Decoy()


class Viewing(nn.Module):
    """A network as many are written: `view` needs maps in the default memory format."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), -1))


def viewing():
    torch.manual_seed(0)
    return Viewing()


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def evaluate(folder, model, *flags):
    """Run the script's job on one of the networks above -> white_attack.json."""
    argv = ["--model", f"tests.test_robustness:{model}", "--dataset", "digits", "--log_path", str(folder / "test.log")]
    white_attack(parse_evaluation("", [*argv, *flags]))
    return json.loads((folder / "white_attack.json").read_text(), parse_constant=refuse)


def right(record, name):
    """The verdicts of a row of the table, (N,) bool."""
    return torch.tensor([verdict == "1" for verdict in record["attacks"][name]["verdicts"]])


def accuracy(record, name):
    return record["attacks"][name]["robust_accuracy"]


def digits(count):
    split = subset(load_split("digits", "test", "", 16), count)
    return split, as_input(split.images)


def partial(folder):
    """The one folder of an evaluation's finished blocks."""
    (found,) = folder.glob("white_attack-*.partial")
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 25 images."""
    monkeypatch.setattr(utils.robustness, "BLOCK", 25)
    monkeypatch.setattr(utils.autoattack, "BLOCK", 25)
    return 25


def shorten(patch):
    """Fewer steps in the library's attacks, for the script and for whoever else calls the library."""
    standard = AutoAttack._set_version

    def brief(self, version):
        standard(self, version)
        self.fab.n_iter, self.square.n_queries = 5, 50
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = 10

    patch.setattr(AutoAttack, "_set_version", brief)
    for name in ("ViewAPGD", "ViewAPGDTargeted"):
        of_view = getattr(utils.adaptive, name)
        patch.setattr(
            utils.adaptive, name, lambda *args, of_view=of_view, **kwargs: of_view(*args, **kwargs | {"n_iter": 10})
        )


@pytest.fixture
def brief_library(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Everything the script does, once, on a network with reverse attention: record, folder, npz."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.diagnostics, "QUERIES", 100)
        shorten(patch)
        flags = ["--attacks", "fgsm,pgd,cw,adaptive,noise", "--n-examples", "50", "--restarts", "2", "--diagnostics"]
        flags += ["--epsilon", str(FULL_EPS), "--step-size", str(FULL_STEP)]
        evaluate(folder, "with_ra", "--attacks", "natural", "--n-examples", "50")
        record = evaluate(folder, "with_ra", *flags, "--save-adversarial", str(folder / "worst.npz"))
    return record, folder


# AutoAttack


def directly(model, count, block):
    """The library called on the images that are right without an attack, block by block -> verdicts, images."""
    split, x = digits(count)
    found = x.clone()
    with frozen(model) as net:
        natural = net(x).argmax(1) == split.labels
        for here in torch.arange(count).split(block):
            rows = here[natural[here]]
            library = AutoAttack(net, norm="Linf", eps=EPS, seed=SEED, version="standard", device="cpu")
            found[rows], _ = library.run_standard_evaluation(x[rows], split.labels[rows], batch_size=len(rows))
        return net(found).argmax(1) == split.labels, found


def same_as_directly(record, stored, expected, found):
    assert torch.equal(right(record, "AutoAttack"), expected)
    assert 0 < accuracy(record, "AutoAttack") < accuracy(record, "natural")
    with np.load(stored) as content:  # of images that are left right both keep the natural one
        assert torch.equal(torch.from_numpy(content["images"]), found)


def test_autoattack_through_the_script_is_autoattack_called_directly(tmp_path, brief_library, small_blocks):
    flags = ("--attacks", "autoattack", "--n-examples", "60", "--save-adversarial", str(tmp_path / "found.npz"))
    record = evaluate(tmp_path, "robust", *flags)
    same_as_directly(record, tmp_path / "found.npz", *directly(robust(), 60, small_blocks))


@pytest.mark.slow
def test_standard_autoattack_on_a_resnet_is_autoattack_called_directly(trained, tmp_path, small_blocks):
    model, _, file = trained
    flags = ["--ckpt_url", str(file), "--attacks", "autoattack", "--n-examples", "40"]
    flags += ["--log_path", str(tmp_path / "test.log"), "--save-adversarial", str(tmp_path / "found.npz")]
    flags += ["--epsilon", "0.03"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "EPS", 0.03)
        white_attack(parse_evaluation("", flags))
        record = json.loads((tmp_path / "white_attack.json").read_text())
        same_as_directly(record, tmp_path / "found.npz", *directly(model.eval(), 40, small_blocks))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_few_classes_are_attacked_and_the_table_says_what_was_left_out(classes, tmp_path, monkeypatch, brief_library):
    def few(*args):
        split = load_split(*args)
        return split.take((split.labels < classes).nonzero().squeeze(1))._replace(classes=split.classes[:classes])

    monkeypatch.setattr(utils.robustness, "load_split", few)
    flags = ("--attacks", "autoattack,adaptive", "--n-examples", "30", "--restarts", "1", "--epsilon", "0.25")
    record = evaluate(tmp_path, f"first_{classes}", *flags)
    assert accuracy(record, "natural") > 80
    for name in ("AutoAttack", "adaptive: final"):
        assert accuracy(record, name) < accuracy(record, "natural") - 10
    notes = " ".join(record["attacks"]["AutoAttack"]["notes"])
    assert f"APGD-T and FAB-T target {classes - 1} of them" in notes
    assert ("APGD-T left out" in notes) == (classes < 4)
    assert f"note, AutoAttack: {classes} classes: APGD-T and FAB-T target" in (tmp_path / "test.log").read_text()


# Stopped and continued


@pytest.fixture
def counted(monkeypatch):
    """Blocks that the long attacks work at, in order; `stop` raises in the one of this number, when it is done."""
    judged = utils.robustness.judged

    class Count(list):
        stop = None

        def __call__(self, net, split, candidates, *args):
            self.append(int(candidates[0]))
            answer = judged(net, split, candidates, *args)
            if self.stop is not None and len(self) == self.stop[0]:
                raise self.stop[1]
            return answer

    count = Count()
    monkeypatch.setattr(utils.robustness, "judged", count)
    return count


LONG = ("--n-examples", "60", "--restarts", "1", "--num-steps", "5")


def stopped(folder, counted, *flags, error, model="robust"):
    """An evaluation that is stopped in its second block."""
    counted.stop = (2, error)
    with pytest.raises(type(error)):
        evaluate(folder, model, *LONG, *flags)
    assert len(counted) == 2
    assert [file.name for file in sorted(partial(folder).iterdir())] == ["images-000000.pt"]
    counted.clear()
    counted.stop = None


@pytest.mark.parametrize(
    ("attack", "error"), [("autoattack", Stopped(signal.SIGTERM, "")), ("adaptive", KeyboardInterrupt())]
)
def test_a_stopped_evaluation_goes_on_to_the_same_table(attack, error, tmp_path, counted, brief_library, small_blocks):
    (tmp_path / "whole").mkdir()
    expected = evaluate(tmp_path / "whole", "robust", *LONG, "--attacks", attack)
    assert len(counted) == 3
    counted.clear()
    stopped(tmp_path, counted, "--attacks", attack, error=error)
    record = evaluate(tmp_path, "robust", *LONG, "--attacks", attack)
    assert len(counted) == 2 and counted[0] >= small_blocks  # the finished block is not attacked again
    assert list(record["attacks"]) == list(expected["attacks"])
    for name in record["attacks"]:
        assert torch.equal(right(record, name), right(expected, name))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("changed", [("--seed", "2"), ("--epsilon", "0.09"), "undefended", "as_callable", "cut off"])
def test_blocks_of_another_evaluation_are_not_reused(changed, tmp_path, counted, brief_library, small_blocks):
    stopped(tmp_path, counted, "--attacks", "adaptive", error=KeyboardInterrupt())
    model, flags = "robust", ()
    if changed == "cut off":
        (file,) = partial(tmp_path).iterdir()
        file.write_bytes(file.read_bytes()[:-200])
    elif isinstance(changed, str):
        model = changed
    else:
        flags = changed
    record = evaluate(tmp_path, model, *LONG, "--attacks", "adaptive", *flags)
    assert len(counted) == 3
    counted.clear()
    (tmp_path / "whole").mkdir()
    expected = evaluate(tmp_path / "whole", model, *LONG, "--attacks", "adaptive", *flags)
    assert torch.equal(right(record, "adaptive: final"), right(expected, "adaptive: final"))


def test_blocks_of_one_callable_do_not_serve_another(tmp_path, counted, brief_library, small_blocks):
    """Callables have no weights to tell them apart."""
    stopped(tmp_path, counted, "--attacks", "adaptive", error=KeyboardInterrupt(), model="as_callable")
    with pytest.MonkeyPatch.context() as patch:  # the same name, edited in between
        patch.setattr(sys.modules[__name__], "robust", undefended)
        evaluate(tmp_path, "as_callable", *LONG, "--attacks", "adaptive")
    assert len(counted) == 3


@pytest.mark.slow
def test_blocks_with_reverse_attention_do_not_serve_the_network_without(
    trained, tmp_path, counted, brief_library, small_blocks
):
    """A published state dict has the same tensors either way."""
    torch.save(trained[0].state_dict(), tmp_path / "bare.pt")
    argv = ["--ckpt_url", str(tmp_path / "bare.pt"), "--dataset", "digits", *LONG, "--attacks", "autoattack"]
    argv += ["--epsilon", "0.01"]
    counted.stop = (2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        white_attack(parse_evaluation("", argv))
    counted.stop = None
    partial(tmp_path).rename(tmp_path / "kept")
    part = torch.load(tmp_path / "kept" / "images-000000.pt", weights_only=True)
    before = part["fingerprint"]
    counted.stop = (2, KeyboardInterrupt())
    counted.clear()
    with pytest.raises(KeyboardInterrupt):
        white_attack(parse_evaluation("", [*argv, "--no-ra"]))
    part = torch.load(partial(tmp_path) / "images-000000.pt", weights_only=True)
    assert part["fingerprint"] != before


@pytest.mark.slow
def test_blocks_found_with_one_surrogate_do_not_serve_another(trained, tmp_path, counted, brief_library, small_blocks):
    """The same file name, other weights."""
    _, _, file = trained
    content = torch.load(file, weights_only=True)
    torch.save(content, tmp_path / "surrogate.pt")
    flags = ("--attacks", "adaptive", "--surrogate", str(tmp_path / "surrogate.pt"), "--epsilon", "0.03")
    counted.stop = (3, KeyboardInterrupt())  # two views a block
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, "robust", *LONG, *flags)
    counted.clear()
    counted.stop = None
    torch.save(
        content | {"model": {k: v * 1.01 if v.is_floating_point() else v for k, v in content["model"].items()}},
        tmp_path / "surrogate.pt",
    )
    record = evaluate(tmp_path, "robust", *LONG, *flags)
    assert len(counted) == 6
    assert "adaptive: surrogate" in record["attacks"]


@pytest.mark.slow
def test_images_of_attacks_that_are_not_in_the_table_are_not_saved(tmp_path, counted, brief_library, small_blocks):
    """An evaluation with more attacks was stopped; the one that follows saves what its own attacks found."""
    stopped(tmp_path, counted, "--attacks", "pgd,autoattack", "--epsilon", "0.2", error=KeyboardInterrupt())
    flags = ("--attacks", "adaptive", "--epsilon", "0.2", "--save-adversarial", str(tmp_path / "found.npz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.robustness, "adaptive", lambda *args, **kwargs: lambda net, x, labels, indices: x)
        record = evaluate(tmp_path, "robust", *LONG, *flags)
    with np.load(tmp_path / "found.npz") as content:
        assert content["right"].tolist() == right(record, "adaptive: final").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["autoattack", "adaptive"])
def test_sigterm_in_the_middle_and_again(attack, trained, tmp_path):
    _, _, file = trained
    small = "import runpy, sys, utils.robustness as r, utils.autoattack as a; r.BLOCK = a.BLOCK = 10; "
    small += "sys.argv = ['test_white_attack.py', *sys.argv[1:]]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--ckpt_url", str(file), "--n-examples", "30", "--attacks", attack, "--restarts", "1", "--device", "cpu"]
    flags += ["--epsilon", "0.03" if attack == "autoattack" else "0.1"]  # where few stand, six views are soon done

    def start(folder):
        argv = [sys.executable, "-c", small, *flags, "--log_path", str(folder / "test.log")]
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = start(tmp_path / "whole")
    assert whole.communicate()[1] is not None and whole.returncode == 0
    job = start(tmp_path / "stopped")
    while not list((tmp_path / "stopped").glob("*.partial/images-*.pt")) and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate()
    assert job.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1].startswith("test_white_attack.py: stopped; finished blocks of AutoAttack")
    assert not (tmp_path / "stopped" / "white_attack.json").exists()
    again = start(tmp_path / "stopped")
    again.communicate()
    assert again.returncode == 0
    expected, record = (
        json.loads((tmp_path / name / "white_attack.json").read_text())["attacks"] for name in ("whole", "stopped")
    )
    assert {k: v["verdicts"] for k, v in record.items()} == {k: v["verdicts"] for k, v in expected.items()}
    assert not list((tmp_path / "stopped").glob("*.partial"))


# Worst cases


def test_the_worst_case_is_no_better_than_any_attack_image_by_image(full):
    record, _ = full
    worst = right(record, "worst case")
    names = [name for name in record["attacks"] if "worst case" not in name]
    assert {"natural", "FGSM", "PGD-40", "CW-20", "adaptive: final", "adaptive: auxiliary 1"} <= set(names)
    for name in [*names, "adaptive, worst case"]:
        assert not (worst & ~right(record, name)).any(), name
    views_ = torch.stack([right(record, name) for name in names if name.startswith("adaptive: ")])
    assert len(views_) >= 5
    assert torch.equal(right(record, "adaptive, worst case"), views_.all(0))
    assert torch.equal(worst, torch.stack([right(record, name) for name in names]).all(0))
    assert len({record["attacks"][name]["verdicts"] for name in names}) > 3  # they differ, so the worst case says more


def test_adaptive_finds_what_pgd_on_each_head_finds(full):
    record, _ = full
    split, x = digits(50)
    worst = right(record, "adaptive, worst case")
    with frozen(with_ra()) as net:
        rows = right(record, "natural").nonzero().squeeze(1)
        x, y = x[rows], split.labels[rows]
        start = x + FULL_EPS * image_noise(x, rows, SEED, "uniform")
        found = []
        for head in (
            lambda heads: heads.final,
            lambda heads: heads.auxiliary[0],
            lambda heads: heads.auxiliary[1],
        ):
            objective = functools.partial(
                lambda head, z: F.cross_entropy(head(net(z, heads=True)), y, reduction="sum"), head
            )
            wrong = net(linf_pgd(x, objective, FULL_EPS, FULL_STEP, 40, start)).argmax(1) != y
            assert not (worst[rows] & wrong).any()
            found.append(wrong)
    assert ((found[1] | found[2]) & ~found[0]).any()  # or the final head alone would do


def test_a_surrogate_is_one_more_view(trained, tmp_path, brief_library):
    flags = ("--attacks", "adaptive", "--restarts", "1", "--n-examples", "40", "--epsilon", "0.2")
    record = evaluate(tmp_path, "robust", *flags, "--surrogate", str(trained[2]))
    assert {"adaptive: final", "adaptive: surrogate", "adaptive, worst case"} <= set(record["attacks"])
    assert accuracy(record, "adaptive: surrogate") < accuracy(record, "natural")


# Planted frauds


def test_a_hardened_head_in_front_of_an_undefended_one_is_exposed(tmp_path):
    """All attacks on the final logits are led astray; the auxiliary view is not."""
    record = evaluate(tmp_path, "decoy", "--attacks", "pgd,adaptive", "--n-examples", "60", "--restarts", "1")
    assert accuracy(record, "PGD-40") > 50
    assert accuracy(record, "adaptive: auxiliary 1") < 10
    assert accuracy(record, "adaptive, worst case") < 10


def test_vanishing_gradients_are_exposed(tmp_path):
    record = evaluate(tmp_path, "scaled", "--attacks", "pgd,adaptive", "--n-examples", "60", "--restarts", "2")
    assert accuracy(record, "PGD-40") > accuracy(record, "natural") - 20 > 50
    assert accuracy(record, "adaptive: final") < 10


def signs(model, count, monkeypatch, eps=EPS):
    """Diagnosis of a plain network: the names of raised signs, and the diagnosis."""
    monkeypatch.setattr(utils.diagnostics, "QUERIES", 300)
    split, _ = digits(count)
    with frozen(model) as net:
        natural = verdicts(net, split, count)
        found = diagnose(net, split, natural, views(False, 2), eps=eps, step_size=eps / 5, seed=SEED, batch_size=count)
    return {sign.name for sign in found.signs if sign.raised}, found


def test_diagnostics_raise_signs_for_vanishing_gradients(monkeypatch):
    raised, found = signs(scaled(), 40, monkeypatch)
    assert {"gradients vanish", "eps 1 leaves images right", "black-box finds what white-box misses"} <= raised
    assert all(sign.figure for sign in found.signs)


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
    assert (tmp_path / "adversarial_examples.png").exists()


def test_eps_0(tmp_path, brief_library):
    """Attacks that may change nothing change nothing."""
    flags = ("--epsilon", "0", "--n-examples", "20", "--restarts", "1", "--attacks", "fgsm,pgd,noise,adaptive")
    record = evaluate(tmp_path, "robust", *flags)
    assert len({attack["verdicts"] for attack in record["attacks"].values()}) == 1


# Verdicts


def test_verdicts_for_another_batch_size(trained, tmp_path):
    records = []
    for size in (200, 37):
        (tmp_path / str(size)).mkdir()
        flags = ["--ckpt_url", str(trained[2]), "--test-batch-size", str(size), "--attacks", "natural,fgsm,pgd,cw"]
        flags += ["--epsilon", "0.03", "--step-size", "0.007", "--num-steps", "10"]
        white_attack(parse_evaluation("", [*flags, "--log_path", str(tmp_path / str(size) / "test.log")]))
        records.append(json.loads((tmp_path / str(size) / "white_attack.json").read_text()))
    assert list(records[0]["attacks"]) == ["natural", "FGSM", "PGD-10", "CW-5", "worst case"]
    assert 5 < accuracy(records[0], "PGD-10") < accuracy(records[0], "natural")
    for name in records[0]["attacks"]:
        verdicts_ = [right(record, name) for record in records]
        assert len(verdicts_[0]) == 360
        assert (verdicts_[0] != verdicts_[1]).float().mean() <= 0.005, name


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
    model = with_ra()
    with torch.no_grad():
        fooled = model(images).argmax(1) != labels
    assert torch.equal(fooled, ~said)
    assert torch.equal(said, right(record, "worst case"))
    assert 0 < said.sum() < right(record, "natural").sum()


def test_n_examples_are_the_first_after_a_fixed_shuffle(tmp_path):
    for name in ("some", "all"):
        (tmp_path / name).mkdir()
    some = evaluate(tmp_path / "some", "robust", "--attacks", "fgsm", "--n-examples", "70")
    every = evaluate(tmp_path / "all", "robust", "--attacks", "fgsm", "--n-examples", "360")
    for name in ("natural", "FGSM"):
        assert some["attacks"][name]["images"] == some["images"] == 70
        chosen = shuffled(360, 0)[:70]
        if name == "natural":  # the start noise of an image depends on its place in the evaluated set
            assert torch.equal(right(some, name), right(every, name)[chosen])
    said = (tmp_path / "some" / "test.log").read_text()
    assert "70" in said and "of 360" in said and "shuffle" in said
    assert "shuffle" not in (tmp_path / "all" / "test.log").read_text()


def test_noise_stays_in_the_ball_and_counts_any_draw(monkeypatch):
    split, x = digits(60)
    rows = torch.arange(60)
    with frozen(undefended()) as net:
        attacked = noise(0.6, SEED, 20)(net, x, split.labels, rows)
        wrong = net(attacked).argmax(1) != split.labels
        draws = [
            net((x + 0.6 * image_noise(x, rows, SEED, "uniform", draw)).clamp(0, 1)).argmax(1) != split.labels
            for draw in range(20)
        ]
    assert (attacked - x).abs().max() <= 0.6 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    natural = net(x).argmax(1) != split.labels
    assert torch.equal(wrong, torch.stack([*draws, natural]).any(0) if natural.any() else torch.stack(draws).any(0))
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
        assert attack["seconds"] >= 0 and attack["notes"] == []
    assert record["dataset"] == "digits" and record["network"]["reverse_attention"] is True
    expected = {"eps": FULL_EPS, "step_size": FULL_STEP, "num_steps": 40, "random": True, "restarts": 2, "seed": SEED}
    assert expected.items() <= record["settings"].items()
    assert {"torch", "pyautoattack", "python"} <= set(record["provenance"]["versions"])


def test_json_keeps_the_evaluations_before(tmp_path):
    for seed in (1, 2, 3):
        evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "10", "--seed", str(seed))
    record = json.loads((tmp_path / "white_attack.json").read_text())
    assert record["settings"]["seed"] == 3
    assert [earlier["settings"]["seed"] for earlier in record["earlier"]] == [1, 2]
    assert all("earlier" not in earlier for earlier in record["earlier"])


@pytest.mark.parametrize("content", ["[1, 2]", '{"earlier": 5}', "{", "7", '{"earlier": null}'])
def test_a_file_of_that_name_that_is_none_of_ours_stops_nothing(content, tmp_path):
    (tmp_path / "white_attack.json").write_text(content)
    record = evaluate(tmp_path, "robust", "--attacks", "natural", "--n-examples", "10")
    assert accuracy(record, "natural") > 50


def test_table_and_markdown_row_say_the_same(full):
    record, folder = full
    lines = (folder / "test.log").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("attack") and "95 %" in line][1:]
    head, rule, row = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")
    )
    assert head[1:] == list(record["attacks"]) and set(rule) == {"---"} and len(head) == len(rule) == len(row)
    for name, figure, line in zip(head[1:], row[1:], lines[start + 1 :], strict=False):
        attack = record["attacks"][name]
        low, high = attack["interval_95"]
        assert float(figure) == pytest.approx(attack["robust_accuracy"], abs=0.005)
        assert line.startswith(f"{name}  ")
        assert line[len(name) :].split()[:5] == [figure, f"{low:.2f}", "-", f"{high:.2f}", "50"]


def test_pictures(full):
    _, folder = full
    for name in ("adversarial_examples.png", "robust_vs_eps.png", "robust_vs_steps.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            assert 400 < picture.width < 2000 and 300 < picture.height < 1500
            assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 20  # not blank


def test_curves_are_in_the_json(full):
    record, folder = full
    found = record["diagnostics"]
    assert found["by_eps"][0][0] == 0 and found["by_eps"][-1][0] == 1
    assert [row[0] for row in found["by_steps"]] == [1, 2, 5, 10, 20, 40, 100, 200]
    assert all(0 <= value <= 100 for row in (*found["by_eps"], *found["by_steps"]) for value in row[1:])
    log = (folder / "test.log").read_text()
    for sign in found["signs"]:
        assert f"{'SIGN' if sign['raised'] else 'ok':<5} {sign['name']}: {sign['figure']}" in log


def test_the_estimate_is_said_before_and_names_the_way_out(full):
    _, folder = full
    lines = (folder / "test.log").read_text().splitlines()
    (line,) = [line for line in lines if "min here for" in line]
    assert line.startswith("adaptive and diagnostics: up to ") and "--n-examples" in line
    assert float(line.split("up to ")[1].split()[0]) >= 0 and "-0" not in line


# Against others, and from Python


def test_fgsm_and_pgd_agree_with_torchattacks_and_foolbox(trained):
    model, _ = load_model(trained[2])  # as the README says, without `frozen`
    split, x = digits(200)
    eps, step, steps = 0.03, 0.005, 40
    y, other = split.labels, foolbox.PyTorchModel(model, bounds=(0, 1))
    theirs = {
        "fgsm": (
            torchattacks.FGSM(model, eps=eps)(x, y),
            foolbox.attacks.LinfFastGradientAttack(random_start=False)(other, x, y, epsilons=eps)[1],
        ),
        "pgd": (
            torchattacks.PGD(model, eps=eps, alpha=step, steps=steps, random_start=False)(x, y),
            foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)(other, x, y, epsilons=eps)[1],
        ),
    }
    with frozen(model) as net:
        natural = percent(verdicts(net, split, 200))
        for name, ours in (
            ("fgsm", white_box(cross_entropy, eps, eps, 1, False, SEED)),
            ("pgd", white_box(cross_entropy, eps, step, steps, False, SEED)),
        ):
            found = percent(verdicts(net, split, 50, ours))
            assert 5 < found < natural - 5
            for images in theirs[name]:
                assert abs(found - percent(model(images).argmax(1) == y)) <= 1, name


@pytest.mark.slow
def test_autoattack_takes_a_loaded_model(trained):
    model, _ = load_model(trained[2])
    split, x = digits(20)
    library = AutoAttack(model, norm="Linf", eps=EPS, seed=SEED, version="custom", attacks=["apgd-ce"])
    images, _ = library.run_standard_evaluation(x, split.labels, batch_size=20)
    assert (images - x).abs().max() <= EPS + 1e-6
    assert percent(model(images).argmax(1) == split.labels) < percent(model(x).argmax(1) == split.labels)


# Foreign classifiers and wrong use


@pytest.mark.slow
def test_a_module_and_a_callable_give_the_same_table(tmp_path):
    flags = ("--attacks", "fgsm,pgd,adaptive", "--n-examples", "30", "--num-steps", "5", "--restarts", "1")
    records = [evaluate(tmp_path, model, *flags) for model in ("robust", "as_callable")]
    for name in ("natural", "FGSM", "PGD-5", "adaptive: final"):
        assert torch.equal(*(right(record, name) for record in records))
    assert records[1]["network"]["arch"] == "tests.test_robustness:as_callable"


def test_a_network_that_uses_view(tmp_path):
    evaluate(tmp_path, "viewing", "--attacks", "fgsm", "--n-examples", "10")


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
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the script in an empty folder beside foreign_nets.py; it must end with status 2 -> the one line it says."""
    (tmp_path / "foreign_nets.py").write_text(FOREIGN)
    (tmp_path / "broken_nets.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(*argv):
        before = sorted(os.listdir())
        assert execute(ATTACK, *argv, "--device", "cpu") == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith(f"{ATTACK}: error: "), error
        assert sorted(os.listdir()) == before
        return error[0]

    yield run
    for name in ("foreign_nets", "broken_nets"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:net", "no_such_module"),
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
def test_a_foreign_network_that_is_none(function, said, refused):
    assert said in refused("--model", function, "--dataset", "digits", "--n-examples", "4", "--attacks", "fgsm")


def test_wrong_flags(refused, trained, tmp_path):
    file = str(trained[2])
    assert "nonsense" in refused("--ckpt_url", file, "--attacks", "natural,nonsense")
    assert "--model" in refused("--ckpt_url", file, "--model", "foreign_nets:seven")
    assert "--ckpt_url" in refused("--attacks", "natural")
    assert "0" in refused("--ckpt_url", file, "--n-examples", "0")
    flags = ("--ckpt_url", file, "--n-examples", "4", "--attacks", "fgsm")
    assert "nowhere" in refused(*flags, "--save-adversarial", str(tmp_path / "nowhere" / "images.npz"))
    assert "--diagnostics" in refused(*flags, "--diagnostics", "--epsilon", "0")


def test_a_surrogate_of_other_classes(trained, tmp_path):
    model = build_model("ResNet18", 7, width=4, image_size=16)
    content = torch.load(trained[2], weights_only=True)
    seven = {"model": model.state_dict(), "num_classes": 7, "classes": list("0123456")}
    torch.save(content | seven, tmp_path / "seven.pt")
    with pytest.raises(UsageError, match="7 classes"):
        evaluate(tmp_path, "robust", "--attacks", "adaptive", "--surrogate", str(tmp_path / "seven.pt"))
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(tmp_path, "robust", "--attacks", "adaptive", "--surrogate", str(tmp_path / "absent.pt"))


def test_logits_that_are_not_finite_are_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "robust", lambda: Scaled(math.inf))
    with pytest.raises(utils.options.RunError, match="not finite"):
        evaluate(tmp_path, "robust", "--attacks", "fgsm", "--n-examples", "10")
    assert not (tmp_path / "white_attack.json").exists()
