"""Several ranks: real gloo processes against one process on the same global batch, and whole runs of them.

`python -m tests.test_distributed FILE`, started once for each rank, works through what its last lines name; the
first rank writes what it finds to FILE.
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models import build_model
from utils import distributed
from utils.attacks import frozen
from utils.data import Split, as_input, load_split, require_same_on_ranks
from utils.evaluation import pgd40_heads, verdicts
from utils.options import UsageError, parse_training
from utils.training import attack_batch, backward, run, training_loss

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_CIFAR10_ResNet.py"
TINY = (
    "--dataset=digits", "--width=4", "--limit-train=24", "--limit-test=12", "--batch-size=10", "--num-steps=1",
    "--epochs=2", "--warmup-epochs=0",
)  # fmt: skip
CASES = {
    f"{' '.join(flags)}, {images} images": (flags, images)
    for flags, images in (
        (("--method=trades",), 8),
        (("--method=trades",), 7),
        (("--method=trades",), 2),
        (("--method=trades", "--sync-bn"), 2),  # an empty slice takes part in the forwards then
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


def network(options):
    """A network whose statistics are those of images, and whose predictions differ: training has begun.

    In float64, so that rounding does not hide a wrong weight and no sign of an attack's gradient hangs on it.
    """
    torch.manual_seed(0)
    model = build_model(
        options.arch, 10, reverse_attention=not options.no_ra, width=4, image_size=options.image_size
    ).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, options.image_size, options.image_size, dtype=torch.double))
    return model.eval()


def images_of(options, count):
    x = torch.rand(count, 3, options.image_size, options.image_size, generator=torch.Generator().manual_seed(1))
    return x.double(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])[:count]


def step(flags, count):
    """One training step with BatchNorm in eval mode -> loss, contrast and every gradient, of the global batch."""
    options = parse_training("", {"arch": "ResNet18"}, ["--dataset=digits", "--num-steps=3", *flags])
    options.warmup_epochs = 0
    model = network(options)
    loss_of = distributed.parallel(model, training_loss)
    x, labels = images_of(options, count)
    attacked = attack_batch(model, x, labels, options, torch.Generator().manual_seed(2), 1)
    figures, _ = backward(loss_of, x, labels, attacked, options)
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"figures": figures}


def steps():
    return {name: step(*case) for name, case in CASES.items()}


def judged():
    """Verdicts of a network on 33 digits in batches of 5, natural and attacked."""
    torch.set_num_threads(1)  # as the ranks: the network is trained here, and rounding grows
    torch.manual_seed(0)
    split = load_split("digits", "test", "", 16)
    split = split.take(torch.arange(33))
    model = build_model("ResNet18", 10, width=4, image_size=16).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(as_input(split.images)), split.labels).backward()
        optimizer.step()
    seen = []
    with frozen(model) as net:
        natural = verdicts(net, split, 5, progress=seen.append)
        robust = verdicts(net, split, 5, pgd40_heads(0.02, 0.01, 2.0, 1, steps=4), natural)
    return {"natural": natural, "robust": robust, "seen": sum(seen)}


def untouched():
    """Statistics of a network in train mode after a step of one image: those of a rank that had none."""
    options = parse_training("", {"arch": "ResNet18"}, ["--dataset=digits", "--num-steps=1"])
    model = network(options).train()
    before = torch.cat([b.flatten().double() for b in model.buffers()])
    x, labels = images_of(options, 1)
    own = distributed.own_slice(1)
    attacked = attack_batch(model, x, labels, options, torch.Generator().manual_seed(2), 1)
    distributed.parallel(model, training_loss)(x[own], labels[own], attacked, options)[0].backward()
    after = torch.cat([b.flatten().double() for b in model.buffers()])
    changed = torch.tensor([not torch.equal(before, after)]).int()
    ranks = torch.cat([distributed.total(changed * (distributed.rank() == r)) for r in range(distributed.world())])
    distributed.share_buffers(model)
    shared = torch.cat([b.flatten().double() for b in model.buffers()])
    return {"changed": ranks.tolist(), "spread": distributed.total(shared) / distributed.world() - shared}


def communications():
    """How often ranks exchange something while they attack a batch, by strategy."""
    counts = {}
    for strategy in ("random_adv", "hard_adv"):
        options = parse_training(
            "", {"arch": "ResNet18"}, ["--dataset=digits", "--num-steps=3", "--strategy", strategy]
        )
        options.warmup_epochs = 0
        batch = network(options), *images_of(options, 7), options, torch.Generator().manual_seed(2), 1
        with (
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
            mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as sent,
        ):
            attack_batch(*batch)
        counts[strategy] = reduced.call_count + sent.call_count
    return counts


def small_things():
    """Sums, wishes and slices, and an error of the first rank."""
    rank, world = distributed.rank(), distributed.world()
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    require_same_on_ranks("here", Split(images, labels, ("a", "b")))
    images[1, 2, 3, 4] = rank == world - 1
    with pytest.raises(UsageError, match="folder in data holds other data"):  # on each rank
        require_same_on_ranks("folder in data", Split(images, labels, ("a", "b")))
    part = torch.arange(7.0)[distributed.own_slice(7)]
    try:
        distributed.from_first(lambda: int("no number") if rank else _refuse())
        said = None
    except UsageError as error:
        said = str(error)
    return {
        "total": distributed.total(torch.tensor([rank + 1])).item(),
        "joined": distributed.joined(part, 7).tolist(),
        "agreed": distributed.agreed(15 if rank == world - 1 else 0),
        "from_first": distributed.from_first(lambda: rank),
        "heard by": distributed.total(torch.tensor(int(said == "wrong"))).item(),
    }


def _refuse():
    raise UsageError("wrong")


def environment(**extra):
    # gloo by the loopback device: a host name need not resolve
    return os.environ | {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
    } | extra  # fmt: skip


def start(count, *argv, cwd=ROOT):
    """Start `python argv` as `count` ranks, each with pipes for what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env=environment(**address, RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(count)),
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(count)
    ]  # fmt: skip


def finish(processes, timeout=60):
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


def torchrun(count, *argv, **extra):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *argv]
    return subprocess.run(list(map(str, command)), env=environment(**extra), capture_output=True, text=True)


def train(count, tmp_path, *flags):
    return finish(start(count, SCRIPT, *TINY, "--model-dir", tmp_path / "run", *flags, cwd=tmp_path))


def folder(tmp_path):
    (found,) = tmp_path.glob("run*")
    return found


def metrics(run):
    with open(run / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if "second" not in key} for row in csv.DictReader(file)]


def state(run):
    return torch.load(run / "last_state.pt", weights_only=True)


def wait_for(line, file, processes):
    """Until `line` is in the log, or a rank has ended."""
    until = time.monotonic() + 40
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        if file() and line in file().read_text():
            return
        time.sleep(0.05)
    said = finish(processes, 1)[1]
    raise AssertionError(f"{line!r} was never logged: {said}")


def log_of(tmp_path):
    return lambda: next(iter(tmp_path.glob("run*/train.log")), None)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What 2 or 3 ranks found, as the first one wrote it, and their number."""
    file = tmp_path_factory.mktemp("ranks") / "found.pt"
    statuses, said = finish(start(request.param, "-m", "tests.test_distributed", file))
    assert statuses == [0] * request.param, said
    return torch.load(file, weights_only=True), request.param


@pytest.fixture(scope="module")
def alone():
    return steps()


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_several_ranks_is_that_of_one_process(ranks, alone, case):
    found, expected = ranks[0]["steps"][case], alone[case]
    assert found.keys() == expected.keys()
    assert any(value.abs().max() > 1e-3 for key, value in expected.items() if key != "figures")
    if "--no-anc" not in case and "hard" not in case and "soft" not in case:
        assert expected["figures"][1] > 0  # the contrast is part of what is compared
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-9), key


def test_verdicts_of_several_ranks_are_those_of_one_process(ranks):
    threads = torch.get_num_threads()
    expected = judged()
    torch.set_num_threads(threads)
    assert 0 < expected["robust"].sum() < expected["natural"].sum()
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(ranks[0]["judged"][key]), torch.as_tensor(value)), key


def test_a_rank_without_images_keeps_its_statistics_and_shares_the_first_ones(ranks):
    assert ranks[0]["untouched"]["changed"] == [1] + [0] * (ranks[1] - 1)
    assert ranks[0]["untouched"]["spread"].abs().max() < 1e-12


def test_attacks_communicate_nothing_but_the_logits_that_choose_negatives(ranks):
    assert ranks[0]["communications"] == {"random_adv": 0, "hard_adv": 1}


def test_sums_wishes_and_errors_reach_every_rank(ranks):
    found, count = ranks
    assert found["small_things"] == {
        "total": count * (count + 1) // 2, "joined": list(range(7)), "agreed": 15, "from_first": 0, "heard by": count,
    }  # fmt: skip


@pytest.mark.slow
def test_ranks_that_end_as_soon_as_they_have_communicated_end_well():
    """Twenty pairs, since it is a race: gloo's threads let go of the last tensors while Python ends.

    The long switch interval makes the race easy to lose: who holds Python's lock keeps it unless it waits.
    """
    program = """
        import os, socket, sys, torch
        import torch.distributed as dist
        from utils import distributed
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.split() == ["0"] * 40 and not done.stderr, done.stderr


def test_one_process_has_no_group():
    assert (distributed.world(), distributed.first(), distributed.own_slice(5)) == (1, True, slice(0, 5))


def run_alone(tmp_path, *flags):
    """The same run in this process."""
    run(parse_training("", {"arch": "ResNet18"}, [*TINY, "--model-dir", str(tmp_path / "run"), *flags]))
    return folder(tmp_path)


def test_torchrun_writes_one_run_and_resumes_with_another_number_of_ranks(tmp_path, capsys):
    first = run_alone(tmp_path, "--epochs=1")
    one = capsys.readouterr().out
    answer = torchrun(2, SCRIPT, *TINY, "--model-dir", tmp_path / "run", "--resume")
    assert answer.returncode == 0, answer.stderr
    assert "resumed    in epoch 2, 0 images done" in answer.stdout
    assert "ranks      1 before, 2 now" in answer.stdout and ", 2 ranks" in answer.stdout
    assert "Error" not in answer.stderr and "utils/" not in answer.stderr  # neither failures nor warnings of ours
    assert state(first)["ranks"] == 2 and json.loads((first / "run.json").read_text())["ranks"] == 2
    run_alone(tmp_path, "--epochs=3", "--resume")
    assert "ranks      2 before, 1 now" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics(first)] == ["1", "2", "3"]
    log = (first / "train.log").read_text()
    assert [log.count(f"epoch {n}/") for n in (1, 2, 3)] == [1, 1, 1] and log.startswith(one.split("\nepoch")[0])


@pytest.mark.slow
def test_a_run_of_two_ranks_stopped_between_epochs_is_the_straight_one(tmp_path):
    for name, parts in (("straight", [()]), ("stopped", [("--epochs=1",), ("--resume",)])):
        (tmp_path / name).mkdir()
        for flags in parts:
            statuses, said = train(2, tmp_path / name, *flags)
            assert statuses == [0, 0], said
        assert said[0][0] and not said[1][0] and not said[1][1]  # the first rank speaks
    straight, stopped = (folder(tmp_path / name) for name in ("straight", "stopped"))
    assert {f.name for f in straight.iterdir()} == {
        "model-wrn-last.pt", "best_adv_model.pt", "last_state.pt", "train.log", "metrics.csv", "run.json",
        "training_curves.png",
    }  # fmt: skip
    assert metrics(straight) == metrics(stopped)
    for key, value in state(straight)["model"].items():
        assert torch.equal(value, state(stopped)["model"][key]), key


def test_a_stop_of_one_rank_stops_all_and_is_resumable(tmp_path):
    ranks = start(2, SCRIPT, *TINY, "--model-dir", tmp_path / "run", "--epochs=999", cwd=tmp_path)
    wait_for("epoch 1/999", log_of(tmp_path), ranks)
    ranks[1].send_signal(signal.SIGTERM)
    statuses, said = finish(ranks)
    assert statuses == [143, 143], said
    (line,) = said[0][1].splitlines()
    assert "terminated; continue by: torchrun --nproc-per-node=2 " in line and said[1][1] == ""
    kept = state(folder(tmp_path))
    epoch = kept["progress"]["epoch"]
    assert kept["ranks"] == 2 and epoch > 1
    run_alone(tmp_path, f"--epochs={epoch}", "--resume")
    assert [row["epoch"] for row in metrics(folder(tmp_path))] == [str(n + 1) for n in range(epoch)]


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_with_one_line(tmp_path, killed):
    ranks = start(2, SCRIPT, *TINY, "--model-dir", tmp_path / "run", "--epochs=999", cwd=tmp_path)
    wait_for("epoch 1/999", log_of(tmp_path), ranks)
    ranks[killed].kill()
    statuses, said = finish(ranks, 20)
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] == 1
    *before, line = said[1 - killed][1].splitlines()
    assert not before or killed == 0  # PyTorch's own words on the store, which the first rank holds without torchrun
    assert f"failed: rank {1 - killed} lost another rank" in line and "--resume" in line
    epoch = state(folder(tmp_path))["epoch"]
    run_alone(tmp_path, f"--epochs={epoch + 1}", "--resume")
    assert len(metrics(folder(tmp_path))) == epoch + 1


@pytest.mark.slow
def test_two_nodes_write_one_run(tmp_path):
    """Both on this machine; the second one sees another folder, since only the first rank has to see the run's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=1", "--local-addr=127.0.0.1"]
        command += [SCRIPT, *TINY, "--model-dir", tmp_path / name / "run", "--amp=bf16"]
        nodes.append(
            subprocess.Popen(
                list(map(str, command)), env=environment(), cwd=tmp_path / name, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    statuses, said = finish(nodes, 120)
    assert statuses == [0, 0], said
    (run_folder,) = tmp_path.glob("*/run*")
    assert [row["epoch"] for row in metrics(run_folder)] == ["1", "2"] and state(run_folder)["ranks"] == 2


def start_by_torchrun(tmp_path, *flags):
    """A run of two ranks under way, which torchrun would start anew once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    job = subprocess.Popen(
        [*command, str(SCRIPT), *TINY, "--model-dir", str(tmp_path / "run"), *flags],
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
    assert [row["epoch"] for row in metrics(folder(tmp_path))] == [str(n + 1) for n in range(epoch)]


@pytest.mark.slow
def test_two_ranks_train_compiled(tmp_path):
    answer = torchrun(
        2, SCRIPT, *TINY, "--model-dir", tmp_path / "run", "--epochs=1", "--no-ra", "--no-anc", "--compile"
    )
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
    assert [row["epoch"] for row in metrics(folder(tmp_path))] == [str(n + 1) for n in range(12)]


def test_a_restart_continues_its_own_run_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    run_alone(tmp_path, "--epochs=1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_alone(tmp_path)
    assert "started anew by torchrun" in capsys.readouterr().out and len(metrics(folder(tmp_path))) == 2
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun's, given the same --rdzv-id and refused before
    with pytest.raises(UsageError, match="holds a run already"):
        run_alone(tmp_path)


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        pytest.param(("--sync-bn",), "--sync-bn needs CUDA devices", marks=pytest.mark.slow),
        (("--lr=-1",), "--lr"),
        pytest.param(("--dataset=folder", "--data-dir=nowhere"), "nowhere has no folder", marks=pytest.mark.slow),
    ],
)
def test_wrong_use_is_said_once_and_ends_all_ranks(tmp_path, flags, mentions):
    statuses, said = train(2, tmp_path, *flags)
    lines = [line for _, errors in said for line in errors.splitlines()]
    assert len(lines) == 1 and mentions in lines[0] and lines[0].startswith("train_CIFAR10_ResNet.py: error: "), said
    assert statuses == [2, 2]
    assert not list(tmp_path.iterdir())


def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UsageError, match="--sync-bn needs CUDA devices, and this run is on cpu; leave it out"):
        run_alone(tmp_path, "--sync-bn", "--device=cpu")
    assert not list(tmp_path.iterdir())


def evaluated(count, folder, file, *flags):
    """white_attack.json of a checkpoint's copy in a folder of its own, and the images saved, by so many ranks."""
    folder.mkdir()
    shutil.copy(file, folder)
    argv = [ROOT / "test_white_attack.py", "--ckpt_url", folder / file.name, "--device", "cpu", *flags]
    argv += ["--save-adversarial", folder / "worst.npz"]
    done = torchrun(count, *argv) if count > 1 else subprocess.run(
        [sys.executable, *map(str, argv)], env=environment(), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| network |") == 1  # said once
    with np.load(folder / "worst.npz") as saved:
        return json.loads((folder / "white_attack.json").read_text())["attacks"], dict(saved)


def assert_same_evaluation(found, expected):
    (attacks, saved), (attacks_alone, saved_alone) = found, expected
    assert list(attacks) == list(attacks_alone)
    for name, row in attacks.items():
        differ = sum(a != b for a, b in zip(row["verdicts"], attacks_alone[name]["verdicts"], strict=True))
        assert differ <= 0.005 * len(row["verdicts"]), name  # rounding, of other batches
    assert (saved["right"] != saved_alone["right"]).mean() <= 0.005
    assert (np.abs(saved["images"] - saved_alone["images"]).max((1, 2, 3)) < 1e-4).mean() > 0.95


def test_an_evaluation_by_two_ranks_is_that_of_one_process(trained, tmp_path):
    flags = ("--attacks", "fgsm,pgd", "--num-steps", "5", "--n-examples", "43", "--epsilon", "0.05")
    found, expected = (evaluated(count, tmp_path / str(count), trained[2], *flags) for count in (2, 1))
    assert "0" in found[0]["worst case"]["verdicts"] and "1" in found[0]["worst case"]["verdicts"]
    assert_same_evaluation(found, expected)


@pytest.mark.slow
def test_blocks_of_the_adaptive_attack_are_shared_by_ranks(trained, tmp_path):
    """360 images are two blocks, one for each rank."""
    flags = ("--attacks", "adaptive", "--num-steps", "5", "--restarts", "1", "--epsilon", "0.3")
    assert_same_evaluation(*(evaluated(count, tmp_path / str(count), trained[2], *flags) for count in (2, 1)))
    assert not list(tmp_path.glob("*/*.partial"))


@pytest.mark.slow
def test_feature_distances_by_two_ranks_are_those_of_one_process(trained, tmp_path):
    argv = [ROOT / "feature_distance.py", "--model_dir", trained[2], "--target_label", "3", "--num-steps", "2"]
    assert torchrun(2, *argv, "--out", tmp_path / "2").returncode == 0
    subprocess.run([sys.executable, *map(str, argv), "--out", str(tmp_path / "1")], env=environment(), check=True)
    (file,) = (tmp_path / "1").iterdir()
    with np.load(file) as expected, np.load(tmp_path / "2" / file.name) as found:
        for key in set(expected) - {"settings"}:
            assert np.allclose(found[key], expected[key], atol=1e-4), key


@pytest.mark.slow
def test_a_umap_by_two_ranks_is_that_of_one_process(trained, tmp_path):
    argv = [ROOT / "draw_umap.py", "--model_dir", trained[2], "--n-examples", "80", "--name", "u"]
    assert torchrun(2, *argv, "--out", tmp_path / "2").returncode == 0
    subprocess.run([sys.executable, *map(str, argv), "--out", str(tmp_path / "1")], env=environment(), check=True)
    assert sorted(f.name for f in (tmp_path / "1").iterdir()) == sorted(f.name for f in (tmp_path / "2").iterdir())
    found, expected = (np.load(tmp_path / folder / "u.npz") for folder in "21")
    assert np.array_equal(found["labels"], expected["labels"]) and np.array_equal(found["indices"], expected["indices"])
    measured, measured_alone = (json.loads(str(arrays["settings"]))["measured"] for arrays in (found, expected))
    assert measured.keys() == measured_alone.keys()
    for key, numbers in measured_alone.items():
        assert measured[key] == pytest.approx(numbers, abs=1e-3)


if __name__ == "__main__":
    with distributed.started():
        found = {f.__name__: f() for f in (steps, judged, untouched, communications, small_things)}
        if distributed.first():
            torch.save(found, sys.argv[1])
