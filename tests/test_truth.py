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
    assert figures["truth"] == min(figures["AutoAttack"], figures["adaptive"], figures["PGD-40"])
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
    (said,) = sanity_warnings(TRICKS[name].network().eval(), digits_split("test", 30))
    assert said.startswith(warning)


@pytest.mark.parametrize("name", ["quantised", "scaled", "cut"])
def test_the_way_around_decides_as_the_trick_does_and_has_gradients(name):
    split = digits_split("test", 40)
    x = as_input(split.images)
    x = (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    trick = TRICKS[name]
    tricked = trick.network()
    known = Known(tricked, trick.around())
    x.requires_grad_()
    logits = known(x)
    assert torch.equal(logits.argmax(1), tricked(x).argmax(1))
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_a_decision_that_the_way_around_does_not_share_is_raised():
    known = Known(lambda x: torch.tensor([[0.0, 3, 1]]), lambda x: torch.tensor([[2.0, 1, 0]]))
    assert known(torch.zeros(1)).tolist() == [[2.0, pytest.approx(2.001), 0.0]]


def test_judges_are_judged_by_truth_and_by_warnings():
    attack, checks = truth.JUDGES["PGD-40"], truth.JUDGES["the checks of every evaluation"]
    assert attack.exposes(network(**{"PGD-40": 15.0}))
    assert not attack.exposes(network(**{"PGD-40": 15.1}))
    assert checks.exposes(network(["two calls"])) and not checks.exposes(network())


def test_the_page_counts_what_the_committed_record_holds():
    """A finished run of all networks, and in the page its hits and false alarms."""
    networks = json.loads(truth.FILE.read_text())["networks"]
    assert list(networks) == truth.NETWORKS
    page = (ROOT / "README.md").read_text()
    for name, judge in truth.JUDGES.items():
        hits = sum(judge.exposes(networks[trick]) for trick in TRICKS)
        alarms = sum(judge.warns(networks[control]) for control in CONTROLS)
        assert f"| {name} | {hits} | {alarms if judge.warners else ''} |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown: nothing; known: ra_gate"),
        (["--images", "0"], "argument --images"),
        (["--print", "none"], "holds no tables"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        truth.main(arguments)
    assert message in capsys.readouterr().err
