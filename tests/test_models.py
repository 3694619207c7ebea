"""Networks against the official ones' numbers, by themselves and as the copy that attacks see."""

from functools import partial
from typing import get_args

import pytest
import torch

from models import ARCHS, CLASSIFIERS, GATES, build_model
from tests.golden_numbers import GoldenNetwork, assert_near, both_attacks, published_shapes
from tests.helpers import digits_network, digits_split
from utils.attacks import cross_entropy_over_heads, pgd40_heads, pgd_together
from utils.data.subject import percent, verdicts
from utils.losses import over_heads, pgd_loss
from utils.negatives import STRATEGIES
from utils.step import OBJECTIVES
from utils.system import settings
from utils.system.attack_copy import frozen

EPS = 8 / 255
RA = ["ResNet18_RA", "PreActResNet18_RA", "WRN34_10_RA", "WRN28_10_RA"]
PLAIN = ["ResNet18", "PreActResNet18", "WRN34_10"]


def slow_if(names, beginning):
    """Mark the names that begin in a certain way as slow."""
    params = []
    for name in names:
        param = name
        if name.startswith(beginning):
            param = pytest.param(name, marks=pytest.mark.slow)
        params.append(param)
    return params


@pytest.fixture(scope="module")
def golden():
    """Build each golden network once."""
    networks = {}
    return lambda name: networks.setdefault(name, GoldenNetwork(name))


@pytest.mark.parametrize("name", RA + PLAIN)
def test_state_dict_keys_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        state = GoldenNetwork.outline(name).state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    assert shapes == published_shapes(name)


@pytest.mark.parametrize("name", slow_if(RA + PLAIN, "WRN34"))
def test_logits_of_the_network_and_of_its_attack_copy(golden, name):
    g = golden(name)
    with frozen(g.model) as net, torch.no_grad():
        for network in (g.model, net):
            heads = network(g.x, heads=True)
            assert_near(heads.final, g["eval_logits"])
            assert torch.equal(network(g.x), heads.final)
            if name in RA:
                auxiliary = torch.stack(heads.auxiliary)
                assert_near(auxiliary, g["eval_aux"])
            else:
                assert heads.auxiliary == ()


@pytest.mark.parametrize("name", slow_if(RA + PLAIN, "WRN"))
def test_attack_objective_and_its_gradient(golden, name):
    g = golden(name)
    x = g.x.clone().requires_grad_()
    with frozen(g.model) as net:
        objective = cross_entropy_over_heads(net, g.y, 2)
        value = objective(x) / len(x)
        (gradient,) = torch.autograd.grad(value, x)
    if name in RA:
        assert_near(value.detach(), g["attack_loss"])
        expected = g["attack_grad"]
    else:
        expected = g["ce_grad"]
    difference = gradient - expected
    assert difference.norm() < 1e-2 * expected.norm()
    has_same_sign = gradient.sign() == expected.sign()
    assert has_same_sign.float().mean() > 0.999


@pytest.mark.parametrize("name", slow_if(RA, ("P", "W")))
def test_training_attacks_end_where_the_official_ones_do(golden, name):
    g = golden(name)
    batches = both_attacks(g.x, g.start, g.y, g.target_labels)
    with frozen(g.model) as net:
        attacked = pgd_together(net, batches, 2, EPS, 0.007, 10)
    for images, kind in zip(attacked, ("pgd_untargeted", "pgd_targeted"), strict=True):
        change = images - g.x
        assert change.abs().max() <= EPS + 1e-6
        assert images.min() >= 0
        assert images.max() <= 1
        is_equal = (images - g[kind]).abs() <= 1e-5
        assert is_equal.float().mean() > 0.75


@pytest.mark.parametrize("name", slow_if(RA, "WRN"))
def test_training_forward_statistics_and_gradients(golden, name):
    g = golden(name)
    model = GoldenNetwork(name).model.train()
    heads = model(g.x, g.y, heads=True)
    auxiliary = torch.stack(heads.auxiliary)
    criterion = partial(pgd_loss, labels=g.y)
    loss = over_heads(criterion, heads, auxiliary_weight=2)
    assert_near(heads.final, g["train_logits"])
    assert_near(auxiliary, g["train_aux"])
    assert_near(loss, g["train_loss"])
    loss.backward()

    means = []
    for key in g.arrays["bn_keys"]:
        mean = model.get_buffer(key)
        means.append(mean.double().sum().item())
    expected = g.arrays["bn_running_mean_sum"]
    assert means == pytest.approx(expected, rel=1e-3, abs=1e-3)

    names = [name for name, _ in model.named_parameters()]
    assert set(names) == set(g.arrays["grad_keys"])
    norms = []
    for key in g.arrays["grad_keys"]:
        gradient = model.get_parameter(key).grad
        norms.append(gradient.norm().item())
    assert norms == pytest.approx(g.arrays["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("arch", ["ResNet18", "PreActResNet18", "WRN-28-10"])
@pytest.mark.parametrize("image_size", [16, 32, 64])
@pytest.mark.parametrize("reverse_attention", [True, False])
def test_every_network_at_every_size(arch, image_size, reverse_attention):
    width = 1 if arch.startswith("WRN") else 8
    model = build_model(
        arch, 7, reverse_attention=reverse_attention, width=width, image_size=image_size
    ).eval()
    x = torch.rand(3, 3, image_size, image_size)
    heads = model(x, heads=True)
    assert heads.final.shape == (3, 7)
    assert len(heads.auxiliary) == (2 if reverse_attention else 0)
    assert heads.features.shape == (3, model.classifier.in_features)
    with frozen(model) as net:
        assert_near(net(x), heads.final.detach(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reverse_attention", "natural", "robust"), [(True, 95.28, 70.83), (False, 91.94, 59.44)]
)
def test_stored_networks_attain_what_their_table_says(reverse_attention, natural, robust):
    """Of tests/golden/README.md. On another CPU only images at the border can change sides."""
    split = digits_split()
    with frozen(digits_network(reverse_attention)) as net:
        right = verdicts(net, split, 100)
        attack = pgd40_heads(0.1, 0.02, 2.0, 1)
        robustly = verdicts(net, split, 100, attack, right)
    assert percent(right) == pytest.approx(natural, abs=0.6)
    assert percent(robustly) == pytest.approx(robust, abs=2)


@pytest.mark.parametrize(
    ("arch", "changes", "mentioned"),
    [
        ("ResNet50", {}, "ResNet18"),
        ("ResNet18", {"image_size": 20}, "multiple of 8"),
        ("PreActResNet18", {"image_size": 48}, "multiple of 32"),
        ("ResNet18", {"gate": "hard"}, "predicted"),
        ("ResNet18", {"classifier": "mine"}, "shared"),
    ],
)
def test_what_cannot_be_built_is_said(arch, changes, mentioned):
    with pytest.raises(ValueError, match=mentioned):
        build_model(arch, 10, **changes)


def test_settings_offer_what_the_registries_hold():
    strategies = get_args(settings.Strategy)
    pairs = [
        (settings.ARCHS, ARCHS),
        (get_args(settings.Gate), GATES),
        (get_args(settings.Classifier), CLASSIFIERS),
        (get_args(settings.Method), OBJECTIVES),
        ({name.removesuffix("_adv") for name in strategies}, STRATEGIES),
    ]
    for offered, held in pairs:
        assert set(offered) == set(held)
