"""The benchmarks run and write their JSON; how fast anything is, no test says."""

import json

import pytest
import torch

from tests.helpers import digits_network, digits_split, python
from tests.tools import benchmarks, card
from utils.attacks import cross_entropy_over_heads, linf_pgd
from utils.system.attack_copy import frozen

QUICK = (
    "step",
    "share",
    "companions",
    "memory",
    "negatives",
    "pgd",
    "growth",
    "data",
    "figures",
)  # no torchrun, no compiler


def run(tmp_path, name):
    """Run a benchmark -> the rows of its table."""
    file = tmp_path / "figures.json"
    benchmarks.main([name, "--quick", "--device", "cpu", "--out", str(file)])
    return json.loads(file.read_text())["benchmarks"][name]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs_and_writes_its_figures(tmp_path, capsys, name):
    rows = run(tmp_path, name)
    assert rows
    table = capsys.readouterr().out
    for row in rows:
        assert "failed" not in row
        assert all(column in table for column in row)
        assert row.get("seconds", 1) > 0


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_without_one(tmp_path):
    file = tmp_path / "card.json"
    argv = ("-m", "tests.tools.card", "--quick", "--device", "cpu", "--out", file)
    done = python(*argv)
    parts = json.loads(file.read_text())["parts"]
    assert done.returncode == 0, done.stdout
    assert list(parts) == list(card.ORDER)
    for part in parts.values():
        assert part["rows"]
        assert not part["note"]
    for row in parts["resume"]["rows"]:
        assert row["stopped"]
        assert row["equal bit for bit"] == row["tensors"] > 0


def test_a_card_s_figures_are_kept_row_by_row(tmp_path, monkeypatch, capsys):
    """A part that fails, one whose time is over, and one that no longer fits."""
    file = tmp_path / "card.json"

    def failing(device):
        """Fails."""
        yield {"row": 1}
        assert json.loads(file.read_text())["parts"]["failing"]["rows"] == [{"row": 1}]
        raise RuntimeError("no such kernel")

    def slow(device):
        """Takes its time."""
        device.deadline = 0
        yield {"row": 1}
        yield {"row": 2}

    monkeypatch.setattr(card, "ORDER", {"failing": failing, "slow": slow, "long": slow})
    monkeypatch.setattr(card, "SECONDS", {"failing": 1, "slow": 1, "long": 10_000})
    with pytest.raises(SystemExit) as end:
        card.main(["--quick", "--device", "cpu", "--out", str(file)])
    assert end.value.code == 1
    assert "long left out" in capsys.readouterr().out
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == ["failing", "slow"]
    assert "no such kernel" in parts["failing"]["note"]
    assert parts["slow"]["rows"] == [{"row": 1}]


def test_every_attack_of_the_pgd_benchmark_leaves_the_same_accuracy(tmp_path, monkeypatch):
    """On a trained network and with steps so large that they fool some of the 8 images."""
    test = digits_split()
    network = digits_network(False)
    monkeypatch.setattr(benchmarks, "trained_on_digits", lambda *args: (network, test))
    monkeypatch.setattr(benchmarks, "EPS", 0.2)
    monkeypatch.setattr(benchmarks, "STEP", 0.1)
    rows = run(tmp_path, "pgd")
    exact = [row["robust accuracy %"] for row in rows if row["variant"] != "ours bf16"]
    assert len(exact) == 4
    assert 0 < min(exact) == max(exact) < 100


def test_the_plain_step_attacks_as_ours_does():
    """From the same start, so that a faster step is not one that computes less."""
    job = benchmarks.Step("ResNet18", 6, 16, 3, 4, torch.device("cpu"))
    job.model.eval()
    torch.manual_seed(0)
    plain = benchmarks.plain_pgd(job.model, job.x, job.labels, 1, 3)
    torch.manual_seed(0)
    start = job.x + 0.001 * torch.randn_like(job.x)
    with frozen(job.model) as net:
        objective = cross_entropy_over_heads(net, job.labels, 2.0)
        ours = linf_pgd(job.x, objective, benchmarks.EPS, benchmarks.STEP, 3, start)
    assert ((plain - ours).abs() < 1e-5).float().mean() > 0.99
