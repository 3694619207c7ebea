"""On an NVIDIA card, `python -m pytest -m cuda`: the numbers of a CPU, and no waiting."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from models import build_model
from tests.conftest import shorten_runs
from tests.golden_numbers import GoldenNetwork, assert_near, both_attacks, golden_tensors
from tests.helpers import (
    ATTACK,
    digits_checkpoint,
    digits_network,
    digits_split,
    execute,
    folder,
    resume,
    settings,
    state,
    train,
)
from utils import step
from utils.attacks import (
    cross_entropy,
    cross_entropy_over_heads,
    linf_pgd,
    pgd,
    pgd40_heads,
)
from utils.data.subject import verdicts
from utils.negatives import choose_negatives
from utils.step import training_loss
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, frozen
from utils.system.devices import computing
from utils.training.companions import Average, adversarial_weights
from utils.training.loop import attack_batch, backward

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
EPS = 8 / 255
STEP = 0.007
WITHOUT_TF32 = torch.cuda.is_available() and not torch.cuda.is_tf32_supported()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def strict():
    """Compute in float32, by the same kernels in each run: what is compared here is the code."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with computing("fp32"):
        yield
    torch.backends.cudnn.deterministic = before


def relative(value, expected):
    """Return the norm of the difference over the norm of what is expected."""
    value = value.detach().double().cpu()
    expected = expected.detach().double().cpu()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def random_batch(count, classes=10):
    """Return random images and labels of each class in turn, on the card."""
    x = torch.rand(count, 3, 32, 32, device=CUDA)
    return x, torch.arange(count, device=CUDA) % classes


# The golden numbers


@pytest.mark.parametrize("name", ["ResNet18_RA", "PreActResNet18_RA", "WRN28_10_RA", "ResNet18"])
def test_logits_of_golden_networks(name):
    g = GoldenNetwork(name)
    model = g.model.to(CUDA)
    x = g.x.to(CUDA)
    expected = g["eval_logits"]
    with frozen(model) as net, torch.no_grad():
        assert_near(model(x).cpu(), expected)
        assert_near(net(x).cpu(), expected)
        with computing("default"):
            assert_near(net(x).cpu(), expected, 0.02)
    with frozen(model, "bf16") as net, torch.no_grad():
        assert_near(net(x).cpu(), expected, 0.1)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["ResNet18_RA", "PreActResNet18_RA", "WRN28_10_RA"])
def test_training_attacks_end_where_the_official_ones_do(name, graph):
    g = GoldenNetwork(name)
    inputs = (g.x, g.start, g.y, g.target_labels)
    batches = both_attacks(*(tensor.to(CUDA) for tensor in inputs))
    attack_copy = AttackCopy(g.model.to(CUDA), graph=graph)
    for _ in range(2):  # a graph is recorded at the second call
        attacked = attack_copy.pgd(batches, 2.0, EPS, STEP, 10)
    for images, kind in zip(attacked, ("pgd_untargeted", "pgd_targeted"), strict=True):
        is_equal = (images.cpu() - g[kind]).abs() <= 1e-5
        assert is_equal.float().mean() > 0.75


@pytest.mark.parametrize("strategy", ["soft", "hard", "easy"])
def test_negatives(strategy):
    golden = golden_tensors("negatives", "c10")
    logits = golden["logits"].to(CUDA)
    labels = golden["labels"]  # on the CPU, as those of a batch
    expected = golden[strategy]
    generator = torch.Generator(CUDA).manual_seed(0)
    chosen = choose_negatives(logits, labels, strategy, generator).squeeze(1).cpu()
    is_defined = expected >= 0
    assert torch.equal(chosen[is_defined], expected[is_defined])
    assert (labels[chosen] != labels).all()


# Training steps


def cpu_draws():
    """Replace the device's random draws by a CPU's, so that steps on both can be compared."""

    def start(x, generator):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + 0.001 * noise.to(x.device)

    def choose(logits, labels, strategy, generator, *counts):
        if logits is not None:
            logits = logits.cpu()
        chosen = choose_negatives(logits, labels.cpu(), strategy, generator, *counts)
        return None if chosen is None else chosen.to(labels.device)

    return mock.patch.multiple(step, gaussian_start=start, choose_negatives=choose)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("ResNet18", {"gate": "soft", "ra_blocks": 1}),
        ("PreActResNet18", {"method": "mart", "strategy": "hard_adv", "awp": 0.01, "ema": 0.9}),
        ("WRN-28-10", {"method": "pgd", "inner": "kl", "strategy": "soft"}),
    ],
)
def test_steps_are_those_of_a_cpu_in_float64(arch, changes, graph):
    """Also where weights are moved in place and back, as a recorded attack needs it."""
    s = replace(settings(), num_steps=3, warmup_epochs=0, image_size=16, **changes)
    on_cpu = three_steps(CPU, arch, s)
    on_card = three_steps(CUDA, arch, s, graph)
    for value, expected in zip(on_card, on_cpu, strict=True):
        assert relative(value, expected) < 1e-6


def three_steps(device, arch, s, graph=False):
    """Return images, stats and weights of three training steps in float64."""
    width = 1 if arch.startswith("WRN") else 4
    torch.manual_seed(0)
    model = build_model(arch, 5, width=width, image_size=16, gate=s.gate, ra_blocks=s.ra_blocks)
    model = model.double().to(device).train()
    attack_copy = AttackCopy(model, graph=graph)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    average = Average(model)
    loss_of = partial(training_loss, model)
    generator = torch.Generator().manual_seed(2)
    tensors = []
    for _ in range(3):
        x = torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.double).to(device)
        labels = (torch.arange(8) % 5).to(device)
        with cpu_draws():
            attacked = attack_batch(attack_copy, x, labels, s, generator, 1)
        gradients = partial(backward, loss_of, x, labels, attacked, s)
        with adversarial_weights(model, gradients, s.awp) if s.awp else nullcontext():
            tensors += [attacked.adversarial, attacked.negative, gradients()]
            optimizer.step()
        optimizer.zero_grad()
        average.update(model, s.ema)
    return [*tensors, *model.state_dict().values(), *average.model.parameters()]


def attacked_images(attack_copy, x, labels, precision):
    """Return the adversarial images and negatives of a training step."""
    s = replace(settings(), precision=precision)
    generator = torch.Generator(CUDA).manual_seed(3)
    attacked = attack_batch(attack_copy, x, labels, s, generator, 1)
    return attacked.adversarial, attacked.negative


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "default", "bf16"])
def test_a_graph_replays_the_attack_bit_for_bit(precision):
    """Also after an update of the weights, and for a batch of another size."""
    model = build_model("ResNet18", 10, width=16).to(CUDA).train()
    with computing(precision):
        eager = AttackCopy(model, precision)
        graph = AttackCopy(model, precision, graph=True)
        for count in (16, 16, 12, 16):
            x, labels = random_batch(count)
            expected = attacked_images(eager, x, labels, precision)
            for images, others in zip(
                attacked_images(graph, x, labels, precision), expected, strict=True
            ):
                assert torch.equal(images, others)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
                model(x)


def test_an_attack_never_waits_for_the_device():
    model = build_model("ResNet18", 10, width=16).to(CUDA)
    x, labels = random_batch(16)
    batches = both_attacks(x, x, labels, labels.roll(1))
    for graph in (False, True):
        attack_copy = AttackCopy(model, graph=graph)
        for _ in range(2):  # a graph is recorded at the second call
            attack_copy.pgd(batches, 2.0, EPS, STEP, 3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attack_copy.sync_weights()
            attack_copy.pgd(batches, 2.0, EPS, STEP, 3)
            objective = cross_entropy_over_heads(attack_copy.net, labels, 2.0)
            linf_pgd(x, objective, EPS, STEP, 3, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_from_step_to_step():
    model = build_model("ResNet18", 10, width=16).to(CUDA).train()
    s = replace(settings(), num_steps=2)
    attack_copy = AttackCopy(model, graph=True)
    generator = torch.Generator(CUDA).manual_seed(0)
    x, labels = random_batch(32)
    held = []
    for _ in range(12):
        attacked = attack_batch(attack_copy, x, labels, s, generator, 1)
        training_loss(model, x, labels, attacked, s).loss.backward()
        model.zero_grad()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[2] * 1.02


# Runs


def short(parent, *flags):
    """Train on a few digits on the card, and return the run's folder."""
    few = ("--width=8", "--limit-train=200", "--limit-test=60", "--num-steps=2", "--batch-size=64")
    return train(parent, *few, "--device=cuda", *flags)


def assert_near_weights(run, other):
    """Compare the last weights of two runs, which other kernels may have rounded otherwise."""
    expected = state(other)["model"]
    for key, value in state(run)["model"].items():
        assert relative(value.float(), expected[key].float()) < 1e-3, key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_card_computes_what_the_first_one_does(tmp_path, short_runs, capsys):
    """Its graph is recorded there, and its figures are read when they are there."""
    first = short(tmp_path / "0", "--epochs=1", "--precision=fp32")
    second = short(tmp_path / "1", "--epochs=1", "--precision=fp32", "--device=cuda:1")
    torch.cuda.set_device(0)
    assert_near_weights(second, first)
    assert "CUDA graph" not in capsys.readouterr().out
    losses = []
    for run in (first, second):
        row = state(run)["progress"]["rows"][0]
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_a_resumed_run_is_one_never_stopped_and_goes_on_on_a_cpu(tmp_path, short_runs, precision):
    flags = ("--limit-train=96", "--batch-size=32", "--precision", precision, "--ema=0.9")
    straight = short(tmp_path / "straight", "--epochs=2", *flags)
    resumed = short(tmp_path / "resumed", "--epochs=1", *flags)
    short(tmp_path / "resumed", "--epochs=2", "--resume", *flags)
    assert_near_weights(resumed, straight)
    resume(resumed, "--epochs=3", "--device=cpu")
    assert json.loads((straight / "run.json").read_text())["card"]["name"]


@pytest.mark.skipif(WITHOUT_TF32, reason="needs a CUDA device with TF32")
def test_float32_and_tf32_are_what_they_say():
    x = torch.rand(128, 64, 16, 16, device=CUDA) - 0.5
    weight = torch.rand(128, 64, 3, 3, device=CUDA) - 0.5

    def products(x, weight):
        rows = x.flatten(1)[:, :576]
        return F.conv2d(x, weight), rows @ weight.flatten(1).T

    exact = products(x.double(), weight.double())
    for precision, smallest, largest in (("fp32", 0, 1e-5), ("tf32", 1e-5, 1e-2)):
        with computing(precision):
            for product, expected in zip(products(x, weight), exact, strict=True):
                assert smallest < relative(product, expected) < largest


# Evaluation


def test_verdicts_are_those_of_a_cpu():
    attacks = (
        pgd(cross_entropy, 0.1, 0.02, 10, start="uniform", seed=1),
        pgd40_heads(0.1, 0.02, 2.0, 1, steps=10),
    )
    results = []
    for device in (CPU, CUDA):
        split = digits_split().to(device)
        with frozen(digits_network().to(device)) as net:
            natural = verdicts(net, split, 200)
            robust = [verdicts(net, split, 200, attack, natural) for attack in attacks]
        results.append([natural, *robust])
    for on_cpu, on_card in zip(*results, strict=True):
        assert (on_cpu != on_card).float().mean() <= 0.005
    assert 0 < results[0][1].sum() < results[0][0].sum()


def test_white_attack_from_end_to_end(tmp_path):
    file = digits_checkpoint(tmp_path / "best_adv_model.pt")
    flags = ("--attacks", "all", "--n-examples", 24, "--restarts", 1, "--num-steps", 4)
    examples = tmp_path / "worst.npz"
    status = execute(
        ATTACK, "--ckpt_url", file, *flags, "--device", "cuda", "--save-adversarial", examples
    )
    assert status == 0
    assert examples.exists()
    record = json.loads((tmp_path / "white_attack.json").read_text())
    assert record["provenance"]["card"]["name"] == torch.cuda.get_device_name()
    assert {"natural", "AutoAttack", "adaptive, worst case"} <= set(record["attacks"])


# One rank by NCCL


class SeveralRanks(int):
    """A number of ranks, 1, that the code takes for several, so that everything goes by NCCL."""

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def run_rank_by_nccl(rank, folder):
    """Train as the only rank of a process group; NCCL takes a card for one rank only."""
    torch.cuda.set_device(0)
    torch.backends.cudnn.deterministic = True
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        patch.setattr(distributed, "world", lambda: SeveralRanks(1))
        short(Path(folder) / "nccl", "--epochs=2", "--precision=fp32", "--batch-size=32")
    dist.destroy_process_group()


def test_a_run_by_nccl_is_the_run_without(tmp_path, short_runs):
    """Its thread looks after the card during a recording; gradients are reduced in backward."""
    mp.spawn(run_rank_by_nccl, (str(tmp_path),), 1)
    alone = short(tmp_path / "alone", "--epochs=2", "--precision=fp32", "--batch-size=32")
    with torch.serialization.safe_globals([SeveralRanks]):  # the state's number of ranks
        assert_near_weights(folder(tmp_path / "nccl"), alone)
