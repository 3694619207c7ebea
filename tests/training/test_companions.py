"""Optimisers, AWP, averages, schedules, extra data, label smoothing, by other derivations."""

import copy
import math
from dataclasses import replace
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import utils.training.loop as training
from models import build_model
from tests.helpers import (
    ANCRA,
    DIGITS,
    assert_equal,
    digits_split,
    folder,
    pixels,
    resume,
    settings,
    state,
    train,
)
from utils.data.datasets import load_extra, with_extra
from utils.losses import pgd_loss, trades_loss
from utils.step import Attacked, training_loss
from utils.system.checkpoints import load_model
from utils.system.errors import Stopped
from utils.training.companions import adversarial_weights, learning_rate, make_optimizer

# Optimisers


def test_steps_of_adamw_by_hand():
    torch.manual_seed(0)
    layers = {
        "norm": nn.BatchNorm1d(4),
        "fc": nn.Linear(4, 2),
        "positions": nn.Embedding(3, 4),
    }
    model = nn.ModuleDict(layers).double()
    optimizer = make_optimizer(model, settings("--optimizer=adamw", "--lr=0.1", "--wd=0.5"))
    expected = copy.deepcopy(model.state_dict())
    first = dict.fromkeys(expected, 0)
    second = dict.fromkeys(expected, 0)
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean = first[name] / (1 - 0.9**step)
            variance = second[name] / (1 - 0.999**step)
            spread = variance.sqrt() + 1e-8
            if name == "fc.weight":  # the only one that decays
                expected[name] *= 1 - 0.1 * 0.5
            expected[name] -= 0.1 * mean / spread
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-12, atol=1e-12)


# Adversarial weight perturbation


def awp_case(no_ra, method="trades"):
    """Return a network in double precision, and the other arguments of its `training_loss`."""
    torch.manual_seed(0)
    model = build_model("ResNet18", 4, reverse_attention=not no_ra, width=2, image_size=16)
    natural, adversarial, negative = torch.rand(3, 6, 3, 16, 16, dtype=torch.double)
    labels = torch.tensor([0, 1, 2, 3, 1, 2])
    attacked = Attacked(adversarial, negative, labels.roll(1))
    chosen = replace(settings(), method=method, no_ra=no_ra)
    model.double().train()
    return model, (natural, labels, attacked, chosen)


def leave_gradients(model, case):
    """Leave the gradients of `training_loss` in the parameters."""
    training_loss(model, *case).loss.backward()


def two_steps(model, case, gamma):
    """Take two steps with `adversarial_weights` -> all weights and statistics."""
    optimizer = make_optimizer(model, replace(case[-1], lr=0.1))
    for _ in range(2):
        with adversarial_weights(model, partial(leave_gradients, model, case), gamma):
            leave_gradients(model, case)
            optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def two_steps_by_hand(model, case, gamma):
    """Take two steps by functional calls, with a momentum of their own -> weights and statistics.

    The weights are moved back after the optimiser's step, so its decay is of the moved ones.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    weights = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    momentum = dict.fromkeys(weights, 0)

    def gradients(weights, buffers):
        moving = {name: w.clone().requires_grad_() for name, w in weights.items()}

        def network(images, gate=None, heads=False):
            return functional_call(model, moving | buffers, (images, gate, heads))

        loss = training_loss(network, *case).loss
        values = torch.autograd.grad(loss, list(moving.values()))
        return dict(zip(moving, values, strict=True))

    for _ in range(2):
        first = gradients(weights, copy.deepcopy(buffers))
        moved = dict(weights)
        for name, gradient in first.items():
            if gradient.ndim > 1:
                direction = gradient / (gradient.norm() + 1e-20)
                size = gamma * weights[name].norm()
                moved[name] = weights[name] + size * direction
        second = gradients(moved, buffers)  # whose statistics stay
        for name, gradient in second.items():
            momentum[name] *= 0.9
            momentum[name] += gradient + case[-1].weight_decay * moved[name]
            weights[name] = weights[name] - 0.1 * momentum[name]
    return weights | buffers


@pytest.mark.parametrize(
    ("no_ra", "method"),
    [(False, "trades"), (True, "trades"), (False, "mart"), (False, "pgd")],
)
def test_a_step_with_adversarial_weights(no_ra, method):
    model, case = awp_case(no_ra, method)
    expected = two_steps_by_hand(model, case, 0.01)
    actual = two_steps(model, case, 0.01)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_weights_come_back_whatever_happens_inside():
    model, case = awp_case(False)
    before = copy.deepcopy(model.state_dict())
    perturbed = adversarial_weights(model, partial(leave_gradients, model, case), 0.1)
    with pytest.raises(RuntimeError, match="inside"), perturbed:
        assert not torch.equal(before["conv1.weight"], model.conv1.weight)
        raise RuntimeError("inside")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-12)


# Schedules


def cosine(part):
    """The factor of the cosine schedule after a part of its epochs."""
    return (1 + math.cos(math.pi * part)) / 2


TIMES = [0, 0.5, 1, 2.5, 4, 5, 7.5, 8, 9.5, 9.99]  # in epochs


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lr-schedule=milestones --milestones=4,9", [1] * 4 + [0.1] * 3 + [0.01] * 3),
        ("--lr-schedule=piecewise", [1] * 5 + [0.1] + [0.01] * 4),
        ("--lr-schedule=cosine", [cosine(t / 10) for t in TIMES]),
        (
            "--lr-schedule=cyclic",
            [0, 0.2, 0.4, 1, 0.8, 2 / 3, 1 / 3, 8 / 30, 2 / 30, 0.04 / 30],
        ),
        (
            "--lr-schedule=cosine --warmup-lr=2",
            [0, 0.25, 0.5, *(cosine((t - 2) / 8) for t in TIMES[3:])],
        ),
        ("--milestones=2 --warmup-lr=2", [0, 0.25, 0.5] + [0.1] * 7),
    ],
)
def test_learning_rates_at_ten_times(flags, expected):
    chosen = settings("--lr=1", "--epochs=10", *flags.split())
    rates = [learning_rate(chosen, done) for done in TIMES]
    assert rates == pytest.approx(expected)


# Extra data


def extra_file(path, **changes):
    """Write 40 generated images for the ten classes of digits -> the file."""
    arrays = {
        "image": pixels(0, 40, 16, 16, 3),
        "label": np.arange(40) % 10,
    }
    np.savez(path, **arrays | changes)
    return path


def test_a_batch_of_extra_data_image_by_image(tmp_path):
    file = extra_file(tmp_path / "extra.npz")
    train_part = digits_split("train", 64)
    extra = load_extra(str(file), train_part)
    batch = train_part.take(torch.arange(6))
    both = with_extra(batch, extra, 14, (1, 2, 0))

    stored = np.load(file)
    draw = np.random.default_rng((1, 2, 0))
    chosen = draw.integers(40, size=14)
    order = draw.permutation(20)
    extra_images = stored["image"][chosen].transpose(0, 3, 1, 2)
    extra_labels = stored["label"][chosen]
    images = np.concatenate([batch.images, extra_images])
    labels = np.concatenate([batch.labels, extra_labels])
    assert np.array_equal(both.images, images[order])
    assert np.array_equal(both.labels, labels[order])


def test_an_epoch_sees_each_original_image_once(tmp_path, monkeypatch, short_runs):
    step = MagicMock(wraps=training.train_step)
    monkeypatch.setattr(training, "train_step", step)
    flags = ("--extra-data", extra_file(tmp_path / "extra.npz"), "--extra-fraction", 0.6)
    run = train(tmp_path, "--epochs", 1, "--limit-train", 30, "--batch-size", 10, *flags)
    batches = [args[1] for args, _ in step.call_args_list]
    sizes = [len(batch.labels) for batch in batches]
    assert sizes == [10] * 7 + [8]  # 6 of each are extra; 2 of the 30 are left at the end
    assert "extra_fraction-0.6" in run.name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": np.arange(40) % 12}, "classes"),
        ({"image": np.zeros((40, 16, 16, 3))}, "float64"),
        (None, "extra.npz"),
    ],
    ids=["classes", "format", "no npz"],
)
def test_extra_data_that_does_not_fit_is_refused(tmp_path, refused, changes, reason):
    file = tmp_path / "extra.npz"
    file.write_bytes(b"PK\3\4 cut off")
    if changes is not None:
        extra_file(file, **changes)
    refused(ANCRA, *DIGITS, "--extra-data", file, mentions=["extra.npz", reason])


# Label smoothing


def test_label_smoothing_is_of_cross_entropy_alone():
    natural = torch.randn(4, 5)
    adversarial = torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 4])
    cross_entropy = F.cross_entropy(natural, labels)
    uniform = -F.log_softmax(natural, 1).mean()
    smooth = 0.9 * cross_entropy + 0.1 * uniform
    assert torch.allclose(pgd_loss(natural, labels, 0.1), smooth)
    plain = trades_loss(natural, adversarial, labels, 6.0)
    smoothed = trades_loss(natural, adversarial, labels, 6.0, 0.1)
    assert torch.allclose(smoothed - plain, smooth - cross_entropy, atol=1e-6)


# All at once


def test_the_loop_perturbs_averages_and_schedules_as_asked(tmp_path, monkeypatch, short_runs):
    """Rates, perturbations and decays of each step, and which network is evaluated."""
    rates = []
    perturbed = []
    weights = []
    averages = []
    evaluate = MagicMock(wraps=training.evaluate)
    real_step = training.train_step

    def step(job, batch):
        rates.append(job.optimizer.param_groups[0]["lr"])
        figures = real_step(job, batch)
        weights.append(job.model.conv1.weight.detach().clone())
        averages.append(job.average.model.conv1.weight.clone())
        return figures

    def perturb(model, gradients, gamma):
        perturbed.append((len(rates), gamma))
        return adversarial_weights(model, gradients, gamma)

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "adversarial_weights", perturb)
    monkeypatch.setattr(training, "evaluate", evaluate)
    flags = ("--awp=0.05", "--awp-warmup=1", "--ema=0.3", "--lr-schedule=cosine", "--warmup-lr=1")
    train(tmp_path, *flags, "--epochs=3", "--limit-train=32", "--batch-size=16", "--lr=0.03")

    after_warmup = [0.03 * cosine(t) for t in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0, 0.015, *after_warmup])
    assert perturbed == [(step, 0.05) for step in (3, 4, 5, 6)]
    assert evaluate.call_count == 3
    for (job, network, _), _ in evaluate.call_args_list:
        assert network is job.average.model
    expected = averages[0]
    for t in range(1, 6):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weights[t]
        torch.testing.assert_close(averages[t], expected, rtol=0, atol=1e-6)


def test_a_run_with_everything_resumes_in_mid_epoch_bit_for_bit(tmp_path, monkeypatch, short_runs):
    flags = (
        "--optimizer=adamw",
        "--awp=0.01",
        "--awp-warmup=0",
        "--ema=0.9",
        "--lr-schedule=cosine",
        "--warmup-lr=1",
        "--label-smoothing=0.1",
        "--gate=soft",
        "--extra-data",
        extra_file(tmp_path / "extra.npz"),
    )
    straight = train(tmp_path / "1", *flags)
    real = training.train_step

    def stopping(job, batch):
        if job.progress.done:
            job.stop_signal = 15
        return real(job, batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "train_step", stopping)
        train(tmp_path / "2", *flags)
    resumed = resume(folder(tmp_path / "2"))
    expected = state(straight)
    actual = state(resumed)
    for key in ("model", "average", "average_steps", "generator", "optimizer"):
        assert_equal(actual[key], expected[key], key)

    trained = expected["model"]
    last, _ = load_model(straight / "model-wrn-last.pt")
    saved = last.state_dict()
    assert_equal(saved, expected["average"])
    assert not torch.equal(saved["conv1.weight"], trained["conv1.weight"])
    assert torch.equal(saved["bn1.running_mean"], trained["bn1.running_mean"])
    assert len(straight.name) == 200  # too long for a name, and cut
