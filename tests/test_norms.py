"""Attacks in both norms: formulas in float64, other libraries, known margins; and L2 commands."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torchattacks

from tests.conftest import shorten_runs
from tests.helpers import ANCRA, ATTACK, PLAIN, digits_split, resume, state, train
from tests.tiny_networks import robust
from utils.attacks import cross_entropy, image_noise, l2_step, margin, pgd
from utils.data.datasets import as_input, subset
from utils.evaluation.autoattack import square
from utils.evaluation.robustness import white_attack
from utils.system.attack_copy import frozen
from utils.system.errors import UsageError
from utils.system.options import parse
from utils.system.settings import Evaluation


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No picture is drawn."""
    monkeypatch.setattr("utils.evaluation.report.save_or_note", lambda draw, file: "")


def norms(images):
    """The L2 norm of each image, (N, 1, 1, 1), for 0 a tiny number."""
    sizes = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return sizes.clamp(min=1e-300)


def evaluate(folder, *flags):
    """Attack some digits with the log in `folder` -> white_attack.json."""
    log = str(folder / "test.log")
    argv = ["--n-examples=20", "--device=cpu", "--log_path", log, *flags]
    white_attack(parse(Evaluation, "", argv))
    return json.loads((folder / "white_attack.json").read_text())


# Steps and starts


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5, 9.0])
def test_an_l2_step_is_the_formula_in_float64_for_gradients_of_any_size(eps):
    """Also where the squares of a gradient are 0 or not finite in float32."""
    x, adversarial, gradient = torch.rand(3, 6, 3, 5, 5)
    adversarial[4:] = x[4:]
    sizes = torch.tensor([1, 1e-30, 1e30, 0, 1, 0])
    gradient -= 0.5
    gradient *= sizes.reshape(6, 1, 1, 1)
    step = l2_step(x, eps, 0.2)
    stepped = step(adversarial, gradient)

    gradient = gradient.double()
    direction = gradient / norms(gradient)
    change = adversarial.double() - x
    change += 0.2 * direction
    factor = eps / norms(change)
    change *= factor.clamp(max=1)
    expected = (x + change).clamp(0, 1)
    torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=2e-6)


def test_l2_noise_is_uniform_in_the_unit_ball():
    """So the share of the ball's volume within an image's radius is uniform, too."""
    numbers = torch.arange(400)
    x = torch.zeros(400, 3, 2, 2)
    many = image_noise(x, numbers, 1, "L2")
    sizes = norms(many)
    volumes = sizes.flatten() ** 12
    shares, _ = volumes.sort()
    even = (numbers + 0.5) / 400
    assert shares.max() <= 1 + 1e-5
    torch.testing.assert_close(shares, even, rtol=0, atol=0.08)  # Kolmogorov, 1 in 100
    directions = (many / sizes).flatten(1)
    covariance = directions.T @ directions / 400
    expected = torch.eye(12) / 12
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.03)


# Known margins, and other libraries


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.3)])
def test_attacks_on_a_linear_network_succeed_exactly_beyond_its_margin(norm, eps):
    w = torch.randn(3, 6, 6) ** 3 / 10
    steepest = w.sign()
    if norm == "L2":
        steepest = w / w.norm()
    margins = eps * torch.tensor([0.5, 0.98, 1.02, 1.5])
    distances = margins.reshape(4, 1, 1, 1)
    x = 0.5 + distances * steepest  # the border is at 0.5
    labels = torch.ones(4, dtype=torch.long)
    numbers = torch.arange(4)

    def net(x):
        products = (x - 0.5) * w
        score = products.sum((1, 2, 3))
        other = torch.zeros_like(score)
        return torch.stack([other, score], 1)

    ascent = partial(pgd, seed=1, norm=norm)
    attacks = [
        ascent(margin, eps, eps / 5, 20, start="uniform"),
        ascent(cross_entropy, eps, eps, 1, start="image"),
    ]
    for attack in attacks:
        attacked = attack(net, x, labels, numbers)
        predicted = net(attacked).argmax(1)
        assert predicted.tolist() == [0, 0, 1, 1]


LIBRARY = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
@pytest.mark.parametrize("steps", [1, 10])
def test_attacks_of_one_and_of_many_steps_are_those_of_a_library(norm, eps, steps):
    split = digits_split(count=40)
    x = as_input(split.images)
    labels = split.labels
    step_size = eps if steps == 1 else eps / 5
    library = LIBRARY[norm]
    theirs = library(robust(), eps, step_size, steps, random_start=False)
    ours = pgd(cross_entropy, eps, step_size, steps, start="image", seed=1, norm=norm)
    with frozen(robust()) as net:
        images = ours(net, x, labels, torch.arange(40))
    difference = norms(images - theirs(x, labels))
    is_close = difference < 1e-2
    assert is_close.float().mean() >= 0.95  # rounding may flip a ReLU


# Commands


@pytest.fixture(scope="module")
def l2_run(tmp_path_factory):
    """A short training in an L2 ball."""
    parent = tmp_path_factory.mktemp("l2")
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        return train(parent, "--norm=L2", "--epochs=1", recipe=PLAIN)


def test_a_run_says_its_norm_and_keeps_it(l2_run, short_runs):
    assert "-digits-L2-" in l2_run.name
    assert "epsilon" not in l2_run.name
    log = (l2_run / "train.log").read_text()
    assert "--epsilon 1.5 --step-size 0.3" in log
    with pytest.raises(UsageError, match="--norm Linf, the run has L2"):
        resume(l2_run, "--norm=Linf")
    resumed = resume(l2_run, "--epochs=2")
    recipe = state(resumed)["recipe"]
    assert recipe["norm"] == "L2"
    assert recipe["epsilon"] == 1.5
    assert recipe["step_size"] == 0.3


FEW = ("--attacks=fgsm,pgd", "--num-steps=3")
DIGITS = (*FEW, "--model=tests.tiny_networks:undefended", "--dataset=digits")


def test_an_evaluation_takes_the_norm_of_the_checkpoint_unless_told_another(l2_run, tmp_path):
    checkpoint = f"--ckpt_url={l2_run}"
    own = evaluate(tmp_path, checkpoint, *FEW)
    assert own["threat_model"] == "L2, eps 1.5 on images in [0, 1]"
    assert {"FGM", "PGD-3"} <= own["attacks"].keys()
    assert own["notes"] == []

    other = evaluate(tmp_path, checkpoint, "--attacks=pgd", "--norm=Linf")
    assert other["threat_model"] == "Linf, eps 0.1 on images in [0, 1]"
    assert other["attacks"].keys() == {"natural", "PGD-40"}  # and no row of the other norm
    (note,) = other["notes"]
    assert "trained against L2 attacks, and attacked in Linf" in note


def test_every_attack_stays_in_the_l2_ball(tmp_path, monkeypatch):
    saved = tmp_path / "worst.npz"
    monkeypatch.setattr("utils.evaluation.robustness.square", partial(square, queries=20))
    flags = ("--norm=L2", "--epsilon=0.6", "--restarts=1", "--apgd-steps=5", "--num-steps=5")
    split = subset(digits_split(), 20)
    natural = as_input(split.images)
    flags += (*DIGITS, f"--save-adversarial={saved}")
    for kind in ("fgsm", "pgd", "adaptive", "noise", "square"):
        evaluate(tmp_path, *flags, f"--attacks={kind}")
        with np.load(saved) as content:
            images = torch.from_numpy(content["images"])
            assert str(content["threat_model"]).startswith("L2, eps 0.6")
        changed = norms(images - natural).max()
        assert changed <= 0.6 + 1e-5
        if kind in ("fgsm", "pgd", "adaptive"):
            assert changed > 0.3


def test_balls_beyond_all_images_are_refused(refused):
    refused(ANCRA, "--dataset=digits", "--epsilon=1.5", mentions=["at most 1 for"])
    refused(ATTACK, *DIGITS, "--norm=L2", "--step-size=28", mentions=["at most 27.71 for"])
