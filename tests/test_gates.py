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
    digits_split,
    execute,
    state,
    train,
)
from utils.data.datasets import as_input
from utils.evaluation.adaptive import views
from utils.system.checkpoints import load_model


def gated(gate, arch="ResNet18", **options):
    """Return the same small network with any gate."""
    torch.manual_seed(0)
    return build_model(arch, 4, width=4, image_size=16, gate=gate, **options).eval()


def test_gates_that_a_forward_is_given():
    model = gated("label")
    x = torch.rand(4, 3, 16, 16)
    labels = torch.arange(4)
    heads = model(x, heads=True)
    predictions = tuple(logits.argmax(1) for logits in heads.auxiliary)
    assert torch.equal(heads.final, model(x, predictions))
    by_label = model(x, labels)
    one_hot = F.one_hot(labels, 4).float()
    assert torch.allclose(by_label, model(x, (one_hot, one_hot)), atol=1e-6)
    assert torch.equal(by_label, model(x, (labels, labels)))
    assert not torch.allclose(by_label, model(x, (labels, None)))


def test_any_head_may_answer():
    x = torch.rand(3, 3, 16, 16)
    model = gated("label")
    heads = model(x, heads=True)
    for name, logits in zip(["auxiliary1", "auxiliary2"], heads.auxiliary, strict=True):
        model.predict = name
        assert_equal(model(x), logits)
        assert_equal(model(x, heads=True).final, heads.final)
        for view in views(True, 2.0, predict=name).values():
            answer, _ = view(model, x)
            assert_equal(answer, logits)


def test_an_evaluation_judges_by_the_head_that_answers(tmp_path, refused):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--n-examples=8", "--num-steps=2", "--attacks=natural,pgd", "--device=cpu")
    assert execute(ATTACK, "--ckpt_url", file, *flags, "--predict=auxiliary1") == 0
    record = json.loads((tmp_path / "white_attack.json").read_text())
    images = as_input(digits_split(count=8).images)
    logits = digits_network()(images, heads=True).auxiliary[0]
    assert_equal(load_model(file, predict="auxiliary1")[0](images), logits)
    assert record["predicted"]["natural"] == logits.argmax(1).tolist()

    plain = digits_checkpoint(tmp_path / "plain.pt", reverse_attention=False)
    refused(ATTACK, "--ckpt_url", plain, "--predict=auxiliary1", mentions=["final"])


def test_own_classifiers_are_drawn_after_all_other_weights():
    shared = gated("label").state_dict()
    one = gated("label", classifier="own", ra_blocks=1).state_dict()
    two = gated("label", classifier="own").state_dict()
    assert list(one) == [*shared, "block_classifiers.0.weight", "block_classifiers.0.bias"]
    assert len(two) == len(one) + 2
    assert_equal([two[name] for name in shared], list(shared.values()))


def test_with_own_classifiers_every_head_is_a_view():
    x = torch.rand(3, 3, 16, 16)
    model = gated("none", classifier="own")
    heads = model(x, heads=True)
    assert not torch.equal(heads.auxiliary[1], heads.final)
    assert "auxiliary 2" not in views(True, 2.0, gate="none")
    with_own = views(True, 2.0, gate="none", classifier="own")
    for name, logits in zip(["auxiliary 1", "auxiliary 2"], heads.auxiliary, strict=True):
        view = with_own[name]
        answer, [(_, attacked)] = view(model, x)
        assert_equal(answer, heads.final)
        assert_equal(attacked, logits)


def test_a_run_with_own_classifiers_is_evaluated_as_such(short_runs, tmp_path):
    flags = ("--classifier=own", "--ra-blocks=1", "--awp=0.01", "--awp-warmup=0", "--ema=0.9")
    run = train(tmp_path, *flags, "--epochs=1")
    assert "-classifier-own-ra_blocks-1" in run.name
    assert state(run)["model"]["block_classifiers.0.weight"].shape == (10, 32)

    attacks = ("--attacks=adaptive", "--n-examples=4", "--restarts=1", "--num-steps=1")
    search = ("--apgd-steps=5", "--device=cpu")
    assert execute(ATTACK, "--ckpt_url", run, *attacks, *search) == 0
    record = json.loads((run / "white_attack.json").read_text())
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
        (file, "--classifier=shared", ["classifier own, not shared", "leave the flag out"]),
        (file, "--no-ra", ["reverse_attention True, not False"]),
        (other, "--classifier=own", ["classifier shared, not own"]),
    ):
        refused(ATTACK, "--ckpt_url", checkpoint, flag, mentions=words)
