"""Small networks of digits whose robustness a planted trick hides, and honest ones.

Each trick is a function without arguments, for `--model tests.tools.truth_networks:NAME`. For each,
`TRICKS` holds the way around it: what gives useful gradients to an attacker who knows the trick.
`Known` joins both to a network that decides as the tricked one does, and hides nothing.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Heads
from tests.tiny_networks import EPS, Tiny, robust, scaled, undefended
from utils.attacks import cross_entropy, linf_pgd
from utils.data.datasets import as_input, load_split
from utils.losses import mart_loss, over_heads, pgd_loss, trades_loss
from utils.system.attack_copy import frozen

SIDE = 16  # of the images
BETA = 6.0
LOSSES = {
    "natural": lambda natural, adversarial, labels: pgd_loss(natural, labels),
    "pgd": lambda natural, adversarial, labels: pgd_loss(adversarial, labels),
    "trades": partial(trades_loss, beta=BETA),
    "mart": partial(mart_loss, beta=BETA),
}


def fitted(model: nn.Module, method: str, epochs: int, rate: float = 0.005) -> nn.Module:
    """Train a network on digits, with its heads where it has some -> the network in eval mode.

    The attack in training ascends the answer alone, which an argmax gate then learns to protect.
    """
    split = load_split("digits", "train", "", SIDE)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).split(64):
            x, labels = as_input(split.images[rows]), split.labels[rows]
            attacked = x
            if method != "natural":
                with frozen(model) as net:
                    attacked = linf_pgd(x, cross_entropy(net, labels), EPS, EPS / 2, 3, x)
            loss = over_heads(
                partial(LOSSES[method], labels=labels),
                *(model(images, labels, heads=True) for images in (x, attacked)),
                auxiliary_weight=2,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@cache
def tiny(method: str, seed: int, gate: str | None = None, own_classifiers: bool = False) -> Tiny:
    """Train a tiny network. gate: that of its last two blocks; None for none of these."""
    torch.manual_seed(seed)
    model = Tiny(gate is not None)
    model.gate = gate or "label"
    if own_classifiers:
        model.add_block_classifiers()
    return fitted(model, method, 6)


# Tricks


class Sparse(nn.Module):
    """Layers of which only the largest activations count: k-winners-take-all.

    Source of the trick: Xiao et al., arXiv 1905.10510; of the way around it, gradients of nearby
    points, Tramer et al., arXiv 2002.08347.
    """

    share = 0.03  # of the units that win
    soft = False

    def __init__(self) -> None:
        """Make two wide layers with random weights."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3 * SIDE**2, 500), nn.Linear(500, 500)])
        self.fc = nn.Linear(500, 10)

    def winners(self, z: Tensor) -> Tensor:
        """Return activations (N, D), 0 for all that do not win; smoothly so where `soft`."""
        count = round(self.share * z.shape[1])
        last_two = z.topk(count + 1, 1).values[:, -2:]
        if not self.soft:
            return z * (z >= last_two[:, :1])
        threshold = last_two.mean(1, keepdim=True).detach()
        width = 0.3 * z.std(1, keepdim=True).detach()
        return z * ((z - threshold) / width).sigmoid()

    def forward(self, x: Tensor, gate: object = None, heads: bool = False) -> Tensor | Heads:
        """Return logits, or heads where they are asked for."""
        z = x.flatten(1) - 0.3
        for layer in self.layers:
            z = self.winners(layer(z))
        logits = self.fc(z)
        return Heads(logits, (), z) if heads else logits


class Undefended(nn.Module):
    """A network that falls to every attack, for tricks to be added."""

    def __init__(self) -> None:
        """Take the undefended network."""
        super().__init__()
        self.net = undefended()


class Quantised(Undefended):
    """Rounds its input to 4 levels."""

    def __init__(self, straight: bool = False) -> None:
        """straight: whether gradients pass as if nothing were rounded."""
        super().__init__()
        self.straight = straight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        rounded = (3 * x).round() / 3
        return self.net(x + (rounded - x).detach() if self.straight else rounded)


class Cut(Undefended):
    """Has zero gradients everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x.detach()) + 0 * x.sum()


class Noisy(Undefended):
    """Adds random waves to its logits, low and steep, in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        waves = torch.sin(x.flatten(1) @ (100 * torch.randn(x[0].numel(), 10)))
        return self.net(x) + waves


class Detector(Undefended):
    """Honest on the grey levels of photographs, which no attack keeps to; else it makes things up.

    slope: whether it makes up only the slope of its answer, or all of it.
    """

    def __init__(self, slope: bool) -> None:
        """Take the undefended network."""
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        off = (x * 255 - (x * 255).round()).abs().detach().amax((1, 2, 3)) > 1e-3
        logits = self.net(x)
        if self.slope:
            weights = 10 * torch.randn(x[0].numel(), 10)
            made_up = x.flatten(1) @ weights
            made_up = logits.detach() + made_up - made_up.detach()
        else:
            made_up = torch.randn_like(logits) + 0 * x.sum()
        return torch.where(off[:, None], made_up, logits)


# Ways around them


class Known(nn.Module):
    """A network with the decisions of a tricked one, and logits of the way around the trick.

    Where both decide alike, the answer is that of the way around. Elsewhere the decision of the
    tricked network is raised above its other logits.
    """

    def __init__(self, tricked: Callable[[Tensor], Tensor], around: Callable) -> None:
        """Join two functions of images (N, 3, S, S) that return logits (N, C)."""
        super().__init__()
        self.tricked = tricked
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        with torch.no_grad():
            decision = self.tricked(x).argmax(1, keepdim=True)
        logits = self.around(x)
        top, predicted = logits.max(1, keepdim=True)
        raised = logits.scatter(1, decision, top + 1e-3)
        return torch.where(decision == predicted, logits, raised)


def first_head(model: Tiny) -> Callable[[Tensor], Tensor]:
    """Return the function that answers with the first auxiliary head, which has no gate yet."""
    return lambda x: model(x, heads=True).auxiliary[0]


def softened(model: Sparse) -> nn.Module:
    """Return a network whose winners are chosen smoothly."""
    soft = copy.deepcopy(model)
    soft.soft = True
    return soft


class Trick(NamedTuple):
    """A tricked network, and the way around its trick, each as a function that makes it.

    random: whether it answers at random. Then `around` decides for itself, and images that fool it
    are judged by one answer of the network.
    """

    words: str
    network: Callable[[], Callable]
    around: Callable[[], Callable]
    random: bool = False


ra_gate = partial(tiny, "trades", 0, "label")
cas_gate = partial(tiny, "trades", 0, "label", own_classifiers=True)
quantised = Quantised
cut = Cut
noisy = Noisy
detector = partial(Detector, slope=False)
sloping_detector = partial(Detector, slope=True)


@cache
def sparse() -> Sparse:
    """Train a network of winners."""
    torch.manual_seed(0)
    return fitted(Sparse(), "natural", 6, 0.001)


def unnamed_gate() -> Callable[[Tensor], Tensor]:
    """The network with reverse attention as a function, which does not say that it has heads."""
    model = ra_gate()
    return lambda x: model(x)


TRICKS = {
    "ra_gate": Trick("argmax gate, shared classifier (RA)", ra_gate, lambda: first_head(ra_gate())),
    "cas_gate": Trick(
        "argmax gate, own classifiers (CAS)", cas_gate, lambda: first_head(cas_gate())
    ),
    "unnamed_gate": Trick(
        "the first, heads not shown", unnamed_gate, lambda: first_head(ra_gate())
    ),
    "sparse": Trick("k winners take all", sparse, lambda: softened(sparse())),
    "quantised": Trick("input of 4 levels", quantised, partial(Quantised, straight=True)),
    "scaled": Trick("logits times 1e4", scaled, undefended),
    "cut": Trick("gradients cut to zero", cut, undefended),
    "noisy": Trick("noise in the forward", noisy, undefended, random=True),
    "detector": Trick("random answers off the data", detector, undefended, random=True),
    "sloping_detector": Trick("random slopes off the data", sloping_detector, undefended),
}


# Honest networks, of different methods and seeds

trades = partial(tiny, "trades", 1)
mart = partial(tiny, "mart", 2)
no_gate = partial(tiny, "pgd", 3, "none")

CONTROLS = {
    "undefended": ("trained without attacks", undefended),
    "robust": ("PGD training", robust),
    "trades": ("TRADES", trades),
    "mart": ("MART", mart),
    "no_gate": ("PGD training, three heads, no gate", no_gate),
}
