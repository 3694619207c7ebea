"""Gates by their definitions, one block of reverse attention, and heads that answer."""

import json

import pytest
import torch

from models import build_model
from tests.helpers import ATTACK, assert_equal, digits_checkpoint, execute
from utils.data.datasets import as_input, load_split
from utils.evaluation.adaptive import views
from utils.system.checkpoints import load_model


def gated(gate, arch="ResNet18", **options):
    """Return the same small network with any gate."""
    torch.manual_seed(0)
    return build_model(arch, 4, width=4, image_size=16, gate=gate, **options).eval()


@pytest.mark.parametrize("gate", ["predicted", "soft", "none"])
def test_gates_do_not_see_labels(gate):
    x = torch.rand(5, 3, 16, 16)
    model = gated(gate)
    by_label = model(x, torch.arange(5) % 4, heads=True)
    assert_equal(by_label.final, model(x))
    assert torch.equal(gated("label")(x), model(x)) == (gate == "predicted")


def test_no_gate_weights_nothing():
    heads = gated("none")(torch.rand(5, 3, 16, 16), heads=True)
    assert_equal(heads.features, heads.unweighted)
    assert_equal(heads.final, heads.auxiliary[1])


def test_the_soft_gate_weights_by_softmax_and_passes_gradients():
    x = torch.rand(5, 3, 16, 16)
    model = gated("soft")
    heads = model(x, heads=True)
    probabilities = tuple(logits.softmax(1) for logits in heads.auxiliary)
    assert torch.allclose(model(x, probabilities), heads.final, atol=1e-6)
    (gradient,) = torch.autograd.grad(heads.final.sum(), model.fc.weight)
    assert gradient.abs().sum() > 0


def test_one_block_weights_the_last_map_alone():
    x = torch.rand(3, 3, 16, 16)
    one = gated("label", "PreActResNet18", ra_blocks=1)
    plain = gated("label", "PreActResNet18", reverse_attention=False)
    plain.load_state_dict(one.state_dict())
    (auxiliary,) = one(x, heads=True).auxiliary
    assert torch.allclose(auxiliary, plain(x), atol=1e-6)  # its map comes before any weighting


def test_any_head_may_answer():
    x = torch.rand(3, 3, 16, 16)
    model = gated("label")
    heads = model(x, heads=True)
    for i, name in enumerate(["auxiliary1", "auxiliary2"]):
        model.predict = name
        assert_equal(model(x), heads.auxiliary[i])
        assert_equal(model(x, heads=True).final, heads.final)
        for view in views(True, 2.0, predict=name).values():
            assert_equal(view(model, x)[0], heads.auxiliary[i])


def test_an_evaluation_judges_by_the_head_that_answers(tmp_path):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--n-examples=8", "--num-steps=2", "--attacks=natural,pgd", "--device=cpu")
    assert execute(ATTACK, "--ckpt_url", file, *flags, "--predict=auxiliary1") == 0
    record = json.loads((tmp_path / "white_attack.json").read_text())
    images = as_input(load_split("digits", "test", "", 16, 8).images)
    expected = load_model(file)[0](images, heads=True).auxiliary[0].argmax(1)
    assert record["predicted"]["natural"] == expected.tolist()
    assert torch.equal(load_model(file, predict="auxiliary1")[0](images).argmax(1), expected)
