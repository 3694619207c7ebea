"""Attacks of the evaluation, the loop over a split, and what the script makes of a checkpoint."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import build_model
from tests.helpers import (
    assert_equal,
    checkpoint,
    digits_checkpoint,
    digits_content,
    digits_network,
    digits_split,
    image_folder,
)
from tests.helpers import settings as training_settings
from tests.tiny_networks import with_ra
from utils.attacks import (
    cross_entropy,
    cross_entropy_over_heads,
    image_noise,
    linf_pgd,
    margin,
    margins,
    noise,
    pgd,
    pgd40_heads,
)
from utils.data.datasets import as_input, over_images, subset
from utils.data.subject import (
    Subject,
    halving,
    percent,
    verdicts,
)
from utils.evaluation.results import at_chance
from utils.evaluation.robustness import white_attack
from utils.system.attack_copy import frozen
from utils.system.checkpoints import load_model
from utils.system.errors import UsageError
from utils.system.options import parse
from utils.system.settings import MEANS, STDS, Evaluation
from utils.training import loop as training

EPS, STEP = 0.1, 0.02
QUICK = "--attacks=natural,fgsm,pgd,cw"
over_two_heads = partial(cross_entropy_over_heads, auxiliary_weight=2.0)
DIGITS_ALONE = ("--dataset=digits", "--limit-test=120", "--attacks=natural")


def test_pgd_stays_in_ball_and_range_and_shows_every_iterate():
    x = torch.rand(4, 3, 16, 16)
    start = x + 0.5
    iterates = {}

    def objective(z):
        return (z**2).sum()

    def see(step, iterate):
        iterates[step] = iterate.clone()

    found = linf_pgd(x, objective, EPS, STEP, 7, start, see)
    assert [*iterates] == [*range(1, 8)]
    assert torch.equal(iterates[7], found)
    assert not found.requires_grad
    every = torch.stack([*iterates.values()])
    assert (every - x).abs().max() <= EPS + 1e-6
    assert 0 <= every.min() <= every.max() <= 1


@pytest.mark.parametrize(
    ("attack", "objective", "kind", "scale"),
    [
        (pgd(cross_entropy, EPS, STEP, 2, start="uniform", seed=3), cross_entropy, "Linf", EPS),
        (pgd40_heads(EPS, STEP, 2.0, 3, steps=2), over_two_heads, "normal", 0.001),
    ],
)
def test_starts_are_noise_of_the_images_numbers(trained, attack, objective, kind, scale):
    """Uniform in the ball for the table, x + 0.001 N(0, 1) over heads for choosing epochs."""
    model, split, _ = trained
    x = as_input(split.images[:6])
    y = split.labels[:6]
    numbers = torch.arange(100, 106)
    start = x + scale * image_noise(x, numbers, 3, kind)
    with frozen(model) as net:
        expected = linf_pgd(x, objective(net, y), EPS, STEP, 2, start)
        assert torch.equal(attack(net, x, y, numbers), expected)


def test_margin_keeps_attacking_each_image(trained):
    """A misclassified image leaves the gradient of others as it is, and its own is not zero."""
    model, split, _ = trained
    x = as_input(split.images[:6])
    y = split.labels[:6].clone()
    y[0] = (y[0] + 1) % 10

    def gradient(rows):
        images = x[rows].requires_grad_()
        loss = margin(net, y[rows])(images)
        return torch.autograd.grad(loss, images)[0]

    with frozen(model) as net:
        together = gradient(slice(None))
        for i in range(6):
            assert torch.allclose(together[i], gradient([i])[0], atol=1e-5)
            assert together[i].any()


def test_margins_are_of_the_largest_other_logit():
    logits = torch.tensor([[1.0, 5, 3], [1, 5, 3]])
    labels = torch.tensor([1, 2])
    assert margins(logits, labels).tolist() == [-2, 2]


@pytest.mark.parametrize(
    ("kind", "deviation"),
    [("normal", 1), ("Linf", 3**-0.5), ("L2", 768**-0.5)],
)
def test_noise_of_an_image_depends_on_seed_and_number_alone(kind, deviation):
    x = torch.zeros(50, 3, 16, 16)
    numbers = torch.arange(50)
    noises = image_noise(x, numbers, 1, kind)
    alone = image_noise(x[:1], numbers[3:4], 1, kind)
    assert torch.equal(noises[3], alone[0])
    assert not torch.equal(noises, image_noise(x, numbers, 2, kind))
    assert not torch.equal(noises[0], noises[1])
    assert abs(noises.mean()) < 0.02 * deviation
    assert noises.std().item() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("shared", [True, False])
def test_the_loop_over_a_split_keeps_order_and_numbers(shared):
    split = digits_split().take(torch.tensor([40, 3, 17, 8, 30]))
    done = []
    x, labels, numbers = over_images(split, 2, lambda *batch: batch, done.append, shared)
    assert torch.equal(x, as_input(split.images))
    assert torch.equal(labels, split.labels)
    assert torch.equal(numbers, split.numbers)
    assert done == [2, 2, 1]


@pytest.mark.parametrize(
    "attack",
    [
        pgd40_heads(EPS / 2, STEP, 2.0, 1, steps=10),
        pgd(cross_entropy, EPS / 2, STEP, 10, start="uniform", seed=1),
        noise(EPS / 2, 1, 3),
    ],
)
def test_verdicts_do_not_depend_on_the_batch_size(attack):
    split = digits_split()
    with frozen(with_ra()) as net:
        natural = verdicts(net, split, 100)
        whole = verdicts(net, split, 360, attack, natural)
        in_batches = verdicts(net, split, 77, attack, natural)
    assert (whole != in_batches).float().mean() <= 0.005
    assert not (whole & ~natural).any()
    assert 0 < percent(whole) <= percent(natural)


def test_an_attack_that_runs_out_of_memory_goes_on_in_halves():
    """Verdicts stay, sizes stay halved, and a smaller last batch halves nothing."""
    split = subset(digits_split(), 90)
    sizes = []
    attack = pgd(cross_entropy, EPS, STEP, 2, start="uniform", seed=1)

    def with_memory_for(count):
        def short_of_memory(net, x, labels, numbers):
            sizes.append(len(x))
            if len(x) > count:
                raise torch.cuda.OutOfMemoryError("no memory")
            return attack(net, x, labels, numbers)

        return halving(short_of_memory)

    with frozen(with_ra()) as net:
        expected = verdicts(net, split, 40, attack)
        assert torch.equal(verdicts(net, split, 40, with_memory_for(15)), expected)
        assert 0 < expected.sum() < 90
        assert sizes == [40, 20, *[10] * 9]
        with pytest.raises(torch.cuda.OutOfMemoryError):
            verdicts(net, split, 40, with_memory_for(0))


def test_an_epoch_s_attack_searches_in_the_precision_of_training_and_float32_judges(monkeypatch):
    monkeypatch.setattr(training, "pgd40_heads", partial(pgd40_heads, steps=5))
    model = digits_network()
    split = subset(digits_split(), 60)
    chosen = training_settings("--dataset=digits", "--precision=bf16")
    job = SimpleNamespace(settings=chosen, device=torch.device("cpu"), check_stop=lambda: None)
    accuracies = training.evaluate(job, model, split)

    attack = pgd40_heads(0.1, 0.02, 2.0, 1, steps=5)
    x = as_input(split.images)
    batch = (x, split.labels, split.numbers)
    with frozen(model) as net, frozen(model, "bf16") as searched:
        adversarial = attack(searched, *batch)
        assert not torch.equal(adversarial, attack(net, *batch))
        right = net(x).argmax(1) == split.labels
        judged = net(adversarial).argmax(1) == split.labels
    natural, robust = accuracies.values()
    assert natural == percent(right)
    assert robust == percent(right & judged)
    assert 0 < robust < natural


# The script


def run(*flags):
    settings = parse(Evaluation, "", [*map(str, flags)])
    white_attack(settings)


def test_a_table_and_a_log_beside_the_checkpoint_at_the_data_set_s_eps(tmp_path, capsys):
    digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--ckpt_url", tmp_path, "--limit-test=30", QUICK, "--num-steps=4")
    run(*flags)
    table = capsys.readouterr().out
    log = (tmp_path / "test.log").read_text()
    assert "eps 0.1, step 0.02" in table
    assert table in log
    rows = re.findall(r"(?m)^(\S+) +\d+\.\d\d ", table)
    assert rows == ["natural", "FGSM", "PGD-4", "CW-2"]
    assert "adaptive attack:" not in table

    run(*flags, "--epsilon=8/255")  # the command wins
    again = capsys.readouterr().out
    assert "eps 8/255, step 0.02" in again
    assert (tmp_path / "test.log").read_text() == log + again


def test_a_checkpoint_knows_its_data_and_refuses_others(tmp_path, capsys):
    pets = image_folder(tmp_path / "pets")
    known = {"classes": ["cat", "dog"], "dataset": "folder", "recipe": {"data_dir": str(pets)}}
    file = checkpoint(tmp_path / "run.pt", num_classes=2, **known)
    flags = ("--ckpt_url", file, "--attacks=natural")
    run(*flags)
    assert "folder, 6 of 6 test images" in capsys.readouterr().out
    for part in ("train", "test"):
        folder = pets / part
        (folder / "dog").rename(folder / "eel")
    with pytest.raises(UsageError, match="other classes"):
        run(*flags)


def named(prefix, state):
    """A state dict with a prefix before each key."""
    return {f"{prefix}{key}": value for key, value in state.items()}


def normalisation(prefix):
    """Buffers of a layer that normalises images."""
    mean = torch.tensor([0.25, 0.5, 0.125])[None, :, None, None]
    return {f"{prefix}mean": mean, f"{prefix}std": torch.tensor([0.5])}


PUBLISHED = {  # how a state dict may lie in a file; the other network would be the wrong one
    "bare": lambda net, other: net,
    "net": lambda net, other: {"net": net, "acc": 93.1, "epoch": 7, "arch": "resnet"},
    "compiled": lambda net, other: {"state_dict": named("module._orig_mod.model.", net)},
    "average before it": lambda net, other: {"model_ema": {"module": other}, "model": net},
    "average by --key": lambda net, other: {"model": other, "model_ema": named("module.", net)},
    "normalised": lambda net, other: named("model.", net) | normalisation("normalize."),
    "normalised in sequence": lambda net, other: named("1.", net) | normalisation("0."),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_state_dict_is_found_whatever_it_is_wrapped_in(tmp_path, kind):
    net = digits_content(True)["model"]
    other = digits_content(False)["model"]
    wrap = PUBLISHED[kind]
    torch.save(wrap(net, other), tmp_path / "published.pt")
    key = "model_ema" if "--key" in kind else None
    model, info = load_model(tmp_path / "published.pt", dataset="digits", key=key)
    assert_equal(dict(model.state_dict()), net)  # the normalisation is none of it
    if "normalised" in kind:
        assert info["mean"] == (0.25, 0.5, 0.125)
        assert info["std"] == (0.5, 0.5, 0.5)
        assert model.normalise is not None
    else:
        assert model.normalise is None


def test_a_classifier_of_another_name_is_found(tmp_path):
    model = build_model("PreActResNet18", 10, width=1, image_size=64)
    state = {key.replace("linear.", "head."): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "published.pt")
    found, info = load_model(tmp_path / "published.pt")
    assert info["image_size"] == 64
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found(x), model.eval()(x))


@torch.no_grad()
def test_normalisation_is_a_part_of_the_network_that_attacks_see(tmp_path):
    """Gates, heads and the attack's copy of it take [0, 1] images."""
    file = tmp_path / "bare.pt"
    torch.save(digits_content()["model"], file)
    mean = (0.25, 0.5, 0.125)
    std = (0.5, 0.25, 0.5)
    bare, _ = load_model(file, dataset="digits")
    model, _ = load_model(file, dataset="digits", mean=mean, std=std)
    split = digits_split(count=4)
    x = as_input(split.images)
    by_hand = x - torch.tensor(mean)[:, None, None]
    by_hand /= torch.tensor(std)[:, None, None]
    expected = bare(by_hand, split.labels, heads=True)
    assert_equal(model(x, split.labels, heads=True), expected)
    with frozen(model) as net:
        copied = net(x, split.labels, heads=True)
    assert torch.allclose(copied.final, expected.final, atol=1e-3)


def test_what_was_assumed_stands_beside_the_figures(tmp_path, capsys):
    file = tmp_path / "published.pt"
    torch.save({"state_dict": digits_content(False)["model"]}, file)
    mean = MEANS["cifar10"]
    normalised = ("--mean=cifar10", "--std", ",".join(map(str, STDS["cifar10"])))
    networks = set()
    for flags, images, recorded in (
        ((), "mean None", None),
        (normalised, f"mean {mean}", list(mean)),
    ):
        run("--ckpt_url", file, *DIGITS_ALONE, "--no-ra", *flags)
        _, table = capsys.readouterr().out.split("\nattack ")
        assert f"taken for arch ResNet18, width 4, reverse_attention False, {images}" in table
        record = json.loads((tmp_path / "white_attack.json").read_text())
        assert all(f"note: {note}" in table for note in record["notes"])
        assert record["network"]["mean"] == recorded
        networks.add(record["identity"]["network"])
    assert len(networks) == 2


@pytest.mark.parametrize(
    ("ra", "recipe", "name"),
    [
        (True, {"method": "trades", "no_anc": False}, "ANCRA-TRADES"),
        (True, {"method": "pgd", "no_anc": True}, "PGD-AT-RA"),
        (False, {"method": "mart", "no_anc": False}, "MART-ANC"),
        (False, {"method": "pgd", "no_anc": True}, "PGD-AT"),
        (True, None, "best_adv_model"),
    ],
)
def test_runs_are_named_by_method_and_ablation(ra, recipe, name):
    info = {"recipe": recipe, "reverse_attention": ra}
    file = Path("run/best_adv_model.pt")
    assert Subject(file, None, info, "digits", None, 0.1, 0.02).method == name


def test_a_table_names_a_network_at_chance(tmp_path, capsys):
    """It answers one class, so that no attack can change it: as robust as it is useless."""
    content = digits_content()
    for favour in (0.0, 1e4):
        content["model"]["fc.bias"][3] += favour
        torch.save(content, tmp_path / "weights.pt")
        run("--ckpt_url", tmp_path / "weights.pt", "--attacks=natural")
        assert ("at chance" in capsys.readouterr().out) == (favour > 0)
    labels = [2, 0, 2]
    assert "66.67 %" in at_chance(66.66, labels)
    assert not at_chance(67, labels)
    assert not at_chance(50, labels[:1])
