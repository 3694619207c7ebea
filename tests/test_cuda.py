"""On an NVIDIA card: `python -m pytest -m cuda`. The same numbers as on a CPU, no waiting, no surprises."""

import csv
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from models import build_model
from tests.conftest import shorten_runs
from tests.golden_numbers import FOLDER, GoldenNetwork, assert_near
from tests.helpers import (
    ATTACK,
    digits_checkpoint,
    digits_network,
    digits_split,
    execute,
    folder,
    resume,
    settings,
    train,
)
from tests.training.test_companions import EVERYTHING, extra_file
from utils import step
from utils.attacks import ToAttack, cross_entropy, cross_entropy_over_heads, linf_pgd, linf_pgd_together, pgd, pgd40_heads
from utils.data.subject import verdicts
from utils.evaluation.adaptive import adaptive, views
from utils.losses import asymmetric_negative_contrast, mart_loss, over_heads, trades_loss
from utils.negatives import choose_negatives
from utils.step import away_from_labels, towards_labels, training_loss
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, frozen
from utils.system.devices import computing
from utils.system.graphs import Graphed
from utils.system.provenance import in_one_line, provenance
from utils.training.companions import Average, adversarial_weights
from utils.training.loop import attack_batch, backward

CUDA, EPS = torch.device("cuda"), 8 / 255
CUDA_IS_OLD = torch.cuda.is_available() and not torch.cuda.is_tf32_supported()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


@pytest.fixture(autouse=True)
def strict():
    """float32, and the same kernels in each run: what is compared here is the code."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with computing("fp32"):
        yield
    torch.backends.cudnn.deterministic = before


def relative(value, expected):
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# The golden numbers


@pytest.mark.parametrize("name", ["ResNet18_RA", "PreActResNet18_RA", "WRN34_10_RA", "WRN28_10_RA", "ResNet18"])
def test_golden_networks(name):
    g = GoldenNetwork(name)
    model, x = g.model.to(CUDA), g.x.to(CUDA)
    with frozen(model) as net, torch.no_grad():
        for network in (model, net):
            heads = network(x, heads=True)
            assert_near(heads.final.cpu(), g["eval_logits"])
            if name.endswith("_RA"):
                assert_near(torch.stack(heads.auxiliary).cpu(), g["eval_aux"])
        with computing("default"):
            assert_near(net(x).cpu(), g["eval_logits"], 0.02)
    with frozen(model, "bf16") as net, torch.no_grad():
        assert_near(net(x).cpu(), g["eval_logits"], 0.1)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["ResNet18_RA", "PreActResNet18_RA", "WRN28_10_RA"])
def test_training_attacks_end_where_the_official_ones_do(name, graph):
    g = GoldenNetwork(name)
    x, start, y, wrong = (t.to(CUDA) for t in (g.x, g.start, g.y, (g.y + 1) % g.meta["classes"]))
    attack_copy = AttackCopy(g.model.to(CUDA), graph=graph)
    both = [ToAttack(x, start, away_from_labels, y), ToAttack(x, start, towards_labels, wrong)]
    for _ in range(2):  # a graph is recorded at the second call
        found = attack_copy.pgd(both, 2.0, EPS, 0.007, 10)
    for images, kind in zip(found, ("pgd_untargeted", "pgd_targeted"), strict=True):
        assert ((images.cpu() - g[kind]).abs() <= 1e-5).float().mean() > 0.75


def test_losses_and_negatives():
    losses, negatives = np.load(FOLDER / "losses.npz"), np.load(FOLDER / "negatives.npz")

    def of(tag, key):
        return torch.from_numpy(losses[f"{tag}/{key}"]).to(CUDA)

    for tag, loss in (("trades_c10", trades_loss), ("mart_c10", mart_loss)):
        value = loss(of(tag, "nat"), of(tag, "adv"), of(tag, "labels"), float(losses[f"{tag}/hparams"][0])).item()
        assert value == pytest.approx(float(losses[f"{tag}/loss"][0]), rel=1e-4)
    pair = of("trades_ancra_c10", "nat"), of("trades_ancra_c10", "neg")
    here, there = (asymmetric_negative_contrast(*both, 0.5).item() for both in (pair, [t.cpu() for t in pair]))
    assert here == pytest.approx(there, abs=1e-6)
    for tag in ("c10", "c200"):
        logits, labels = (torch.from_numpy(negatives[f"{tag}/{key}"]).to(CUDA) for key in ("logits", "labels"))
        for strategy in ("soft", "hard", "easy"):
            expected = torch.from_numpy(negatives[f"{tag}/{strategy}"])
            for place in (labels, labels.cpu()):
                generator = torch.Generator(CUDA).manual_seed(0)
                chosen = choose_negatives(logits, place, strategy, generator).squeeze(1)
                assert chosen.is_cuda and torch.equal(chosen.cpu()[expected >= 0], expected[expected >= 0])
                assert bool((labels[chosen] != labels).all())


# Training


def cpu_draws():
    """The device's draws replaced by a CPU's, so that steps on both can be compared."""

    def start(x, generator):
        return x + 0.001 * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    def choose(logits, labels, strategy, generator, *counts):
        logits = None if logits is None else logits.cpu()
        chosen = choose_negatives(logits, labels.cpu(), strategy, generator, *counts)
        return None if chosen is None else chosen.to(labels.device)

    return mock.patch.multiple(step, gaussian_start=start, choose_negatives=choose)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("ResNet18", {}),
        ("PreActResNet18", {"method": "mart", "strategy": "hard_adv"}),
        ("WRN-28-10", {"method": "pgd", "inner": "kl", "strategy": "soft", "sample_class_number": 2}),
        ("ResNet18", {"gate": "soft", "ra_blocks": 1}),
        ("PreActResNet18", {"gate": "none", "awp": 0.01, "ema": 0.9}),
    ],
)
def test_three_steps_are_those_of_a_cpu_in_float64(arch, changes, graph):
    """Also where weights are moved in place and back, as the recorded attack needs it."""
    s, found = replace(settings(), num_steps=3, warmup_epochs=0, image_size=16, **changes), []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        how = {"width": 1 if arch[0] == "W" else 4, "image_size": 16, "gate": s.gate, "ra_blocks": s.ra_blocks}
        model = build_model(arch, 5, **how).double().to(device).train()
        attack_copy, generator = AttackCopy(model, graph=graph and device == CUDA), torch.Generator().manual_seed(2)
        optimizer, values = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), []
        average, loss = Average(model), partial(training_loss, model)
        draw = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.rand(8, 3, 16, 16, generator=draw, dtype=torch.double).to(device)
            labels = (torch.arange(8) % 5).to(device)
            with cpu_draws():
                attacked = attack_batch(attack_copy, x, labels, s, generator, 1)
            gradients = partial(backward, loss, x, labels, attacked, s)
            with adversarial_weights(model, gradients, s.awp) if s.awp else nullcontext():
                values += [attacked.adversarial, attacked.negative, gradients()[0]]
                optimizer.step()
            optimizer.zero_grad()
            average.update(model, s.ema)
        found.append([*values, *model.state_dict().values(), *average.model.parameters()])
    assert max(relative(b, a) for a, b in zip(*found, strict=True)) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "default", "bf16"])
def test_a_graph_replays_what_the_eager_attack_computes_bit_for_bit(precision):
    """Also after an update of the weights, and for a batch of another size, which runs as it is."""
    torch.manual_seed(0)
    model = build_model("ResNet18", 10, width=16).to(CUDA).train()
    s, attack_copies = replace(settings(), precision=precision), []
    with computing(precision):
        for graph in (False, True):
            attack_copies.append(AttackCopy(model, precision, graph=graph))
        for count in (16, 16, 12, 16):
            x, labels = torch.rand(count, 3, 32, 32, device=CUDA), torch.arange(count, device=CUDA) % 10
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                one, other = (
                    attack_batch(attack_copy, x, labels, s, torch.Generator(CUDA).manual_seed(3), 1) for attack_copy in attack_copies
                )
            assert torch.equal(one.adversarial, other.adversarial) and torch.equal(one.negative, other.negative)
            assert (one.adversarial - x).abs().max() > 0.02
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
                model(x)


def attacked_by(attack_copies, count, steps=3):
    """A batch attacked by each of them, the same draws."""
    x, labels = torch.rand(count, 3, 32, 32, device=CUDA), torch.arange(count, device=CUDA) % 10
    s = replace(settings(), num_steps=steps)
    return [attack_batch(attack_copy, x, labels, s, torch.Generator(CUDA).manual_seed(3), 1) for attack_copy in attack_copies]


def test_an_attack_of_another_number_of_steps_is_recorded_again_in_the_memory_of_the_old_one(monkeypatch):
    model = build_model("ResNet18", 10, width=16).to(CUDA)
    attack_copies = AttackCopy(model), AttackCopy(model, graph=True)
    recorded, held, record = [], [], Graphed._record

    def noting(self, args):
        recorded.append(steps)
        return record(self, args)

    monkeypatch.setattr(Graphed, "_record", noting)
    for steps in (3, 4, 5, 6):
        for count in (64, 64, 64, 12):
            one, other = attacked_by(attack_copies, count, steps)
            assert torch.equal(one.adversarial, other.adversarial) and torch.equal(one.negative, other.negative)
        held.append(torch.cuda.memory_reserved())
    assert recorded == [3, 4, 5, 6]
    assert held[-1] <= held[0] * 1.1


def test_a_graph_that_replays_nothing_is_not_used(monkeypatch):
    model, lines = build_model("ResNet18", 10, width=8).to(CUDA), []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    attack_copies = AttackCopy(model), AttackCopy(model, graph=True, warned=lines.append)
    for _ in range(4):
        one, other = attacked_by(attack_copies, 16)
        assert torch.equal(one.adversarial, other.adversarial) and torch.equal(one.negative, other.negative)
    assert len(lines) == 1 and attack_copies[1].pgd.graph is None


FEW = ("--dataset=digits", "--width=8", "--limit-train=200", "--limit-test=60", "--num-steps=2", "--batch-size=64")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_card_computes_what_the_first_one_does(tmp_path, short_runs):
    """Its graph is recorded there, and its figures are read when they are there."""
    first = short(tmp_path / "0", "--epochs=1", "--precision=fp32")
    second = train(tmp_path / "1", *FEW, "--device=cuda:1", "--epochs=1", "--precision=fp32")
    torch.cuda.set_device(0)
    for key, value in weights(first).items():
        assert relative(weights(second)[key].float(), value.float()) < 1e-3, key
    assert "without a graph" not in (second / "train.log").read_text()
    rows = [list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (first, second)]
    losses = [float(row["loss"]) for (row,) in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def short(tmp_path, *flags):
    return train(tmp_path, *FEW, "--device=cuda", *flags)


def weights(run):
    return torch.load(run / "last_state.pt", weights_only=True)["model"]


ANY_EPOCHS = ("--lr-schedule=milestones", "--warmup-lr=0")  # a run of two begins as one of one does


@pytest.mark.parametrize("more", [(), EVERYTHING], ids=["", "everything"])
@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_and_goes_on_on_a_cpu(tmp_path, short_runs, precision, more):
    flags = ("--limit-train=96", "--batch-size=32", "--precision", precision, *more)  # few: a CPU may emulate bfloat16
    if more:
        flags += ("--extra-data", extra_file(tmp_path / "extra.npz"), *ANY_EPOCHS)
    straight = short(tmp_path / "straight", "--epochs=2", *flags)
    resumed = short(tmp_path / "resumed", "--epochs=1", *flags)
    short(tmp_path / "resumed", "--epochs=2", "--resume", *flags)
    for key, value in weights(straight).items():
        assert relative(weights(resumed)[key].float(), value.float()) < 1e-3, key
    resume(resumed, "--epochs=3", "--device=cpu")
    record = json.loads((straight / "run.json").read_text())
    assert record["card"]["name"] and record["precision"].startswith("bfloat16" if precision == "bf16" else "TF32")


def test_a_run_by_graph_is_the_run_without(tmp_path, short_runs):
    one = short(tmp_path / "graph", "--epochs=1", "--precision=fp32")
    other = short(tmp_path / "eager", "--epochs=1", "--precision=fp32", "--cuda-graph=False")
    assert one.name == other.name
    for key, value in weights(one).items():
        assert relative(weights(other)[key].float(), value.float()) < 1e-3, key


# Precision


@pytest.mark.skipif(CUDA_IS_OLD, reason="needs a CUDA device with TF32")
@pytest.mark.parametrize("user", ["none", "ieee", "tf32"])
def test_float32_and_tf32_are_what_they_say_whatever_is_switched_on(user):
    """By PyTorch's newer switches, which are as they were in the end."""
    x, weight = torch.rand(128, 64, 16, 16, device=CUDA) - 0.5, torch.rand(128, 64, 3, 3, device=CUDA) - 0.5
    operations = (lambda x, w: F.conv2d(x, w)), (lambda x, w: x.flatten(1)[:, :576] @ w.flatten(1).T)
    exact = [operation(x.double(), weight.double()) for operation in operations]
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = user
        for name, smallest, largest in (("fp32", 0, 1e-5), ("tf32", 1e-5, 1e-2)):
            with computing(name):
                for operation, value in zip(operations, exact, strict=True):
                    assert smallest < relative(operation(x, weight), value) < largest
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@pytest.mark.parametrize("arch", ["PreActResNet18", "WRN-28-10"])
def test_the_attack_copy_of_a_network_of_several_ranks_has_no_batchnorm_left(arch):
    model = build_model(arch, 10, width=4 if arch[0] == "P" else 1).to(CUDA)
    copy = AttackCopy(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)).net
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in copy.modules())
    x = torch.rand(8, 3, 32, 32, device=CUDA)
    assert relative(copy(x), model.eval()(x)) < 1e-5


# Waiting for the device


def test_an_attack_never_waits_for_the_device():
    model = build_model("ResNet18", 10, width=16).to(CUDA)
    x, labels = torch.rand(16, 3, 32, 32, device=CUDA), torch.arange(16, device=CUDA) % 10
    for graph in (False, True):
        attack_copy = AttackCopy(model, graph=graph)
        both = [ToAttack(x, x, away_from_labels, labels), ToAttack(x, x, towards_labels, labels.roll(1))]
        for _ in range(2):  # a graph is recorded at the second call
            attack_copy.pgd(both, 2.0, EPS, 0.007, 3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attack_copy.pgd(both, 2.0, EPS, 0.007, 3)
            linf_pgd(x, cross_entropy_over_heads(attack_copy.net, labels, 2.0), EPS, 0.007, 3, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_from_step_to_step():
    model, s = build_model("ResNet18", 10, width=16).to(CUDA).train(), replace(settings(), num_steps=2)
    attack_copy, generator = AttackCopy(model, graph=True), torch.Generator(CUDA).manual_seed(0)
    x, labels = torch.rand(32, 3, 32, 32, device=CUDA), torch.arange(32, device=CUDA) % 10
    held = []
    for _ in range(12):
        attacked = attack_batch(attack_copy, x, labels, s, generator, 1)
        training_loss(model, x, labels, attacked, s).loss.backward()
        model.zero_grad()
        held.append(torch.cuda.memory_allocated())
    del attacked
    assert held[-1] <= held[2] * 1.02


# Evaluation


def test_verdicts_are_those_of_a_cpu():
    found = []
    for device in (torch.device("cpu"), CUDA):
        model, split = digits_network().to(device), digits_split().to(device)
        attacks = (
            pgd(cross_entropy, 0.1, 0.02, 10, start="uniform", seed=1),
            pgd40_heads(0.1, 0.02, 2.0, 1, steps=10),
        )
        with frozen(model) as net:
            natural = verdicts(net, split, 200)
            found.append([natural, *(verdicts(net, split, 200, attack, natural) for attack in attacks)])
    for one, other in zip(*found, strict=True):
        assert (one != other).float().mean() <= 0.005
    assert 0 < found[0][1].sum() < found[0][0].sum()


def test_adaptive_verdicts_are_those_of_a_cpu():
    found = []
    for device in (torch.device("cpu"), CUDA):
        model, split = digits_network().to(device), digits_split(count=60).to(device)
        how = dict(eps=0.1, step_size=0.02, steps=10, restarts=1, seed=1, warned=print, says=lambda line: None)
        with frozen(model) as net:
            view = views(True, 2.0)["auxiliary 1"]
            found.append(verdicts(net, split, 60, adaptive(view, **how)))
    assert (found[0] != found[1]).sum() <= 1  # of 60: their random starts are another device's


def test_white_attack_from_end_to_end(tmp_path):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--attacks", "all", "--n-examples", 24, "--restarts", 1, "--num-steps", 4, "--device", "cuda")
    assert execute(ATTACK, "--ckpt_url", file, *flags, "--save-adversarial", tmp_path / "worst.npz") == 0
    record = json.loads((tmp_path / "white_attack.json").read_text())
    assert record["provenance"]["card"]["name"] == torch.cuda.get_device_name()
    assert {"natural", "PGD-4", "AutoAttack", "adaptive, worst case"} <= set(record["attacks"])
    assert (tmp_path / "worst.npz").exists()
    assert record["provenance"]["card"]["driver"] in in_one_line(provenance(CUDA))


# Two ranks on one card


CASES = (8, 7, 1)  # images of a step


def gradients(images):
    """Loss and gradients of a step in float64, BatchNorm in eval mode."""
    s = replace(settings("--dataset=digits"), num_steps=2)
    torch.manual_seed(0)
    model = build_model("ResNet18", 5, width=4, image_size=16).double().to(CUDA).eval()
    x = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(CUDA)
    labels = (torch.arange(images) % 5).to(CUDA)
    with cpu_draws():
        attacked = attack_batch(AttackCopy(model), x, labels, s, torch.Generator().manual_seed(2), 1)
        figures = backward(distributed.parallel(model, training_loss), x, labels, attacked, s)
    return [figures.cpu(), *(p.grad.cpu() for p in model.parameters())]


def a_rank(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("cpu:gloo,cuda:gloo", store=store, rank=rank, world_size=2)
    for images in CASES:
        found = gradients(images)
        if rank == 0:
            torch.save(found, f"{folder}/{images}.pt")
    dist.destroy_process_group()


def test_two_ranks_on_one_card_have_the_gradients_of_one_process(tmp_path):
    mp.spawn(a_rank, (str(tmp_path),), 2)
    for images in CASES:
        found = torch.load(Path(tmp_path) / f"{images}.pt")
        assert max(relative(a, b) for a, b in zip(found, gradients(images), strict=True)) < 1e-6, images


class OfOne(int):
    """A world of one rank that does not take itself for one, so that everything goes through NCCL."""

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def a_rank_by_nccl(rank, folder):
    """NCCL takes a card for one rank only."""
    torch.cuda.set_device(0)
    torch.backends.cudnn.deterministic = True
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        patch.setattr(distributed, "world", lambda: OfOne(1))
        patch.setenv("MASTER_ADDR", "localhost")
        assert type(distributed.parallel(torch.nn.Linear(1, 1).to(CUDA), print)) is DistributedDataParallel
        short(Path(folder) / "nccl", "--epochs=2", "--precision=fp32", "--batch-size=32")
    dist.destroy_process_group()


def test_a_run_by_nccl_is_the_run_without(tmp_path, short_runs):
    """Its own thread looks after the card while an attack is recorded, and gradients are reduced during backward."""
    mp.spawn(a_rank_by_nccl, (str(tmp_path),), 1)
    alone = short(tmp_path / "alone", "--epochs=2", "--precision=fp32", "--batch-size=32")
    with torch.serialization.safe_globals([OfOne]):  # the number of ranks
        found = weights(folder(tmp_path / "nccl"))
    for key, value in weights(alone).items():
        assert relative(found[key].float(), value.float()) < 1e-3, key


def test_a_training_forward_has_the_golden_gradients():
    g = GoldenNetwork("ResNet18_RA")
    model, x, y = g.model.to(CUDA).train(), g.x.to(CUDA), g.y.to(CUDA)
    heads = model(x, y, heads=True)
    over_heads(lambda logits: F.cross_entropy(logits, y), heads, auxiliary_weight=2).backward()
    parameters = dict(model.named_parameters())
    for key, norm in zip(g.arrays["grad_keys"], g.arrays["grad_norm"], strict=True):
        assert parameters[key].grad.double().norm().item() == pytest.approx(norm, rel=1e-2)


def test_both_attacks_go_as_one_batch_whatever_their_size():
    model = build_model("ResNet18", 10, width=8).to(CUDA)
    x, labels, seen = torch.rand(8, 3, 32, 32, device=CUDA), torch.arange(8, device=CUDA), []
    both = [ToAttack(x, x, away_from_labels, labels), ToAttack(x, x, towards_labels, labels.roll(1))]
    with frozen(model) as net, mock.patch("utils.attacks.SMALL", 0):
        net.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
        linf_pgd_together(net, both, 2.0, EPS, 0.007, 2)
    assert seen == [16, 16]
