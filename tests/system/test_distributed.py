"""Several ranks: real gloo processes against one process on the same global batch, and whole runs of them.

`python -m tests.system.test_distributed COUNT FOLDER [SCRIPT FLAG ...]` loads PyTorch once and forks into COUNT ranks, which
run the script, or else work through what `work` names. What they say and find goes to FOLDER.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
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
CASES = {
    f"{' '.join(flags)}, {images} images": (flags, images)
    for flags, images in (
        (("--method=trades",), 8),
        (("--method=trades",), 7),
        (("--method=trades",), 2),
        (("--method=trades",), 1),
        (("--method=trades", "--inner=kl", "--no-ra", "--no-anc"), 7),
        (("--method=trades", "--inner=kl"), 2),
        (("--method=trades", "--strategy=easy_adv", "--sample_class_number=2", "--sample_number=2"), 7),
        (("--method=mart", "--strategy=hard"), 7),
        (("--method=mart", "--strategy=hard"), 2),
        (("--method=mart", "--strategy=soft_adv", "--alpha=0.5"), 8),
        (("--method=pgd", "--no-ra"), 7),
        (("--method=pgd", "--no-anc"), 2),
        (("--method=pgd", "--arch=PreActResNet18", "--image-size=64"), 2),
    )
}


def some_settings(*flags):
    """Of a step behind the warm-up."""
    return replace(settings("--dataset=digits", "--num-steps=3", *flags), warmup_epochs=0)


def network(settings):
    """A network whose statistics are those of images, and whose predictions differ: training has begun.

    In float64, so that rounding does not hide a wrong weight and no sign of an attack's gradient hangs on it.
    """
    torch.manual_seed(0)
    model = build_model(settings.arch, 10, reverse_attention=not settings.no_ra, width=4, image_size=settings.image_size).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, settings.image_size, settings.image_size, dtype=torch.double))
    return model.eval()


def images_of(settings, count):
    x = torch.rand(count, 3, settings.image_size, settings.image_size, generator=torch.Generator().manual_seed(1))
    return x.double(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])[:count]


def step(flags, count, train=False):
    """One training step -> its figures, every gradient and every statistic, of the global batch.

    BatchNorm is in eval mode unless `train`, since ranks normalise their own slices.
    """
    settings = some_settings(*flags)
    model = network(settings).train(train)
    loss_of = distributed.parallel(model, training_loss)
    x, labels = images_of(settings, count)
    attacked = attack_batch(AttackCopy(model), x, labels, settings, torch.Generator().manual_seed(2), 1)
    figures = backward(loss_of, x, labels, attacked, settings)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return gradients | dict(model.named_buffers()) | {"figures": counted(figures, count)}


def counted(figures, count):
    """A step's figures, with numbers of right images for their shares."""
    losses, shares = figures.tolist()[:5], figures.tolist()[5:]
    return [*losses, *(round(share * count) for share in shares)]


def steps():
    return {name: step(*case) for name, case in CASES.items()}


def small_batches():
    """Training steps of 1 and 2 images with BatchNorm in train mode: of fewer images than ranks each rank takes all."""
    return {count: step(("--method=trades",), count, train=True) for count in (1, 2)}


def companions():
    """Two steps with adversarial weights and averaged ones -> weights, average, statistics, in float64."""
    settings = some_settings("--method=trades")
    model = network(settings)
    loss_of, average = distributed.parallel(model, training_loss), Average(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, labels = images_of(settings, 7)
    for _ in range(2):
        attacked = attack_batch(AttackCopy(model), x, labels, settings, torch.Generator().manual_seed(2), 1)
        gradients = partial(backward, loss_of, x, labels, attacked, settings)
        with adversarial_weights(model, gradients, 0.05):
            figures = gradients()
            optimizer.step()
        optimizer.zero_grad()
        average.update(model, 0.9)
    averaged = {f"average of {name}": value for name, value in average.model.state_dict().items()}
    return {"figures": counted(figures, 7)} | averaged | model.state_dict()


def judged():
    """Verdicts of a network on 33 digits in batches of 5, natural and attacked; in float64, as batches differ."""
    split, seen = digits_split(count=33), []
    with frozen(digits_network().double()) as net:

        def exact(x, **heads):
            return net(x.double(), **heads)

        natural = verdicts(exact, split, 5, progress=seen.append)
        robust = verdicts(exact, split, 5, pgd40_heads(0.1, 0.04, 2.0, 1, steps=4), natural, seen.append)
    return {"natural": natural, "robust": robust, "seen": sum(seen)}


def shared():
    """How far the ranks' statistics lie apart after a step of 7 images, and after the first one's are shared."""
    settings = some_settings()
    model = network(settings).train()
    x, labels = images_of(settings, 7)
    attacked = attack_batch(AttackCopy(model), x, labels, settings, torch.Generator().manual_seed(2), 1)
    backward(distributed.parallel(model, training_loss), x, labels, attacked, settings)

    def spread():
        own = torch.cat([b.flatten().double() for b in model.buffers()])
        every = torch.stack(distributed.gathered(own))
        return (every - every[0]).abs().max().item(), torch.equal(own, every[0])

    before, _ = spread()
    distributed.share_buffers(model)
    return {"before": before, "after": spread()[0]}


def communications():
    """How often ranks exchange something while they attack a batch, by strategy."""
    counts = {}
    for strategy in ("random_adv", "hard_adv"):
        settings = some_settings("--strategy", strategy)
        batch = AttackCopy(network(settings)), *images_of(settings, 7), settings, torch.Generator().manual_seed(2), 1
        with (
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
            mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as sent,
            mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gathered,
        ):
            attack_batch(*batch)
        counts[strategy] = reduced.call_count + sent.call_count + gathered.call_count
    return counts


def small_things():
    """Sums, wishes and slices, and an error of the first rank."""
    rank, world = distributed.rank(), distributed.world()
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    require_same_on_ranks("here", Split(images, labels, ("a", "b")))
    images[1, 2, 3, 4] = rank == world - 1
    with pytest.raises(UsageError, match="folder in data holds other data"):  # on each rank
        require_same_on_ranks("folder in data", Split(images, labels, ("a", "b")))
    try:
        distributed.from_first(lambda: int("no number") if rank else _refuse())
        said = None
    except UsageError as error:
        said = str(error)
    return {
        "total": distributed.total(torch.tensor([rank + 1])).item(),
        "joined": distributed.joined(torch.arange(7.0)[distributed.own_slice(7)], 7).tolist(),
        "joined of one": distributed.joined(torch.arange(1.0)[distributed.own_slice(1)] + 5, 1).tolist(),
        "slices": distributed.gathered([distributed.own_slice(count).indices(count)[:2] for count in (1, 7)]),
        "weights": [distributed.own_weight(count) for count in (1, world)],
        "gathered": distributed.gathered(f"rank {rank}"),
        "agreed": distributed.agreed(15 if rank == world - 1 else 0),
        "from_first": distributed.from_first(lambda: rank),
        "heard by": distributed.total(torch.tensor(int(said == "wrong"))).item(),
    }


def _refuse():
    raise UsageError("wrong")


def evaluate_and_measure(parent):
    """test_white_attack.py on two blocks of 25 digits, and feature_distance.py, of a checkpoint in a folder."""
    flags = ["--attacks", "fgsm,pgd", "--num-steps", "5", "--n-examples", "50", "--device", "cpu"]
    argv = ["--ckpt_url", str(parent / "net.pt"), *flags, "--save-adversarial", str(parent / "worst.npz")]
    with mock.patch.object(robustness, "BLOCK", 25):
        robustness.white_attack(parse(Evaluation, "", argv))
    argv = ["--model_dir", str(parent / "net.pt"), "--target_label", "3", "--num-steps", "2", "--device", "cpu"]
    argv += ["--test-batch-size", "1"]  # as each process takes so many at a time, batches are the same
    feature_distance(parse(Distances, "", [*argv, "--out", str(parent / "distances")]))


def start(count, *argv, cwd=ROOT):
    """Start `python argv` as `count` ranks, each with pipes for what it says."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env=environment(**address, RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(count)),
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(count)
    ]  # fmt: skip


class Forked:
    """Ranks forked from one process that has loaded PyTorch, which takes them most of their time otherwise."""

    def __init__(self, count, parent, *argv):
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        self.count, self.parent = count, parent
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.test_distributed", str(count), str(parent), *map(str, argv)],
            env=environment(**port, LOCAL_WORLD_SIZE=str(count)), cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def poll(self):
        return self.process.poll()

    def send_signal(self, rank, signum):
        os.kill(json.loads((self.parent / "pids.json").read_text())[rank], signum)

    def finish(self):
        """As `finish`."""
        try:
            self.process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(self.process.pid, signal.SIGKILL)
        return json.loads((self.parent / "statuses.json").read_text()), said_by(self.count, self.parent)


def said_by(count, parent):
    """What each of `Forked` ranks wrote to standard output and standard error."""
    return [tuple((parent / f"{name}.{rank}").read_text() for name in ("out", "err")) for rank in range(count)]


def finish(processes, timeout=120):
    """Wait for ranks -> their exit statuses, and what each wrote to standard output and standard error."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks then
                time.sleep(1)
                process.kill()
    return [process.returncode for process in processes], said


def torchrun(count, *argv):
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *argv)


def wait_for(line, file, processes):
    """Until `line` is in the log, or a rank has ended."""
    until = time.monotonic() + 90
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        if file() and line in file().read_text():
            return
        time.sleep(0.05)
    said = [p.finish() if isinstance(p, Forked) else finish([p], 1) for p in processes]
    raise AssertionError(f"{line!r} was never logged: {said}")


def log_of(tmp_path):
    return lambda: next(iter(tmp_path.glob("run*/train.log")), None)


@contextlib.contextmanager
def one_thread():
    """As the ranks compute, since rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """All that a launch of 3 or 2 ranks finds -> that, their number, what each said, the folder they wrote to."""
    count = request.param

    def launch(parent):
        digits_checkpoint(parent / "net.pt")
        statuses, said = Forked(count, parent).finish()
        assert statuses == [0] * count, said

    parent = made_once(tmp_path_factory, f"{count}-ranks", launch)
    said = said_by(count, parent)
    return torch.load(parent / "found.pt", weights_only=True), count, said, parent


@pytest.fixture(scope="module")
def alone():
    """The same work by this one process."""
    with one_thread():
        return {f.__name__: f() for f in (steps, small_batches, companions, judged)}


def assert_same_step(found, expected):
    """Figures, gradients and statistics; both sides are float64, only sums of other order differ."""
    assert found.keys() == expected.keys()
    assert found["figures"] == pytest.approx(expected["figures"], abs=1e-9)
    assert found["figures"][5:] == expected["figures"][5:]  # numbers of right images
    tensors = {key: value for key, value in expected.items() if key != "figures"}
    assert any(value.abs().max() > 1e-3 for value in tensors.values())
    for key, value in tensors.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-9), key


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_several_ranks_is_that_of_one_process(ranks, alone, case):
    found, expected = ranks[0]["steps"][case], alone["steps"][case]
    if not any(word in case for word in ("--no-anc", "hard", "soft", ", 1 images")):
        assert expected["figures"][1] > 0  # the contrast is part of what is compared
    assert_same_step(found, expected)


def test_adversarial_and_averaged_weights_of_several_ranks_are_those_of_one_process(ranks, alone):
    assert_same_step(ranks[0]["companions"], alone["companions"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_fewer_images_than_ranks_is_each_rank_s_own(ranks, alone, count):
    """With BatchNorm in train mode too: every rank normalises the whole batch, and keeps the statistics of it."""
    if count >= ranks[1]:
        count = 1
    assert_same_step(ranks[0]["small_batches"][count], alone["small_batches"][count])


def test_verdicts_of_several_ranks_are_those_of_one_process(ranks, alone):
    expected = alone["judged"]
    assert 0 < expected["robust"].sum() < expected["natural"].sum()
    assert_equal(ranks[0]["judged"], expected)


def test_the_first_rank_s_statistics_are_shared(ranks):
    assert ranks[0]["shared"]["before"] > 1e-3 and ranks[0]["shared"]["after"] == 0


def test_attacks_communicate_nothing_but_the_logits_that_choose_negatives(ranks):
    assert ranks[0]["communications"] == {"random_adv": 0, "hard_adv": 1}


def test_sums_wishes_and_errors_reach_every_rank(ranks):
    found, count = ranks[:2]
    slices = {2: [(0, 4), (4, 7)], 3: [(0, 3), (3, 5), (5, 7)]}[count]
    assert found["small_things"] == {
        "total": count * (count + 1) // 2, "joined": list(range(7)), "joined of one": [5], "agreed": 15,
        "slices": [[(0, 1), own] for own in slices], "weights": [1 / count, 1 / count],
        "gathered": [f"rank {r}" for r in range(count)], "from_first": 0, "heard by": count,
    }  # fmt: skip


@pytest.mark.slow
def test_ranks_that_end_as_soon_as_they_have_communicated_end_well():
    """Twenty pairs, since it is a race: gloo's threads let go of the last tensors while Python ends.

    The long switch interval makes the race easy to lose: who holds Python's lock keeps it unless it waits.
    """
    program = """
        import os, socket, sys, torch
        import torch.distributed as dist
        from utils.system import distributed
        torch.set_num_threads(1)
        sys.setswitchinterval(10)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
        for _ in range(20):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
            for rank in "01":
                os.environ["RANK"] = rank
                if not os.fork():
                    with distributed.started():
                        kept = dist.group.WORLD  # as DistributedDataParallel does, beyond the group's end
                        for _ in range(20):
                            distributed.total(torch.tensor(1))
                    sys.exit()
            print(os.wait()[1], os.wait()[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["0"] * 40 and not done.stderr, done.stderr


def test_one_process_has_no_group():
    assert (distributed.world(), distributed.first(), distributed.own_slice(5)) == (1, True, slice(0, 5))


def run_alone(tmp_path, *flags):
    """The same run in this process."""
    return train(tmp_path, "--num-steps=1", *flags)


def start_ranks(tmp_path, *flags):
    """The same run by two ranks."""
    return start(2, SCRIPT, *SHORT, "--model-dir", tmp_path / "run", *flags, cwd=tmp_path)


def train_by_ranks(tmp_path, *flags):
    return finish(start_ranks(tmp_path, *flags))


def run_by_ranks(tmp_path):
    """The same run by two ranks, which has begun."""
    ranks = start_ranks(tmp_path, "--epochs=999")
    wait_for("epoch 2/999", log_of(tmp_path), ranks)
    return ranks


def epochs(run):
    return [int(row["epoch"]) for row in metrics(run)]


@pytest.mark.slow
def test_ranks_continue_a_run_and_a_stop_of_one_stops_all(short_runs, tmp_path, capsys):
    """One process, then two ranks until one of them is told to stop, then one process again: one run."""
    run = run_alone(tmp_path, "--epochs=1")
    one = capsys.readouterr().out
    (tmp_path / "ranks").mkdir()
    flags = (*SHORT, "--model-dir", tmp_path / "run", "--resume", "--epochs=999")
    ranks = Forked(2, tmp_path / "ranks", SCRIPT, *flags)
    wait_for("epoch 2/999", log_of(tmp_path), [ranks])
    ranks.send_signal(1, signal.SIGTERM)
    statuses, said = ranks.finish()
    assert statuses == [143, 143], said
    (line,) = said[0][1].splitlines()
    assert "terminated; continue by: torchrun --nproc-per-node=2 " in line and said[1] == ("", "")
    assert "resumed    in epoch 2, 0 images done" in said[0][0]
    assert "ranks      1 before, 2 now" in said[0][0] and ", 2 ranks" in said[0][0]
    kept = state(run)
    epoch = kept["progress"]["epoch"]
    assert kept["ranks"] == 2 and json.loads((run / "run.json").read_text())["ranks"] == 2 and epoch > 2
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert "ranks      2 before, 1 now" in capsys.readouterr().out
    assert epochs(run) == list(range(1, epoch + 1))
    log = (run / "train.log").read_text()
    assert [log.count(f"epoch {n}/") for n in epochs(run)] == [1] * epoch and log.startswith(one.split("\nepoch")[0])


@pytest.mark.slow
def test_torchrun_writes_one_run_and_resumes_with_another_number_of_ranks(short_runs, tmp_path, capsys):
    first = run_alone(tmp_path, "--epochs=1")
    answer = torchrun(2, SCRIPT, *SHORT, "--model-dir", tmp_path / "run", "--resume")
    assert answer.returncode == 0, answer.stderr
    assert "resumed    in epoch 2, 0 images done" in answer.stdout
    assert "ranks      1 before, 2 now" in answer.stdout and ", 2 ranks" in answer.stdout
    assert "Error" not in answer.stderr and "utils/" not in answer.stderr  # neither failures nor warnings of ours
    assert state(first)["ranks"] == 2 and json.loads((first / "run.json").read_text())["ranks"] == 2
    run_alone(tmp_path, "--epochs=3", "--resume")
    assert "ranks      2 before, 1 now" in capsys.readouterr().out
    assert epochs(first) == [1, 2, 3]


@pytest.mark.slow
def test_a_run_of_two_ranks_stopped_between_epochs_is_the_straight_one(tmp_path):
    for name, parts in (("straight", [()]), ("stopped", [("--epochs=1",), ("--resume",)])):
        (tmp_path / name).mkdir()
        for flags in parts:
            statuses, said = train_by_ranks(tmp_path / name, *flags)
            assert statuses == [0, 0], said
        assert said[0][0] and not said[1][0] and not said[1][1]  # the first rank speaks
    straight, stopped = (folder(tmp_path / name) for name in ("straight", "stopped"))
    assert {f.name for f in straight.iterdir()} == {
        "model-wrn-last.pt", "best_adv_model.pt", "last_state.pt", "train.log", "metrics.csv", "run.json",
        "training_curves.png", "training_curves.pdf",
    }  # fmt: skip
    assert metrics(straight) == metrics(stopped)
    assert_equal(state(straight)["model"], state(stopped)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line(short_runs, tmp_path, killed):
    ranks = run_by_ranks(tmp_path)
    ranks[killed].kill()
    statuses, said = finish(ranks)
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] == 1
    *before, line = said[1 - killed][1].splitlines()
    assert not before or killed == 0  # PyTorch's own words on the store, which the first rank holds without torchrun
    assert f"failed: rank {1 - killed} lost another rank" in line and "--resume" in line
    epoch = state(folder(tmp_path))["epoch"]
    run_alone(tmp_path, f"--epochs={epoch + 1}", "--resume")
    assert epochs(folder(tmp_path))[-1] == epoch + 1


@pytest.mark.slow
def test_two_nodes_write_one_run(tmp_path):
    """Both on this machine; the second one sees another folder, since only the first rank has to see the run's."""
    meeting, nodes = f"127.0.0.1:{free_port()}", []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=1", "--local-addr=127.0.0.1"]
        command += [SCRIPT, *SHORT, "--model-dir", tmp_path / name / "run", "--precision=bf16"]
        nodes.append(
            subprocess.Popen(
                list(map(str, command)), env=environment(), cwd=tmp_path / name, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    statuses, said = finish(nodes, 120)
    assert statuses == [0, 0], said
    (run_folder,) = tmp_path.glob("*/run*")
    assert epochs(run_folder) == [1, 2] and state(run_folder)["ranks"] == 2


def start_by_torchrun(tmp_path, *flags):
    """A run of two ranks under way, which torchrun would start anew once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    job = subprocess.Popen(
        [*command, str(SCRIPT), *SHORT, "--model-dir", str(tmp_path / "run"), *flags],
        env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for("epoch 1/", log_of(tmp_path), [job])
    return job


@pytest.mark.slow
def test_a_stop_of_torchrun_stops_its_ranks_and_is_resumable(tmp_path):
    job = start_by_torchrun(tmp_path, "--epochs=999")
    job.send_signal(signal.SIGTERM)
    (status,), ((_, errors),) = finish([job])
    assert status == 1 and errors.count("terminated; continue by: torchrun --nproc-per-node=2 ") == 1, errors
    epoch = state(folder(tmp_path))["progress"]["epoch"]
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert epochs(folder(tmp_path)) == list(range(1, epoch + 1))


@pytest.mark.slow
def test_two_ranks_train_compiled(tmp_path):
    answer = torchrun(2, SCRIPT, *SHORT, "--model-dir", tmp_path / "run", "--epochs=1", "--no-ra", "--no-anc", "--compile")
    assert answer.returncode == 0, answer.stderr
    assert ", compiled, 2 ranks" in answer.stdout
    assert state(folder(tmp_path))["epoch"] == 1


@pytest.mark.slow
def test_torchrun_restarts_continue_the_run(tmp_path):
    job = start_by_torchrun(tmp_path, "--epochs=12")
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"train_CIFAR10" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    (status,), (said,) = finish([job], 180)
    assert status == 0, said
    assert "started anew by torchrun" in said[0] and "lost another rank" in said[1]
    assert epochs(folder(tmp_path)) == list(range(1, 13))


def test_a_restart_continues_its_own_run_and_no_other(short_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    run_alone(tmp_path, "--epochs=1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_alone(tmp_path)
    assert "started anew by torchrun" in capsys.readouterr().out and len(metrics(folder(tmp_path))) == 2
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun's, given the same --rdzv-id and refused before
    with pytest.raises(UsageError, match="holds a run already"):
        run_alone(tmp_path)


def test_variables_that_torchrun_left_behind_are_named(monkeypatch):
    """A process that waits for ranks nobody has started says so; numbers that no launcher gives are refused."""
    code = "from utils import distributed as d\nd.QUIET = 0.2\nwith d.started(): pass"
    for rank, whom in (("0", "the others"), ("1", "rank 0")):
        port = str(free_port())
        told = environment(RANK=rank, WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with subprocess.Popen([sys.executable, "-c", code], env=told, stderr=subprocess.PIPE, text=True) as waiting:
            line = next(line for line in waiting.stderr if "waits for" in line)
            waiting.kill()
        assert f"rank {rank} of 3 waits for {whom} at 127.0.0.1:{port}; " in line and "unset RANK, WORLD_" in line
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    for key, value in (("RANK", "3"), ("RANK", "x"), ("WORLD_SIZE", ""), ("MASTER_PORT", "http")):
        monkeypatch.setenv(key, value)
        with pytest.raises(UsageError, match=f"{key}={value}.* unset RANK"), distributed.started():
            pass
        monkeypatch.setenv(key, told[key])


def test_ranks_of_an_evaluation_may_share_a_device_and_those_of_a_training_may_not(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for local, shared in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0"), ("3", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert str(distributed.own_device(torch.device("cuda"), shared=True)) == shared
        assert str(distributed.own_device(torch.device("cuda:1"), shared=True)) == "cuda:1"
    for device, mentions in (("cuda", "2 CUDA devices for more ranks"), ("cuda:1", "a CUDA device of its own")):
        with pytest.raises(UsageError, match=mentions):
            distributed.own_device(torch.device(device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (("--sync-bn",), "--sync-bn needs CUDA devices"),
        (("--lr=-1",), "--lr"),
        (("--dataset=folder", "--data-dir=nowhere"), "nowhere"),
    ],
)
def test_wrong_use_is_said_once_and_ends_all_ranks(tmp_path, flags, mentions):
    statuses, said = train_by_ranks(tmp_path, *flags)
    lines = [line for _, errors in said for line in errors.splitlines()]
    assert len(lines) == 1 and mentions in lines[0] and lines[0].startswith("train_CIFAR10_ResNet.py: error: "), said
    assert statuses == [2, 2]
    assert not list(tmp_path.iterdir())


def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UsageError, match="--sync-bn needs CUDA devices, and this run is on cpu; leave it out"):
        run_alone(tmp_path, "--sync-bn", "--device=cpu")
    assert not list(tmp_path.iterdir())


def evaluated(parent):
    """White_attack.json of an evaluation, and the images that it saved."""
    with np.load(parent / "worst.npz") as saved:
        return json.loads((parent / "white_attack.json").read_text())["attacks"], dict(saved)


def assert_same_evaluation(found, expected):
    (attacks, saved), (attacks_alone, saved_alone) = found, expected
    assert list(attacks) == list(attacks_alone)
    for name, row in attacks.items():
        differ = sum(a != b for a, b in zip(row["verdicts"], attacks_alone[name]["verdicts"], strict=True))
        assert differ <= 0.005 * len(row["verdicts"]), name  # rounding, of other batches
    assert (saved["right"] != saved_alone["right"]).mean() <= 0.005
    assert (np.abs(saved["images"] - saved_alone["images"]).max((1, 2, 3)) < 1e-4).mean() > 0.95


def test_scripts_of_several_ranks_find_what_one_process_finds(ranks, tmp_path, capsys):
    """Evaluation, shared block by block, and feature distances, shared image by image."""
    _, count, said, together = ranks
    digits_checkpoint(tmp_path / "net.pt")
    with one_thread():
        evaluate_and_measure(tmp_path)
    assert capsys.readouterr().out.count("| network |") == 1
    assert [out.count("| network |") for out, _ in said] == [1] + [0] * (count - 1)
    found, expected = evaluated(together), evaluated(tmp_path)
    assert "0" in found[0]["worst case"]["verdicts"] and "1" in found[0]["worst case"]["verdicts"]
    assert_same_evaluation(found, expected)
    (file,) = (tmp_path / "distances").iterdir()
    _, arrays = read_arrays(together / "distances" / file.name)
    for key, values in read_arrays(file)[1].items():
        assert np.allclose(arrays[key], values, atol=1e-4), key


@pytest.mark.slow
def test_blocks_of_the_adaptive_attack_are_shared_by_torchrun(tmp_path):
    """360 images are two blocks, one for each rank; what both keep is the same. A plain network: one view is enough."""
    flags = ("--attacks", "adaptive", "--num-steps", "5", "--restarts", "1", "--epsilon", "0.2", "--device", "cpu")
    for name in "12":
        file = digits_checkpoint(tmp_path / name / "net.pt", reverse_attention=False)
        argv = (ROOT / ATTACK, "--ckpt_url", file, *flags, "--save-adversarial", file.parent / "worst.npz")
        done = torchrun(2, *argv) if name == "2" else python(*argv)
        assert done.returncode == 0 and done.stdout.count("| network |") == 1, done.stderr
    found, expected = evaluated(tmp_path / "2"), evaluated(tmp_path / "1")
    assert set(found[0]["adaptive: final"]["verdicts"]) == {"0", "1"}
    assert_same_evaluation(found, expected)
    kept, kept_alone = (sorted(f.name for f in (tmp_path / name / "white_attack.blocks").iterdir()) for name in "21")
    assert kept == kept_alone and kept


@pytest.mark.slow
def test_a_umap_by_two_ranks_is_that_of_one_process(trained, tmp_path):
    argv = [ROOT / "draw_umap.py", "--model_dir", trained[2], "--n-examples", "80", "--name", "u"]
    assert torchrun(2, *argv, "--out", tmp_path / "2").returncode == 0
    assert python(*argv, "--out", tmp_path / "1").returncode == 0
    assert sorted(f.name for f in (tmp_path / "1").iterdir()) == sorted(f.name for f in (tmp_path / "2").iterdir())
    found, expected = (np.load(tmp_path / folder / "u.npz") for folder in "21")
    assert np.array_equal(found["labels"], expected["labels"]) and np.array_equal(found["indices"], expected["indices"])
    measured, measured_alone = (json.loads(str(arrays["settings"]))["measured"] for arrays in (found, expected))
    assert measured.keys() == measured_alone.keys()
    for key, numbers in measured_alone.items():
        assert measured[key] == pytest.approx(numbers, abs=1e-3)


def work(parent):
    """All that the fixture `ranks` shows, as one rank."""
    with distributed.started():
        found = {f.__name__: f() for f in (steps, small_batches, companions, judged, shared, communications, small_things)}
        evaluate_and_measure(parent)
        if distributed.first():
            torch.save(found, parent / "found.pt")


def run_rank(rank, parent, argv):
    """A forked rank; never returns."""

    def ranked():
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if argv:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        else:
            work(parent)

    end_forked(ranked, parent / f"out.{rank}", parent / f"err.{rank}")


def main():
    import torch._dynamo  # noqa: F401, DistributedDataParallel loads it

    from utils import training  # noqa: F401

    count, parent = int(sys.argv[1]), Path(sys.argv[2])
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            run_rank(rank, parent, sys.argv[3:])
    (parent / "pids.json").write_text(json.dumps(pids))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (parent / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
