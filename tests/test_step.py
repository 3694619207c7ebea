"""A training step computes what the method says and no more."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from tests.helpers import RUN, python, settings, some_batch
from utils import attacks
from utils.negatives import choose_negatives
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy
from utils.training.loop import attack_batch


class Calls(TorchDispatchMode):
    """Notes name and arguments of every operator that runs inside."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.noted.append((operator.overloadpacket.__name__, args))
        return operator(*args, **(kwargs or {}))

    def named(self, *names):
        """Return the arguments of each call of these operators."""
        return [args for name, args in self.noted if name in names]


@pytest.mark.parametrize(
    ("flags", "small", "forwards", "attacked"),
    [
        ((), 0, 3, 4),
        ((), attacks.SMALL, 3, 2),
        (("--strategy", "hard_adv"), attacks.SMALL, 3, 3),
        (("--inner", "kl"), attacks.SMALL, 3, 3),
        (("--strategy", "random"), attacks.SMALL, 3, 2),
        (("--no-anc",), attacks.SMALL, 2, 2),
        (("--no-anc", "--method", "pgd"), attacks.SMALL, 1, 2),
    ],
)
def test_forwards_of_a_step(monkeypatch, flags, small, forwards, attacked):
    """Attacks of two steps, of both batches as one where they are small."""
    monkeypatch.setattr(attacks, "SMALL", small)
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
    with Calls() as calls:
        attack_batch(AttackCopy(model, precision), x, labels, s, torch.Generator(), 1)
    backward = calls.named("convolution_backward")
    assert backward
    for args in backward:
        assert tuple(args[-1]) == (True, False, False)  # of images, weights, bias


def test_choosing_negatives_waits_for_the_device_a_fixed_number_of_times():
    waits = []
    for count in (16, 128):
        _, labels = some_batch(count)
        with Calls() as calls:
            choose_negatives(torch.randn(count, 4), labels, "hard", torch.Generator())
        waits.append(len(calls.named("_local_scalar_dense", "_unique2", "nonzero")))
    assert waits[0] == waits[1] <= 2


@pytest.mark.slow
def test_memory_does_not_grow_from_step_to_step():
    code = """
import torch
from tests.tools.benchmarks import Step
from utils.system.devices import peak_memory
device = torch.device("cpu")
job = Step("ResNet18", 12, 16, 4, 16, device)
for step in range(23):
    job.ours(num_steps=1)
    if step in (2, 22):
        print(peak_memory(device))
"""
    early, late = (int(peak) / 1e6 for peak in python("-c", code).stdout.split())
    assert late - early < 20  # a copy of the network a step would add 60
