"""AWP, averaged weights, schedules, extra data, label smoothing, gates: each against a derivation of its own."""

import copy
import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import utils.training.loop as training
from models import GATES, build_model
from tests.helpers import ANCRA, ATTACK, assert_equal, digits_checkpoint, digits_split, execute, folder, settings, train
from tests.test_reference import deviation
from utils.data.datasets import as_input, load_extra, load_split, with_extra
from utils.data.subject import load_subject
from utils.evaluation.adaptive import views
from utils.losses import pgd_loss, trades_loss
from utils.step import Attacked, training_loss
from utils.system.attack_copy import AttackCopy
from utils.system.checkpoints import load_model
from utils.system.errors import Stopped, UsageError
from utils.system.options import parse
from utils.system.settings import Evaluation
from utils.training.companions import Average, adversarial_weights, learning_rate
from utils.training.loop import attack_batch

# Adversarial weight perturbation


def awp_case(no_ra, method="trades"):
    torch.manual_seed(0)
    model = build_model("ResNet18", 4, reverse_attention=not no_ra, width=2, image_size=16).double().train()
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    labels = torch.tensor([0, 1, 2, 3, 1, 2])
    attacked = Attacked(draw(6, 3, 16, 16), draw(6, 3, 16, 16), labels.roll(1))
    return model, draw(6, 3, 16, 16), labels, attacked, replace(settings(), method=method, no_ra=no_ra)


def ours(model, x, labels, attacked, s, gamma):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)

    def gradients():
        training_loss(model, x, labels, attacked, s).loss.backward()

    for _ in range(2):
        with adversarial_weights(model, gradients, gamma):
            gradients()
            optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def by_hand(model, at, momentum, case, gamma, lr, restored="after"):
    """A step by functional calls, a momentum of its own, and no statistics of the first forwards -> all at its end.

    at: parameters and buffers by name; momentum: of the parameters, which is moved on in place.
    """
    weights = {name: at[name] for name in momentum}

    def gradients(weights):
        moving = {name: w.clone().requires_grad_() for name, w in weights.items()}
        buffers = {name: b.clone() for name, b in at.items() if name not in momentum}

        def network(images, gate=None, heads=False):
            return functional_call(model, moving | buffers, (images, gate, heads))

        loss = training_loss(network, *case).loss
        return dict(zip(moving, torch.autograd.grad(loss, list(moving.values())), strict=True)), buffers

    first, _ = gradients(weights)
    moves = {name: gamma * weights[name].norm() / (g.norm() + 1e-20) * g for name, g in first.items() if g.ndim > 1}
    moved = {name: w + moves.get(name, 0) for name, w in weights.items()}
    second, buffers = gradients(moved)
    begin = moved if restored == "after" else weights
    for name, gradient in second.items():
        momentum[name] = 0.9 * momentum[name] + gradient + case[-1].weight_decay * begin[name]
        weights[name] = begin[name] - lr * momentum[name] - (moves.get(name, 0) if restored == "after" else 0)
    return weights | buffers


def derived(model, x, labels, attacked, s, gamma, restored="after"):
    """Two steps by hand."""
    at = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    momentum = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    for _ in range(2):
        at = by_hand(model, at, momentum, (x, labels, attacked, s), gamma, 0.1, restored)
    return at


@pytest.mark.parametrize(("no_ra", "method"), [(False, "trades"), (True, "trades"), (False, "mart"), (False, "pgd")])
def test_a_step_with_adversarial_weights(no_ra, method):
    case = awp_case(no_ra, method)
    start = copy.deepcopy(case[0].state_dict())
    expected = derived(copy.deepcopy(case[0]), *case[1:], 0.01)
    found = ours(*case, 0.01)
    assert max(deviation(found[name], value) for name, value in expected.items()) < 1e-9
    # what would be wrong, or no AWP at all, is far from it
    for wrong in (
        derived(awp_case(no_ra, method)[0], *case[1:], 0.01, restored="before"),
        derived(awp_case(no_ra, method)[0], *case[1:], 0.0),
    ):
        assert max(deviation(found[name], wrong[name]) for name in dict(case[0].named_parameters())) > 1e-6
    assert any(not torch.equal(start[name], value) for name, value in found.items())


def test_a_network_without_statistics():
    model = torch.nn.Linear(2, 2)
    average = Average(model)
    with adversarial_weights(model, lambda: model(torch.ones(1, 2)).sum().backward(), 0.1):
        pass
    average.take_statistics(model)


def test_weights_come_back_whatever_happens_inside():
    model, *case = awp_case(False)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(RuntimeError, match="inside"),
        adversarial_weights(model, lambda: training_loss(model, *case).loss.backward(), 0.1),
    ):
        assert not torch.equal(before["conv1.weight"], model.conv1.weight)
        raise RuntimeError("inside")
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-12), name


# Averaged weights


def test_an_average_over_five_steps():
    model, tau = build_model("ResNet18", 4, width=2, image_size=16), 0.3
    average = Average(model)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for t in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        model.train()(torch.rand(4, 3, 16, 16))
        average.update(model, tau)
        decay = min(tau, (1 + t) / (10 + t))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, p in average.model.named_parameters():
        assert torch.allclose(p.double(), expected[name], atol=1e-5) and not p.requires_grad
    mean = average.model.bn1.running_mean.clone()
    assert not torch.equal(mean, model.bn1.running_mean)
    average.take_statistics(model)
    model(torch.rand(4, 3, 16, 16))  # a copy, not an alias
    assert not torch.equal(average.model.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(average.model.bn1.running_mean, mean)


# Schedules


def test_learning_rates_at_ten_points():
    at = [0, 0.5, 1, 2.5, 4, 5, 7.5, 8, 9.5, 9.99]
    published = [learning_rate("milestones", 1.0, 10, t, milestones=(4, 9)) for t in at]
    assert published == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert [learning_rate("piecewise", 1.0, 10, t) for t in at] == pytest.approx([1] * 5 + [0.1] + [0.01] * 4)
    cosine = [learning_rate("cosine", 2.0, 10, t) for t in at]
    assert cosine == pytest.approx([1 + math.cos(math.pi * t / 10) for t in at])
    cyclic = [learning_rate("cyclic", 1.0, 10, t) for t in at]
    assert cyclic == pytest.approx([0, 0.2, 0.4, 1, 0.8, 2 / 3, 1 / 3, 8 / 30, 2 / 30, 0.04 / 30])
    warm = [learning_rate("cosine", 1.0, 10, t, warmup=2) for t in (0, 0.5, 1, 1.5, 2, 6, 10)]
    assert warm == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.5, 0])
    assert learning_rate("milestones", 1.0, 10, 5, milestones=(2,), warmup=2) == pytest.approx(0.1)


# Extra data


def extra_file(path, count=40, side=16, classes=10, **changes):
    draw = np.random.default_rng(0)
    arrays = {"image": draw.integers(0, 256, (count, side, side, 3), np.uint8), "label": np.arange(count) % classes}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


def test_a_batch_of_extra_data_image_by_image(tmp_path):
    train_part, file = digits_split("train", 64), extra_file(tmp_path / "extra.npz")
    extra, stored = load_extra(str(file), train_part), np.load(file)
    batch = train_part.take(torch.arange(6))
    both = with_extra(batch, extra, 14, (1, 2, 0))
    assert_equal(both, with_extra(batch, extra, 14, (1, 2, 0)))
    assert not torch.equal(both.images, with_extra(batch, extra, 14, (1, 2, 6)).images)
    draw = np.random.default_rng((1, 2, 0))
    chosen, order = draw.integers(40, size=14), draw.permutation(20)
    for place, source in enumerate(order):
        if source < 6:
            image, label = batch.images[source], batch.labels[source]
        else:
            image = torch.from_numpy(stored["image"][chosen[source - 6]]).permute(2, 0, 1)
            label = stored["label"][chosen[source - 6]]
        assert torch.equal(both.images[place], image) and both.labels[place] == int(label)


def test_an_epoch_sees_each_original_image_once(tmp_path, monkeypatch, short_runs):
    seen, real = [], training.train_step

    def noting(job, batch, epoch):
        seen.append(len(batch.labels))
        return real(job, batch, epoch)

    monkeypatch.setattr(training, "train_step", noting)
    flags = ("--extra-data", extra_file(tmp_path / "extra.npz"), "--extra-fraction", 0.6, "--batch-size", 10)
    run = train(tmp_path, "--epochs", 1, "--limit-train", 30, *flags)
    assert seen == [10] * 7 + [8]  # 6 of each are extra; 2 of the 30 are left at the end
    assert "extra_fraction-0.6" in run.name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": None}, "image"),
        ({"side": 32}, r"image is uint8 \(40, 32, 32, 3\)"),
        ({"image": np.zeros((40, 16, 16, 3))}, "image is float64"),
        ({"label": np.arange(40) % 10 - 1}, "10 classes"),
        ({"classes": 4}, "10 classes"),
        ({"label": np.arange(40) / 2}, "label is float64"),
        ({"label": np.arange(39) % 10}, r"label is int64 \(39,\)"),
        ({"label": np.array([{}] * 40)}, "label"),
    ],
)
def test_extra_data_that_does_not_fit(tmp_path, changes, said):
    file = extra_file(tmp_path / "extra.npz", **changes)
    with pytest.raises(UsageError, match=said):
        load_extra(str(file), digits_split("train", 64))


def test_extra_data_that_is_no_npz(tmp_path, refused):
    for content in (b"", b"PK\3\4 cut off", b"\x93NUMPY", b"text"):
        (tmp_path / "extra.npz").write_bytes(content)
        refused(ANCRA, "--dataset=digits", "--extra-data", tmp_path / "extra.npz", "--model-dir", tmp_path / "run")
    refused(ANCRA, "--dataset=digits", "--extra-data", tmp_path / "none.npz", "--model-dir", tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--extra-data=x.npz", "--extra-fraction=0"), "(0, 1)"),
        (("--extra-data=x.npz", "--extra-fraction=1"), "(0, 1)"),
        (("--extra-data=x.npz", "--extra-fraction=0.999"), "128 of 128 images"),
        (("--awp=-0.1",), "[0, inf)"),
        (("--ema=1",), "[0, 1)"),
        (("--label-smoothing=1",), "[0, 1)"),
        (("--method=mart", "--label-smoothing=0.1"), "--label-smoothing"),
        (("--no-ra", "--gate=soft"), "reverse attention"),
        (("--no-ra", "--ra_blocks=1"), "reverse attention"),
        (("--awp=0.005", "--epochs=10"), "--awp never acts"),
        (("--gate=hard",), "invalid choice"),
        (("--ra-blocks=3",), "from 1 to 2"),
    ],
)
def test_wrong_companions(refused, flags, said):
    refused(ANCRA, "--dataset=digits", *flags, mentions=(said,))


def test_what_a_flag_belongs_to_may_be_the_resumed_run_s_own():
    """So may a default that is given, and one of a list of runs of which the first is without."""
    assert settings("--resume=run", "--awp-warmup=3", "--extra-fraction=0.5").awp_warmup == 3
    assert settings("--resume", "--awp=0.1", "--epochs=8").awp_warmup == 10
    assert settings("--awp=0", "--awp-warmup=3").awp_warmup == 3
    assert settings("--no-ra", "--gate=label").gate == "label"


def test_label_smoothing_is_of_cross_entropy_alone():
    natural, adversarial, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    smooth = 0.9 * F.cross_entropy(natural, labels) - 0.1 * F.log_softmax(natural, 1).mean()
    plain = trades_loss(natural, adversarial, labels, 6.0) - F.cross_entropy(natural, labels)
    assert trades_loss(natural, adversarial, labels, 6.0, 0.1).item() == pytest.approx((smooth + plain).item(), rel=1e-5)
    assert pgd_loss(natural, labels, 0.1).item() == pytest.approx(smooth.item(), rel=1e-5)


# All at once


EVERYTHING = (
    "--awp=0.01",
    "--awp-warmup=0",
    "--ema=0.9",
    "--lr-schedule=cosine",
    "--warmup-lr=1",
    "--label-smoothing=0.1",
)


def test_a_run_with_everything_resumes_in_mid_epoch_bit_for_bit(tmp_path, monkeypatch, short_runs):
    flags = (*EVERYTHING, "--extra-data", extra_file(tmp_path / "extra.npz"), "--gate=soft", "--epochs=2")
    straight = train(tmp_path / "1", *flags)
    real, calls = training.train_step, []

    def stopping(job, batch, epoch):
        calls.append(1)
        if len(calls) == 2:
            job.stop = 15
        return real(job, batch, epoch)

    monkeypatch.setattr(training, "train_step", stopping)
    with pytest.raises(Stopped):
        train(tmp_path / "2", *flags)
    monkeypatch.setattr(training, "train_step", real)
    train(tmp_path / "2", "--resume", folder(tmp_path / "2"))
    one, other = (torch.load(run / "last_state.pt", weights_only=True) for run in (straight, folder(tmp_path / "2")))
    for key in ("model", "average", "average_steps", "generator", "optimizer"):
        assert_equal(one[key], other[key], key)
    best = load_model(straight / "model-wrn-last.pt")[0].state_dict()
    assert_equal(best, one["average"], "what is saved is the average")
    assert not torch.equal(best["conv1.weight"], one["model"]["conv1.weight"])
    named = [
        load_subject(parse(Evaluation, "", ["--ckpt_url", "x", "--device=cpu"]), run).method
        for run in (straight, straight / "last_state.pt", train(tmp_path / "3", "--epochs=1"))
    ]
    averaged = "ANCRA-TRADES, AWP 0.01, EMA 0.9, extra data extra.npz, label smoothing 0.1, schedule cosine"
    averaged += ", lr warm-up 1, gate soft"
    assert named == [averaged, f"{averaged}, not averaged", "ANCRA-TRADES"]
    assert "awp-0.01" in straight.name and "ema-0.9" in straight.name
    assert len(straight.name) == 200 and re.search("-[0-9a-f]{8}$", straight.name)  # too long for a name, and cut


def test_the_loop_perturbs_averages_and_schedules_as_asked(tmp_path, monkeypatch, short_runs):
    """Every step of a run against one by hand: AWP from its epoch on, the rate of the step, momentum as it is."""
    real, evaluated, looked, steps, averages = training.train_step, training.evaluate, [], [], []

    def watched(job, batch, epoch):
        model, generator = copy.deepcopy(job.model), torch.Generator()
        generator.set_state(job.generator.get_state())
        before, states = copy.deepcopy(model.state_dict()), job.optimizer.state.values()
        momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        momentum |= dict(zip(momentum, [state["momentum_buffer"].clone() for state in states], strict=False))
        averages[:] = averages or [dict(model.named_parameters())]
        figures = real(job, batch, epoch)
        x, group = as_input(batch.images), job.optimizer.param_groups[0]
        attacked = attack_batch(AttackCopy(model), x, batch.labels, job.settings, generator, epoch)
        own, share = len(steps) % 2, 0.05 * (epoch > 1)
        done, decay = epoch - 1 + own / 2, min(0.3, (1 + len(steps)) / (10 + len(steps)))
        lr = 0.03 * (done if done < 1 else (1 + math.cos(math.pi * (done - 1) / 2)) / 2)
        assert group["lr"] == pytest.approx(lr, abs=1e-9) and group["momentum"] == 0.9
        case = x, batch.labels, attacked, job.settings
        expected, wrong = (by_hand(model, before, dict(momentum), case, of, lr) for of in (share, 0.05 - share))
        found = job.model.state_dict()
        assert max(deviation(found[name], expected[name]) for name in momentum) < 1e-4
        assert lr == 0 or max(deviation(found[name], wrong[name]) for name in momentum) > 1e-3
        averages[0] = {name: decay * averages[0][name] + (1 - decay) * found[name] for name in momentum}
        for name, value in job.average.model.named_parameters():
            assert deviation(value, averages[0][name]) < 1e-5
        steps.append(epoch)
        return figures

    def noting(job, model, split):
        looked.append(model is job.average.model)
        return evaluated(job, model, split)

    monkeypatch.setattr(training, "train_step", watched)
    monkeypatch.setattr(training, "evaluate", noting)
    flags = ("--awp=0.05", "--awp-warmup=1", "--ema=0.3", "--lr-schedule=cosine", "--warmup-lr=1", "--width=4")
    flags += ("--weight-decay=1",)  # which tells perturbed weights from others
    train(tmp_path, *flags, "--epochs=3", "--limit-train=32", "--batch-size=16", "--lr=0.03", "--eval-interval=1")
    assert steps == [1, 1, 2, 2, 3, 3] and looked == [True] * 3


# Gates, heads that answer, blocks


def test_gates_by_their_definitions():
    torch.manual_seed(0)
    x, labels = torch.rand(5, 3, 16, 16), torch.arange(5) % 4
    model = build_model("ResNet18", 4, width=4, image_size=16).eval()
    published = model(x, labels, heads=True), model(x, heads=True)
    probabilities = published[1].auxiliary[0].softmax(1)
    for gate in GATES:
        model.gate = gate
        trained, attacked = model(x, labels, heads=True), model(x, heads=True)
        if gate == "label":
            assert_equal((trained.final, attacked.final), (published[0].final, published[1].final))
            continue
        assert_equal(trained.final, attacked.final)  # no label leaks
        if gate == "predicted":
            assert_equal(attacked.final, published[1].final)
        if gate == "none":
            assert_equal(attacked.features, attacked.unweighted)
            assert_equal(attacked.final, attacked.auxiliary[1])
        if gate == "soft":
            first = model(x, (probabilities, attacked.auxiliary[1].softmax(1)), heads=True)
            assert torch.allclose(first.final, attacked.final, atol=1e-6)
            (gradient,) = torch.autograd.grad(
                model(x.requires_grad_(), heads=True).final.sum(), model.fc.weight, allow_unused=False
            )
            assert gradient.abs().sum() > 0


def test_a_head_that_answers_and_one_block(tmp_path):
    x = torch.rand(3, 3, 16, 16)
    model = build_model("PreActResNet18", 4, width=4, image_size=16).eval()
    heads = model(x, heads=True)
    for name, logits in {
        "final": heads.final,
        "auxiliary1": heads.auxiliary[0],
        "auxiliary2": heads.auxiliary[1],
    }.items():
        model.predict = name
        assert_equal(model(x), logits)
        assert_equal(model(x, heads=True).final, heads.final)
        for view in views(True, 2.0, predict=name).values():
            assert_equal(view(model, x)[0], logits)
    one = build_model("PreActResNet18", 4, width=4, image_size=16, ra_blocks=1).eval()
    one.load_state_dict(model.state_dict())
    assert len(one(x, heads=True).auxiliary) == 1
    plain = build_model("PreActResNet18", 4, width=4, image_size=16, reverse_attention=False).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(one(x, heads=True).auxiliary[0], plain(x), atol=1e-6)  # its map comes before any weighting
    assert list(views(True, 2.0, ra_blocks=1)) == ["final", "auxiliary 1", "over heads", "smooth gates"]
    assert "smooth gates" not in views(True, 2.0, gate="soft")
    assert list(views(True, 2.0, gate="none")) == ["final", "auxiliary 1", "mean auxiliary", "over heads"]


def test_predictions_by_a_head_under_every_attack(tmp_path, refused):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--n-examples=8", "--num-steps=2", "--attacks=natural,pgd", "--device=cpu")
    assert execute(ATTACK, "--ckpt_url", file, *flags, "--predict=auxiliary1") == 0
    record = json.loads((tmp_path / "white_attack.json").read_text())
    images = as_input(load_split("digits", "test", "", 16, 8).images)
    expected = load_model(file)[0](images, heads=True).auxiliary[0].argmax(1).tolist()
    assert record["predicted"]["natural"] == expected and record["settings"]["predict"] == "auxiliary1"
    assert load_model(file, predict="auxiliary1")[0](images).argmax(1).tolist() == expected
    with pytest.raises(TypeError, match="nothing known as predicts"):
        load_model(file, predicts="auxiliary1")
    plain = digits_checkpoint(tmp_path / "plain.pt", reverse_attention=False)
    refused(ATTACK, "--ckpt_url", plain, "--predict=auxiliary1", mentions=("has final alone",))
    refused(ATTACK, "--ckpt_url", file, "--no-ra", "--gate=soft", mentions=("contradict --no-ra",))
    refused(ATTACK, "--model", "x:f", "--predict=auxiliary1", mentions=("contradict --model",))


WRAPPED = """
from utils.system.checkpoints import load_model
def make():
    return load_model({file!r}, predict="auxiliary1")[0]
"""


def test_under_attack_a_head_that_answers_is_a_network_of_its_own(tmp_path):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    (tmp_path / "wrapped.py").write_text(WRAPPED.format(file=str(file)))
    flags = ("--n-examples=24", "--num-steps=8", "--device=cpu", "--epsilon=0.15", "--attacks=natural,fgsm,pgd,cw")
    elsewhere = ("--model", f"{tmp_path}/wrapped.py:make", "--dataset=digits", "--image-size=16")
    found = []
    for network in (("--ckpt_url", file, "--predict=auxiliary1"), elsewhere, ("--ckpt_url", file)):
        assert execute(ATTACK, *network, *flags, f"--log_path={tmp_path}/test.log") == 0
        attacks = json.loads((tmp_path / "white_attack.json").read_text())["attacks"]
        found.append([attacks[name]["verdicts"] for name in ("natural", "FGSM", "PGD-8", "CW-4")])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 2


def test_a_published_file_answers_by_a_head_too(tmp_path, capsys):
    model = load_model(digits_checkpoint(tmp_path / "run.pt"))[0]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.pt")
    flags = ("--dataset=digits", "--n-examples=8", "--attacks=natural", "--device=cpu", "--predict=auxiliary2")
    assert execute(ATTACK, "--ckpt_url", tmp_path / "bare.pt", *flags) == 0
    assert "taken for ResNet18" in capsys.readouterr().out
