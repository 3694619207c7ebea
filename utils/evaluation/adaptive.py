"""Attacks that know reverse attention: where the decision is made, and what to ascend there.

The final logits of a network with reverse attention repeat the auxiliary prediction with an
inflated margin, and their gradient at a fixed gate is not the gradient of the decision. So the
attacks here ascend a *view* of the network, a function of its heads, while every candidate image is
judged by the network's real prediction.

* The decision falls in the first gate. On digits, attacks on `auxiliary 1` are the strongest, and
  those on the second head stop at the gate before it. The README's table has the figures.
* APGD's target classes are ranked by the view: the final logits, which are inflated, rank badly.
* Smooth gates, a softmax of the auxiliary logits over a temperature of 0.3, fool images that the
  other views leave right.
* A margin over heads is weak, since the inflated final logits outweigh the others. Cross-entropy
  over heads is not.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from models import Heads
from utils.attacks import Attack, image_noise, margins, projected_ascent
from utils.evaluation.cache import Monitor
from utils.system.devices import computing

VERSION = 1  # raise it when a view or the attack changes, so that no cached verdict is used

# What to attack: logits (N, C), each with its weight in the loss.
Targets = list[tuple[float, Tensor]]
# The network's real final logits (N, C), and what to attack
Viewed = tuple[Tensor, Targets]
View = Callable[[nn.Module, Tensor], Viewed]
Views = dict[str, View]  # by name
Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (N, C), labels (N,) -> (N,), to ascend
# (network, images, their heads) -> what to attack
TargetsOfHeads = Callable[[nn.Module, Tensor, Heads], Targets]


def plain(net: nn.Module, x: Tensor) -> Viewed:
    """View of any classifier: its answer."""
    logits = net(x)
    return logits, [(1, logits)]


def of_heads(targets: TargetsOfHeads, predict: str) -> View:
    """Make a view from a function of the network, images and their heads.

    predict: the head that answers.
    """

    def view(net, x):
        heads = net(x, heads=True)
        return heads.logits(predict), targets(net, x, heads)

    return view


def smooth_gates(net: nn.Module, x: Tensor, heads: Heads) -> Targets:
    """Return the final logits under gates that mix the rows of the classifier's weight.

    They are mixed by a softmax of the auxiliary logits, for gradients only. The gates' own
    gradients come along, so that this attacks both decisions at once. Two forwards a step.
    """
    gates = [(logits / 0.3).softmax(1) for logits in heads.auxiliary]
    last_two = (None, *gates)[-2:]
    return [(1, net(x, last_two, heads=True).final)]


def transfer(surrogate: nn.Module) -> View:
    """Make a view of another network's logits: gradients come from it alone."""

    def view(net, x):
        with torch.no_grad():
            final = net(x)
        return final, [(1, surrogate(x))]

    return view


def views(
    reverse_attention: bool,
    auxiliary_weight: float,
    surrogate: nn.Module | None = None,
    *,
    gate: str = "label",
    classifier: str = "shared",
    ra_blocks: int = 2,
    predict: str = "final",
) -> Views:
    """Return every view of a network by name.

    auxiliary_weight: lambda of the loss over heads that the network was trained with.
    gate, classifier, ra_blocks, predict: of a network with reverse attention. The view `final` is
    the head that answers. Where that is an auxiliary head, `final logits` is the last head.
    """
    views = {"final": plain}

    def add(name: str, targets: TargetsOfHeads) -> None:
        views[name] = of_heads(targets, predict)

    if reverse_attention:
        if predict != "final":
            add("final logits", lambda net, x, heads: [(1, heads.final)])

        # By one classifier and without a gate, the last auxiliary and the final logits are equal.
        equal = gate == "none" and classifier == "shared"
        different = ra_blocks - 1 if equal else ra_blocks
        for i in range(different):
            if predict != f"auxiliary{i + 1}":  # which is `final` already
                add(f"auxiliary {i + 1}", lambda net, x, heads, i=i: [(1, heads.auxiliary[i])])
        if ra_blocks > 1:
            add(
                "mean auxiliary",
                lambda net, x, heads: [(1, sum(heads.auxiliary) / len(heads.auxiliary))],
            )

        weight = auxiliary_weight / ra_blocks
        add(
            "over heads",
            lambda net, x, heads: [(1, heads.final), *((weight, z) for z in heads.auxiliary)],
        )
        if gate not in ("soft", "none"):
            add("smooth gates", smooth_gates)

    if surrogate is not None:
        views["surrogate"] = transfer(surrogate)
    return views


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image. logits: (N, C) -> (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


class ViewedNetwork:
    """A network under a view, callable as the library's attacks expect, and the view's loss.

    The library calls a network with gradients in each step of an attack: it then gets the real
    logits, by which it judges. It calls without gradients to learn the prediction, and which
    classes to target: it then gets scores whose largest is that of the real prediction, and which
    rank the other classes as the view does.
    """

    def __init__(self, net: nn.Module, view: View) -> None:
        """Start before any call, so with nothing to attack."""
        self.net = net
        self.view = view
        self.targets = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return real logits for steps of an attack, else a ranking of the classes."""
        final, self.targets = self.view(self.net, x)
        if x.requires_grad:
            return final
        ranked = self.loss(lambda logits: logits)
        top = ranked.amax(1, keepdim=True) + 1
        return ranked.scatter(1, final.argmax(1, keepdim=True), top)

    def loss(self, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the weighted sum of criterion(logits) for the images of the last call."""
        return sum(weight * criterion(logits) for weight, logits in self.targets)


class ViewAPGD(APGDAttack):
    """APGD on cross-entropy of a view, in the place of the library's DLR loss."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each image, (N,)."""
        return self.model.loss(lambda logits: cross_entropies(logits, y))


class ViewAPGDTargeted(APGDAttack_targeted):
    """Targeted APGD on a margin of a view: the target's logit less the label's.

    Unlike the targeted DLR loss it exists for any number of classes.
    """

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each image, (N,)."""
        rows = torch.arange(len(y), device=y.device)
        return self.model.loss(lambda logits: logits[rows, self.y_target] - logits[rows, y])


def view_pgd(
    net: nn.Module,
    view: View,
    x: Tensor,
    labels: Tensor,
    numbers: Tensor,
    criterion: Criterion,
    *,
    eps: float,
    step_size: float,
    steps: int,
    seed: int,
    draw: int = 0,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor]:
    """Run PGD on a view from a uniform start, and judge every iterate by the real prediction.

    seed, draw: of the start's noise.

    Returns the adversarial images, (N, 3, H, W), of each the last iterate that fools the network or
    else the last one; and which iterates fool it, (N, steps) bool.
    """
    viewed = ViewedNetwork(net, view)
    fooling = x
    wrong_by_step = []

    def judge(iterate: Tensor, logits: Tensor) -> None:
        nonlocal fooling
        wrong = logits.argmax(1) != labels
        if wrong_by_step:  # the start, which comes first, may lie outside of [0, 1]
            fooling = torch.where(wrong[:, None, None, None], iterate.detach(), fooling)
        wrong_by_step.append(wrong)

    def objective(iterate):
        judge(iterate, viewed(iterate))  # by the forward that the gradient needs anyway
        return viewed.loss(lambda logits: criterion(logits, labels)).sum()

    start = x + eps * image_noise(x, numbers, seed, norm, draw)
    last = projected_ascent(norm, x, objective, eps, step_size, steps, start)
    with torch.no_grad():
        judge(last, net(last))

    wrong = torch.stack(wrong_by_step[1:], 1)
    return torch.where(wrong.any(1)[:, None, None, None], fooling, last), wrong


def adaptive(
    view: View,
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    seed: int,
    apgd_steps: int,
    apgd_restarts: int = 1,
    monitor: Monitor,
    norm: str = "Linf",
) -> Attack:
    """Make the attack on one view: PGD with restarts, APGD-CE, then targeted APGD on the margin.

    Each part attacks the images that are still right. steps, restarts: of PGD, which ascends
    cross-entropy and the margin in turn. Its first restart is the row PGD of the table, but on this
    view. apgd_restarts: starts of APGD-CE, and of the targeted one at each target.
    """

    def attack(net, x, labels, numbers):
        viewed = ViewedNetwork(net, view)
        with torch.no_grad():
            targets = min(9, net(x[:1]).shape[1] - 1)
        library_arguments = {
            "eps": eps,
            "norm": norm,
            "n_iter": apgd_steps,
            "n_restarts": apgd_restarts,
            "seed": seed,
            "device": x.device,
            "logger": monitor.logger,
        }
        # The library calls `dlr_loss` for this name; ours is the cross-entropy of the view.
        apgd = ViewAPGD(viewed, loss="dlr", **library_arguments)
        targeted = ViewAPGDTargeted(viewed, n_target_classes=targets, **library_arguments)

        def restart(draw: int, *batch: Tensor) -> Tensor:
            criterion = margins if draw % 2 else cross_entropies
            sizes = {"norm": norm, "eps": eps, "step_size": step_size, "steps": steps}
            images, _ = view_pgd(net, view, *batch, criterion, **sizes, seed=seed, draw=draw)
            return images

        parts = {}  # functions of images, labels and numbers
        for draw in range(restarts):
            parts[f"PGD {draw + 1} of {restarts}"] = partial(restart, draw)
        parts["APGD-CE"] = lambda x, labels, numbers: apgd.perturb(x, labels)
        parts[f"APGD to {targets} targets"] = lambda x, labels, numbers: targeted.perturb(x, labels)

        adversarial = x.clone()
        rows = torch.arange(len(x), device=x.device)  # of images that are still right
        for name, part in parts.items():
            if not len(rows):
                break
            monitor.show(f"{name}, {len(rows)} standing")
            with torch.no_grad():  # or the library's images would keep their graphs
                images = monitor.run_part(name, part, x[rows], labels[rows], numbers[rows.cpu()])
                with computing("fp32"):  # as the verdict will be
                    right = net(images).argmax(1) == labels[rows]
            adversarial[rows] = images
            rows = rows[right]
        return adversarial

    return attack
