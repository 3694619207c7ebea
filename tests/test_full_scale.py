"""Operations on paper are those of a real step, counted while it runs."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from tests.helpers import settings
from tests.tools import full_scale
from utils.attacks import pgd40_heads
from utils.data.datasets import Split
from utils.data.subject import verdicts
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy, frozen
from utils.training.companions import adversarial_weights
from utils.training.loop import attack_batch, backward

TINY = ("--dataset", "digits", "--width", 4, "--num-steps", 2, "--batch-size", 8, "--warmup-epochs", 0)


def one_step(job):
    """A step of digits' settings in epoch 1, as training takes it."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8) % 4
    how = {"gate": job.gate, "ra_blocks": job.ra_blocks, "reverse_attention": not job.no_ra}
    model = build_model(job.arch, 10, width=job.width, image_size=16, **how).train()
    attack_copy, loss = AttackCopy(model), partial(training_loss, model)

    def step():
        gradients = partial(backward, loss, x, labels, attack_batch(attack_copy, x, labels, job, generator, 1), job)
        with adversarial_weights(model, gradients, job.awp) if job.awp else nullcontext():
            gradients()

    return step


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--no-ra",),
        ("--no-anc",),
        ("--no-ra", "--no-anc", "--inner", "kl"),
        ("--strategy", "hard", "--sample_class_number", 2),
        ("--method", "pgd"),
        ("--method", "pgd", "--alpha", 0.5),
        ("--method", "pgd", "--no-anc"),
        ("--method", "mart", "--gate", "soft"),
        ("--gate", "none", "--ra-blocks", 1),
        ("--awp", 0.005, "--awp-warmup", 0),
        ("--arch", "PreActResNet18"),
        ("--arch", "WRN-28-10", "--width", 1),
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "published",
)
def test_a_step_s_operations_are_those_that_are_counted_while_it_runs(flags):
    job = settings(*TINY, *flags)
    assert 8 * full_scale.step_of(job, full_scale.passes(job, 10), 1) == full_scale.counted(one_step(job))


def test_a_run_s_operations_add_up_epochs_and_evaluations():
    job = settings("--dataset", "cifar100", "--epochs", 5, "--eval-interval", 2, "--strategy", "hard", "--warmup-epochs", 2)
    of = full_scale.passes(job, 100)
    early, late = (50_000 * full_scale.step_of(job, of, epoch) for epoch in (2, 3))
    assert early < late
    training, evaluation = full_scale.run_of(job)
    assert training == 2 * early + 3 * late
    assert evaluation == pytest.approx(3 * 10_000 * (2 * of.look + 40 * of.attack))


def test_an_evaluation_s_operations_are_those_that_are_counted_while_it_runs():
    job = settings(*TINY, "--epochs", 1)
    model = build_model("ResNet18", 10, width=4, image_size=16).eval()
    split = Split(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), torch.zeros(3, dtype=torch.long), ("0", "1"))

    def work():
        with frozen(model) as net:
            natural = verdicts(net, split, 4)
            verdicts(net, split, 4, pgd40_heads(0.1, 0.02, 2.0, 1), torch.ones_like(natural))

    with mock.patch.dict(full_scale.IMAGES, digits=(0, 3)):
        assert full_scale.run_of(job)[1] == full_scale.counted(work) > 0


def test_the_counter_is_pytorch_s():
    """Where PyTorch's own can count, which cannot follow gradients of an input."""
    model = build_model("PreActResNet18", 10, width=4, image_size=16)
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([3, 1])

    def work():
        heads = model(x, labels, heads=True)
        (heads.final.sum() + sum(logits.sum() for logits in heads.auxiliary)).backward()

    with FlopCounterMode(display=False) as counter:
        work()
    assert full_scale.counted(work) == counter.get_total_flops() > 0


@pytest.mark.slow
def test_the_table_has_a_row_for_each_of_the_paper_s(capsys):
    full_scale.main(["--zeta", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 11 and all("--zeta 2" in row and row.count("|") == 8 for row in rows)
    assert [row.split(" ")[2] for row in rows] == [command[0] for command in full_scale.ROWS]


def test_hours_and_epochs_an_hour_are_of_training_and_evaluation(capsys, monkeypatch):
    """One row: at the rates of the shares, ten epochs take the hours of both."""
    monkeypatch.setattr(full_scale, "ROWS", [[full_scale.RESNET]])
    monkeypatch.setattr(full_scale, "run_of", lambda settings: (717e12 * 0.16 * 3600, 2 * 717e12 * 0.18 * 3600))
    full_scale.main(["--gate", "soft", "--epochs", "10"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[-3].strip() == "3.0, 0.38; 3.3"


UNCOUNTED = ["--dataset digits", "--limit-train 100", "--precision bf16", "--val-size 10", "--image-size 64"]


@pytest.mark.parametrize("flags", [*UNCOUNTED, "--restart_epoch 60 --ckpt_url x", "--resume x", "--bogus"])
def test_what_is_not_counted_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        full_scale.main(flags.split())
    captured = capsys.readouterr()
    assert end.value.code == 2 and not captured.out
    assert ("nothing is counted here for" in captured.err) != (flags == "--bogus")
