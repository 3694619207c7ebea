"""--arch FILE.py:function: networks of the user's own code."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import (
    ANCRA,
    ATTACK,
    EVALUATE,
    ROOT,
    assert_equal,
    assert_same_run,
    execute,
    resume,
    train,
)
from utils.system.attack_copy import AttackCopy
from utils.system.checkpoints import load_model
from utils.system.errors import UsageError
from utils.system.foreign import build_own, source_of

FILE = ROOT / "tests/own_networks.py"
SHUFFLENET = ("--arch", f"{FILE}:shufflenet")
SHORT = ("--dataset=digits", "--epochs=1", "--limit-train=8", "--limit-test=8", "--device=cpu")
SHAPE = {
    "image_size": 16,
    "gate": "label",
    "classifier": "shared",
    "ra_blocks": 1,
    "reverse_attention": False,
}


def own(name, **changes):
    """Return a network of own_networks.py in eval mode."""
    return build_own(f"{FILE}:{name}", 10, **SHAPE | changes).eval()


def test_reverse_attention_weights_the_tokens_by_the_row_of_a_class():
    model = own("ViT", reverse_attention=True).double()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([4, 0, 9])
    with torch.no_grad():
        heads = model(x, labels, heads=True)
        pooled = model.network.features(x).mean(2)
        weight, bias = model.network.fc.parameters()
        weighted = pooled * weight[labels]
        expected = [pooled @ weight.T + bias, weighted @ weight.T + bias, weighted, pooled]
    actual = [heads.auxiliary[0], heads.final, heads.features, heads.unweighted]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ViT", "shufflenet"])
def test_a_plain_network_has_its_logits_and_features(name):
    """Features are what the last layer gets."""
    model = own(name, image_size=32)
    x = torch.rand(4, 3, 32, 32)
    heads = model(x, heads=True)
    assert torch.equal(heads.final, model.network(x))
    layer = model.network.fc
    assert torch.equal(F.linear(heads.features, layer.weight, layer.bias), heads.final)

    model.train()(x)  # BatchNorm's statistics change
    seen = AttackCopy(model).net(x)
    assert torch.allclose(seen, model.network.eval()(x), atol=1e-6)


@pytest.mark.usefixtures("short_runs")
def test_a_vit_is_trained_resumed_and_evaluated(tmp_path, monkeypatch):
    vit = ("--arch", f"{FILE}:ViT")
    flags = ("--ema=0.9", "--awp=0.01", "--awp-warmup=0", "--classifier=own")
    straight = train(tmp_path / "straight", *vit, *flags)
    monkeypatch.chdir(FILE.parent)
    parts = train(tmp_path / "parts", "--arch=own_networks.py:ViT", *flags, "--epochs=1")
    resume(parts, *vit, "--epochs=2")
    assert_same_run(straight, parts)
    assert "-digits-ViT-" in straight.name
    assert "ra_blocks" not in straight.name
    assert (straight / "train.log").read_text().endswith(f"--arch {FILE}:ViT\n")

    flags = (*EVALUATE, "--attacks=adaptive", "--restarts=1", "--apgd-steps=5")
    assert execute(ATTACK, "--ckpt_url", straight, *flags, *vit) == 0
    record = json.loads((straight / "white_attack.json").read_text())
    assert {"adaptive: auxiliary 1", "adaptive: over heads"} <= record["attacks"].keys()


@pytest.mark.usefixtures("short_runs")
def test_a_network_of_torchvision_is_trained_and_measured(here):
    flags = ("--no-ra", "--method=mart", "--image-size=32", "--model-dir=run")
    assert execute(ANCRA, *SHORT, *flags, *SHUFFLENET) == 0
    (run,) = here.glob("run*")
    flags = ("--target_label=all", "--n-examples=6", "--device=cpu", *SHUFFLENET)
    assert execute("feature_distance.py", "--model_dir", run, *flags) == 0
    assert (here / "distances/MART-ANC-shufflenet-digits-all.npz").exists()


MINE = """
import torch
open("ran", "w").close()
def net(num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))
"""


def test_code_that_only_a_checkpoint_names_is_not_run(here, trained):
    arch = f"{here}/mine.py:net"
    (here / "mine.py").write_text(MINE)
    weights = build_own(arch, 10, **SHAPE).state_dict()
    content = {"model": weights, "arch": arch, "source": source_of(arch), "num_classes": 10}
    torch.save(content | SHAPE, "net.pt")
    (here / "ran").unlink()
    del sys.modules["mine"]
    for other in (None, f"{FILE}:ViT"):
        with pytest.raises(UsageError, match=f"--arch {arch}"):
            load_model("net.pt", arch=other)
    assert not (here / "ran").exists()

    model, info = load_model("net.pt", arch=arch)
    assert_equal(model.state_dict(), weights)
    assert info["notes"] == []
    (here / "mine.py").write_text(MINE + "# edited\n")
    assert "has changed" in load_model("net.pt", arch=arch)[1]["notes"][0]
    del sys.modules["mine"]
    assert load_model(trained[2], arch=arch)[1]["arch"] == "ResNet18"  # needs none


@pytest.mark.parametrize(
    ("arch", "flags", "said"),
    [
        (f"{FILE}:seven", "--no-ra", "[2, 7]), not logits (2, 10)"),
        (f"{FILE}:seven", "--no-ra --image-size 32", "768"),
        (f"{FILE}:function", "--no-ra", "no torch.nn.Module"),
        (f"{FILE}:nothing", "--no-ra", "nothing"),
        (f"{FILE}:shufflenet", "", "add --no-ra"),
        (f"{FILE}:shufflenet", "--no-ra --width 3", "width"),
        (f"{FILE}:Doubled", "", "fc(features(x).flatten(2).mean(2))"),
        (f"{FILE}:ViT", "--ra-blocks 2", "--ra-blocks"),
        ("no.py:net", "", "No module named 'no'"),
        ("ResNet50", "", "ResNet50"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(refused, here, arch, flags, said):
    refused(ANCRA, *SHORT, "--arch", arch, *flags.split(), mentions=[said])
