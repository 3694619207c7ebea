"""Tiny networks of digits with fixed weights, for the evaluation's tests, and frauds made of them.

Weights are stored (tests/golden/tiny_networks.npz, float16), so that what attacks find does not depend on the CPU. They
were trained by `python -m tests.tiny_networks`, which writes them anew.
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
TRAINED = {"robust": (False, EPS, 6), "undefended": (False, 0, 4), "with_ra": (True, 0, 4)}  # RA, eps, epochs


class Tiny(ReverseAttentionNetwork):
    """Three convolutions, the last two of them the blocks that carry reverse attention."""

    def __init__(self, reverse_attention):
        super().__init__()
        self.reverse_attention = reverse_attention
        self.stem = nn.Conv2d(3, 12, 4, 2, 1)
        block = nn.Sequential(nn.Conv2d(12, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.Sequential(block, nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU()))
        self.fc = nn.Linear(24, 10)

    def trunk(self, x):
        return F.relu(self.stem(x))

    def last_blocks(self):
        return self.blocks


@cache
def stored(name):
    """A network of `TRAINED` with its stored weights, in eval mode."""
    model = Tiny(TRAINED[name][0])
    with np.load(FILE) as content:
        state = {key: torch.from_numpy(content[f"{name}/{key}"]) for key in model.state_dict()}
    model.load_state_dict(state)
    return model.eval()


class First(nn.Module):
    """The logits of the first classes only."""

    def __init__(self, classes):
        super().__init__()
        self.net, self.classes = robust(), classes

    def forward(self, x):
        return self.net(x)[:, : self.classes]


class Scaled(nn.Module):
    """Fraud: an undefended network whose logits are so large that the cross-entropy has no gradient in float32."""

    def __init__(self, scale):
        super().__init__()
        self.net, self.scale = undefended(), scale

    def forward(self, x):
        return self.scale * self.net(x)


class Decoy(nn.Module):
    """Fraud: an undefended network decides; final logits repeat that with gradients of something else."""

    reverse_attention = True

    def __init__(self):
        super().__init__()
        self.net = undefended()
        self.decoy = nn.Linear(768, 10)

    def forward(self, x, gate=None, heads=False):
        auxiliary = self.net(x)
        final = 20 * F.one_hot(auxiliary.argmax(1), 10) + self.decoy(x.flatten(1)).tanh()
        return Heads(final, (auxiliary, auxiliary), auxiliary) if heads else final


class Viewing(nn.Module):
    """A network as many are written: `view` needs maps in the default memory format."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), -1))


def seeded(build, seed):
    torch.manual_seed(seed)
    return build()


# Networks for --model tests.tiny_networks:NAME
robust, undefended, with_ra = (partial(stored, name) for name in TRAINED)
first_2, first_3, first_7 = (partial(First, classes) for classes in (2, 3, 7))
scaled, always_wrong, not_finite = (partial(Scaled, scale) for scale in (1e4, -1, torch.inf))
decoy, viewing = partial(seeded, Decoy, 3), partial(seeded, Viewing, 0)


def as_callable():
    return lambda x: robust()(x)


# of which attacks learn too little
def in_training_mode():
    net = copy.deepcopy(robust()).train()
    return lambda x: net(x)


def at_random():
    return lambda x: robust()(x + 0.05 * torch.randn_like(x))


def probabilities():
    return lambda x: robust()(x).softmax(1)


def in_steps():
    return lambda x: robust()((4 * x).round() / 4)


# that compute, and answer, in another type than float32
def of_type(dtype):
    net = copy.deepcopy(robust()).to(dtype)
    return lambda x: net(x.to(dtype))


in_bfloat16, in_half, in_double = (partial(of_type, t) for t in (torch.bfloat16, torch.float16, torch.float64))


# of TorchScript
def layers_of_robust():
    net = copy.deepcopy(robust())
    return nn.Sequential(net.stem, nn.ReLU(), net.blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc).eval()


def scripted():
    return torch.jit.script(layers_of_robust())


def frozen_script():
    return torch.jit.freeze(scripted())


def traced():
    return torch.jit.trace(layers_of_robust(), torch.zeros(2, 3, 16, 16))


def saved_script():
    saved = io.BytesIO()
    torch.jit.save(scripted(), saved)
    return torch.jit.load(io.BytesIO(saved.getvalue()))


def fit(reverse_attention, eps, epochs):
    """Train a tiny network on digits, under an attack of radius eps unless that is 0."""
    torch.manual_seed(0)
    model, split = Tiny(reverse_attention), load_split("digits", "train", "", 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).split(64):
            x, y = as_input(split.images[rows]), split.labels[rows]
            if eps:
                with frozen(model) as net:
                    x = linf_pgd(x, cross_entropy(net, y), eps, eps / 2, 3, x)
            heads = model(x, y, heads=True)
            loss = F.cross_entropy(heads.final, y) + 2 * sum(F.cross_entropy(logits, y) for logits in heads.auxiliary)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


if __name__ == "__main__":
    weights = {f"{name}/{key}": v for name, how in TRAINED.items() for key, v in fit(*how).state_dict().items()}
    np.savez_compressed(FILE, **{k: (v.half() if v.is_floating_point() else v).numpy() for k, v in weights.items()})
