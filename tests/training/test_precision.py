"""Runs in bfloat16, in TF32 and through torch.compile."""

import json
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._pytree import tree_leaves

import utils.training.loop as training
from tests.golden_numbers import assert_near
from tests.helpers import some_batch, state, train
from utils import attacks
from utils.data.subject import right_or_not
from utils.system.attack_copy import Bfloat16
from utils.system.errors import UsageError

pytestmark = pytest.mark.usefixtures("short_runs")

ONE_EPOCH = ("--epochs", 1)


def test_a_run_in_bfloat16_keeps_float32_weights_and_verdicts(tmp_path, monkeypatch):
    verdicts = MagicMock(wraps=training.verdicts)
    monkeypatch.setattr(training, "verdicts", verdicts)
    run = train(tmp_path, *ONE_EPOCH, "--amp", "bf16")
    assert run.name.endswith("-precision-bf16")
    assert json.loads((run / "run.json").read_text())["precision"].startswith("bfloat16")
    assert verdicts.call_count > 0
    for (net, *_), _ in verdicts.call_args_list:
        assert not isinstance(net.judge, Bfloat16)
        dtypes = {parameter.dtype for parameter in net.judge.parameters()}
        assert dtypes == {torch.float32}
    content = state(run)
    tensors = tree_leaves([content["model"], content["optimizer"]["state"]])
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("default", (True, False)), ("fp32", (False, False)), ("tf32", (True, True))],
)
def test_attacks_search_in_the_precision_asked_for_and_verdicts_are_float32(
    tmp_path, monkeypatch, precision, expected
):
    """By the switches of a CUDA device, which are set on a CPU, too."""

    def switches():
        both = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return tuple(switch.fp32_precision == "tf32" for switch in both)

    noted = {"attack": set(), "pgd": set(), "verdict": set()}

    def noting(name, real):
        def patched(*args):
            noted[name].add(switches())
            return real(*args)

        return patched

    monkeypatch.setattr(training, "attack_batch", noting("attack", training.attack_batch))
    monkeypatch.setattr(attacks, "projected_ascent", noting("pgd", attacks.projected_ascent))
    train(tmp_path, *ONE_EPOCH, "--precision", precision)
    network = noting("verdict", lambda x: x.flatten(1)[:, :4])
    x, labels = some_batch(4)
    right_or_not(network, None, x, labels, torch.arange(4))
    assert noted == {"attack": {expected}, "pgd": {expected}, "verdict": {(False, False)}}
    assert switches() == (True, False)


def test_no_compilation_is_wrong_use_before_anything_is_written(tmp_path, monkeypatch):
    def fail(function, **kwargs):
        raise RuntimeError("no compiler\nand much else")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match="no compiler"):
        train(tmp_path, "--compile")
    assert not list(tmp_path.glob("run*"))


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_up_to_rounding(tmp_path):
    """Of one step; after it the signs of attacks amplify rounding."""
    from torch._dynamo.utils import counters

    flags = ("--limit-train", 10, "--eval-interval", 9, *ONE_EPOCH)
    eager = train(tmp_path / "1", *flags)
    counters.clear()
    compiled = train(tmp_path / "2", *flags, "--compile")
    assert eager.name == compiled.name  # what is computed is the same
    expected = state(compiled)["model"]
    for key, value in state(eager)["model"].items():
        assert_near(expected[key].double(), value.double(), 1e-4)
    graphs = counters["stats"]["unique_graphs"]
    train(tmp_path / "2", *flags, "--epochs", 2, "--resume")  # a second step needs no other graphs
    assert counters["stats"]["unique_graphs"] == graphs > 0
