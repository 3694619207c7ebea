"""Heads that answer, and classifiers of their own; tests/test_reference.py has every gate."""

import json

import torch
import torch.nn.functional as F

from models import build_model
from tests.helpers import (
    ATTACK,
    assert_equal,
    digits_checkpoint,
    digits_network,
    execute,
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


def evaluated(folder, *flags):
    """Evaluate a run's best network, and return the record."""
    assert execute(ATTACK, "--ckpt_url", folder, *flags, "--device=cpu") == 0
    return json.loads((folder / "white_attack.json").read_text())


def test_gates_that_a_forward_is_given():
    model = gated("label")
    x = torch.rand(4, 3, 16, 16)
    labels = torch.arange(4)
    heads = model(x, heads=True)
    first, second = heads.auxiliary
    predictions = (first.argmax(1), second.argmax(1))
    assert_equal(model(x, predictions), heads.final)
    by_label = model(x, labels)
    one_hot = F.one_hot(labels, 4).float()
    by_one_hot = model(x, (one_hot, one_hot))
    assert torch.allclose(by_label, by_one_hot, atol=1e-6)
    assert_equal(model(x, (labels, labels)), by_label)
    by_one_label = model(x, (labels, None))
    assert not torch.allclose(by_label, by_one_label)


def test_any_head_may_answer():
    x = torch.rand(3, 3, 16, 16)
    model = gated("label")
    heads = model(x, heads=True)
    for number, logits in enumerate(heads.auxiliary, 1):
        name = f"auxiliary{number}"
        model.predict = name
        assert_equal(model(x), logits)
        assert_equal(model(x, heads=True), heads)
        for view in views(True, 2.0, predict=name).values():
            answer, _ = view(model, x)
            assert_equal(answer, logits)


def test_an_evaluation_judges_by_the_head_that_answers(tmp_path, refused):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--n-examples=8", "--num-steps=2", "--attacks=natural,pgd")
    record = evaluated(tmp_path, *flags, "--predict=auxiliary1")
    split = load_split("digits", "test", "", 16, 8)
    images = as_input(split.images)
    heads = digits_network()(images, heads=True)
    logits = heads.auxiliary[0]
    model, _ = load_model(file, predict="auxiliary1")
    assert_equal(model(images), logits)
    assert record["predicted"]["natural"] == logits.argmax(1).tolist()

    plain = digits_checkpoint(tmp_path / "plain.pt", reverse_attention=False)
    refused(ATTACK, "--ckpt_url", plain, "--predict=auxiliary1", mentions=["final"])


def test_own_classifiers_are_drawn_after_all_other_weights():
    shared = gated("label").state_dict()
    one = gated("label", classifier="own", ra_blocks=1).state_dict()
    two = gated("label", classifier="own").state_dict()
    added = ["block_classifiers.0.weight", "block_classifiers.0.bias"]
    assert list(one) == [*shared, *added]
    assert len(two) == len(one) + 2
    for name, tensor in shared.items():
        assert_equal(two[name], tensor)


def test_with_own_classifiers_every_head_is_a_view():
    x = torch.rand(3, 3, 16, 16)
    model = gated("none", classifier="own")
    heads = model(x, heads=True)
    assert not torch.equal(heads.auxiliary[1], heads.final)
    assert "auxiliary 2" not in views(True, 2.0, gate="none")
    with_own = views(True, 2.0, gate="none", classifier="own")
    for number, logits in enumerate(heads.auxiliary, 1):
        view = with_own[f"auxiliary {number}"]
        answer, attacked_heads = view(model, x)
        assert_equal(answer, heads.final)
        ((_, attacked),) = attacked_heads
        assert_equal(attacked, logits)


def test_a_run_with_own_classifiers_is_evaluated_as_such(short_runs, tmp_path):
    flags = ("--classifier=own", "--ra-blocks=1", "--awp=0.01", "--awp-warmup=0", "--ema=0.9")
    run = train(tmp_path, *flags, "--epochs=1")
    assert "-classifier-own-ra_blocks-1" in run.name
    weights = state(run)["model"]
    assert weights["block_classifiers.0.weight"].shape == (10, 32)

    flags = ("--attacks=adaptive", "--n-examples=4", "--restarts=1", "--apgd-steps=5")
    record = evaluated(run, *flags)
    method = "ANCRA-TRADES, AWP 0.01, EMA 0.9, classifier own, RA blocks 1"
    assert record["network"]["method"] == method
    assert {"adaptive: auxiliary 1", "adaptive: smooth gates"} < set(record["attacks"])


def test_tensors_tell_own_classifiers(tmp_path, refused):
    file = tmp_path / "bare.pt"
    model = gated("label", classifier="own", ra_blocks=1)
    torch.save(model.state_dict(), file)
    loaded, info = load_model(file, image_size=16)
    assert (info["classifier"], info["ra_blocks"]) == ("own", 1)
    x = torch.rand(3, 3, 16, 16)
    assert_equal(loaded(x), model(x))

    other = digits_checkpoint(tmp_path / "shared.pt")
    for checkpoint, flag, words in (
        (file, "--classifier=shared", "classifier own, not shared"),
        (file, "--no-ra", "reverse_attention True, not False"),
        (other, "--classifier=own", "block_classifiers"),
    ):
        refused(ATTACK, "--ckpt_url", checkpoint, flag, mentions=[words])
