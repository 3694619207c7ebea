"""tests/tools/truth.py: a trick and an honest network, end to end, and how judges are judged."""

import json

import pytest
import torch

from tests.evaluation.test_robustness import shorten, shorten_diagnostics
from tests.helpers import ROOT, digits_split
from tests.tools import truth
from tests.tools.truth_networks import CONTROLS, TRICKS, Known
from utils.data.datasets import as_input
from utils.evaluation import report
from utils.evaluation.diagnostics import sanity_warnings


@pytest.fixture
def brief(monkeypatch):
    """Few steps of everything, and no pictures."""
    shorten(monkeypatch)
    shorten_diagnostics(monkeypatch)
    monkeypatch.setattr(report, "save_or_note", lambda draw, file: "")
    monkeypatch.setattr(truth, "FLAGS", (*truth.FLAGS[:2], "--restarts=1", "--apgd-steps=6"))


def network(warnings=(), **figures):
    """What truth.json holds of a network."""
    return {
        "words": "it",
        "figures": {"natural": 90.0, "truth": 10.0, **figures},
        "warnings": {"AutoAttack": [], "sanity_warnings": list(warnings), "--diagnostics": []},
    }


def test_a_trick_is_measured_beside_its_truth(tmp_path, brief):
    found = truth.measured("sloping_detector", tmp_path, 12)
    assert found["figures"]["truth"] < 10 < 80 < found["figures"]["PGD-40"]
    assert "other gradients on noisy images" in found["warnings"]["sanity_warnings"][0]
    assert any("eps 1 leaves" in sign for sign in found["warnings"]["--diagnostics"])
    assert not truth.JUDGES["PGD-40"].exposes(found)
    assert truth.JUDGES["the checks of every evaluation"].exposes(found)


def test_an_honest_network_has_no_truth_of_its_own(tmp_path, brief):
    found = truth.measured("robust", tmp_path, 12)
    figures = found["figures"]
    attacks = [figures[name] for name in ("AutoAttack", "adaptive", "PGD-40")]
    assert figures["truth"] == min(attacks)
    assert 30 < figures["truth"] < figures["natural"]
    assert found["warnings"]["sanity_warnings"] == found["warnings"]["AutoAttack"] == []


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("noisy", "two calls answer differently, which"),
        ("detector", "two calls answer differently on noisy images"),
        ("sloping_detector", "two calls have other gradients on noisy images"),
    ],
)
def test_what_answers_at_random_is_told_apart(name, warning):
    network = TRICKS[name].network().eval()
    (said,) = sanity_warnings(network, digits_split("test", 30))
    assert said.startswith(warning)


@pytest.mark.parametrize("name", ["quantised", "scaled", "cut"])
def test_the_way_around_decides_as_the_trick_does_and_has_gradients(name):
    split = digits_split("test", 40)
    x = as_input(split.images)
    noise = 0.2 * torch.rand_like(x)
    x = (x + noise).clamp(0, 1)
    trick = TRICKS[name]
    tricked = trick.network()
    known = Known(tricked, trick.around())
    x.requires_grad_()
    logits = known(x)
    decisions = tricked(x).argmax(1)
    assert torch.equal(logits.argmax(1), decisions)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    assert gradient.flatten(1).any(1).all()


def test_a_decision_that_the_way_around_does_not_share_is_raised():
    decision = torch.tensor([[0.0, 3, 1]])
    way_around = torch.tensor([[2.0, 1, 0]])
    known = Known(lambda x: decision, lambda x: way_around)
    (logits,) = known(torch.zeros(1)).tolist()
    assert logits == [2, pytest.approx(2.001), 0]


def test_judges_are_judged_by_truth_and_by_warnings():
    attack = truth.JUDGES["PGD-40"]
    checks = truth.JUDGES["the checks of every evaluation"]
    assert attack.exposes(network(**{"PGD-40": 15.0}))
    assert not attack.exposes(network(**{"PGD-40": 15.1}))
    assert checks.exposes(network(["two calls"]))
    assert not checks.exposes(network())


def test_the_page_counts_what_the_committed_record_holds():
    """A finished run of all networks, and in the page its hits and false alarms."""
    networks = json.loads(truth.FILE.read_text())["networks"]
    assert list(networks) == truth.NETWORKS
    page = (ROOT / "README.md").read_text()
    for name, judge in truth.JUDGES.items():
        hits = sum(judge.exposes(networks[trick]) for trick in TRICKS)
        alarms = sum(judge.warns(networks[control]) for control in CONTROLS)
        assert f"| {name} | {hits} | {alarms if judge.warners else ''} |" in page
