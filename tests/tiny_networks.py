"""Tiny networks of digits with fixed weights, for the evaluation's tests, and frauds made of them.

Weights are stored (tests/golden/tiny_networks.npz, float16), so that what attacks find does not
depend on the CPU. `python -m tests.tiny_networks` has trained them, and writes them anew.
"""

import copy
import io
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import Heads, ReverseAttentionNetwork
from utils.attacks import cross_entropy, linf_pgd
from utils.data.datasets import as_input, load_split
from utils.system.attack_copy import frozen

FILE = Path(__file__).parent / "golden" / "tiny_networks.npz"
EPS = 0.1  # that of digits
TRAINED = {
    "robust": (False, EPS, 6),
    "undefended": (False, 0, 4),
    "with_ra": (True, 0, 4),
}  # RA, eps, epochs


class Tiny(ReverseAttentionNetwork):
    """Three convolutions, the last two of them the blocks that carry reverse attention."""

    def __init__(self, reverse_attention):
        """Make layers with random weights."""
        super().__init__()
        self.reverse_attention = reverse_attention
        self.stem = nn.Conv2d(3, 12, 4, 2, 1)
        block = nn.Sequential(nn.Conv2d(12, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.Sequential(
            block, nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU())
        )
        self.fc = nn.Linear(24, 10)

    def trunk(self, x):
        """Return the map before the last blocks."""
        return F.relu(self.stem(x))

    def last_blocks(self):
        """Return the blocks that carry reverse attention."""
        return self.blocks


@cache
def stored(name):
    """A network of `TRAINED` with its stored weights, in eval mode."""
    model = Tiny(TRAINED[name][0])
    with np.load(FILE) as content:
        state = {key: torch.from_numpy(content[f"{name}/{key}"]) for key in model.state_dict()}
    model.load_state_dict(state)
    return model.eval()


class Scaled(nn.Module):
    """Fraud: an undefended network with logits so large that cross-entropy has no gradient."""

    def __init__(self, scale):
        """Multiply logits by a number."""
        super().__init__()
        self.net = undefended()
        self.scale = scale

    def forward(self, x):
        """Return logits."""
        return self.scale * self.net(x)


def first(classes):
    """The logits of the first classes only."""
    return lambda x: robust()(x)[:, :classes]


class Decoy(nn.Module):
    """Fraud: an undefended network decides; final logits repeat it with other gradients."""

    reverse_attention = True

    def __init__(self):
        """Make random layers for the gradients."""
        super().__init__()
        self.net = undefended()
        self.decoy = nn.Linear(768, 10)

    def forward(self, x, gate=None, heads=False):
        """Return logits, or heads where they are asked for."""
        auxiliary = self.net(x)
        final = 20 * F.one_hot(auxiliary.argmax(1), 10) + self.decoy(x.flatten(1)).tanh()
        return Heads(final, (auxiliary, auxiliary), auxiliary) if heads else final


def seeded(build, seed):
    """Build a network with weights that depend on a seed."""
    torch.manual_seed(seed)
    return build()


# Networks for --model tests.tiny_networks:NAME
robust = partial(stored, "robust")
undefended = partial(stored, "undefended")
with_ra = partial(stored, "with_ra")
first_3 = partial(first, 3)
first_7 = partial(first, 7)
scaled = partial(Scaled, 1e4)
always_wrong = partial(Scaled, -1)
not_finite = partial(Scaled, torch.inf)
decoy = partial(seeded, Decoy, 3)


def in_training_mode():
    """BatchNorm's statistics are those of a batch."""
    net = copy.deepcopy(robust()).train()
    return lambda x: net(x)


def at_random():
    """Two calls answer differently."""
    return lambda x: robust()(x + 0.05 * torch.randn_like(x))


def probabilities():
    """Answers whose gradients are small."""
    return lambda x: robust()(x).softmax(1)


def in_steps():
    """Gradients are zero."""
    return lambda x: robust()((4 * x).round() / 4)


def in_bfloat16():
    """Compute and answer in another type than float32."""
    net = copy.deepcopy(robust()).bfloat16()
    return lambda x: net(x.bfloat16())


def saved_script():
    """A TorchScript module that was saved and loaded."""
    net = copy.deepcopy(robust())
    layers = (net.stem, nn.ReLU(), net.blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(*layers).eval()), saved)
    return torch.jit.load(io.BytesIO(saved.getvalue()))


def fit(reverse_attention, eps, epochs):
    """Train a tiny network on digits, under an attack of radius eps unless that is 0."""
    torch.manual_seed(0)
    model = Tiny(reverse_attention)
    split = load_split("digits", "train", "", 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).split(64):
            x = as_input(split.images[rows])
            y = split.labels[rows]
            if eps:
                with frozen(model) as net:
                    x = linf_pgd(x, cross_entropy(net, y), eps, eps / 2, 3, x)
            heads = model(x, y, heads=True)
            loss = F.cross_entropy(heads.final, y) + 2 * sum(
                F.cross_entropy(logits, y) for logits in heads.auxiliary
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


if __name__ == "__main__":
    arrays = {}
    for name, arguments in TRAINED.items():
        for key, value in fit(*arguments).state_dict().items():
            small = value.half() if value.is_floating_point() else value
            arrays[f"{name}/{key}"] = small.numpy()
    np.savez_compressed(FILE, **arrays)
