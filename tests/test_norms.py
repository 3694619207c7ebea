"""L2 attacks: against formulas in float64, other libraries, and where margins are known."""

import json
from functools import partial

import foolbox
import numpy as np
import pytest
import torch
import torchattacks
from torch import nn

from tests.conftest import shorten_runs
from tests.helpers import ANCRA, ATTACK, PLAIN, digits_split, resume, settings, some_batch, train
from tests.tiny_networks import robust, with_ra
from utils import attacks
from utils.attacks import cross_entropy, image_noise, margin, noise, pgd, projected_ascent
from utils.data.datasets import as_input, subset
from utils.evaluation import results
from utils.evaluation.autoattack import square
from utils.evaluation.robustness import white_attack
from utils.system.attack_copy import AttackCopy, frozen
from utils.system.errors import UsageError
from utils.system.options import parse
from utils.system.settings import Evaluation
from utils.training.loop import attack_batch

NUMBERS = torch.arange(1000)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No picture is drawn."""
    monkeypatch.setattr("utils.evaluation.report.save_or_note", lambda draw, file: "")


def norms(images):
    """The L2 norm of each image."""
    return images.flatten(1).norm(dim=1)


def evaluate(folder, *flags):
    """Attack some digits with the log in `folder` -> white_attack.json."""
    flags = ("--n-examples=20", "--device=cpu", "--log_path", folder / "test.log", *flags)
    white_attack(parse(Evaluation, "", [*map(str, flags)]))
    return json.loads((folder / "white_attack.json").read_text())


# Steps, projections and starts


def test_an_l2_step_is_the_formula_in_float64_for_gradients_of_any_size():
    generator = torch.Generator().manual_seed(0)
    x, adversarial, gradient = torch.rand(3, 6, 3, 5, 5, generator=generator)
    gradient = gradient - 0.5
    gradient[1] *= 1e-30  # whose squares are 0 in float32
    gradient[2] *= 1e30  # whose squares are not finite
    gradient[3] = 0
    adversarial[4:] = x[4:]
    for eps, step_size in ((0.5, 0.2), (9.0, 0.2), (0.1, 0.2), (0.0, 0.2)):
        stepped = attacks.l2_step(x, eps, step_size)(adversarial, gradient)
        for i in range(6):
            centre, image, slope = (part[i].double().numpy() for part in (x, adversarial, gradient))
            length = np.sqrt((slope**2).sum())
            moved = image + (step_size * slope / length if length else 0)
            distance = np.sqrt(((moved - centre) ** 2).sum())
            if distance > eps:
                moved = centre + eps * (moved - centre) / distance
            assert np.allclose(stepped[i], moved.clip(0, 1), rtol=0, atol=2e-6), (eps, i)
    assert norms(attacks.l2_step(x, 9.0, 1e-3)(x, gradient))[[0, 1, 2]].gt(0).all()


def test_l2_noise_is_uniform_in_the_unit_ball():
    """So the share of the ball's volume within an image's radius is uniform, too."""
    many = image_noise(torch.zeros(400, 3, 2, 2), NUMBERS[:400], 1, "L2").double()
    shares = norms(many).pow(12).sort().values
    assert shares.max() <= 1 + 1e-5
    assert (shares - (torch.arange(400) + 0.5) / 400).abs().max() < 0.08  # Kolmogorov, 1 in 100
    directions = many.flatten(1) / norms(many)[:, None]
    assert (directions.T @ directions / 400 - torch.eye(12) / 12).abs().max() < 0.03


def test_training_attacks_stay_in_the_l2_ball():
    x, labels = some_batch()
    s = settings("--norm=L2", "--dataset=digits", "--epsilon=0.4", "--warmup-epochs=0")
    copy = AttackCopy(with_ra())
    attacked = attack_batch(copy, x, labels, s, torch.Generator().manual_seed(0), 1)
    for images in (attacked.adversarial, attacked.negative):
        assert images.min() >= 0 and images.max() <= 1
    changed = norms(attacked.adversarial - x)
    assert changed.min() > 0.2 and changed.max() <= 0.4 + 1e-5
    nearest = torch.cdist(attacked.negative.flatten(1), x.flatten(1)).amin(1)
    assert nearest.min() > 0.2 and nearest.max() <= 0.4 + 1e-5


# Where margins are known


class Linear(nn.Module):
    """Two logits, 0 and w x + b; so an image's radius is its margin by the dual norm of w."""

    def __init__(self):
        """Draw w, with entries of different sizes."""
        super().__init__()
        self.w = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)) ** 3 / 10

    def forward(self, x):
        """Return logits."""
        score = ((x - 0.5) * self.w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attacks_on_a_linear_network_succeed_exactly_beyond_its_margin(norm):
    net = Linear()
    w = net.w.double()
    eps = 0.1 if norm == "Linf" else 0.3
    direction, dual = (w.sign(), w.abs().sum()) if norm == "Linf" else (w / w.norm(), w.norm())
    distances = eps * torch.tensor([0.5, 0.98, 1.02, 1.5])
    x = (0.5 + distances[:, None, None, None] * direction).float()
    labels = torch.ones(4, dtype=torch.long)
    assert torch.allclose(net(x)[:, 1] / dual.float(), distances, atol=1e-5)

    for objective, start in ((margin, "uniform"), (cross_entropy, "image")):
        attack = pgd(objective, eps, eps / 5, 20, start=start, seed=1, norm=norm)
        found = attack(net, x, labels, NUMBERS[:4])
        assert net(found).argmax(1).tolist() == [0, 0, 1, 1]
    one_step = pgd(cross_entropy, eps, eps, 1, start="image", seed=1, norm=norm)
    assert net(one_step(net, x, labels, NUMBERS[:4])).argmax(1).tolist() == [0, 0, 1, 1]
    for weak in (noise(eps, 1, 20, norm), square(eps, 1, 50, norm)):
        right = net(weak(net, x, labels, NUMBERS[:4])).argmax(1) == labels
        assert right[2:].all()


# Other libraries


@pytest.mark.parametrize(("steps", "step_size"), [(1, 0.5), (10, 0.1)])
def test_fgm_and_pgd_are_those_of_torchattacks_and_foolbox(steps, step_size):
    split = subset(digits_split(), 40)
    x, labels = as_input(split.images), split.labels
    model = robust()
    attack = torchattacks.PGDL2(model, 0.5, step_size, steps, random_start=False)
    other = foolbox.attacks.L2PGD(abs_stepsize=step_size, steps=steps, random_start=False)
    classifier = foolbox.PyTorchModel(model, bounds=(0, 1))
    theirs = (attack(x, labels), other(classifier, x, labels, epsilons=0.5)[1])
    with frozen(model) as net:
        ours = projected_ascent("L2", x, cross_entropy(net, labels), 0.5, step_size, steps, x)
    for images in theirs:
        close = norms(ours - images) < 1e-2
        assert close.float().mean() >= 0.95  # rounding may flip a ReLU
        assert ((model(images) - model(ours)).abs().amax(1) < 0.05)[close].all()


# Commands


@pytest.fixture(scope="module")
def l2_run(tmp_path_factory):
    """A short training in an L2 ball."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        return train(tmp_path_factory.mktemp("l2"), "--norm=L2", "--epochs=1", recipe=PLAIN)


def test_a_run_says_its_norm_and_keeps_it(l2_run, short_runs):
    assert l2_run.name.startswith("run-") and "-digits-L2-" in l2_run.name
    assert "epsilon" not in l2_run.name
    log = (l2_run / "train.log").read_text()
    assert "--norm L2 --epsilon 1.5 --num-steps 2 --step-size 0.3" in log
    command = log.partition("evaluate by: ")[2]
    assert "--norm" not in command and "--epsilon" not in command  # the checkpoint says them
    with pytest.raises(UsageError, match="--norm Linf, the run has L2"):
        resume(l2_run, "--norm=Linf")
    resume(l2_run, "--epochs=2")
    recipe = torch.load(l2_run / "last_state.pt", weights_only=True)["recipe"]
    assert (recipe["norm"], recipe["epsilon"], recipe["step_size"]) == ("L2", 1.5, 0.3)


FEW = ("--attacks=fgsm,pgd", "--num-steps=3")
DIGITS = (*FEW, "--model=tests.tiny_networks:undefended", "--dataset=digits")


def test_an_evaluation_takes_the_norm_of_the_checkpoint_unless_told_another(l2_run, tmp_path):
    own = evaluate(tmp_path, f"--ckpt_url={l2_run}", *FEW)
    assert own["threat_model"] == "L2, eps 1.5 on images in [0, 1]"
    assert {*own["attacks"]} >= {"FGM", "PGD-3"}
    assert own["settings"]["norm"] == "L2" and own["notes"] == []
    assert "L2 eps 1.5, step 0.3" in (tmp_path / "test.log").read_text()

    other = evaluate(tmp_path, f"--ckpt_url={l2_run}", "--attacks=pgd", "--norm=Linf")
    assert other["threat_model"] == "Linf, eps 0.1 on images in [0, 1]"
    assert {*other["attacks"]} == {"natural", "PGD-40"}  # and no row of the other norm
    (note,) = other["notes"]
    assert "trained against L2 attacks, and attacked in Linf" in note
    assert f"note: {note}" in (tmp_path / "test.log").read_text()

    rows = [line for line in results.table(results.grouped([other, own])) if "| 1 |" in line]
    assert "evaluated in Linf" in rows[0] and "evaluated in L2" in rows[1]
    assert "other images, norm or eps" in rows[1]


def test_every_attack_stays_in_the_l2_ball(tmp_path, monkeypatch):
    saved = tmp_path / "worst.npz"
    monkeypatch.setattr("utils.evaluation.robustness.square", partial(square, queries=20))
    flags = ("--norm=L2", "--epsilon=0.6", "--restarts=1", "--apgd-steps=5", "--num-steps=5")
    for kind in ("fgsm", "pgd", "adaptive", "noise", "square"):
        evaluate(tmp_path, *DIGITS, *flags, f"--attacks={kind}", f"--save-adversarial={saved}")
        with np.load(saved) as content:
            images = torch.from_numpy(content["images"])
            assert str(content["threat_model"]).startswith("L2, eps 0.6")
        changed = norms(images - as_input(subset(digits_split(), 20).images))
        assert changed.max() <= 0.6 + 1e-5
        assert changed.max() > 0.3 or kind in ("noise", "square")


@pytest.mark.parametrize(
    ("flags", "largest"),
    [(("--epsilon=1.5",), "1"), (("--norm=L2", "--step-size=28"), "27.71")],
)
def test_balls_beyond_all_images_are_refused(flags, largest, refused):
    asked = ("--dataset=digits", *flags)
    refused(ANCRA, *asked, mentions=[f"at most {largest} for"])
    refused(ATTACK, *DIGITS, *flags, mentions=[f"at most {largest} for"])
