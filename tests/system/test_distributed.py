"""Several ranks against one process on the same global batch, and whole runs of several ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from models import build_model
from tests.forks import ended, forked, run_script
from tests.helpers import (
    ANCRA,
    ROOT,
    RUN,
    assert_equal,
    digits_checkpoint,
    digits_network,
    digits_split,
    environment,
    folder,
    metrics,
    settings,
    state,
    train,
)
from utils.attacks import pgd40_heads
from utils.data.datasets import Split, require_same_on_ranks
from utils.data.subject import verdicts
from utils.evaluation import robustness
from utils.figures.features import feature_distance
from utils.step import StepStats, training_loss
from utils.system import distributed
from utils.system.attack_copy import AttackCopy, frozen
from utils.system.errors import UsageError
from utils.system.files import read_arrays
from utils.system.options import parse
from utils.system.settings import Distances, Evaluation
from utils.training.companions import Average, adversarial_weights
from utils.training.loop import attack_batch, backward

SCRIPT = ROOT / ANCRA
SHORT = (*RUN, "--num-steps=1")

# Flags of a training step, and the number of images in its batch.
CASES = {
    "trades": (["--method=trades"], 7),
    "fewer images than ranks": (["--method=trades"], 1),
    "plain": (["--method=trades", "--inner=kl", "--no-ra", "--no-anc"], 8),
    "several negatives": (["--strategy=easy_adv", "--sample_class_number=2"], 7),
    "hard negatives": (["--method=mart", "--strategy=hard"], 7),
    "another network": (["--method=pgd", "--arch=PreActResNet18", "--image-size=64"], 2),
}


# What every rank computes


def network(settings):
    """Build a network in float64 whose predictions differ and whose statistics are of images.

    In float64 rounding hides no wrong weight, and flips no sign of an attack's gradient.
    """
    torch.manual_seed(0)
    side = settings.image_size
    model = build_model(
        settings.arch, 10, reverse_attention=not settings.no_ra, width=4, image_size=side
    )
    model.double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, side, side, dtype=torch.double))
    return model.eval()


def prepared(flags, count):
    """Return a network, and the other arguments of `backward` for an attacked batch."""
    s = replace(settings("--dataset=digits", "--num-steps=3", *flags), warmup_epochs=0)
    model = network(s)
    distributed.sum_gradients(model)
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, s.image_size, s.image_size, generator=draw).double()
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])[:count]
    attacked = attack_batch(AttackCopy(model), x, labels, s, torch.Generator().manual_seed(2), 1)
    return model, (partial(training_loss, model), x, labels, attacked, s)


def step(flags, count, train=False):
    """Return stats, gradients and statistics of one training step on a global batch.

    BatchNorm is in eval mode unless `train`, since ranks normalise their own slices.
    """
    model, arguments = prepared(flags, count)
    model.train(train)
    stats = backward(*arguments)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers()) | {"stats": stats}


def steps():
    """Return `step` of each case, and of one image in train mode, which each rank takes."""
    results = {name: step(*case) for name, case in CASES.items()}
    return results | {"train mode": step(["--method=trades"], 1, train=True)}


def companions():
    """Return weights, their average and statistics after two steps with AWP and EMA."""
    model, arguments = prepared(["--method=trades"], 7)
    average = Average(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    gradients = partial(backward, *arguments)
    for _ in range(2):
        with adversarial_weights(model, gradients, 0.05):
            gradients()
            optimizer.step()
        optimizer.zero_grad()
        average.update(model, 0.9)
    averaged = {f"average of {name}": v for name, v in average.model.state_dict().items()}
    return averaged | model.state_dict()


def judged():
    """Return verdicts of a network on 33 digits in batches of 5, natural and attacked."""
    split = digits_split(count=33)
    attack = pgd40_heads(0.1, 0.04, 2.0, 1, steps=4)
    with frozen(digits_network().double()) as net:

        def exact(x, **heads):
            return net(x.double(), **heads)

        natural = verdicts(exact, split, 5)
        robust = verdicts(exact, split, 5, attack, natural)
    return {"natural": natural, "robust": robust}


def assert_ranks_communicate():
    """Sums, wishes, slices, errors and buffers reach every rank."""
    rank = distributed.rank()
    world = distributed.world()
    ranks = range(world)
    assert distributed.gathered(rank) == list(ranks)
    assert distributed.total(torch.tensor(rank + 1)) == sum(ranks) + world
    assert distributed.agreed(15 if rank == world - 1 else 0) == 15
    assert distributed.from_first(lambda: rank) == 0
    with pytest.raises(UsageError, match="wrong"):
        distributed.from_first(mock.Mock(side_effect=UsageError("wrong")))

    for things in (torch.arange(7), torch.tensor([5])):  # of the latter each rank has all
        count = len(things)
        part = things[distributed.own_slice(count)]
        assert_equal(distributed.joined(part, count), things)

    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    splits = {"training": Split(images, torch.tensor([0, 1]), ("a", "b"))}
    images[1, 2, 3, 4] = rank == world - 1
    with pytest.raises(UsageError, match="folder in data"):
        require_same_on_ranks("folder in data", splits)

    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(5 + rank)
    distributed.share_buffers(norm)
    nn.init.constant_(norm.weight, 5 + rank)
    norm.bias.requires_grad_(False)  # a parameter that is not trained has no gradient to sum
    distributed.sum_gradients(norm)
    norm.weight.sum().backward()
    assert (norm.running_mean, norm.weight, norm.weight.grad) == (5, 5, world)


def evaluate_and_measure(parent):
    """Run test_white_attack.py on two blocks of 25 digits, and feature_distance.py."""
    evaluation = [
        *("--ckpt_url", str(parent / "net.pt"), "--attacks", "fgsm,pgd", "--num-steps", "5"),
        *("--n-examples", "50", "--save-adversarial", str(parent / "worst.npz"), "--device", "cpu"),
    ]
    distances = [
        *("--model_dir", str(parent / "net.pt"), "--target_label", "3", "--num-steps", "2"),
        *("--out", str(parent / "distances"), "--device", "cpu"),
        "--test-batch-size=1",  # for each rank, so that batches are the same
    ]
    with distributed.started(), mock.patch.object(robustness, "BLOCK", 25):
        robustness.white_attack(parse(Evaluation, "", evaluation))
        feature_distance(parse(Distances, "", distances))


# Starting ranks


class Ranks:
    """Forked processes that do the same work as the ranks of one group, as torchrun starts them."""

    def __init__(self, count, parent, work, *args):
        parent.mkdir(parents=True, exist_ok=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.outputs = [parent / str(rank) for rank in range(count)]
        self.processes = []
        for rank, out in enumerate(self.outputs):
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(forked(out, in_environment, variables, work, *args))

    def send_signal(self, rank, signum):
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, signum)

    def finish(self):
        """Wait; return exit statuses, and standard output and standard error of each rank."""
        statuses = [ended(process) for process in self.processes]
        written = []
        for out in self.outputs:
            texts = out.with_suffix(".out").read_text(), out.with_suffix(".err").read_text()
            written.append(texts)
        return statuses, written


def in_environment(variables, work, *args):
    """Do some work with further environment variables."""
    os.environ |= variables
    work(*args)


def start_ranks(tmp_path, *flags):
    """Start a short training as two ranks."""
    command = (SCRIPT, *SHORT, "--model-dir", tmp_path / "run", *flags)
    return Ranks(2, tmp_path / "ranks", run_script, *command)


def start_torchrun(*argv):
    """Start a script as two ranks by torchrun on this node."""
    flags = ("--standalone", "--nproc-per-node=2")
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True)


def wait_for(line, parent):
    """Wait until `line` is in the log of the run in a folder."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        for log in parent.glob("run*/train.log"):
            if line in log.read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"{line!r} was never logged")


# Steps and verdicts


def compute(file):
    """Compute what ranks share, and write the results of the first one."""
    with distributed.started():
        assert_ranks_communicate()
        results = computed()
        if distributed.first():
            torch.save(results, file)


def computed():
    """Return the results of steps, of weights beside a step, and verdicts."""
    return steps() | {"companions": companions(), "verdicts": judged()}


@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_several_ranks_compute_what_one_process_computes(tmp_path, count):
    """In float64 only the order of sums differs."""
    file = tmp_path / "results.pt"
    statuses, written = Ranks(count, tmp_path, compute, file).finish()
    assert statuses == [0] * count, written
    results = torch.load(file, weights_only=True)
    expected = computed()
    for case in ("trades", "several negatives"):
        assert StepStats(*expected[case]["stats"]).contrast > 0
    robust = expected["verdicts"]["robust"]
    assert 0 < robust.sum() < expected["verdicts"]["natural"].sum()
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-7, equal_nan=True)


def test_without_torchrun_there_is_one_rank(monkeypatch):
    """Clusters set these variables for purposes of their own."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with distributed.started():
        assert distributed.world() == 1
        assert distributed.first()
        assert distributed.own_slice(5) == slice(0, 5)


def test_ranks_of_an_evaluation_may_share_a_device_and_those_of_a_training_may_not(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    cuda = torch.device("cuda")
    second = torch.device("cuda:1")
    assert distributed.own_device(cuda, shared=True) == torch.device("cuda:0")
    assert distributed.own_device(second, shared=True) == second
    for device in (cuda, second):
        with pytest.raises(UsageError, match="CUDA device"):
            distributed.own_device(device)


# Whole runs


def run_alone(tmp_path, *flags):
    """Run a short training in this process."""
    return train(tmp_path, "--num-steps=1", *flags)


def epochs(run):
    """Return the epochs in a run's metrics.csv."""
    return [int(row["epoch"]) for row in metrics(run)]


@pytest.mark.slow
def test_ranks_continue_a_run_and_a_stop_of_one_stops_all(short_runs, tmp_path):
    """One process, then two ranks until one of them is stopped, then one process: one run."""
    run = run_alone(tmp_path, "--epochs=1")
    ranks = start_ranks(tmp_path, "--resume", "--epochs=999")
    wait_for("epoch 2/999", tmp_path)
    ranks.send_signal(1, signal.SIGTERM)
    statuses, written = ranks.finish()
    assert statuses == [143, 143], written
    (line,) = written[0][1].splitlines()
    assert "torchrun --nproc-per-node=2 " in line
    assert written[1] == ("", "")

    epoch = state(run)["progress"]["epoch"]
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    record = json.loads((run / "run.json").read_text())
    assert [part["ranks"] for part in (*record["earlier"], record)] == [1, 2, 1]
    assert epochs(run) == list(range(1, epoch + 1))


@pytest.mark.slow
def test_a_run_of_two_ranks_stopped_between_epochs_is_the_straight_one(tmp_path):
    straight = tmp_path / "straight"
    stopped = tmp_path / "stopped"
    for parent, flags in ((straight, []), (stopped, ["--epochs=1"]), (stopped, ["--resume"])):
        statuses, written = start_ranks(parent, *flags).finish()
        assert statuses == [0, 0], written
    assert written[0][0] and not written[1][0]  # the first rank logs
    assert metrics(folder(straight)) == metrics(folder(stopped))
    assert_equal(state(folder(straight))["model"], state(folder(stopped))["model"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(short_runs, tmp_path, killed):
    ranks = start_ranks(tmp_path, "--epochs=999")
    wait_for("epoch 2/999", tmp_path)
    ranks.send_signal(killed, signal.SIGKILL)
    statuses, _ = ranks.finish()
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] > 0  # it has failed
    epoch = state(folder(tmp_path))["epoch"]
    run_alone(tmp_path, f"--epochs={epoch + 1}", "--resume")
    assert epochs(folder(tmp_path))[-1] == epoch + 1


@pytest.mark.slow
def test_a_stop_of_torchrun_stops_its_ranks_and_is_resumable(tmp_path):
    job = start_torchrun(SCRIPT, *SHORT, "--model-dir", tmp_path / "run", "--epochs=999")
    wait_for("epoch 1/", tmp_path)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert errors.count("torchrun --nproc-per-node=2 ") == 1, errors
    epoch = state(folder(tmp_path))["progress"]["epoch"]
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert epochs(folder(tmp_path)) == list(range(1, epoch + 1))


@pytest.mark.slow
def test_two_ranks_train_compiled(tmp_path):
    flags = ("--model-dir", tmp_path / "run", "--epochs=1", "--no-ra", "--no-anc", "--compile")
    job = start_torchrun(SCRIPT, *SHORT, *flags)
    out, errors = job.communicate()
    assert job.returncode == 0, errors
    assert "compiled" in out
    assert state(folder(tmp_path))["epoch"] == 1


def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UsageError, match="--sync-bn"):
        run_alone(tmp_path, "--sync-bn", "--device=cpu")
    assert not list(tmp_path.iterdir())


# Evaluation and figures


def evaluated(parent):
    """Return the verdicts of an evaluation by attack, and the images that it saved."""
    attacks = json.loads((parent / "white_attack.json").read_text())["attacks"]
    verdicts = {name: row["verdicts"] for name, row in attacks.items()}
    with np.load(parent / "worst.npz") as saved:
        return verdicts, saved["images"]


def test_scripts_of_several_ranks_find_what_one_process_finds(tmp_path):
    """Evaluation, shared block by block, and feature distances, shared image by image."""
    together = tmp_path / "together"
    alone = tmp_path / "alone"
    for parent in (together, alone):
        digits_checkpoint(parent / "net.pt")
    evaluate_and_measure(alone)
    statuses, written = Ranks(2, together, evaluate_and_measure, together).finish()
    assert statuses == [0, 0], written
    assert [out.count("robust %") for out, _ in written] == [1, 0]

    verdicts, images = evaluated(together)
    expected_verdicts, expected_images = evaluated(alone)
    assert verdicts == expected_verdicts
    distances = np.abs(images - expected_images).max((1, 2, 3))
    assert (distances < 1e-4).mean() > 0.95

    (file,) = (alone / "distances").iterdir()
    _, arrays = read_arrays(together / "distances" / file.name)
    _, expected_arrays = read_arrays(file)
    for key, expected in expected_arrays.items():
        assert np.allclose(arrays[key], expected, atol=1e-4), key
