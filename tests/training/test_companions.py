"""Optimisers, AWP, averages, schedules, extra data, label smoothing, by other derivations."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import utils.training.loop as training
from models import build_model
from tests.helpers import ANCRA, assert_equal, digits_split, folder, resume, settings, state, train
from utils.data.datasets import load_extra, with_extra
from utils.losses import pgd_loss, trades_loss
from utils.step import Attacked, training_loss
from utils.system.checkpoints import load_model
from utils.system.errors import Stopped, UsageError
from utils.training.companions import (
    Average,
    adversarial_weights,
    learning_rate,
    make_optimizer,
)

# Optimisers


def test_steps_of_adamw_by_hand():
    torch.manual_seed(0)
    layers = {"norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 2), "positions": nn.Embedding(3, 4)}
    model = nn.ModuleDict(layers).double()
    optimizer = make_optimizer(model, settings("--optimizer=adamw", "--lr=0.1", "--wd=0.5"))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = dict.fromkeys(expected, 0)
    second = dict.fromkeys(expected, 0)
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean = first[name] / (1 - 0.9**step)
            spread = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            decay = 0.5 if name == "fc.weight" else 0
            expected[name] = (1 - 0.1 * decay) * expected[name] - 0.1 * mean / spread
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-12, atol=1e-12), name


# Adversarial weight perturbation


def awp_case(no_ra, method="trades"):
    """Return a network in double precision, and the other arguments of its `training_loss`."""
    torch.manual_seed(0)
    model = build_model("ResNet18", 4, reverse_attention=not no_ra, width=2, image_size=16)
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    labels = torch.tensor([0, 1, 2, 3, 1, 2])
    attacked = Attacked(draw(6, 3, 16, 16), draw(6, 3, 16, 16), labels.roll(1))
    chosen = replace(settings(), method=method, no_ra=no_ra)
    return model.double().train(), (draw(6, 3, 16, 16), labels, attacked, chosen)


def two_steps(model, case, gamma):
    """Take two steps with `adversarial_weights` -> all weights and statistics."""
    optimizer = make_optimizer(model, replace(case[-1], lr=0.1))

    def gradients():
        training_loss(model, *case).loss.backward()

    for _ in range(2):
        with adversarial_weights(model, gradients, gamma):
            gradients()
            optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def two_steps_by_hand(model, case, gamma):
    """Take two steps by functional calls, with a momentum of their own -> weights and statistics.

    The weights are moved back after the optimiser's step, so its decay is of the moved ones.
    """
    weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}

    def gradients(weights, buffers):
        moving = {name: w.clone().requires_grad_() for name, w in weights.items()}

        def network(images, gate=None, heads=False):
            return functional_call(model, moving | buffers, (images, gate, heads))

        loss = training_loss(network, *case).loss
        return dict(zip(moving, torch.autograd.grad(loss, list(moving.values())), strict=True))

    for _ in range(2):
        first = gradients(weights, {name: b.clone() for name, b in buffers.items()})
        moved = dict(weights)
        for name, gradient in first.items():
            if gradient.ndim > 1:
                size = gamma * weights[name].norm() / (gradient.norm() + 1e-20)
                moved[name] = weights[name] + size * gradient
        second = gradients(moved, buffers)  # whose statistics stay
        for name, gradient in second.items():
            decay = case[-1].weight_decay * moved[name]
            momentum[name] = 0.9 * momentum[name] + gradient + decay
            weights[name] = weights[name] - 0.1 * momentum[name]
    return weights | buffers


@pytest.mark.parametrize(
    ("no_ra", "method"), [(False, "trades"), (True, "trades"), (False, "mart"), (False, "pgd")]
)
def test_a_step_with_adversarial_weights(no_ra, method):
    model, case = awp_case(no_ra, method)
    expected = two_steps_by_hand(copy.deepcopy(model), case, 0.01)
    actual = two_steps(model, case, 0.01)
    torch.testing.assert_close(dict(actual), expected, rtol=1e-9, atol=1e-9)


def test_weights_come_back_whatever_happens_inside():
    model, case = awp_case(False)
    before = copy.deepcopy(model.state_dict())

    def gradients():
        training_loss(model, *case).loss.backward()

    with pytest.raises(RuntimeError, match="inside"), adversarial_weights(model, gradients, 0.1):
        assert not torch.equal(before["conv1.weight"], model.conv1.weight)
        raise RuntimeError("inside")
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-12), name


# Averaged weights


def test_an_average_copies_statistics():
    model = build_model("ResNet18", 4, width=2, image_size=16)
    average = Average(model)
    model.train()(torch.rand(4, 3, 16, 16))
    taken = model.bn1.running_mean.clone()
    assert not torch.equal(average.model.bn1.running_mean, taken)
    average.take_statistics(model)
    model(torch.rand(4, 3, 16, 16))
    assert torch.equal(average.model.bn1.running_mean, taken)


# Schedules


def test_learning_rates_at_ten_points():
    at = [0, 0.5, 1, 2.5, 4, 5, 7.5, 8, 9.5, 9.99]

    def rates(schedule, **options):
        chosen = replace(settings(), lr=1.0, epochs=10, lr_schedule=schedule, **options)
        return [learning_rate(chosen, done) for done in at]

    published = rates("milestones", milestones=(4, 9))
    assert published == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert rates("piecewise") == pytest.approx([1] * 5 + [0.1] + [0.01] * 4)
    assert rates("cosine") == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in at])
    linear = [0, 0.2, 0.4, 1, 0.8, 2 / 3, 1 / 3, 8 / 30, 2 / 30, 0.04 / 30]
    assert rates("cyclic") == pytest.approx(linear)
    warm = rates("cosine", warmup_lr=2)
    assert warm[:3] == pytest.approx([0, 0.25, 0.5])
    assert warm[6] == pytest.approx((1 + math.cos(math.pi * 5.5 / 8)) / 2)
    assert rates("milestones", milestones=(2,), warmup_lr=2)[5] == pytest.approx(0.1)


# Extra data


def extra_file(path, count=40, side=16, **changes):
    """Write generated images for the ten classes of digits -> the file."""
    draw = np.random.default_rng(0)
    arrays = {
        "image": draw.integers(0, 256, (count, side, side, 3), np.uint8),
        "label": np.arange(count) % 10,
        **changes,
    }
    np.savez(path, **arrays)
    return path


def test_a_batch_of_extra_data_image_by_image(tmp_path):
    file = extra_file(tmp_path / "extra.npz")
    stored = np.load(file)
    train_part = digits_split("train", 64)
    extra = load_extra(str(file), train_part)
    batch = train_part.take(torch.arange(6))
    both = with_extra(batch, extra, 14, (1, 2, 0))
    assert_equal(both, with_extra(batch, extra, 14, (1, 2, 0)))
    assert not torch.equal(both.images, with_extra(batch, extra, 14, (1, 2, 6)).images)

    draw = np.random.default_rng((1, 2, 0))
    chosen = draw.integers(40, size=14)
    extra_images = torch.from_numpy(stored["image"][chosen]).permute(0, 3, 1, 2)
    images = torch.cat([batch.images, extra_images])
    labels = torch.cat([batch.labels, torch.from_numpy(stored["label"][chosen])])
    order = draw.permutation(20)
    assert torch.equal(both.images, images[order])
    assert torch.equal(both.labels, labels[order])


def test_an_epoch_sees_each_original_image_once(tmp_path, monkeypatch, short_runs):
    sizes = []
    real = training.train_step

    def noting(job, batch):
        sizes.append(len(batch.labels))
        return real(job, batch)

    monkeypatch.setattr(training, "train_step", noting)
    flags = ("--extra-data", extra_file(tmp_path / "extra.npz"), "--extra-fraction", 0.6)
    run = train(tmp_path, "--epochs", 1, "--limit-train", 30, "--batch-size", 10, *flags)
    assert sizes == [10] * 7 + [8]  # 6 of each are extra; 2 of the 30 are left at the end
    assert "extra_fraction-0.6" in run.name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": np.arange(40) % 12}, "classes"),
        ({"image": np.zeros((40, 16, 16, 3))}, "float64"),
    ],
)
def test_extra_data_that_does_not_fit(tmp_path, changes, reason):
    file = extra_file(tmp_path / "extra.npz", **changes)
    with pytest.raises(UsageError, match=reason):
        load_extra(str(file), digits_split("train", 64))


def test_extra_data_that_is_no_npz(tmp_path, refused):
    file = tmp_path / "extra.npz"
    file.write_bytes(b"PK\3\4 cut off")
    flags = ("--dataset=digits", "--model-dir", tmp_path / "run", "--extra-data")
    refused(ANCRA, *flags, file, mentions=(file,))
    refused(ANCRA, *flags, tmp_path / "none.npz", mentions=("none.npz",))


# Label smoothing


def test_label_smoothing_is_of_cross_entropy_alone():
    natural = torch.randn(4, 5)
    adversarial = torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 4])
    cross_entropy = F.cross_entropy(natural, labels)
    smooth = 0.9 * cross_entropy - 0.1 * F.log_softmax(natural, 1).mean()
    assert torch.allclose(pgd_loss(natural, labels, 0.1), smooth)
    expected = trades_loss(natural, adversarial, labels, 6.0) - cross_entropy + smooth
    assert torch.allclose(trades_loss(natural, adversarial, labels, 6.0, 0.1), expected)


# All at once


def test_the_loop_perturbs_averages_and_schedules_as_asked(tmp_path, monkeypatch, short_runs):
    """Rates, perturbations and decays of each step, and which network is evaluated."""
    rates = []
    perturbed = []
    averaged = []
    evaluated = []
    real_step = training.train_step
    real_evaluate = training.evaluate

    def step(job, batch):
        rates.append(job.optimizer.param_groups[0]["lr"])
        figures = real_step(job, batch)
        networks = job.model, job.average.model
        averaged.append([network.conv1.weight.detach().clone() for network in networks])
        return figures

    def perturb(model, gradients, gamma):
        perturbed.append((len(rates), gamma))
        return adversarial_weights(model, gradients, gamma)

    def evaluate(job, model, split):
        evaluated.append(model is job.average.model)
        return real_evaluate(job, model, split)

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "adversarial_weights", perturb)
    monkeypatch.setattr(training, "evaluate", evaluate)
    flags = ("--awp=0.05", "--awp-warmup=1", "--ema=0.3", "--lr-schedule=cosine", "--warmup-lr=1")
    train(tmp_path, *flags, "--epochs=3", "--limit-train=32", "--batch-size=16", "--lr=0.03")

    cosine = [0.03 * (1 + math.cos(math.pi * t / 2)) / 2 for t in (0, 0.5, 1, 1.5)]
    assert rates == pytest.approx([0, 0.015, *cosine])
    assert perturbed == [(step, 0.05) for step in (3, 4, 5, 6)]
    assert evaluated == [True, True, True]
    for t, (weights, average) in enumerate(averaged[1:], 1):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * averaged[t - 1][1] + (1 - decay) * weights
        assert torch.allclose(average, expected, atol=1e-6)


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
    for key in ("model", "average", "average_steps", "generator", "optimizer"):
        assert_equal(state(straight)[key], state(resumed)[key], key)

    saved = load_model(straight / "model-wrn-last.pt")[0].state_dict()
    assert_equal(saved, state(straight)["average"])
    assert len(straight.name) == 200  # too long for a name, and cut
