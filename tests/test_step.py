"""A training step computes what the method says and no more."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from tests.helpers import RUN, settings, some_batch
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy
from utils.training.loop import attack_batch


class ConvolutionGradients(TorchDispatchMode):
    """Notes which gradients each convolution computes: of its images, weights, bias."""

    def __init__(self):
        super().__init__()
        self.noted = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ == "convolution_backward":
            self.noted.add(tuple(args[-1]))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("flags", "forwards", "attacked"),
    [
        ((), 3, 2),
        (("--strategy", "hard_adv"), 3, 3),
        (("--inner", "kl"), 3, 3),
        (("--no-anc",), 2, 2),
        (("--no-anc", "--method", "pgd"), 1, 2),
    ],
)
def test_forwards_of_a_step(flags, forwards, attacked):
    """Attacks of two steps, of both batches as one."""
    s = settings(*RUN, *flags)
    model = build_model("ResNet18", 4, width=4, image_size=16, reverse_attention=not s.no_ra)
    attack_copy = AttackCopy(model)
    called = []
    for network in (model, attack_copy.net):
        network.register_forward_hook(lambda module, inputs, out: called.append(module))
    x, labels = some_batch()
    images = attack_batch(attack_copy, x, labels, s, torch.Generator(), 1)
    training_loss(model, x, labels, images, s)
    assert called == [attack_copy.net] * attacked + [model] * forwards


@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_an_attack_computes_gradients_of_images_alone(precision):
    model = build_model("ResNet18", 4, width=8, image_size=16)
    x, labels = some_batch()
    s = settings(*RUN, "--precision", precision, "--strategy", "hard_adv")
    attack_copy = AttackCopy(model, precision)
    with ConvolutionGradients() as gradients:
        attack_batch(attack_copy, x, labels, s, torch.Generator(), 1)
    assert gradients.noted == {(True, False, False)}
