"""Gates by their definitions, one block of reverse attention, and heads that answer."""

import json

import pytest
import torch

from models import build_model
from tests.helpers import (
    ATTACK,
    assert_equal,
    digits_checkpoint,
    execute,
    resume,
    state,
    train,
)
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


def test_own_classifiers_are_drawn_after_all_other_weights():
    shared = gated("label").state_dict()
    one = gated("label", classifier="own", ra_blocks=1).state_dict()
    two = gated("label", classifier="own").state_dict()
    names = ["block_classifiers.0.weight", "block_classifiers.0.bias"]
    assert list(one) == [*shared, *names]
    assert len(two) == len(one) + 2
    assert_equal([two[name] for name in shared], list(shared.values()))
    assert "block_classifiers.0.weight" not in gated("none", reverse_attention=False).state_dict()


def test_with_own_classifiers_every_head_is_a_view():
    x = torch.rand(3, 3, 16, 16)
    model = gated("none", classifier="own")
    heads = model(x, heads=True)
    of_model = views(True, 2.0, gate="none", classifier="own")
    assert "auxiliary 2" not in views(True, 2.0, gate="none")
    for i, logits in enumerate(heads.auxiliary):
        final, [(_, attacked)] = of_model[f"auxiliary {i + 1}"](model, x)
        assert_equal((final, attacked), (heads.final, logits))
    assert not torch.equal(heads.auxiliary[1], heads.final)


def test_a_run_with_own_classifiers_is_resumed_and_evaluated_as_such(short_runs, tmp_path):
    flags = ("--classifier=own", "--ra-blocks=1", "--awp=0.01", "--awp-warmup=0", "--ema=0.9")
    run = train(tmp_path, *flags, "--epochs=1")
    assert "-classifier-own-ra_blocks-1" in run.name
    before = state(run)["model"]["block_classifiers.0.weight"]
    after = state(resume(run, "--epochs=2"))["model"]["block_classifiers.0.weight"]
    assert before.shape == (10, 32)
    assert not torch.equal(before, after)

    attacks = ("--attacks=adaptive", "--n-examples=4", "--restarts=1", "--num-steps=1")
    search = ("--apgd-steps=5", "--device=cpu")
    assert execute(ATTACK, "--ckpt_url", run, *attacks, *search) == 0
    record = json.loads((run / "white_attack.json").read_text())
    network = record["network"]
    assert network["method"] == "ANCRA-TRADES, AWP 0.01, EMA 0.9, classifier own, RA blocks 1"
    assert network["classifier"] == "own"
    assert {"adaptive: auxiliary 1", "adaptive: smooth gates"} < set(record["attacks"])


def test_tensors_tell_own_classifiers(tmp_path, refused):
    file = tmp_path / "bare.pt"
    model = gated("label", classifier="own", ra_blocks=1)
    torch.save(model.state_dict(), file)
    loaded, info = load_model(file, image_size=16)
    assert (info["classifier"], info["ra_blocks"]) == ("own", 1)
    x = torch.rand(3, 3, 16, 16)
    assert_equal(loaded(x), model(x))

    words = ("classifier own, not shared", "leave the flag out")
    refused(ATTACK, "--ckpt_url", file, "--classifier=shared", mentions=words)
    refused(ATTACK, "--ckpt_url", file, "--no-ra", mentions=["reverse_attention True, not False"])
    other = digits_checkpoint(tmp_path / "shared.pt")
    words = ["classifier shared, not own"]
    refused(ATTACK, "--ckpt_url", other, "--classifier=own", mentions=words)
