"""The method once more, written from its equations alone, in float64: whole training steps.

Nothing in the reference calls the losses, attacks or networks under test. It reads weights by their
published names, and does the rest by PyTorch's functions alone.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn import BatchNorm2d
from torch.nn.init import uniform_

from models import build_model
from tests.golden_numbers import assert_near
from utils.negatives import choose_negatives
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy
from utils.system.settings import Training
from utils.training.loop import attack_batch

METHODS = ("pgd", "trades", "mart")
CLASSES = 5
TOLERANCE = 1e-8  # relative; both sides are float64


def options(**changes):
    """Return settings whose attacks leave the ball, so that both clips are compared."""
    base = Training(num_steps=3, step_size=0.012)
    return replace(base, **changes)


def l2(images):
    """Return the L2 norm of each image, (N, 1, 1, 1)."""
    squares = images.square().sum((1, 2, 3), keepdim=True)
    return squares.sqrt()


# The objectives. Heads are a list of (N, C) logits, the final one first.


def over_list(criterion, *heads, weight):
    """Return a criterion of the first heads plus weight times the mean of those of the others."""
    final, *auxiliary = map(criterion, *heads)
    if not auxiliary:
        return final
    mean = sum(auxiliary) / len(auxiliary)
    return final + weight * mean


def probability(logits, labels):
    """Return the softmax of each row at its label, (N,)."""
    rows = torch.arange(len(labels))
    return logits.softmax(1)[rows, labels]


def ce(logits, labels):
    """Return the mean cross-entropy."""
    return -probability(logits, labels).log().mean()


def kl(natural, adversarial):
    """Return the mean KL divergence of adversarial from natural probabilities."""
    p = natural.softmax(1)
    q = adversarial.softmax(1)
    log_ratio = (p / q).log()
    divergence = (p * log_ratio).sum(1)
    return divergence.mean()


def boosted_ce(adversarial, labels):
    """Return MART's cross-entropy, which pushes the most probable other class down."""
    is_label = F.one_hot(labels, adversarial.shape[1]).bool()
    others = adversarial.softmax(1).masked_fill(is_label, 0)
    rival = others.amax(1)
    log_others = (1.0001 - rival + 1e-12).log()
    return ce(adversarial, labels) - log_others.mean()


def weighted_kl(natural, adversarial, labels):
    """Return MART's KL divergence, weighted by the doubt about natural examples."""
    p = natural.softmax(1)
    q = adversarial.softmax(1) + 1e-12
    log_ratio = (p / q).log()
    divergence = (p * log_ratio).sum(1)
    doubt = 1.0000001 - probability(natural, labels)
    return (divergence * doubt).mean()


def anc(natural, negative, alpha):
    """Return asymmetric negative contrast, the K negatives of each anchor in a row."""
    count = len(negative) // len(natural)
    anchors = torch.arange(len(negative)) // count
    probabilities = natural.softmax(1)[anchors]
    p, predicted = probabilities.max(1)
    q, negative_predicted = negative.softmax(1).max(1)
    of_negative = (p.detach() * q).sqrt()
    of_natural = (p * q.detach()).sqrt()
    similarity = alpha * of_negative + (1 - alpha) * of_natural
    agree = predicted == negative_predicted
    return (similarity * agree).mean()


def objective(natural, adversarial, negative, labels, o):
    """Return (loss, ANC over heads); natural and negative are None where nothing needs them."""
    over = partial(over_list, weight=o.cr_beta)
    labelled_ce = partial(ce, labels=labels)
    if o.method == "pgd":
        loss = over(labelled_ce, adversarial)
    elif o.method == "trades":
        divergence = over(kl, natural, adversarial)
        loss = over(labelled_ce, natural) + o.beta * divergence
    elif o.method == "mart":
        divergence = over(partial(weighted_kl, labels=labels), natural, adversarial)
        boosted = over(partial(boosted_ce, labels=labels), adversarial)
        loss = boosted + o.beta * divergence
    contrast = torch.zeros((), dtype=torch.float64)
    if negative is not None:
        contrast = over(partial(anc, alpha=o.alpha), natural, negative)
    return loss + o.zeta * contrast, contrast


# Training steps


class Reference:
    """A network as a table of tensors under their published names, and its forward pass by hand."""

    def __init__(self, model, arch, o):
        self.ra_blocks = 0 if o.no_ra else o.ra_blocks
        self.gate = o.gate
        self.preactivation = arch != "ResNet18"
        self.state = copy.deepcopy(model.state_dict())
        self.parameters = {}
        for name, _ in model.named_parameters():
            self.parameters[name] = self.state[name].requires_grad_()
        self.linear = "linear" if arch == "PreActResNet18" else "fc"
        self.last_norm = {"PreActResNet18": "bn", "WRN-28-10": "bn1"}.get(arch)
        self.window = 4 if arch == "PreActResNet18" else None
        self.blocks = {}  # strides by name; the first block of each stage but the first has 2
        for key in self.state:
            if key.endswith(".conv1.weight"):
                name = key.removesuffix("conv1.weight")
                self.blocks[name] = 2 if name.endswith(".0.") else 1
        first = next(iter(self.blocks))
        self.blocks[first] = 1

    def norm(self, name, z, train):
        """Apply a BatchNorm layer."""
        if train:
            self.state[f"{name}.num_batches_tracked"] += 1
        parts = ("running_mean", "running_var", "weight", "bias")
        names = [f"{name}.{part}" for part in parts]
        tensors = [self.state[name] for name in names]
        return F.batch_norm(z, *tensors, train)

    def norm_relu(self, name, z, train):
        """Apply a BatchNorm layer and a ReLU."""
        return self.norm(name, z, train).clamp(min=0)

    def conv(self, name, z, stride=1):
        """Apply a convolution that keeps the side, or divides it by the stride."""
        weight = self.state[name + ".weight"]
        margin = weight.shape[-1] // 2
        return F.conv2d(z, weight, stride=stride, padding=margin)

    def basic_block(self, name, z, stride, train):
        """Apply a block of ResNet-18."""
        out = self.conv(name + "conv1", z, stride)
        out = self.norm_relu(name + "bn1", out, train)
        out = self.conv(name + "conv2", out)
        out = self.norm(name + "bn2", out, train)
        if name + "shortcut.0.weight" in self.state:
            z = self.conv(name + "shortcut.0", z, stride)
            z = self.norm(name + "shortcut.1", z, train)
        return (out + z).clamp(min=0)

    def preactivation_block(self, name, z, stride, train):
        """Apply a block of PreActResNet-18 or of a WideResNet."""
        out = self.norm_relu(name + "bn1", z, train)
        for shortcut in (name + "shortcut.0", name + "convShortcut"):
            if shortcut + ".weight" in self.state:
                z = self.conv(shortcut, out, stride)
        out = self.conv(name + "conv1", out, stride)
        out = self.norm_relu(name + "bn2", out, train)
        return self.conv(name + "conv2", out) + z

    def pool(self, z):
        """Return the mean of each pooling cell of a map, (N, D * cells)."""
        side = z.shape[2]
        window = min(self.window or side, side)
        return F.avg_pool2d(z, window).flatten(1)

    def classify(self, z, name):
        """Return the logits of a map by a classifier; one of a block's own has no cells."""
        pooled = z.mean((2, 3))
        if name == self.linear:
            pooled = self.pool(z)
        weight = self.state[name + ".weight"]
        bias = self.state[name + ".bias"]
        return pooled @ weight.T + bias

    def weigh(self, z, name, logits, labels):
        """Return z'[n, d, i, j] = z[n, d, i, j] * W[c_n] at the pooling cell of (i, j)."""
        weight = self.state[name + ".weight"]
        if self.gate == "none":
            return z
        if self.gate == "soft":
            rows = logits.softmax(1) @ weight
        elif self.gate == "label" and labels is not None:
            rows = weight[labels]
        else:
            rows = weight[logits.argmax(1)]
        count, channels, side, _ = z.shape
        cells = int((rows.shape[1] // channels) ** 0.5)
        rows = rows.reshape(count, channels, cells, cells)
        cell_side = side // cells
        rows = rows.repeat_interleave(cell_side, 2)
        return z * rows.repeat_interleave(cell_side, 3)

    def forward(self, x, labels=None, train=False):
        """Return heads, the final one first; labels are for gates."""
        z = self.conv("conv1", x)
        block = self.preactivation_block
        if not self.preactivation:
            z = self.norm_relu("bn1", z, train)
            block = self.basic_block
        auxiliary = []
        left = len(self.blocks)
        for name, stride in self.blocks.items():
            z = block(name, z, stride, train)
            carries = left <= self.ra_blocks
            if self.last_norm and (carries or left == 1):
                z = self.norm_relu(self.last_norm, z, train)
            if carries:
                name = f"block_classifiers.{len(auxiliary)}"
                if name + ".weight" not in self.state:
                    name = self.linear
                logits = self.classify(z, name)
                auxiliary.append(logits)
                z = self.weigh(z, name, logits, labels)
            left -= 1
        return [self.classify(z, self.linear), *auxiliary]

    def attack(self, centre, o, generator, score):
        """Ascend a score of the heads in the ball and in [0, 1]."""
        noise = torch.randn(centre.shape, generator=generator)
        x = centre + 0.001 * noise
        for _ in range(o.num_steps):
            x = x.detach().requires_grad_()
            value = score(self.forward(x))
            (gradient,) = torch.autograd.grad(value, x)
            change = x.detach() - centre
            if o.norm == "L2":
                direction = gradient / l2(gradient)
                change += o.step_size * direction
                factor = o.epsilon / l2(change)
                change *= factor.clamp(max=1)
            else:
                change += o.step_size * gradient.sign()
                change = change.clamp(-o.epsilon, o.epsilon)
            x = (centre + change).clamp(0, 1)
        return x

    def attacks(self, x, labels, o, generator, epoch):
        """Return adversarial images, negatives and their labels; None where one class is all."""
        over = partial(over_list, weight=o.cr_beta)
        with torch.no_grad():
            natural = self.forward(x)
        chosen = None
        if not o.no_anc:
            strategy = "random"
            if epoch > 10:
                strategy = o.strategy.removesuffix("_adv")
            counts = o.sample_class_number, o.sample_number
            chosen = choose_negatives(natural[0], labels, strategy, generator, *counts)

        score = partial(over, kl, natural)
        if o.inner == "ce":
            score = partial(over, partial(ce, labels=labels))
        adversarial = self.attack(x, o, generator, score)
        if chosen is None:
            return adversarial, None, None
        rows = chosen.flatten()
        negative = x[rows]
        if o.strategy.endswith("_adv"):
            anchors = labels.repeat_interleave(chosen.shape[1])
            towards_anchors = partial(over, lambda logits: -ce(logits, anchors))
            negative = self.attack(negative, o, generator, towards_anchors)
        return adversarial, negative, labels[rows]

    def loss(self, x, labels, o, generator, epoch):
        """Return the attacked images of a training step (negatives or None), loss and contrast."""
        adversarial, negative, negative_labels = self.attacks(x, labels, o, generator, epoch)
        natural_heads = None
        negative_heads = None
        if o.method != "pgd" or negative is not None:
            natural_heads = self.forward(x, labels, True)
        adversarial_heads = self.forward(adversarial, labels, True)
        if negative is not None:
            negative_heads = self.forward(negative, negative_labels, True)
        loss, contrast = objective(natural_heads, adversarial_heads, negative_heads, labels, o)
        return adversarial, negative, loss, contrast


def network(arch, o, image_size, width):
    """Return a small confident network in float64, with BatchNorms unlike new ones."""
    torch.manual_seed(3)
    model = build_model(
        arch,
        CLASSES,
        reverse_attention=not o.no_ra,
        width=width,
        image_size=image_size,
        gate=o.gate,
        classifier=o.classifier,
        ra_blocks=o.ra_blocks,
    ).double()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            uniform_(module.weight, 0.7, 1.3)
            uniform_(module.bias, -0.2, 0.2)
            uniform_(module.running_mean, -0.2, 0.2)
            uniform_(module.running_var, 0.7, 1.3)
    with torch.no_grad():
        model.classifier.weight *= 4
    return model.train()


def batch(labels, image_size, seed):
    """Return images of different colours, many pixels at 0 and 1, where attacks are clipped."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(side):
        shape = (len(labels), 3, side, side)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    texture = uniform(image_size)
    colour = 2 * uniform(1) - 1
    x = (texture + colour).clamp(0, 1)
    return x, torch.tensor(labels)


def assert_same_steps(
    o, *, arch="ResNet18", width=4, labels=(0, 1, 2, 0, 1, 4), image_size=16, steps=2, epoch=1
):
    """Compare training steps of the repository with the reference; return the steps' contrasts."""
    model = network(arch, o, image_size, width)
    reference = Reference(model, arch, o)
    attack_copy = AttackCopy(model)
    options = {"lr": o.lr, "momentum": 0.9, "weight_decay": o.weight_decay}
    sgd = partial(torch.optim.SGD, **options)
    optimizer = sgd(model.parameters())
    reference_optimizer = sgd(reference.parameters.values())
    generator = torch.Generator().manual_seed(5)
    same_generator = torch.Generator().manual_seed(5)
    contrasts = []
    for step in range(steps):
        x, y = batch(labels, image_size, step)
        theirs = reference.loss(x, y, o, same_generator, epoch)
        adversarial, negative, loss, contrast = theirs
        attacked = attack_batch(attack_copy, x, y, o, generator, epoch)
        stats = training_loss(model, x, y, attacked, o)
        contrasts.append(contrast.item())
        optimizer.zero_grad()
        stats.loss.backward()
        reference_optimizer.zero_grad()
        loss.backward()

        assert (attacked.negative is None) == (negative is None)
        if negative is not None:
            assert_near(attacked.negative, negative, TOLERANCE)
        pairs = [
            (attacked.adversarial, adversarial),
            (stats.loss, loss),
            (stats.contrast, contrast),
        ]
        for name, parameter in model.named_parameters():
            expected = reference.parameters[name]
            pair = (parameter.grad, expected.grad)
            pairs.append(pair)
        optimizer.step()
        reference_optimizer.step()
        for name, tensor in model.state_dict().items():
            pairs.append((tensor, reference.state[name]))
        for pair in pairs:
            assert_near(*pair, TOLERANCE)
    assert torch.equal(generator.get_state(), same_generator.get_state())
    return contrasts


@pytest.mark.parametrize("no_anc", [False, True], ids=["anc", "without-anc"])
@pytest.mark.parametrize("no_ra", [False, True], ids=["ra", "plain"])
@pytest.mark.parametrize("arch", ["ResNet18", "PreActResNet18"])
@pytest.mark.parametrize("method", METHODS)
def test_training_steps(method, arch, no_ra, no_anc):
    o = options(method=method, no_ra=no_ra, no_anc=no_anc)
    contrasts = assert_same_steps(o, arch=arch)
    assert any(contrasts) != no_anc


OTHER_SETTINGS = {
    "kl": ({"inner": "kl"}, {}),
    "L2": ({"norm": "L2", "epsilon": 0.4, "step_size": 0.3}, {}),
    "not attacked": ({"strategy": "random", "alpha": 0.5}, {}),
    "warm-up": ({"strategy": "hard_adv"}, {"arch": "PreActResNet18", "epoch": 10}),
    "hard": ({"strategy": "hard_adv", "alpha": 0.0}, {"arch": "PreActResNet18", "epoch": 11}),
    "soft": ({"strategy": "soft"}, {"epoch": 11}),
    "two negatives": ({"sample_class_number": 2, "method": "mart", "alpha": 0.5}, {}),
    "wide": ({"method": "pgd"}, {"arch": "WRN-28-10", "width": 1}),
    "one block": ({"ra_blocks": 1}, {"arch": "PreActResNet18"}),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_training_steps_of_other_settings(name):
    changes, setup = OTHER_SETTINGS[name]
    o = options(**changes)
    assert any(assert_same_steps(o, **setup))


@pytest.mark.parametrize("classifier", ["shared", "own"])
@pytest.mark.parametrize(
    ("gate", "setup"),
    [
        ("label", {"arch": "PreActResNet18", "width": 2, "image_size": 64}),
        ("predicted", {}),
        ("soft", {"arch": "PreActResNet18", "width": 2, "image_size": 64}),
        ("none", {}),
    ],
)
def test_training_steps_of_gates_and_classifiers(gate, setup, classifier):
    o = options(num_steps=2, gate=gate, classifier=classifier, alpha=0.5)
    assert any(assert_same_steps(o, **setup))


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_of_a_batch_of_one_class(method):
    o = options(method=method)
    contrasts = assert_same_steps(o, labels=(2, 2, 2, 2), steps=1)
    assert not any(contrasts)
