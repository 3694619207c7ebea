"""The benchmarks run and write their JSON; how fast anything is, no test says."""

import json

import pytest
import torch
from torch import nn

from tests.helpers import digits_network, digits_split, python
from tests.tools import benchmarks, card
from utils.attacks import cross_entropy_over_heads, linf_pgd
from utils.system.attack_copy import frozen

QUICK = (
    "step",
    "share",
    "together",
    "companions",
    "memory",
    "negatives",
    "pgd",
    "growth",
    "data",
    "figures",
)  # no torchrun, no compiler


def run(tmp_path, name):
    benchmarks.main([name, "--quick", "--device", "cpu", "--out", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())["benchmarks"][name]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs_and_writes_its_figures(tmp_path, capsys, name):
    rows = run(tmp_path, name)
    assert rows and not any("failed" in row for row in rows), rows
    table = capsys.readouterr().out
    assert all(column in table for column in rows[0])
    for row in rows:
        assert all(value > 0 for key, value in row.items() if key in ("seconds", "images/s", "GFLOP/s", "share %"))


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_without_one(tmp_path):
    done = python("-m", "tests.tools.card", "--quick", "--device", "cpu", "--out", tmp_path / "card.json")
    found = json.loads((tmp_path / "card.json").read_text())["parts"]
    assert done.returncode == 0 and [*found] == [*card.ORDER], done.stdout
    rows = {name: part["rows"] for name, part in found.items()}
    assert all(rows.values()) and not any(part["note"] for part in found.values())
    assert rows["tests"][0]["skipped"] == 1 and [row["processes"] for row in rows["autoattack"]] == [1, 2]
    for row in rows["resume"]:
        assert row["stopped"] and row["equal bit for bit"] == row["tensors"] > 0


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
    found = json.loads(file.read_text())["parts"]
    assert end.value.code == 1 and "long left out" in capsys.readouterr().out
    assert {name: (part["rows"], part["note"]) for name, part in found.items()} == {
        "failing": ([{"row": 1}], "failed: no such kernel"),
        "slow": ([{"row": 1}], "its time is over"),
    }


def test_every_attack_of_the_pgd_benchmark_leaves_the_same_accuracy(tmp_path, monkeypatch):
    """On a trained network and with steps so large that they fool some of the 8 images."""
    test = digits_split()
    monkeypatch.setattr(benchmarks, "trained_on_digits", lambda *args: (digits_network(False), test))
    monkeypatch.setattr(benchmarks, "EPS", 0.2)
    monkeypatch.setattr(benchmarks, "STEP", 0.1)
    exact = [row for row in run(tmp_path, "pgd") if row["variant"] != "ours bf16"]
    assert len(exact) == 4
    (accuracy,) = {row["robust accuracy %"] for row in exact}
    assert 0 < accuracy < 100


def test_operations_are_counted_from_the_layers():
    """A convolution of 3 to 8 channels over 16x16 and one linear layer, by hand."""

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 256, 10))
    expected = 2 * 2 * (8 * 256 * 3 * 9 + 8 * 256 * 10)
    assert benchmarks.forward_flops(net, torch.rand(2, 3, 16, 16)) == expected


def test_the_plain_step_attacks_as_ours_does():
    """Both start from the same draw here, so that a faster step could not be one that computes less."""

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


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["stpe"], "unknown: stpe; known: step, share"),
        (["negatives", "--device", "gpu"], "--device gpu is none of auto, cpu, cuda, cuda:N"),
        (["negatives", "--out", "a file/figures.json"], "a file/figures.json"),
    ],
)
def test_wrong_use_is_said_before_anything_is_measured(here, capsys, argv, said):
    (here / "a file").touch()
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(argv)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert said in told.err and not told.out
