"""Networks against the official ones' numbers, on the plain network and on the one that attacks see."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import ARCHS, build_model
from tests.golden_numbers import GoldenNetwork, assert_near, published_shapes
from tests.helpers import digits_network, digits_split
from utils import attacks
from utils.attacks import ToAttack, cross_entropy, cross_entropy_over_heads, linf_pgd_together, pgd40_heads
from utils.data.subject import percent, verdicts
from utils.losses import over_heads
from utils.step import away_from_labels, towards_labels
from utils.system.attack_copy import frozen

EPS = 8 / 255
RA = ["ResNet18_RA", "PreActResNet18_RA", "WRN34_10_RA", "WRN28_10_RA"]
PLAIN = ["ResNet18", "PreActResNet18", "WRN34_10"]


def slow_if(names, *beginnings):
    return [pytest.param(n, marks=pytest.mark.slow) if n.startswith(beginnings) else n for n in names]


@pytest.fixture(scope="module")
def golden():
    networks = {}
    return lambda name: networks.setdefault(name, GoldenNetwork(name))


def assert_same_gradient(value, expected):
    assert (value - expected).norm() / expected.norm() < 1e-2
    assert (value.sign() == expected.sign()).float().mean() > 0.999


def ce_over_heads(heads, labels):
    return over_heads(lambda logits: F.cross_entropy(logits, labels), heads, auxiliary_weight=2)


@pytest.mark.parametrize("name", RA + PLAIN)
def test_state_dict_keys_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        state = GoldenNetwork.outline(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(name)


@pytest.mark.parametrize("name", slow_if(RA + PLAIN, "WRN34"))
def test_logits_of_the_plain_and_the_frozen_network(golden, name):
    g = golden(name)
    with frozen(g.model) as net, torch.no_grad():
        for network in (g.model, net):
            heads = network(g.x, heads=True)
            assert_near(heads.final, g["eval_logits"], 1e-4)
            assert torch.equal(network(g.x), heads.final)
            if name.endswith("_RA"):
                assert_near(torch.stack(heads.auxiliary), g["eval_aux"], 1e-4)
            else:
                assert heads.auxiliary == ()


@pytest.mark.parametrize("name", slow_if(PLAIN, "WRN"))
def test_input_gradient_of_plain_networks(golden, name):
    g = golden(name)
    with frozen(g.model) as net:
        x = g.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(net, g.y)(x) / len(x), x)
    assert_same_gradient(gradient, g["ce_grad"])


@pytest.mark.parametrize("name", slow_if(RA, "WRN"))
def test_attack_objective_and_its_gradient(golden, name):
    g = golden(name)
    with frozen(g.model) as net:
        x = g.x.clone().requires_grad_()
        value = cross_entropy_over_heads(net, g.y, 2)(x) / len(x)
        (gradient,) = torch.autograd.grad(value, x)
    assert_near(value.detach(), g["attack_loss"], 1e-4)
    assert_same_gradient(gradient, g["attack_grad"])


@pytest.mark.parametrize(
    "name, small",
    [
        pytest.param(name, small, marks=pytest.mark.slow if slow else (), id=f"{name}-{how}")
        for name in RA
        for small, how in ((0, "apart"), (math.inf, "as-one-batch"))
        for slow in [name != "ResNet18_RA" or how == "apart"]
    ],
)
def test_training_attacks_end_where_the_official_ones_do(golden, name, small, monkeypatch):
    monkeypatch.setattr(attacks, "SMALL", small)
    g = golden(name)

    kinds = {"pgd_untargeted": (1, g.y), "pgd_targeted": (-1, (g.y + 1) % g.meta["classes"])}
    objectives = {1: away_from_labels, -1: towards_labels}
    batches = [ToAttack(g.x, g.start, objectives[sign], labels) for sign, labels in kinds.values()]
    with frozen(g.model) as net:
        both = linf_pgd_together(net, batches, 2, EPS, 0.007, 10)
        for (kind, (sign, labels)), found in zip(kinds.items(), both, strict=True):
            with torch.no_grad():
                values = [cross_entropy_over_heads(net, labels, 2)(images) for images in (found, g[kind], g.x)]
            assert_near(values[0], values[1], 1e-3)
            assert sign * (values[0] - values[2]) > 0
            assert (found - g.x).abs().max() <= EPS + 1e-6
            assert found.min() >= 0 and found.max() <= 1
            assert ((found - g[kind]).abs() <= 1e-5).float().mean() > 0.75


@pytest.mark.parametrize("name", slow_if(RA, "WRN"))
def test_training_forward_statistics_and_gradients(golden, name):
    g = golden(name)
    model = GoldenNetwork(name).model.train()
    heads = model(g.x, g.y, heads=True)
    assert_near(heads.final.detach(), g["train_logits"], 1e-4)
    assert_near(torch.stack(heads.auxiliary).detach(), g["train_aux"], 1e-4)
    loss = ce_over_heads(heads, g.y)
    assert_near(loss.detach(), g["train_loss"], 1e-4)
    loss.backward()
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    for key, expected in zip(g.arrays["bn_keys"], g.arrays["bn_running_mean_sum"], strict=True):
        assert float(buffers[key].double().sum()) == pytest.approx(expected, rel=1e-3, abs=1e-3), key
    assert set(g.arrays["grad_keys"]) == set(parameters)
    for key, expected in zip(g.arrays["grad_keys"], g.arrays["grad_norm"], strict=True):
        assert float(parameters[key].grad.double().norm()) == pytest.approx(expected, rel=1e-2), key


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("image_size", [16, 32, 64])
@pytest.mark.parametrize("reverse_attention", [True, False])
def test_every_network_at_every_size(arch, image_size, reverse_attention):
    width = 1 if arch.startswith("WRN") else 8
    model = build_model(arch, 7, reverse_attention=reverse_attention, width=width, image_size=image_size).eval()
    x = torch.rand(3, 3, image_size, image_size)
    heads = model(x, heads=True)
    assert heads.final.shape == (3, 7) and len(heads.auxiliary) == 2 * reverse_attention
    assert heads.features.shape == (3, model.classifier.in_features)
    with frozen(model) as net:
        assert_near(net(x), heads.final.detach(), 1e-5)


def test_gates():
    model = build_model("ResNet18", 5, width=8, image_size=16).eval()
    x, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    predicted = model(x, heads=True)
    by_prediction = model(x, tuple(a.argmax(1) for a in predicted.auxiliary), heads=True)
    assert torch.equal(predicted.final, by_prediction.final)
    by_label, by_one_hot = model(x, labels), model(x, F.one_hot(labels, 5).float())
    assert torch.allclose(by_label, by_one_hot, atol=1e-6)
    assert not torch.allclose(by_label, model(x, (labels, None)))
    assert torch.equal(model(x, (labels, labels)), by_label)


def test_frozen_leaves_the_model_as_it_was_whatever_happens():
    model = build_model("PreActResNet18", 5, width=8, image_size=16).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), frozen(model) as net:
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        net(torch.rand(2, 3, 16, 16))
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attacked", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["natural", "attacked"])
@pytest.mark.parametrize(("reverse_attention", "natural", "robust"), [(True, 95.28, 70.83), (False, 91.94, 59.44)])
def test_stored_networks_attain_what_their_table_says(reverse_attention, natural, robust, attacked):
    """tests/golden/README.md. Weights are fixed, so only images at the border can change sides on another CPU."""
    split = digits_split()
    with frozen(digits_network(reverse_attention)) as net:
        right = verdicts(net, split, 100)
        assert percent(right) == pytest.approx(natural, abs=0.6)
        if attacked:
            found = verdicts(net, split, 100, pgd40_heads(0.1, 0.02, 2.0, 1), right)
            assert percent(found) == pytest.approx(robust, abs=2)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="ResNet18, WRN-34-10, WRN-28-10, PreActResNet18"):
        build_model("ResNet50", 10)
    with pytest.raises(ValueError, match="multiple of 8"):
        build_model("ResNet18", 10, image_size=20)
    with pytest.raises(ValueError, match="16, 24, 32, 64"):
        build_model("PreActResNet18", 10, image_size=48)
