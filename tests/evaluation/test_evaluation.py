"""Attacks of the evaluation, the loop over a split, and what the script makes of a checkpoint."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import build_model
from tests.helpers import (
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
from utils.data.datasets import as_input, subset
from utils.data.subject import (
    Subject,
    at_chance,
    halving,
    network_checksum,
    over_images,
    percent,
    verdicts,
)
from utils.evaluation.robustness import white_attack
from utils.system.attack_copy import frozen
from utils.system.checkpoints import load_model
from utils.system.errors import UsageError
from utils.system.options import parse
from utils.system.settings import MEANS, STDS, Evaluation
from utils.training import loop as training

EPS, STEP = 0.1, 0.02
QUICK = ("--attacks", "natural,fgsm,pgd,cw")
DIGITS_ALONE = ("--dataset", "digits", "--limit-test", "120", "--attacks", "natural")


def test_pgd_stays_in_ball_and_range_and_shows_every_iterate():
    x = torch.rand(4, 3, 16, 16)
    seen = []
    found = linf_pgd(
        x,
        lambda z: (z**2).sum(),
        EPS,
        STEP,
        7,
        x + 0.5,
        on_step=lambda step, z: seen.append((step, z.clone())),
    )
    assert [step for step, _ in seen] == list(range(1, 8))
    assert torch.equal(seen[-1][1], found) and not found.requires_grad
    for _, iterate in seen:
        assert (iterate - x).abs().max() <= EPS + 1e-6 and iterate.min() >= 0 and iterate.max() <= 1


def test_starts_are_noise_of_the_images_numbers(trained):
    """Uniform in the ball for the table, x + 0.001 N(0, 1) over heads for choosing epochs."""
    model, split, _ = trained
    x = as_input(split.images[:6])
    y = split.labels[:6]
    numbers = torch.arange(100, 106)
    with frozen(model) as net:
        uniform = pgd(cross_entropy, EPS, STEP, 2, start="uniform", seed=3)
        start = x + EPS * image_noise(x, numbers, 3, "Linf")
        expected = linf_pgd(x, cross_entropy(net, y), EPS, STEP, 2, start)
        assert torch.equal(uniform(net, x, y, numbers), expected)

        over_heads = pgd40_heads(EPS, STEP, 2.0, 3, steps=2)
        start = x + 0.001 * image_noise(x, numbers, 3, "normal")
        objective = cross_entropy_over_heads(net, y, 2.0)
        expected = linf_pgd(x, objective, EPS, STEP, 2, start)
        assert torch.equal(over_heads(net, x, y, numbers), expected)


def test_margin_keeps_attacking_each_image(trained):
    """A misclassified image leaves the gradient of others as it is, and its own is not zero."""
    model, split, _ = trained
    x = as_input(split.images[:6]).requires_grad_()
    y = split.labels[:6].clone()
    y[0] = (y[0] + 1) % 10
    with frozen(model) as net:
        (together,) = torch.autograd.grad(margin(net, y)(x), x)
        alone = []
        for i in range(6):
            (gradient,) = torch.autograd.grad(margin(net, y[i : i + 1])(x[i : i + 1]), x)
            alone.append(gradient[i])
        logits = net(x)
    for row, label, value in zip(logits, y, margins(logits, y), strict=True):
        assert value == row[torch.arange(10) != label].max() - row[label]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert together.flatten(1).abs().sum(1).min() > 0


@pytest.mark.parametrize("kind", ["normal", "Linf", "L2"])
def test_noise_of_an_image_depends_on_seed_and_number_alone(kind):
    x = torch.zeros(5, 3, 16, 16)
    whole = image_noise(x, torch.arange(5), 1, kind)
    assert torch.equal(whole[3:], image_noise(x[:2], torch.tensor([3, 4]), 1, kind))
    assert not torch.equal(whole, image_noise(x, torch.arange(5), 2, kind))
    assert not torch.equal(whole[0], whole[1])
    many = image_noise(torch.zeros(50, 3, 16, 16), torch.arange(50), 1, kind)
    deviation = {"normal": 1, "Linf": 3**-0.5, "L2": 768**-0.5}[kind]
    assert abs(many.mean()) < 0.02 * deviation
    assert many.std().item() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("shared", [True, False])
def test_the_loop_over_a_split_keeps_order_and_numbers(shared):
    split, done = subset(digits_split(), 50), []
    rows = torch.tensor([40, 3, 17, 8, 30])

    def work(x, labels, numbers):
        return x.mean((1, 2, 3)), labels, numbers

    means, labels, numbers = over_images(split, rows, 2, work, done.append, shared)
    assert torch.equal(numbers, split.numbers[rows]) and torch.equal(labels, split.labels[rows])
    assert torch.allclose(means, as_input(split.images[rows]).mean((1, 2, 3)))
    assert done == [2, 2, 1]


def test_verdicts_do_not_depend_on_the_batch_size():
    split = digits_split()
    attacks = [
        pgd40_heads(EPS / 2, STEP, 2.0, 1, steps=10),
        pgd(cross_entropy, EPS / 2, STEP, 10, start="uniform", seed=1),
        pgd(margin, EPS / 2, STEP, 5, start="uniform", seed=1),
        noise(EPS / 2, 1, 3),
    ]
    with frozen(with_ra()) as net:
        natural = verdicts(net, split, 100)
        for attack in attacks:
            whole = verdicts(net, split, 360, attack, natural)
            in_batches = verdicts(net, split, 77, attack, natural)
            assert (whole != in_batches).float().mean() <= 0.005
            assert not (whole & ~natural).any()
            assert 0 < percent(whole) <= percent(natural)


def test_an_attack_that_runs_out_of_memory_goes_on_in_halves():
    """Verdicts stay, sizes stay halved, and a smaller last batch halves nothing."""
    split, sizes = subset(digits_split(), 90), []
    attack = pgd(cross_entropy, EPS, STEP, 2, start="uniform", seed=1)

    def short_of_memory(net, x, labels, numbers):
        sizes.append(len(x))
        if len(x) > 15:
            raise torch.cuda.OutOfMemoryError("no memory")
        return attack(net, x, labels, numbers)

    with frozen(with_ra()) as net:
        expected = verdicts(net, split, 40, attack)
        assert torch.equal(verdicts(net, split, 40, halving(short_of_memory)), expected)
        assert 0 < expected.sum() < 90
        assert sizes == [40, 20, 10, 10, 10, 10, 10, 10, 10, 10, 10]

        def hopeless(*args):
            raise torch.cuda.OutOfMemoryError("no memory")

        with pytest.raises(torch.cuda.OutOfMemoryError):
            verdicts(net, split, 40, halving(hopeless))


@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_an_epoch_s_attack_searches_in_the_precision_of_training_and_float32_judges(
    precision, monkeypatch
):
    monkeypatch.setattr(training, "pgd40_heads", partial(pgd40_heads, steps=5))
    model, split = digits_network(), subset(digits_split(), 60)
    chosen = training_settings("--dataset", "digits", "--precision", precision)
    job = SimpleNamespace(settings=chosen, device=torch.device("cpu"), check_stop=lambda: None)
    natural, robust = training.evaluate(job, model, split)
    attack = pgd40_heads(0.1, 0.02, 2.0, 1, steps=5)
    x, labels = as_input(split.images), split.labels
    with frozen(model) as net, frozen(model, precision) as searched:
        right = net(x).argmax(1) == labels
        judged = net(attack(searched, x, labels, split.numbers)).argmax(1) == labels
        assert searched(x).equal(net(x)) == (precision == "default")
    assert natural == percent(right) and robust == percent(right & judged)
    assert 0 < robust < natural


# The script


def run(*flags):
    white_attack(parse(Evaluation, "", [*map(str, flags)]))


def test_a_table_and_a_log_beside_the_checkpoint_at_the_data_set_s_eps(tmp_path, capsys):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--ckpt_url", tmp_path, "--limit-test", "30", *QUICK, "--num-steps", "4")
    run(*flags)
    table = capsys.readouterr().out
    assert "eps 0.1, step 0.02" in table
    (start,) = [i for i, line in enumerate(table.splitlines()) if line.startswith("attack ")]
    figures = dict(line.split()[:2] for line in table.splitlines()[start + 1 : start + 5])
    assert list(figures) == ["natural", "FGSM", "PGD-4", "CW-2"]
    assert all(float(figures["natural"]) >= float(figures[name]) for name in figures)
    assert table in (file.parent / "test.log").read_text()
    run(*flags, "--epsilon", "8/255")  # the command wins
    assert "eps 8/255, step 0.02" in capsys.readouterr().out
    assert (file.parent / "test.log").read_text().count("\nPGD-4") == 2


def test_a_checkpoint_knows_its_data_and_refuses_others(tmp_path, capsys):
    pets = image_folder(tmp_path / "pets")
    known = {"classes": ["cat", "dog"], "dataset": "folder", "recipe": {"data_dir": str(pets)}}
    short = (
        "--ckpt_url",
        checkpoint(tmp_path / "run.pt", num_classes=2, **known),
        "--num-steps",
        "1",
        *QUICK,
    )
    run(*short)
    assert "folder, 6 of 6 test images" in capsys.readouterr().out
    for part in ("train", "test"):
        (pets / part / "dog").rename(pets / part / "eel")
    with pytest.raises(UsageError, match="other classes"):
        run(*short)


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
    torch.save(PUBLISHED[kind](net, other), tmp_path / "published.pt")
    key = {"key": "model_ema"} if "--key" in kind else {}
    model, info = load_model(tmp_path / "published.pt", dataset="digits", **key)
    loaded = model.state_dict()
    assert loaded.keys() == net.keys()  # the normalisation is none of it
    assert all(torch.equal(loaded[name], value) for name, value in net.items())
    if "normalised" in kind:
        assert (info["mean"], info["std"]) == ((0.25, 0.5, 0.125), (0.5, 0.5, 0.5))
        assert model.normalise is not None
    else:
        assert info["mean"] is None and model.normalise is None


def test_a_classifier_of_another_name_is_found(tmp_path):
    model = build_model("PreActResNet18", 10, width=1, image_size=64)
    state = {key.replace("linear.", "head."): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "published.pt")
    found, info = load_model(tmp_path / "published.pt")
    assert (info["arch"], info["width"], info["image_size"]) == ("PreActResNet18", 1, 64)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found(x), model.eval()(x))


@torch.no_grad()
def test_normalisation_is_a_part_of_the_network_that_attacks_see(tmp_path):
    """Gates, heads and the attack's copy of it take [0, 1] images."""
    file = tmp_path / "bare.pt"
    torch.save(digits_content()["model"], file)
    mean, std = (0.25, 0.5, 0.125), (0.5, 0.25, 0.5)
    bare, _ = load_model(file, dataset="digits")
    model, info = load_model(file, dataset="digits", mean=mean, std=std)
    split = digits_split(count=4)
    x = as_input(split.images)
    labels = torch.tensor([1, 2, 3, 4])
    by_hand = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for gate in (None, labels):
        expected = bare(by_hand, gate, heads=True)
        heads = model(x, gate, heads=True)
        assert torch.equal(heads.final, expected.final)
        assert torch.equal(heads.auxiliary[0], expected.auxiliary[0])
        with frozen(model) as net:
            assert torch.allclose(net(x, gate, heads=True).final, expected.final, atol=1e-3)
    _, other = load_model(file, dataset="digits", mean=mean, std=mean)
    assert network_checksum(model, info, split) != network_checksum(model, other, split)


def test_what_was_assumed_stands_beside_the_figures(tmp_path, capsys):
    mean = MEANS["cifar10"]
    std = STDS["cifar10"]
    normalised = ("--mean", "cifar10", "--std", ",".join(map(str, std)))
    torch.save({"state_dict": digits_content(False)["model"]}, tmp_path / "published.pt")
    for flags, images in (((), "not normalised"), (normalised, f"normalised by {mean}")):
        run("--ckpt_url", tmp_path / "published.pt", *DIGITS_ALONE, "--no-ra", *flags)
        _, table = capsys.readouterr().out.split("\nattack ")
        assert "taken for ResNet18 of width 4, without reverse attention" in table
        assert f"images {images}" in table
        record = json.loads((tmp_path / "white_attack.json").read_text())
        assert record["notes"] and all(f"note: {note}" in table for note in record["notes"])
        assert record["network"]["mean"] == (list(mean) if flags else None)


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
    file = tmp_path / "weights.pt"
    for favour in (0.0, 1e4):
        content = digits_content()
        content["model"]["fc.bias"][3] += favour
        torch.save(content, file)
        run("--ckpt_url", file, "--attacks", "natural")
        assert ("at chance" in capsys.readouterr().out) == (favour > 0)
    labels = torch.tensor([2, 0, 2])
    assert "66.67 %" in at_chance(66.66, labels)
    assert not at_chance(67, labels)
    assert not at_chance(50, labels[:1])
