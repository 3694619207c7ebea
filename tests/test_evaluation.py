"""Attacks of the evaluation, its verdicts and its script."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from utils.attacks import cross_entropy, frozen, image_noise, linf_pgd, margin
from utils.data import as_input
from utils.evaluation import percent, pgd40_heads, verdicts, white_box
from utils.options import UsageError, parse_evaluation, parse_training
from utils.robustness import white_attack
from utils.training import run

EPS, STEP = 0.1, 0.02
QUICK = ("--attacks", "natural,fgsm,pgd,cw")


def test_pgd_stays_in_ball_and_range_and_shows_every_iterate():
    x = torch.rand(4, 3, 16, 16)
    seen = []
    found = linf_pgd(
        x, lambda z: (z**2).sum(), EPS, STEP, 7, x + 0.5, on_step=lambda step, z: seen.append((step, z.clone()))
    )
    assert [step for step, _ in seen] == list(range(1, 8))
    assert torch.equal(seen[-1][1], found) and not found.requires_grad
    for _, iterate in seen:
        assert (iterate - x).abs().max() <= EPS + 1e-6 and iterate.min() >= 0 and iterate.max() <= 1


def test_one_step_from_the_image_is_textbook_fgsm(trained):
    model, split, _ = trained
    x, y = as_input(split.images[:8]), split.labels[:8]
    with frozen(model) as net:
        found = white_box(cross_entropy, EPS, EPS, 1, False, 0)(net, x, y, torch.arange(8))
        z = x.clone().requires_grad_()
        F.cross_entropy(net(z), y).backward()
    assert torch.equal(found, (x + EPS * z.grad.sign()).clamp(0, 1).clamp(x - EPS, x + EPS))


def test_margin_keeps_attacking_each_image(trained):
    """One misclassified image leaves the gradient of the others as it is, and its own is not zero."""
    model, split, _ = trained
    x, y = as_input(split.images[:6]), split.labels[:6].clone()
    y[0] = (y[0] + 1) % 10
    with frozen(model) as net:
        z = x.clone().requires_grad_()
        (together,) = torch.autograd.grad(margin(net, y)(z), z)
        alone = [torch.autograd.grad(margin(net, y[i : i + 1])(z[i : i + 1]), z)[0][i] for i in range(6)]
        logits = net(x)
        values = [row[torch.arange(10) != label].max() - row[label] for row, label in zip(logits, y, strict=True)]
        assert float(margin(net, y)(x)) == pytest.approx(float(sum(values)), rel=1e-4)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert together.flatten(1).abs().sum(1).min() > 0


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_of_an_image_depends_on_seed_and_index_alone(kind):
    x = torch.zeros(5, 3, 16, 16)
    whole = image_noise(x, torch.arange(5), 1, kind)
    assert torch.equal(whole[3:], image_noise(x[:2], torch.tensor([3, 4]), 1, kind))
    assert not torch.equal(whole, image_noise(x, torch.arange(5), 2, kind))
    assert not torch.equal(whole[0], whole[1])
    many = image_noise(torch.zeros(50, 3, 16, 16), torch.arange(50), 1, kind)
    assert abs(many.mean()) < 0.02 and abs(many.std() - (1 if kind == "normal" else 3**-0.5)) < 0.02


def test_verdicts_do_not_depend_on_the_batch_size(trained):
    model, split, _ = trained
    attack = pgd40_heads(0.05, STEP, 2, 1)
    with frozen(model) as net:
        natural = verdicts(net, split, 100)
        found = [verdicts(net, split, size, attack, natural) for size in (360, 77)]
    assert (found[0] != found[1]).float().mean() <= 0.005
    assert not (found[0] & ~natural).any()
    assert percent(natural) > 80 and percent(found[0]) < percent(natural)


def test_the_script_reports_the_attacks_in_a_table_and_a_log(trained, capsys):
    _, _, file = trained
    flags = ["--ckpt_url", str(file), "--limit-test", "60", "--epsilon", "0.05", *QUICK, "--num-steps", "10"]
    white_attack(parse_evaluation("", flags))
    table = capsys.readouterr().out
    figures = dict(line.split()[:2] for line in table.splitlines()[4:8])
    assert list(figures) == ["natural", "FGSM", "PGD-10", "CW-5"]
    assert float(figures["natural"]) >= float(figures["FGSM"]) >= float(figures["PGD-10"])
    assert table in (file.parent / "test.log").read_text()
    white_attack(parse_evaluation("", [*flags, "--seed", "1"]))
    assert (file.parent / "test.log").read_text().count("\nPGD-10") == 2


def test_a_data_set_brings_its_own_eps_and_the_command_wins(trained, capsys):
    _, _, file = trained
    for flags, said in (([], "eps 0.1, step 0.02"), (["--epsilon", "8/255"], "eps 0.031373, step 0.02")):
        white_attack(
            parse_evaluation("", ["--ckpt_url", str(file), "--limit-test", "4", "--num-steps", "1", *QUICK, *flags])
        )
        assert said in capsys.readouterr().out


def test_a_checkpoint_knows_its_data_and_refuses_others(tmp_path, capsys):
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "pets" / part / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "pets" / part / name / f"{i}.png")
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "pets"), "--model-dir", str(tmp_path / "run")]
    flags += ["--image-size", "16", "--width", "4", "--epochs", "1", "--num-steps", "1"]
    recipe = {"arch": "ResNet18", "dataset": "cifar10"}
    run(parse_training("", recipe, flags))
    (folder,) = tmp_path.glob("run*")
    short = ["--ckpt_url", str(folder), "--num-steps", "1", *QUICK]
    white_attack(parse_evaluation("", short))
    assert "folder, 6 test images" in capsys.readouterr().out
    for part in ("train", "test"):
        (tmp_path / "pets" / part / "dog").rename(tmp_path / "pets" / part / "eel")
    with pytest.raises(UsageError, match="other classes"):
        white_attack(parse_evaluation("", short))


def test_a_published_bare_state_dict_evaluates(trained, tmp_path, capsys):
    model, _, _ = trained
    bare = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(bare | {"module.sub_block1.layer.0.bn1.weight": torch.ones(1)}, tmp_path / "published.pt")
    flags = ["--dataset", "digits", "--limit-test", "60", "--num-steps", "2", *QUICK]
    white_attack(parse_evaluation("", ["--ckpt_url", str(tmp_path / "published.pt"), *flags]))
    assert "ResNet18 with reverse attention, digits, 60 test images" in capsys.readouterr().out
