"""Operations on paper are those of a real step, counted while it runs."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from tests import full_scale
from tests.helpers import settings
from utils.attacks import Standing
from utils.companions import adversarial_weights
from utils.step import attack_batch, backward, training_loss

TINY = ("--dataset", "digits", "--width", 4, "--num-steps", 2, "--batch-size", 8, "--warmup-epochs", 0)


def one_step(job):
    """A step of digits' settings in epoch 1, as training takes it."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8) % 4
    how = {"gate": job.gate, "ra_blocks": job.ra_blocks, "reverse_attention": not job.no_ra}
    model = build_model(job.arch, 10, width=job.width, image_size=16, **how).train()
    standing, loss = Standing(model), partial(training_loss, model)

    def step():
        gradients = partial(backward, loss, x, labels, attack_batch(standing, x, labels, job, generator, 1), job)
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
    job = settings(
        "--dataset", "cifar100", "--epochs", 5, "--eval-interval", 2, "--strategy", "hard", "--warmup-epochs", 2
    )
    of = full_scale.passes(job, 100)
    early, late = (50_000 * full_scale.step_of(job, of, epoch) for epoch in (2, 3))
    assert early < late
    assert full_scale.run_of(job) == (2 * early + 3 * late, 3 * 10_000 * (of.look + 40 * of.attack))


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


def test_the_table_has_a_row_for_each_of_the_paper_s(capsys):
    full_scale.main(["--zeta", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 11 and all("--zeta 2" in row and row.count("|") == 8 for row in rows)
    assert [row.split(" ")[2] for row in rows] == [command[0] for command in full_scale.ROWS]


@pytest.mark.parametrize("flags", ["--dataset digits", "--limit-train 100", "--precision bf16", "--val-size 10"])
def test_what_is_not_counted_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        full_scale.main(flags.split())
    assert end.value.code == 2 and "nothing is counted here for" in capsys.readouterr().err
