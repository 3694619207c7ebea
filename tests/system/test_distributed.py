"""Several ranks against one process on the same global batch, and whole runs of several ranks.

`python -m tests.system.test_distributed COUNT FOLDER [SCRIPT FLAG ...]` loads PyTorch once and
forks into COUNT ranks, which run the script or else `work`. Their output and results go to FOLDER.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models import build_model
from tests.helpers import (
    ANCRA,
    ATTACK,
    ROOT,
    RUN,
    assert_equal,
    digits_checkpoint,
    digits_network,
    digits_split,
    end_forked,
    environment,
    folder,
    free_port,
    made_once,
    metrics,
    python,
    settings,
    state,
    train,
)
from utils.attacks import pgd40_heads
from utils.data.datasets import Split, require_same_on_ranks
from utils.data.subject import verdicts
from utils.evaluation import robustness
from utils.figures.features import feature_distance
from utils.step import training_loss
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
    "trades, 8 images": (("--method=trades",), 8),
    "trades, 7 images": (("--method=trades",), 7),
    "trades, 2 images": (("--method=trades",), 2),
    "trades, 1 image": (("--method=trades",), 1),
    "plain trades, 7 images": (("--method=trades", "--inner=kl", "--no-ra", "--no-anc"), 7),
    "several negatives, 7 images": (
        ("--method=trades", "--strategy=easy_adv", "--sample_class_number=2", "--sample_number=2"),
        7,
    ),
    "hard negatives, 7 images": (("--method=mart", "--strategy=hard"), 7),
    "hard negatives, 2 images": (("--method=mart", "--strategy=hard"), 2),
    "soft negatives, 8 images": (("--method=mart", "--strategy=soft_adv", "--alpha=0.5"), 8),
    "pgd without ra, 7 images": (("--method=pgd", "--no-ra"), 7),
    "pgd without anc, 2 images": (("--method=pgd", "--no-anc"), 2),
    "another network, 2 images": (
        ("--method=pgd", "--arch=PreActResNet18", "--image-size=64"),
        2,
    ),
}
# Cases in which the contrast is more than 0.
WITH_CONTRAST = (
    "trades, 8 images",
    "trades, 7 images",
    "trades, 2 images",
    "pgd without ra, 7 images",
)


# What every rank computes


def step_settings(*flags):
    """Settings of a step after the warm-up."""
    return replace(settings("--dataset=digits", "--num-steps=3", *flags), warmup_epochs=0)


def network(settings):
    """Build a network in float64 whose predictions differ and whose statistics are of images.

    In float64 rounding hides no wrong weight, and flips no sign of an attack's gradient.
    """
    torch.manual_seed(0)
    model = build_model(
        settings.arch,
        10,
        reverse_attention=not settings.no_ra,
        width=4,
        image_size=settings.image_size,
    ).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1)
    side = settings.image_size
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, side, side, dtype=torch.double))
    return model.eval()


def batch_of(settings, count):
    """Return images and labels of a batch."""
    side = settings.image_size
    x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.double(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])[:count]


def attacked_batch(model, x, labels, settings):
    """Attack a batch as a training step does."""
    generator = torch.Generator().manual_seed(2)
    return attack_batch(AttackCopy(model), x, labels, settings, generator, 1)


def step(flags, count, train=False):
    """Return figures, gradients and statistics of one training step on a global batch.

    BatchNorm is in eval mode unless `train`, since ranks normalise their own slices.
    """
    settings = step_settings(*flags)
    model = network(settings).train(train)
    loss_of = distributed.parallel(model, training_loss)
    x, labels = batch_of(settings, count)
    attacked = attacked_batch(model, x, labels, settings)
    figures = backward(loss_of, x, labels, attacked, settings)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return gradients | dict(model.named_buffers()) | {"figures": counted(figures, count)}


def counted(figures, count):
    """Return a step's figures with numbers of right images in place of shares."""
    figures = figures.tolist()
    return figures[:5] + [round(share * count) for share in figures[5:]]


def steps():
    """Return `step` of each case."""
    return {name: step(*case) for name, case in CASES.items()}


def small_batches():
    """Return steps of 1 and 2 images in train mode; of fewer than ranks each rank takes all."""
    return {count: step(("--method=trades",), count, train=True) for count in (1, 2)}


def companions():
    """Return weights, their average and statistics after two steps with AWP and EMA."""
    settings = step_settings("--method=trades")
    model = network(settings)
    loss_of = distributed.parallel(model, training_loss)
    average = Average(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, labels = batch_of(settings, 7)
    for _ in range(2):
        attacked = attacked_batch(model, x, labels, settings)
        gradients = partial(backward, loss_of, x, labels, attacked, settings)
        with adversarial_weights(model, gradients, 0.05):
            figures = gradients()
            optimizer.step()
        optimizer.zero_grad()
        average.update(model, 0.9)
    averaged = {f"average of {name}": v for name, v in average.model.state_dict().items()}
    return {"figures": counted(figures, 7)} | averaged | model.state_dict()


def judged():
    """Return verdicts of a network on 33 digits in batches of 5, natural and attacked."""
    split = digits_split(count=33)
    batches = []
    attack = pgd40_heads(0.1, 0.04, 2.0, 1, steps=4)
    with frozen(digits_network().double()) as net:

        def exact(x, **heads):
            return net(x.double(), **heads)

        natural = verdicts(exact, split, 5, progress=batches.append)
        robust = verdicts(exact, split, 5, attack, natural, batches.append)
    return {"natural": natural, "robust": robust, "images": sum(batches)}


def shared_statistics():
    """Return how far the ranks' statistics lie apart after a step, and after they are shared."""
    settings = step_settings()
    model = network(settings).train()
    x, labels = batch_of(settings, 7)
    attacked = attacked_batch(model, x, labels, settings)
    backward(distributed.parallel(model, training_loss), x, labels, attacked, settings)

    def spread():
        own = torch.cat([buffer.flatten().double() for buffer in model.buffers()])
        of_ranks = torch.stack(distributed.gathered(own))
        return (of_ranks - of_ranks[0]).abs().max().item()

    before = spread()
    distributed.share_buffers(model)
    return {"before": before, "after": spread()}


def communications():
    """Count how often ranks exchange something while they attack a batch, by strategy."""
    counts = {}
    for strategy in ("random_adv", "hard_adv"):
        settings = step_settings("--strategy", strategy)
        model = network(settings)
        x, labels = batch_of(settings, 7)
        with (
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
            mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as sent,
            mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gathered,
        ):
            attacked_batch(model, x, labels, settings)
        counts[strategy] = reduced.call_count + sent.call_count + gathered.call_count
    return counts


def small_things():
    """Return sums, wishes and slices, and on how many ranks an error of the first one arrives."""
    rank = distributed.rank()
    world = distributed.world()
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    require_same_on_ranks("here", Split(images, labels, ("a", "b")))
    images[1, 2, 3, 4] = rank == world - 1
    with pytest.raises(UsageError, match="folder in data"):  # on each rank
        require_same_on_ranks("folder in data", Split(images, labels, ("a", "b")))

    def refuse():
        raise UsageError("wrong")

    with pytest.raises(UsageError, match="wrong"):
        distributed.from_first(refuse)
    return {
        "total": distributed.total(torch.tensor([rank + 1])).item(),
        "joined": distributed.joined(torch.arange(7.0)[distributed.own_slice(7)], 7).tolist(),
        "joined of one": distributed.joined(torch.tensor([5.0]), 1).tolist(),
        "slices": distributed.gathered(distributed.own_slice(7).indices(7)[:2]),
        "weights": [distributed.own_weight(count) for count in (1, world)],
        "agreed": distributed.agreed(15 if rank == world - 1 else 0),
        "from_first": distributed.from_first(lambda: rank),
    }


def evaluate_and_measure(parent):
    """Run test_white_attack.py on two blocks of 25 digits, and feature_distance.py."""
    evaluation = [
        *("--ckpt_url", str(parent / "net.pt"), "--attacks", "fgsm,pgd", "--num-steps", "5"),
        *("--n-examples", "50", "--save-adversarial", str(parent / "worst.npz"), "--device", "cpu"),
    ]
    with mock.patch.object(robustness, "BLOCK", 25):
        robustness.white_attack(parse(Evaluation, "", evaluation))
    distances = [
        *("--model_dir", str(parent / "net.pt"), "--target_label", "3", "--num-steps", "2"),
        *("--out", str(parent / "distances"), "--device", "cpu"),
        "--test-batch-size=1",  # for each rank, so that batches are the same
    ]
    feature_distance(parse(Distances, "", distances))


# Starting ranks


def start(count, *argv, cwd=ROOT):
    """Start `python argv` as `count` ranks, each with pipes for its output."""
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks = []
    for rank in range(count):
        env = environment(**address, RANK=str(rank), LOCAL_RANK=str(rank))
        ranks.append(popen(sys.executable, *argv, env=env, cwd=cwd))
    return ranks


def popen(*command, env, cwd):
    """Start a command with pipes for its output."""
    pipe = subprocess.PIPE
    command = list(map(str, command))
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


class Forked:
    """Ranks forked from one process that has loaded PyTorch, which takes most of their time."""

    def __init__(self, count, parent, *argv):
        self.count = count
        self.parent = parent
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        module = "tests.system.test_distributed"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(count), str(parent), *map(str, argv)],
            env=environment(**address),
            cwd=ROOT,
            start_new_session=True,
        )

    def poll(self):
        """Return the exit status of all ranks together, None while they run."""
        return self.process.poll()

    def send_signal(self, rank, signum):
        """Send a signal to one rank."""
        pids = json.loads((self.parent / "pids.json").read_text())
        os.kill(pids[rank], signum)

    def finish(self, timeout=120):
        """Wait for the ranks; return as the function `finish`."""
        try:
            self.process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(self.process.pid, signal.SIGKILL)
        statuses = json.loads((self.parent / "statuses.json").read_text())
        return statuses, outputs(self.count, self.parent)


def outputs(count, parent):
    """Return what each of `Forked` ranks wrote to standard output and standard error."""
    pairs = []
    for rank in range(count):
        out = (parent / f"out.{rank}").read_text()
        err = (parent / f"err.{rank}").read_text()
        pairs.append((out, err))
    return pairs


def finish(processes, timeout=120):
    """Wait for processes; return their exit statuses, and standard output and error of each."""
    try:
        written = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks then
                time.sleep(1)
                process.kill()
    return [process.returncode for process in processes], written


def torchrun(count, *argv):
    """Run a script by torchrun on this node and wait for it."""
    flags = ("--standalone", f"--nproc-per-node={count}")
    return python("-m", "torch.distributed.run", *flags, *argv)


def wait_for(line, parent, process):
    """Wait until `line` is in the log of the run in a folder; fail if the process has ended."""
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        for log in parent.glob("run*/train.log"):
            if line in log.read_text():
                return
        time.sleep(0.05)
    written = process.finish() if isinstance(process, Forked) else finish([process], 1)
    raise AssertionError(f"{line!r} was never logged: {written}")


@contextlib.contextmanager
def one_thread():
    """Compute as the ranks do, since rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Steps, verdicts and small things


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """Return the results of 3 or 2 ranks, their number, their outputs and their folder."""
    count = request.param

    def launch(parent):
        digits_checkpoint(parent / "net.pt")
        statuses, written = Forked(count, parent).finish()
        assert statuses == [0] * count, written

    parent = made_once(tmp_path_factory, f"{count}-ranks", launch)
    results = torch.load(parent / "results.pt", weights_only=True)
    return results, count, outputs(count, parent), parent


@pytest.fixture(scope="module")
def alone():
    """Return the same results of this one process."""
    with one_thread():
        return {f.__name__: f() for f in (steps, small_batches, companions, judged)}


def assert_same_step(result, expected):
    """Compare figures, gradients and statistics; in float64 only the order of sums differs."""
    assert result.keys() == expected.keys()
    assert result["figures"] == pytest.approx(expected["figures"], abs=1e-9)
    assert result["figures"][5:] == expected["figures"][5:]  # numbers of right images
    tensors = {key: value for key, value in expected.items() if key != "figures"}
    assert any(value.abs().max() > 1e-3 for value in tensors.values())
    for key, value in tensors.items():
        assert torch.allclose(result[key], value, rtol=0, atol=1e-9), key


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_several_ranks_is_that_of_one_process(ranks, alone, case):
    expected = alone["steps"][case]
    if case in WITH_CONTRAST:
        assert expected["figures"][1] > 0
    assert_same_step(ranks[0]["steps"][case], expected)


def test_adversarial_and_averaged_weights_of_several_ranks_are_those_of_one_process(ranks, alone):
    assert_same_step(ranks[0]["companions"], alone["companions"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_fewer_images_than_ranks_is_each_rank_s_own(ranks, alone, count):
    """Every rank normalises the whole batch and keeps its statistics."""
    if count >= ranks[1]:
        count = 1
    assert_same_step(ranks[0]["small_batches"][count], alone["small_batches"][count])


def test_verdicts_of_several_ranks_are_those_of_one_process(ranks, alone):
    expected = alone["judged"]
    assert 0 < expected["robust"].sum() < expected["natural"].sum()
    assert_equal(ranks[0]["judged"], expected)


def test_the_first_rank_s_statistics_are_shared(ranks):
    statistics = ranks[0]["shared_statistics"]
    assert statistics["before"] > 1e-3
    assert statistics["after"] == 0


def test_attacks_communicate_nothing_but_the_logits_that_choose_negatives(ranks):
    assert ranks[0]["communications"] == {"random_adv": 0, "hard_adv": 1}


def test_sums_wishes_and_errors_reach_every_rank(ranks):
    results, count, *_ = ranks
    slices = {2: [(0, 4), (4, 7)], 3: [(0, 3), (3, 5), (5, 7)]}
    assert results["small_things"] == {
        "total": count * (count + 1) // 2,
        "joined": list(range(7)),
        "joined of one": [5],
        "slices": slices[count],
        "weights": [1 / count, 1 / count],
        "agreed": 15,
        "from_first": 0,
    }


def test_one_process_has_no_group():
    assert distributed.world() == 1
    assert distributed.first()
    assert distributed.own_slice(5) == slice(0, 5)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_variables_that_are_not_all_of_torchrun_start_no_group(monkeypatch, missing):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=AssertionError))
    with distributed.started():
        assert distributed.world() == 1


def test_ranks_of_an_evaluation_may_share_a_device_and_those_of_a_training_may_not(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    cuda = torch.device("cuda")
    second = torch.device("cuda:1")
    for local, device in (("1", "cuda:1"), ("2", "cuda:0"), ("3", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert str(distributed.own_device(cuda, shared=True)) == device
        assert str(distributed.own_device(second, shared=True)) == "cuda:1"
    for device in (cuda, second):
        with pytest.raises(UsageError, match="CUDA device"):
            distributed.own_device(device)


# Whole runs


def run_alone(tmp_path, *flags):
    """Run a short training in this process."""
    return train(tmp_path, "--num-steps=1", *flags)


def start_ranks(tmp_path, *flags):
    """Start the same training as two ranks."""
    return start(2, SCRIPT, *SHORT, "--model-dir", tmp_path / "run", *flags, cwd=tmp_path)


def epochs(run):
    """Return the epochs in a run's metrics.csv."""
    return [int(row["epoch"]) for row in metrics(run)]


@pytest.mark.slow
def test_ranks_continue_a_run_and_a_stop_of_one_stops_all(short_runs, tmp_path, capsys):
    """One process, then two ranks until one of them is stopped, then one process: one run."""
    run = run_alone(tmp_path, "--epochs=1")
    (tmp_path / "ranks").mkdir()
    flags = (*SHORT, "--model-dir", tmp_path / "run", "--resume", "--epochs=999")
    ranks = Forked(2, tmp_path / "ranks", SCRIPT, *flags)
    wait_for("epoch 2/999", tmp_path, ranks)
    ranks.send_signal(1, signal.SIGTERM)
    statuses, written = ranks.finish()
    assert statuses == [143, 143], written
    (line,) = written[0][1].splitlines()
    assert "torchrun --nproc-per-node=2 " in line
    assert written[1] == ("", "")
    assert "1 before, 2 now" in written[0][0]

    stopped = state(run)
    epoch = stopped["progress"]["epoch"]
    assert epoch > 2
    assert stopped["ranks"] == 2
    assert json.loads((run / "run.json").read_text())["ranks"] == 2
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert "2 before, 1 now" in capsys.readouterr().out
    assert epochs(run) == list(range(1, epoch + 1))
    log = (run / "train.log").read_text()
    assert all(log.count(f"epoch {n}/") == 1 for n in epochs(run))


@pytest.mark.slow
def test_a_run_of_two_ranks_stopped_between_epochs_is_the_straight_one(tmp_path):
    runs = []
    for name, parts in (("straight", [()]), ("stopped", [("--epochs=1",), ("--resume",)])):
        (tmp_path / name).mkdir()
        for flags in parts:
            statuses, written = finish(start_ranks(tmp_path / name, *flags))
            assert statuses == [0, 0], written
        assert written[0][0] and not written[1][0]  # the first rank logs
        runs.append(folder(tmp_path / name))
    straight, stopped = runs
    assert metrics(straight) == metrics(stopped)
    assert_equal(state(straight)["model"], state(stopped)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(short_runs, tmp_path, killed):
    ranks = start_ranks(tmp_path, "--epochs=999")
    wait_for("epoch 2/999", tmp_path, ranks[0])
    ranks[killed].kill()
    statuses, written = finish(ranks)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1
    line = written[1 - killed][1].splitlines()[-1]
    assert "lost another rank" in line and "--resume" in line
    epoch = state(folder(tmp_path))["epoch"]
    run_alone(tmp_path, f"--epochs={epoch + 1}", "--resume")
    assert epochs(folder(tmp_path))[-1] == epoch + 1


@pytest.mark.slow
def test_two_nodes_write_one_run(tmp_path):
    """Both on this machine, in folders of their own: only the first rank has to see the run's."""
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"),
            *(SCRIPT, *SHORT, "--model-dir", tmp_path / name / "run", "--precision=bf16"),
        ]
        nodes.append(popen(*command, env=environment(), cwd=tmp_path / name))
    statuses, written = finish(nodes)
    assert statuses == [0, 0], written
    (run,) = tmp_path.glob("*/run*")
    assert epochs(run) == [1, 2]
    assert state(run)["ranks"] == 2


@pytest.mark.slow
def test_a_stop_of_torchrun_stops_its_ranks_and_is_resumable(tmp_path):
    job = popen(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(SCRIPT, *SHORT, "--model-dir", tmp_path / "run", "--epochs=999"),
        env=environment(),
        cwd=tmp_path,
    )
    wait_for("epoch 1/", tmp_path, job)
    job.send_signal(signal.SIGTERM)
    (status,), ((_, errors),) = finish([job])
    assert status == 1
    assert errors.count("torchrun --nproc-per-node=2 ") == 1, errors
    epoch = state(folder(tmp_path))["progress"]["epoch"]
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert epochs(folder(tmp_path)) == list(range(1, epoch + 1))


@pytest.mark.slow
def test_two_ranks_train_compiled(tmp_path):
    flags = ("--model-dir", tmp_path / "run", "--epochs=1", "--no-ra", "--no-anc", "--compile")
    answer = torchrun(2, SCRIPT, *SHORT, *flags)
    assert answer.returncode == 0, answer.stderr
    assert "compiled" in answer.stdout
    assert state(folder(tmp_path))["epoch"] == 1


@pytest.mark.slow
def test_wrong_use_ends_all_ranks(tmp_path):
    statuses, written = finish(start_ranks(tmp_path, "--sync-bn"))
    assert statuses == [2, 2], written
    assert "--sync-bn" in written[0][1]
    assert not list(tmp_path.iterdir())


def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UsageError, match="--sync-bn"):
        run_alone(tmp_path, "--sync-bn", "--device=cpu")
    assert not list(tmp_path.iterdir())


# Evaluation and figures


def evaluated(parent):
    """Return the attacks of an evaluation's white_attack.json, and the images that it saved."""
    attacks = json.loads((parent / "white_attack.json").read_text())["attacks"]
    with np.load(parent / "worst.npz") as saved:
        return attacks, dict(saved)


def assert_same_evaluation(result, expected):
    """Compare two evaluations, up to the rounding of other batches."""
    attacks, saved = result
    expected_attacks, expected_saved = expected
    assert list(attacks) == list(expected_attacks)
    for name, row in attacks.items():
        verdicts = np.array([*row["verdicts"]])
        expected_verdicts = np.array([*expected_attacks[name]["verdicts"]])
        assert (verdicts != expected_verdicts).mean() <= 0.005, name
    assert (saved["right"] != expected_saved["right"]).mean() <= 0.005
    distances = np.abs(saved["images"] - expected_saved["images"]).max((1, 2, 3))
    assert (distances < 1e-4).mean() > 0.95


def test_scripts_of_several_ranks_find_what_one_process_finds(ranks, tmp_path, capsys):
    """Evaluation, shared block by block, and feature distances, shared image by image."""
    _, count, written, together = ranks
    digits_checkpoint(tmp_path / "net.pt")
    with one_thread():
        evaluate_and_measure(tmp_path)
    capsys.readouterr()
    assert [out.count("| network |") for out, _ in written] == [1] + [0] * (count - 1)
    assert_same_evaluation(evaluated(together), evaluated(tmp_path))
    (file,) = (tmp_path / "distances").iterdir()
    _, arrays = read_arrays(together / "distances" / file.name)
    _, expected = read_arrays(file)
    for key, values in expected.items():
        assert np.allclose(arrays[key], values, atol=1e-4), key


@pytest.mark.slow
def test_blocks_of_the_adaptive_attack_are_shared_by_torchrun(tmp_path):
    """360 images are two blocks, one for each rank. Of a plain network one view is enough."""
    flags = (
        *("--attacks", "adaptive", "--num-steps", "5", "--restarts", "1", "--epsilon", "0.2"),
        *("--device", "cpu"),
    )
    blocks = []
    for name in ("alone", "together"):
        file = digits_checkpoint(tmp_path / name / "net.pt", reverse_attention=False)
        saved = file.parent / "worst.npz"
        argv = (ROOT / ATTACK, "--ckpt_url", file, *flags, "--save-adversarial", saved)
        done = python(*argv) if name == "alone" else torchrun(2, *argv)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| network |") == 1
        blocks.append({f.name for f in (tmp_path / name / "white_attack.blocks").iterdir()})
    assert_same_evaluation(evaluated(tmp_path / "together"), evaluated(tmp_path / "alone"))
    assert blocks[0] == blocks[1] != set()


@pytest.mark.slow
def test_a_umap_by_two_ranks_is_that_of_one_process(trained, tmp_path):
    draw = (ROOT / "draw_umap.py", "--model_dir", trained[2], "--n-examples", "80", "--name", "u")
    assert python(*draw, "--out", tmp_path / "alone").returncode == 0
    assert torchrun(2, *draw, "--out", tmp_path / "together").returncode == 0
    expected = np.load(tmp_path / "alone" / "u.npz")
    arrays = np.load(tmp_path / "together" / "u.npz")
    for key in ("labels", "indices"):
        assert np.array_equal(arrays[key], expected[key])
    measured = json.loads(str(arrays["settings"]))["measured"]
    for key, numbers in json.loads(str(expected["settings"]))["measured"].items():
        assert measured[key] == pytest.approx(numbers, abs=1e-3)


# The program that forks into ranks


def work(parent):
    """Do as one rank all that the fixture `ranks` returns."""
    jobs = (
        steps,
        small_batches,
        companions,
        judged,
        shared_statistics,
        communications,
        small_things,
    )
    with distributed.started():
        results = {job.__name__: job() for job in jobs}
        evaluate_and_measure(parent)
        if distributed.first():
            torch.save(results, parent / "results.pt")


def run_rank(rank, parent, argv):
    """Run a script or `work` as a forked rank, and end the process."""

    def job():
        os.environ["RANK"] = str(rank)
        os.environ["LOCAL_RANK"] = str(rank)
        if argv:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        else:
            work(parent)

    end_forked(job, parent / f"out.{rank}", parent / f"err.{rank}")


def main():
    """Fork into ranks and wait for them."""
    import torch._dynamo  # noqa: F401, which DistributedDataParallel loads

    count = int(sys.argv[1])
    parent = Path(sys.argv[2])
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, parent, sys.argv[3:])
        pids.append(pid)
    (parent / "pids.json").write_text(json.dumps(pids))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (parent / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
