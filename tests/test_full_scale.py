"""Operations on paper are those of a real step, counted while it runs."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from models import build_model
from tests.helpers import digits_split, settings
from tests.tools import full_scale
from utils.attacks import pgd40_heads
from utils.data.subject import verdicts
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy, frozen
from utils.training.companions import adversarial_weights
from utils.training.loop import attack_batch, backward

TINY = ("--dataset", "digits", "--width", 4, "--num-steps", 2, "--batch-size", 8)
TINY += ("--warmup-epochs", 0)


def network(job):
    """The network of a training's settings."""
    return build_model(
        job.arch,
        10,
        reverse_attention=not job.no_ra,
        width=job.width,
        image_size=16,
        gate=job.gate,
        classifier=job.classifier,
        ra_blocks=job.ra_blocks,
    )


def one_step(job):
    """Take a step of digits' settings in epoch 1, as training does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 16, 16, generator=generator)
    labels = torch.arange(8) % 4
    model = network(job).train()
    attacked = attack_batch(AttackCopy(model), x, labels, job, generator, 1)
    gradients = partial(backward, partial(training_loss, model), x, labels, attacked, job)
    perturbed = nullcontext()
    if job.awp:
        perturbed = adversarial_weights(model, gradients, job.awp)
    with perturbed:
        gradients()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--no-ra", "--no-anc", "--inner", "kl"),
        ("--strategy", "hard", "--sample_class_number", 2),
        ("--method", "pgd", "--alpha", 0.5),
        ("--method", "pgd", "--no-anc"),
        ("--method", "mart", "--gate", "soft", "--classifier", "own"),
        ("--awp", 0.005, "--awp-warmup", 0),
        ("--arch", "WRN-28-10", "--width", 1),
    ],
)
def test_a_step_s_operations_are_those_that_are_counted_while_it_runs(flags):
    job = settings(*TINY, *flags)
    expected = 8 * full_scale.step_of(job, full_scale.passes(job, 10), 1)
    assert full_scale.counted(partial(one_step, job)) == expected


def test_a_run_s_operations_add_up_epochs_and_evaluations():
    flags = ("--epochs", 5, "--eval-interval", 2, "--strategy", "hard", "--warmup-epochs", 2)
    job = settings("--dataset", "cifar100", *flags)
    passes = full_scale.passes(job, 100)
    early = 50_000 * full_scale.step_of(job, passes, 2)
    late = 50_000 * full_scale.step_of(job, passes, 3)
    assert early < late
    training, evaluation = full_scale.run_of(job)
    assert training == 2 * early + 3 * late
    assert evaluation == pytest.approx(3 * 10_000 * (2 * passes.look + 40 * passes.attack))


def test_an_evaluation_s_operations_are_those_that_are_counted_while_it_runs(monkeypatch):
    job = settings(*TINY, "--epochs", 1)
    split = digits_split("test", 3)

    def evaluate():
        with frozen(network(job).eval()) as net:
            natural = verdicts(net, split, 4)
            verdicts(net, split, 4, pgd40_heads(0.1, 0.02, 2.0, 1), torch.ones_like(natural))

    monkeypatch.setitem(full_scale.DATASETS, "digits", (0, 3, 10))
    assert full_scale.run_of(job)[1] == full_scale.counted(evaluate) > 0


def test_hours_and_epochs_an_hour_are_of_training_and_evaluation(capsys, monkeypatch):
    """At the rates of the shares, ten epochs take one hour of training and two of evaluation."""
    operations = (717e12 * 0.16 * 3600, 2 * 717e12 * 0.18 * 3600)
    monkeypatch.setattr(full_scale, "ROWS", [[full_scale.RESNET]])
    monkeypatch.setattr(full_scale, "run_of", lambda settings: operations)
    full_scale.main(["--gate", "soft", "--epochs", "10"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[-3].strip() == "3.0, 0.38; 3.3"
