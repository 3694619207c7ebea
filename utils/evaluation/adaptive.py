"""Attacks that know reverse attention: where the decision is made, and what to ascend there.

The final logits of a network with reverse attention repeat the auxiliary prediction with an inflated margin, and their
gradient at a fixed gate is not the gradient of the decision. So the attacks here ascend a *view* of the network, a
function of its heads, while every candidate image is judged by the network's real prediction.

* The decision falls in the first gate: on digits, attacks on `auxiliary 1` are the strongest, and those on the second
  head stop at the gate before it. README's table has the figures.
* Targets of APGD come in the order of the view: the final logits, which are inflated, rank badly.
* Smooth gates, softmax of the auxiliary logits over a temperature of 0.3, fool images that the other views leave.
* A margin over heads is weak, since the inflated final logits outweigh the others; cross-entropy is not.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from models import Heads
from utils.attacks import Attack, margins, pgd
from utils.evaluation.autoattack import Keep, Listener, Says, keep_nothing
from utils.system.settings import APGD_STEPS

VERSION = 1  # raise it when a view or the attack changes, so that kept results are not reused

# What a view returns: the real final logits (N, C), and what to attack, logits (N, C) each with its weight in the loss.
Seen = tuple[Tensor, list[tuple[float, Tensor]]]
View = Callable[[nn.Module, Tensor], Seen]


def plain(net: nn.Module, x: Tensor) -> Seen:
    """The one view of a network without reverse attention, or of any classifier."""
    logits = net(x)
    return logits, [(1, logits)]


def of_heads(attacked: Callable[[Heads], list[tuple[float, Tensor]]], predict: str = "final") -> View:
    """A view from a function of the heads of one forward. predict: the head that answers."""

    def view(net: nn.Module, x: Tensor) -> Seen:
        heads = net(x, heads=True)
        return heads.logits(predict), attacked(heads)

    return view


def smooth_gates(predict: str) -> View:
    """The final logits under gates that mix the rows of W by softmax of the auxiliary logits, for gradients only.

    The gates' own gradients come along, so that this view attacks both decisions at once. Two forwards a step.
    """

    def view(net: nn.Module, x: Tensor) -> Seen:
        heads = net(x, heads=True)
        gates = tuple((logits / 0.3).softmax(1) for logits in heads.auxiliary)
        return heads.logits(predict), [(1, net(x, (None, *gates)[-2:], heads=True).final)]

    return view


def transfer(surrogate: nn.Module) -> View:
    """The logits of another network: gradients come from it alone."""

    def view(net: nn.Module, x: Tensor) -> Seen:
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
    ra_blocks: int = 2,
    predict: str = "final",
) -> dict[str, View]:
    """Every view of a network by name. auxiliary_weight: lambda of the loss over heads that it was trained with.

    gate, ra_blocks, predict: of a network with reverse attention; a gate that is smooth, or none, needs no smoothing.
    `final` is what the network answers, `final logits` those of its last head where another one answers.
    """
    known: dict[str, View] = {"final": plain}

    def add(name: str, attacked: Callable[[Heads], list[tuple[float, Tensor]]]) -> None:
        known[name] = of_heads(attacked, predict)

    if reverse_attention:
        if predict != "final":
            add("final logits", lambda heads: [(1, heads.final)])
        for i in range(ra_blocks - (gate == "none")):  # without a gate the last one is the final head
            if predict != f"auxiliary{i + 1}":  # that is `final`
                add(f"auxiliary {i + 1}", lambda heads, i=i: [(1, heads.auxiliary[i])])
        if ra_blocks > 1:
            add("mean auxiliary", lambda heads: [(1, sum(heads.auxiliary) / len(heads.auxiliary))])
        weight = auxiliary_weight / ra_blocks
        add("over heads", lambda heads: [(1, heads.final), *((weight, logits) for logits in heads.auxiliary)])
        if gate in ("label", "predicted"):
            known["smooth gates"] = smooth_gates(predict)
    if surrogate is not None:
        known["surrogate"] = transfer(surrogate)
    return known


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class Watched:
    """A view as the library's attacks take a network, with `loss` for what they ascend.

    A call with gradients is a step of an attack: it answers with the real logits, by which the library judges. One
    without asks for the prediction and for classes worth a try: those come in the order of the view's logits, behind
    the real prediction.
    """

    def __init__(self, net: nn.Module, view: View) -> None:
        self.net, self.view = net, view
        self.attacked: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        final, self.attacked = self.view(self.net, x)
        if x.requires_grad:
            return final
        ranked = self.loss(lambda logits: logits)
        return ranked.scatter(1, final.argmax(1, keepdim=True), ranked.amax(1, keepdim=True) + 1)

    def loss(self, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The view's loss of the images last seen. criterion: logits (N, C) -> (N,)."""
        return sum(weight * criterion(logits) for weight, logits in self.attacked)


class ViewAPGD(APGDAttack):
    """APGD on cross-entropy of a view; what the library calls its DLR loss is replaced."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model.loss(lambda logits: cross_entropies(logits, y))


class ViewAPGDTargeted(APGDAttack_targeted):
    """Targeted APGD on the margin of a view, target's logit less the label's, which any number of classes has."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(y), device=y.device)
        return self.model.loss(lambda logits: logits[rows, self.y_target] - logits[rows, y])


def view_pgd(
    net: nn.Module,
    view: View,
    x: Tensor,
    labels: Tensor,
    numbers: Tensor,
    criterion: Callable[..., Tensor],
    **how: float,
) -> tuple[Tensor, Tensor]:
    """PGD on a view from a uniform start, every iterate judged by the network's real prediction.

    criterion: logits (N, C), labels (N,) -> (N,), to ascend. how: eps, step_size, steps, seed and draw, of `pgd`.
    Returns of each image the last iterate that fools the network, else the last one; and which iterates do, (n, steps).
    """
    watched, found, fooled = Watched(net, view), x.clone(), []

    def judge(iterate: Tensor, wrong: Tensor) -> None:
        nonlocal found
        if fooled:  # the start itself, which comes first, may lie outside [0, 1]
            found = torch.where(wrong[:, None, None, None], iterate.detach(), found)
        fooled.append(wrong)

    def ascended(iterate: Tensor) -> Tensor:
        judge(iterate, watched(iterate).argmax(1) != labels)
        return watched.loss(lambda logits: criterion(logits, labels)).sum()

    last = pgd(lambda net, labels: ascended, start="uniform", **how)(net, x, labels, numbers)
    with torch.no_grad():
        judge(last, net(last).argmax(1) != labels)
    iterates = torch.stack(fooled[1:], 1)
    return torch.where(iterates.any(1)[:, None, None, None], found, last), iterates


def adaptive(
    view: View,
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    seed: int,
    warned: Says,
    says: Says,
    apgd_steps: int = APGD_STEPS,
    keep: Keep = keep_nothing,
) -> Attack:
    """The attack on one view, for `evaluation.verdicts`: PGD with restarts, APGD-CE, targeted APGD on the margin.

    Each goes on with the images that still stand; the returned image fools the network wherever one was found.
    steps, restarts: of PGD, by turns on cross-entropy and on the margin; the first is the PGD of the README's table
    moved to this view. warned: is told of the library's warnings. says: of each stage as it begins.

    keep: may answer for a stage that an earlier process has finished; each stage seeds its own draws.
    """
    logger = logging.Logger("adaptive")
    logger.addHandler(Listener(warned))

    def attack(net: nn.Module, x: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        watched = Watched(net, view)
        with torch.no_grad():
            targets = min(9, net(x[:1]).shape[1] - 1)
        how = dict(eps=eps, step_size=step_size, steps=steps, seed=seed)
        library = dict(eps=eps, norm="Linf", n_iter=apgd_steps, seed=seed, device=x.device, logger=logger)

        def restart(draw: int) -> Callable[..., Tensor]:
            criterion = margins if draw % 2 else cross_entropies
            return lambda *images: view_pgd(net, view, *images, criterion, draw=draw, **how)[0]

        def stage_on(stage: Callable[..., Tensor], numbers: Tensor, x: Tensor, labels: Tensor) -> Tensor:
            return stage(x, labels, numbers)

        def apgd(attack: type[APGDAttack], **own: object) -> Callable[..., Tensor]:
            return lambda x, labels, _: attack(watched, **own, **library).perturb(x, labels)

        stages = {f"PGD {draw + 1} of {restarts}": restart(draw) for draw in range(restarts)}
        stages["APGD-CE"] = apgd(ViewAPGD, loss="dlr")
        stages[f"APGD to {targets} targets"] = apgd(ViewAPGDTargeted, n_target_classes=targets)
        found, standing = x.clone(), torch.ones_like(labels, dtype=torch.bool)
        for name, stage in stages.items():
            rows = standing.nonzero().squeeze(1)
            if not len(rows):
                break
            says(f"{name}, {len(rows)} standing")
            with torch.no_grad():  # without it the library's images keep their graphs
                attack_stage = partial(stage_on, stage, numbers[rows.cpu()])
                candidates = keep(name, attack_stage, x[rows], labels[rows])
                standing[rows] = net(candidates).argmax(1) == labels[rows]
            found[rows] = candidates
        return found

    return attack
