"""The method once more, written from its equations alone, in float64: losses and whole training steps against it.

Nothing in the reference calls the losses, attacks or networks under test. It reads weights by their published names and
does the rest by hand: softmax and logarithms, BatchNorm, reverse attention, the attacks' steps, momentum.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import Heads, build_model
from utils import attacks
from utils.negatives import choose_negatives
from utils.step import Attacked, training_loss
from utils.system.attack_copy import AttackCopy
from utils.system.settings import METHODS, Training
from utils.training.loop import attack_batch

CLASSES = 5
TIGHT = 1e-8  # relative; both sides are float64
CLEAR = 1e-3


def options(**changes):
    """Three attack steps leave the ball, as ten of the published size do: both clips are part of what is compared."""
    return replace(Training(), **{"num_steps": 3, "step_size": 0.012} | changes)


def deviation(value, expected):
    """Largest difference, relative to the largest expected entry."""
    value, expected = value.detach(), expected.detach()
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    difference = (value - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-12)


# The objectives, example by example. Heads are a list of (N, C) logits, the final one first.


def probabilities(logits):
    exponentials = torch.exp(logits)
    return exponentials / exponentials.sum(-1, keepdim=True)


def over_list(criterion, *heads, weight):
    final, *auxiliary = [criterion(*logits) for logits in zip(*heads, strict=True)]
    return final + weight * sum(auxiliary) / len(auxiliary) if auxiliary else final


def ce(logits, labels):
    q = probabilities(logits)
    return sum(-torch.log(q[n, labels[n]]) for n in range(len(q))) / len(q)


def kl(natural, adversarial):
    p, q = probabilities(natural), probabilities(adversarial)
    return sum(p[n, c] * torch.log(p[n, c] / q[n, c]) for n in range(len(p)) for c in range(p.shape[1])) / len(p)


def boosted_ce(adversarial, labels):
    q = probabilities(adversarial)
    total = 0
    for n in range(len(q)):
        others = [c for c in range(q.shape[1]) if c != labels[n]]
        rival = max(others, key=lambda c: q[n, c].item())
        total = total - torch.log(q[n, labels[n]]) - torch.log(1.0001 - q[n, rival] + 1e-12)
    return total / len(q)


def weighted_kl(natural, adversarial, labels):
    p, q = probabilities(natural), probabilities(adversarial)
    total = 0
    for n in range(len(p)):
        divergence = sum(p[n, c] * (torch.log(p[n, c]) - torch.log(q[n, c] + 1e-12)) for c in range(p.shape[1]))
        total = total + divergence * (1.0000001 - p[n, labels[n]])
    return total / len(p)


def anc(natural, negative, alpha, wrong=""):
    p, q = probabilities(natural), probabilities(negative)
    per_anchor = len(q) // len(p)
    total = torch.zeros((), dtype=p.dtype)
    for n in range(len(p)):
        for k in range(per_anchor):
            pair = k * len(p) + n if wrong == "negatives ordered by turn" else n * per_anchor + k
            a, g = p[n].argmax(), q[pair].argmax()
            if a == g:
                anchor, other = p[n, a], q[pair, g]
                frozen = anchor if wrong == "natural side not detached" else anchor.detach()
                total = total + alpha * torch.sqrt(frozen * other)
                total = total + (1 - alpha) * torch.sqrt(anchor * other.detach())
    return total / len(q)


def objective(natural, adversarial, negative, labels, o, wrong=""):
    """(loss, ANC over heads) of the method; natural and negative may be None where nothing needs them."""
    weight = 1 if wrong == "auxiliary weight 1" else o.cr_beta
    if o.method == "pgd":
        loss = over_list(lambda a: ce(a, labels), adversarial, weight=weight)
    elif o.method == "trades":
        loss = over_list(lambda n: ce(n, labels), natural, weight=weight)
        loss = loss + o.beta * over_list(kl, natural, adversarial, weight=weight)
    else:
        loss = over_list(lambda a: boosted_ce(a, labels), adversarial, weight=weight)
        loss = loss + o.beta * over_list(lambda n, a: weighted_kl(n, a, labels), natural, adversarial, weight=weight)
    contrast = torch.zeros((), dtype=torch.float64)
    if negative is not None:
        contrast = over_list(lambda n, g: anc(n, g, o.alpha, wrong), natural, negative, weight=weight)
    return loss + o.zeta * contrast, contrast


# 1. Losses over heads and their gradients, on random logits.


def random_logits(auxiliary, per_anchor, anchors=8):
    """Logits of three batches, `1 + auxiliary` heads each: classes and confidences vary, and class 0 is frequent."""
    generator = torch.Generator().manual_seed(10 * auxiliary + per_anchor)
    sizes = {"natural": anchors, "adversarial": anchors, "negative": anchors * per_anchor}
    frequent = torch.tensor([1.5, 0, 0, 0])

    def head(size):
        return 2 * torch.randn(size, 4, generator=generator, dtype=torch.float64) + frequent

    logits = {side: [head(size) for _ in range(1 + auxiliary)] for side, size in sizes.items()}
    return logits, torch.randint(4, (anchors,), generator=generator)


def loss_and_gradients(logits, compute):
    leaves = {side: [head.clone().requires_grad_() for head in heads] for side, heads in logits.items()}
    loss, contrast = compute(leaves)
    flat = [head for heads in leaves.values() for head in heads]
    return [loss, contrast, *torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)]


def repository_loss(labels, o, per_anchor):
    """The repository's loss for logits given beforehand: a stub answers its forwards, and checks their gates."""
    names = {"natural": torch.tensor(0), "adversarial": torch.tensor(1), "negative": torch.tensor(2)}
    gates = {"natural": labels, "adversarial": labels, "negative": labels.repeat_interleave(per_anchor) - 1}

    def compute(leaves):
        calls = []

        def model(x, gate, heads):
            side = list(names)[int(x)]
            calls.append(side)
            assert heads
            assert torch.equal(gate, gates[side])
            final, *auxiliary = leaves[side]
            return Heads(final, tuple(auxiliary), torch.empty(0))

        attacked = Attacked(names["adversarial"], names["negative"], gates["negative"])
        terms = training_loss(model, names["natural"], labels, attacked, o)
        assert calls == ["natural", "adversarial", "negative"]
        return terms.loss, terms.contrast

    return compute


def reference_loss(labels, o, wrong=""):
    return lambda leaves: objective(leaves["natural"], leaves["adversarial"], leaves["negative"], labels, o, wrong)


@pytest.mark.parametrize("auxiliary", [0, 2])
@pytest.mark.parametrize("per_anchor", [1, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_loss_over_heads_and_its_gradients(method, alpha, per_anchor, auxiliary):
    logits, labels = random_logits(auxiliary, per_anchor)
    o = options(method=method, alpha=alpha)
    expected = loss_and_gradients(logits, reference_loss(labels, o))
    actual = loss_and_gradients(logits, repository_loss(labels, o, per_anchor))
    for natural, negative in zip(logits["natural"], logits["negative"], strict=True):
        same = natural.argmax(1).repeat_interleave(per_anchor) == negative.argmax(1)
        assert same.any()
        assert not same.all()
    assert max(map(deviation, actual, expected)) < TIGHT


@pytest.mark.parametrize("method", METHODS)
def test_loss_of_sharp_predictions(method):
    """Probabilities far below the 1e-12 inside the logarithm of MART's KL."""
    logits, labels = random_logits(2, 1)
    logits = {side: [10 * head for head in heads] for side, heads in logits.items()}
    o = options(method=method)
    expected = loss_and_gradients(logits, reference_loss(labels, o))
    actual = loss_and_gradients(logits, repository_loss(labels, o, 1))
    assert max(map(deviation, actual, expected)) < TIGHT


@pytest.mark.parametrize(
    ("wrong", "per_anchor"),
    [("auxiliary weight 1", 1), ("natural side not detached", 1), ("negatives ordered by turn", 2)],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_loss_is_told_apart(method, wrong, per_anchor):
    logits, labels = random_logits(2, per_anchor)
    o = options(method=method)
    expected = loss_and_gradients(logits, reference_loss(labels, o, wrong))
    actual = loss_and_gradients(logits, repository_loss(labels, o, per_anchor))
    assert max(map(deviation, actual, expected)) > CLEAR


# 2. Whole training steps.


class Reference:
    """A network as a table of tensors under their published names, and its forward pass by hand."""

    def __init__(self, model, arch, attention):
        self.attention, self.preactivation = attention, arch != "ResNet18"
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.parameters = {name: self.state[name].requires_grad_() for name, _ in model.named_parameters()}
        self.momenta = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.linear = "linear" if arch == "PreActResNet18" else "fc"
        self.last_norm = {"PreActResNet18": "bn", "WRN-28-10": "bn1"}.get(arch)
        self.window = 4 if arch == "PreActResNet18" else None
        if arch == "WRN-28-10":
            stages = [[f"block{s}.layer.{b}." for b in range(4)] for s in (1, 2, 3)]
        else:
            stages = [[f"layer{s}.{b}." for b in range(2)] for s in (1, 2, 3, 4)]
        self.blocks = [
            (name, 2 if stage and not block else 1) for stage, names in enumerate(stages) for block, name in enumerate(names)
        ]

    def norm(self, name, z, train):
        """BatchNorm2d with momentum 0.1; the running variance is unbiased."""
        s = self.state
        mean, variance = s[name + ".running_mean"], s[name + ".running_var"]
        if train:
            count = z.shape[0] * z.shape[2] * z.shape[3]
            mean = z.sum((0, 2, 3)) / count
            variance = ((z - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
            unbiased = variance.detach() * count / (count - 1)
            s[name + ".running_mean"] = 0.9 * s[name + ".running_mean"] + 0.1 * mean.detach()
            s[name + ".running_var"] = 0.9 * s[name + ".running_var"] + 0.1 * unbiased
            s[name + ".num_batches_tracked"] = s[name + ".num_batches_tracked"] + 1
        scale = s[name + ".weight"] / (variance + 1e-5) ** 0.5
        return (z - mean[:, None, None]) * scale[:, None, None] + s[name + ".bias"][:, None, None]

    def conv(self, name, z, stride=1):
        weight = self.state[name + ".weight"]
        return F.conv2d(z, weight, stride=stride, padding=weight.shape[-1] // 2)

    def basic_block(self, name, z, stride, train):
        out = self.norm(name + "bn1", self.conv(name + "conv1", z, stride), train).clamp(min=0)
        out = self.norm(name + "bn2", self.conv(name + "conv2", out), train)
        if name + "shortcut.0.weight" in self.state:
            z = self.norm(name + "shortcut.1", self.conv(name + "shortcut.0", z, stride), train)
        return (out + z).clamp(min=0)

    def preactivation_block(self, name, z, stride, train):
        out = self.norm(name + "bn1", z, train).clamp(min=0)
        for shortcut in (name + "shortcut.0", name + "convShortcut"):
            if shortcut + ".weight" in self.state:
                z = self.conv(shortcut, out, stride)
        out = self.norm(name + "bn2", self.conv(name + "conv1", out, stride), train).clamp(min=0)
        return self.conv(name + "conv2", out) + z

    def pool(self, z):
        side = min(self.window or z.shape[2], z.shape[2])
        cells = z.shape[2] // side
        spans = [slice(side * i, side * (i + 1)) for i in range(cells)]
        means = [z[:, :, rows, columns].sum((2, 3)) / side**2 for rows in spans for columns in spans]
        return torch.stack(means, 2).flatten(1)

    def classify(self, z):
        return self.pool(z) @ self.state[self.linear + ".weight"].T + self.state[self.linear + ".bias"]

    def weigh(self, z, classes, wrong):
        """z'[n, d, i, j] = z[n, d, i, j] * W[c_n] at the pooling cell of (i, j)."""
        weight = self.state[self.linear + ".weight"]
        weight = weight.detach() if wrong == "W detached in the gate" else weight
        cells = int((weight.shape[1] // z.shape[1]) ** 0.5)
        cell = torch.arange(z.shape[2]) * cells // z.shape[2]
        rows = torch.stack([weight[c].reshape(z.shape[1], cells, cells) for c in classes.tolist()])
        return z * rows[:, :, cell][:, :, :, cell]

    def forward(self, x, labels=None, train=False, wrong=""):
        """Heads as a list, the final one first. Reverse attention by labels, or by argmax where there are none."""
        z = self.conv("conv1", x)
        if not self.preactivation:
            z = self.norm("bn1", z, train).clamp(min=0)
        block = self.preactivation_block if self.preactivation else self.basic_block
        auxiliary = []
        for index, (name, stride) in enumerate(self.blocks):
            z = block(name, z, stride, train)
            last = index == len(self.blocks) - 1
            carries = self.attention and index >= len(self.blocks) - 2
            if self.last_norm and (carries or last):
                z = self.norm(self.last_norm, z, train).clamp(min=0)
            if carries:
                auxiliary.append(self.classify(z))
                z = self.weigh(z, auxiliary[-1].argmax(1) if labels is None else labels, wrong)
        return [self.classify(z), *auxiliary]

    def attack(self, centre, start, o, score, train):
        x = start
        for _ in range(o.num_steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(score(self.forward(x, train=train)), x)
            x = x.detach() + o.step_size * torch.sign(gradient)
            x = torch.minimum(torch.maximum(x, centre - o.epsilon), centre + o.epsilon)
            x = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x))
        return x

    def step(self, x, labels, o, generator, epoch=1, wrong=""):
        """One training step; returns what the comparison looks at."""
        train = wrong == "attacks in train mode"
        weight = o.cr_beta

        def start(images):
            return images + 0.001 * torch.randn(images.shape, generator=generator)

        def likelihood(heads, targets):
            def log_probability(logits):
                return torch.log(probabilities(logits)[torch.arange(len(targets)), targets]).sum()

            return over_list(log_probability, heads, weight=weight)

        with torch.no_grad():
            natural = self.forward(x)
        chosen = None
        if not o.no_anc:
            strategy = "random" if epoch <= 10 and wrong != "no warm-up" else o.strategy.removesuffix("_adv")
            chosen = choose_negatives(natural[0], labels, strategy, generator, o.sample_class_number, o.sample_number)
        if o.inner == "kl":
            adversarial = self.attack(x, start(x), o, lambda heads: over_list(kl, natural, heads, weight=weight), train)
        else:
            adversarial = self.attack(x, start(x), o, lambda heads: -likelihood(heads, labels), train)
        images = {"adversarial images": adversarial}
        if chosen is not None:
            own = [int(j) for row in chosen for j in row]
            anchors = torch.stack([labels[n] for n in range(len(chosen)) for _ in chosen[n]])
            negative, negative_labels = x[own], labels[own]
            if o.strategy.endswith("_adv"):
                sign = -1 if wrong == "negatives pushed from the anchor" else 1
                negative = self.attack(negative, start(negative), o, lambda heads: sign * likelihood(heads, anchors), train)
            if wrong == "negatives gated by the anchor":
                negative_labels = anchors
            images["negative images"] = negative

        batches = {"natural": (x, labels), "adversarial": (adversarial, labels)}
        if chosen is not None:
            batches["negative"] = (negative, negative_labels)
        elif o.method == "pgd":
            del batches["natural"]
        if wrong == "one concatenated forward":
            heads = self.forward(*(torch.cat(parts) for parts in zip(*batches.values(), strict=True)), True)
            parts = zip(*(head.split([len(x) for x, _ in batches.values()]) for head in heads), strict=True)
            forwards = dict(zip(batches, parts, strict=True))
        else:
            names = list(reversed(batches)) if wrong == "forwards in another order" else list(batches)
            forwards = {name: self.forward(*batches[name], True, wrong) for name in names}
        loss, contrast = objective(forwards.get("natural"), forwards["adversarial"], forwards.get("negative"), labels, o, wrong)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        gradients = dict(zip(self.parameters, gradients, strict=True))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.momenta[name] = 0.9 * self.momenta[name] + gradients[name] + o.weight_decay * parameter
                parameter -= o.lr * self.momenta[name]
        return images, loss, contrast, gradients


def network(arch, attention, image_size, width):
    """A small network in float64 whose BatchNorms are not at their initial 1 and 0, and whose predictions vary."""
    torch.manual_seed(3)
    model = build_model(arch, CLASSES, reverse_attention=attention, width=width, image_size=image_size).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.7, 1.3),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.7, 1.3),
            ):
                torch.nn.init.uniform_(tensor, low, high)
    probe, _ = batch(range(CLASSES), image_size, 9)
    with torch.no_grad():
        model.classifier.weight *= 4
        heads = model.eval()(probe, heads=True)
        model.classifier.bias -= (heads.auxiliary[0] if attention else heads.final).mean(0)
    return model.train()


def batch(labels, image_size, seed):
    """Images of different colours, with many pixels at 0 and 1, where the attacks are clipped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(labels), 3, image_size, image_size, generator=generator, dtype=torch.float64)
    colours = torch.rand(len(labels), 3, 1, 1, generator=generator, dtype=torch.float64)
    return (noise + 2 * colours - 1).clamp(0, 1), torch.tensor(list(labels))


def compare_steps(o, *, arch="ResNet18", width=4, labels=(0, 1, 2, 0, 1, 4), image_size=16, steps=2, epoch=1, wrong=""):
    """Deviations of the repository's training steps from the reference's, by what deviates; and the reference's ANC."""
    model = network(arch, not o.no_ra, image_size, width)
    reference = Reference(copy.deepcopy(model), arch, not o.no_ra)
    optimizer = torch.optim.SGD(model.parameters(), o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    attack_copy = AttackCopy(model)
    found, contrasts = {}, []

    def note(what, value, expected):
        found[what] = max(found.get(what, 0), deviation(value, expected))

    for step in range(steps):
        x, y = batch(labels, image_size, step)
        images, loss, contrast, gradients = reference.step(x, y, o, same, epoch, wrong)
        contrasts.append(contrast.item())
        attacked = attack_batch(attack_copy, x, y, o, generator, epoch)
        terms = training_loss(model, x, y, attacked, o)
        optimizer.zero_grad()
        terms.loss.backward()
        assert ("negative images" in images) == (attacked.negative is not None)
        note("adversarial images", attacked.adversarial, images["adversarial images"])
        if attacked.negative is not None:
            note("negative images", attacked.negative, images["negative images"])
        note("loss", terms.loss, loss)
        note("contrast", terms.contrast, contrast)
        for name, parameter in model.named_parameters():
            note("gradients", parameter.grad, gradients[name])
        optimizer.step()
        state = model.state_dict()
        assert state.keys() == reference.state.keys()
        for name, tensor in state.items():
            note("parameters" if name in gradients else "statistics", tensor, reference.state[name])
    assert torch.equal(generator.get_state(), same.get_state())
    return found, contrasts


@pytest.mark.parametrize("no_anc", [False, True], ids=["anc", "without-anc"])
@pytest.mark.parametrize("no_ra", [False, True], ids=["ra", "plain"])
@pytest.mark.parametrize("arch", ["ResNet18", "PreActResNet18"])
@pytest.mark.parametrize("method", METHODS)
def test_training_steps(method, arch, no_ra, no_anc):
    found, contrasts = compare_steps(options(method=method, no_ra=no_ra, no_anc=no_anc), arch=arch)
    assert max(found.values()) < TIGHT, found
    assert any(contrasts) != no_anc


@pytest.mark.parametrize(
    ("changes", "setup"),
    [
        ({"inner": "kl"}, {}),
        ({"strategy": "random", "alpha": 0.5}, {}),
        ({"strategy": "hard_adv"}, {"arch": "PreActResNet18", "epoch": 10}),
        ({"strategy": "hard_adv", "alpha": 0.0}, {"arch": "PreActResNet18", "epoch": 11}),
        ({"strategy": "soft"}, {"epoch": 11}),
        ({"sample_class_number": 2, "method": "mart"}, {}),
        ({"method": "pgd"}, {"arch": "WRN-28-10", "width": 1}),
        ({"num_steps": 2}, {"arch": "PreActResNet18", "width": 2, "image_size": 64}),
    ],
    ids=["kl", "natural-negatives", "warmup", "hard", "soft", "two-negatives", "wide", "four-cells"],
)
def test_training_steps_of_other_settings(changes, setup):
    found, contrasts = compare_steps(options(**changes), **setup)
    assert max(found.values()) < TIGHT, found
    assert any(contrasts)


@pytest.mark.parametrize("inner", ["ce", "kl"])
def test_training_steps_of_batches_too_large_to_be_attacked_as_one(inner, monkeypatch):
    monkeypatch.setattr(attacks, "SMALL", 0)
    found, contrasts = compare_steps(options(inner=inner))
    assert max(found.values()) < TIGHT, found
    assert any(contrasts)


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_of_a_batch_of_one_class(method):
    found, contrasts = compare_steps(options(method=method), labels=(2, 2, 2, 2), steps=1)
    assert max(found.values()) < TIGHT, found
    assert not any(contrasts)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ("auxiliary weight 1", "loss"),
        ("natural side not detached", "gradients"),
        ("attacks in train mode", "adversarial images"),
        ("negatives pushed from the anchor", "negative images"),
        ("negatives gated by the anchor", "gradients"),
        ("W detached in the gate", "gradients"),
        ("one concatenated forward", "loss"),
        ("forwards in another order", "statistics"),
        ("no warm-up", "negative images"),
    ],
)
def test_a_wrong_training_step_is_told_apart(wrong, where):
    o = options(num_steps=5, strategy="hard_adv")
    found, _ = compare_steps(o, arch="PreActResNet18", epoch=10, steps=1, wrong=wrong)
    assert found[where] > CLEAR
