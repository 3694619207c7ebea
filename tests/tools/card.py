"""What an NVIDIA card should answer, part by part, in one command of nine minutes.

python -m tests.tools.card                        the eight parts of `ORDER`
python -m tests.tools.card --only parts,resume    some of them, or of `EXTRA`
python -m tests.tools.card --out card.json        figures also as JSON, written anew after each row
python -m tests.tools.card --minutes 4            parts that no longer fit are left out, and named
python -m tests.tools.card --quick --device cpu   tiny settings, to see that everything runs

Each part has a budget of seconds. It is checked between two rows, so a part that is slow ends with
the rows it has. Networks have their published size, batches 128 random images, unless a part says
otherwise. "Epochs an hour" are of 50,000 training images, and of the evaluation of 10,000 after
each epoch as if all were right without an attack.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from tests.tools.benchmarks import EPS, STEP, Step, forward_flops, options, show
from utils.attacks import cross_entropy_over_heads, linf_pgd, pgd40_heads
from utils.data.datasets import Split
from utils.data.subject import verdicts
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy, frozen, in_precision
from utils.system.devices import compile_for_training, computing, for_training, pick_device
from utils.system.errors import Stopped, UsageError, first_line
from utils.system.options import parse_training
from utils.system.provenance import in_one_line, provenance
from utils.training import loop as training
from utils.training.job import Job
from utils.training.loop import attack_batch, backward

ROOT = Path(__file__).parents[2]
NETWORKS = ("ResNet18", "WRN-34-10")
BATCH = 128
TRAINING_IMAGES = 50_000  # of CIFAR-10
TEST_IMAGES = 10_000
Row = dict[str, object]


class Card:
    """A device, and how to time what runs on it. quick: everything is tiny, and timed once."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        """Take a device."""
        self.device = device
        self.cuda = device.type == "cuda"
        self.quick = quick
        self.networks = NETWORKS[:1] if quick else NETWORKS
        self.attack_steps = 1 if quick else 10
        self.deadline = float("inf")  # of the part under way

    def left(self) -> float:
        """Return the seconds that are left to the part under way, at most a day."""
        return min(self.deadline - time.perf_counter(), 86400)

    def wait(self) -> None:
        """Wait until a CUDA device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(
        self, run: Callable[[], object], rounds: int = 5, warm: int = 2
    ) -> tuple[float, float]:
        """Measure the median seconds of a run, and until its call has returned.

        Where both are alike, the host is what is slow.
        """
        for _ in range(0 if self.quick else warm):
            run()
        whole = []
        host = []
        for _ in range(1 if self.quick else rounds):
            self.wait()
            began = time.perf_counter()
            run()
            host.append(time.perf_counter() - began)
            self.wait()
            whole.append(time.perf_counter() - began)
        return statistics.median(whole), statistics.median(host)

    def peak(self, run: Callable[[], object]) -> float:
        """Measure the GB of tensors at most during a run."""
        if not self.cuda:
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def job(self, arch: str, precision: str | None = None) -> Step:
        """Make a step of a network of published size, prepared for training in a precision."""
        if self.quick:
            width = 1 if arch.startswith("WRN") else 4
            job = Step(arch, 8, 16, 10, width, self.device)
        else:
            job = Step(arch, BATCH, 32, 10, None, self.device)
        if precision is not None:
            job.model = for_training(job.model, self.device, precision)
        return job


def run_process(card: Card, *command: object) -> tuple[str, bool]:
    """Run a program until the part's time is over -> its output, and whether it ended by itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = True
        try:
            process.wait(max(1, card.left()))
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its ranks
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        return printed.read(), ended


# The eight parts. Each yields the rows of its table.


def tests(card: Card) -> Iterator[Row]:
    """The tests marked cuda."""
    flags = ["-m", "cuda", "-v", "-rN", "--tb=line", "-p", "no:cacheprovider"]
    selection = ["-n", "4", "tests"]
    if card.quick:
        selection = ["-n", "0", "tests/test_cuda.py", "-k", "losses"]
    printed, ended = run_process(card, sys.executable, "-m", "pytest", *flags, *selection)
    results = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", printed)
    counts = Counter(results)
    yield {
        "passed": counts["PASSED"],
        "failed": counts["FAILED"] + counts["ERROR"],
        "skipped": counts["SKIPPED"],
        "all of them ran": ended,
        "last line": "" if ended and results else printed.strip().rpartition("\n")[2][-100:],
    }
    for line in printed.splitlines():
        if match := re.search(r"\b(?:FAILED|ERROR)\b", line):
            name = re.sub(r"\[[^]]*%\]|\[gw\d+\]", "", line.replace(match[0], ""))
            yield {"failed": name.strip()}


def parts(card: Card) -> Iterator[Row]:
    """Where the time of a step goes: ms, and those of the host."""
    for arch in card.networks:
        for precision in ("default", "bf16"):
            job = card.job(arch, precision)
            settings = options(precision=precision, num_steps=card.attack_steps)

            def row(
                part: str, run: Callable[[], object], arch: str = arch, precision: str = precision
            ) -> Row:
                took, host = card.timed(run)
                return {
                    "network": arch,
                    "precision": precision,
                    "part": part,
                    "ms": 1e3 * took,
                    "host ms": 1e3 * host,
                }

            attack_copy = AttackCopy(job.model, precision)
            attack = partial(
                attack_batch, attack_copy, job.x, job.host_labels, settings, job.generator, 1
            )
            attacked = attack()
            yield row("attack", attack)
            if card.cuda:
                graphed = AttackCopy(job.model, precision, graph=True)
                yield row("attack by graph", partial(attack_batch, graphed, *attack.args[1:]))
            yield row("copy of the weights for the attack", attack_copy.sync_weights)
            forwards = partial(
                training_loss,
                in_precision(job.model, precision),
                job.x,
                job.labels,
                attacked,
                settings,
            )
            yield row("forwards", forwards)
            loss_of = partial(training_loss, in_precision(job.model, precision))
            yield row(
                "forwards and backward",
                partial(backward, loss_of, job.x, job.labels, attacked, settings),
            )
            yield row("optimiser", job.optimizer.step)


def layouts(card: Card) -> Iterator[Row]:
    """Strict float32 in channels-last against the default layout: attack, forwards, backward."""
    for arch in card.networks:
        for layout in (torch.channels_last, torch.contiguous_format):
            job = card.job(arch)
            if card.cuda:  # on a CPU, channels-last training of so few channels has broken the heap
                job.model.to(memory_format=layout)
            settings = options(precision="fp32", num_steps=card.attack_steps)
            x = job.x.repeat(2, 1, 1, 1)
            labels = job.labels.repeat(2)
            steps = min(2, card.attack_steps)
            with computing("fp32"), frozen(job.model) as net:
                net.to(memory_format=layout)
                objective = cross_entropy_over_heads(net, labels, 2.0)
                attack, _ = card.timed(partial(linf_pgd, x, objective, EPS, STEP, steps, x), 3)
                few = options(precision="fp32", num_steps=1)
                attacked = attack_batch(
                    AttackCopy(job.model), job.x, job.host_labels, few, job.generator, 1
                )
                loss_of = partial(training_loss, job.model)
                train, _ = card.timed(
                    partial(backward, loss_of, job.x, job.labels, attacked, settings), 3
                )
            yield {
                "network": arch,
                "layout": str(layout).removeprefix("torch."),
                "attack step ms": 1e3 * attack / steps,
                "forwards and backward ms": 1e3 * train,
                "step of ten ms": 1e3 * (10 * attack / steps + train),
            }


def compiled(card: Card) -> Iterator[Row]:
    """Compiled steps of 128, 128, 80, 128 images in this order, ms each, and the median of 128."""
    if card.quick and not card.cuda:
        yield {"left out": "a CPU's compiler would take minutes"}
        return
    sizes = (8, 8, 5, 8) if card.quick else (128, 128, 80, 128)
    for arch in card.networks:
        for precision in ("bf16", "default"):
            torch.compiler.reset()
            job = card.job(arch, precision)
            compile_for_training(job.model, card.device)
            row = {"network": arch, "precision": precision}
            with computing(precision):
                for number, size in enumerate(sizes, 1):
                    step = partial(
                        cut(job, size).ours,
                        num_steps=card.attack_steps,
                        precision=precision,
                        compile=True,
                    )
                    began = time.perf_counter()
                    step()
                    card.wait()
                    row[f"{number}: batch {size}"] = 1e3 * (time.perf_counter() - began)
                took, host = card.timed(step, 3)
            yield row | {f"then {size}": 1e3 * took, "host ms": 1e3 * host}


def cut(job: Step, count: int) -> Step:
    """Make the same job on its first `count` images."""
    smaller = copy.copy(job)
    smaller.x = job.x[:count]
    smaller.host_labels = job.host_labels[:count]
    smaller.labels = job.labels[:count]
    return smaller


def evaluation(card: Card) -> Iterator[Row]:
    """The PGD-40 over heads after an epoch, by batch and precision; verdicts in strict float32."""
    for arch in card.networks:
        job = card.job(arch)
        batches = (250, 500, 1000, 2000) if arch == "ResNet18" else (250, 1000)
        for precision in ("default", "bf16", "fp32"):
            for batch in batches if precision != "fp32" else batches[:1]:
                yield evaluated(card, arch, job, precision, 8 if card.quick else batch)
                if card.quick:
                    break


def random_split(card: Card, job: Step, count: int) -> Split:
    """Make random images of the job's size."""
    images = torch.randint(256, (count, *job.x.shape[1:]), dtype=torch.uint8, device=card.device)
    labels = torch.randint(10, (count,), device=card.device)
    return Split(images, labels, tuple("0123456789"), numbers=torch.arange(count))


def evaluated(card: Card, arch: str, job: Step, precision: str, batch: int) -> Row:
    """Measure the images a second of the PGD-40 after an epoch, on one batch."""
    split = random_split(card, job, batch)
    job.model.eval()
    with computing(precision), frozen(job.model) as net, frozen(job.model, precision) as searched:

        def search(steps: int) -> object:
            attack = pgd40_heads(EPS, STEP, 2.0, 1, steps=steps)
            return verdicts(net, split, batch, lambda _, *images: attack(searched, *images))

        search(2)
        steps = 2 if card.quick else 40
        took, _ = card.timed(partial(search, steps), rounds=1, warm=0)
        peak = card.peak(partial(search, 1))
    job.model.train()
    rate = batch / took
    row = {"network": arch, "searched in": precision, "batch": batch, "images/s": rate}
    return row | {"s an epoch": TEST_IMAGES / rate, "GB": peak}


BLOCKS = """
import utils.evaluation.autoattack
import utils.evaluation.robustness
import test_white_attack

utils.evaluation.autoattack.BLOCK = utils.evaluation.robustness.BLOCK = {block}
test_white_attack.main()
"""


def autoattack(card: Card) -> Iterator[Row]:
    """AutoAttack by 1 and by 4 processes on one device: ResNet-18 trained on digits of 32x32.

    eps is 0.03. Each process has one block of 60 images. `images/s` leaves out what the processes
    take to start.
    """
    block, name, attack = (6, "FGSM", "fgsm") if card.quick else (60, "AutoAttack", "autoattack")
    with tempfile.TemporaryDirectory() as folder:
        run = train_digits(
            card, Path(folder) / "run", "--width=64", "--image-size=32", "--epochs=4"
        )
        script = Path(folder) / "blocks.py"
        script.write_text(BLOCKS.format(block=block))
        for processes in (1, 2 if card.quick else 4):
            log = Path(folder) / str(processes) / "test.log"
            log.parent.mkdir()
            launcher = []
            if processes > 1:
                launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            count = processes * block
            command = [sys.executable, *launcher, script, "--ckpt_url", run, "--attacks", attack]
            command += ["--n-examples", count, "--epsilon", 0.03]
            command += ["--device", card.device.type, "--log_path", log]
            began = time.perf_counter()
            printed, ended = run_process(card, *command)
            row = {
                "processes": processes,
                "images": count,
                "wall s": time.perf_counter() - began,
            }
            record = log.with_name("white_attack.json")
            if not ended:
                yield row | {"cut off": "yes"}
                return
            if not record.exists():
                yield row | {"failed": printed.strip().rpartition("\n")[2][-200:]}
                continue
            result = json.loads(record.read_text())["attacks"][name]
            each = max(result["seconds"], 0.01) / processes
            row["s a block"] = each
            row["images/s"] = count / each
            row[f"{name} %"] = result["robust_accuracy"]
            yield row


SMALL = (
    "--width=4",
    "--image-size=16",
    "--limit-train=48",
    "--limit-test=24",
    "--num-steps=1",
    "--batch-size=16",
)


def train_digits(card: Card, parent: Path, *flags: str) -> Path:
    """Train a ResNet-18 on digits in this process, in silence -> its run folder."""
    given = ["--dataset=digits", f"--device={card.device}", f"--model-dir={parent}", *flags]
    if card.quick:
        given += SMALL
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        training.run(parse_training("", {"arch": "ResNet18"}, given))
    return max(parent.parent.glob(f"{parent.name}*"), key=lambda path: path.stat().st_mtime)


def kernels(card: Card) -> Iterator[Row]:
    """What takes longest in a step, by PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if card.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    time_of = "self_device_time_total" if card.cuda else "self_cpu_time_total"
    for arch in card.networks:
        for precision in ("default", "bf16"):
            job = card.job(arch, precision)
            step = partial(job.ours, num_steps=card.attack_steps, precision=precision)
            with computing(precision):
                for _ in range(1 if card.quick else 3):
                    step()
                card.wait()
                with torch.profiler.profile(activities=activities) as profile:
                    step()
                    card.wait()
            events = profile.key_averages()
            whole = sum(getattr(event, time_of) for event in events)
            longest = sorted(events, key=lambda event: getattr(event, time_of), reverse=True)
            for event in longest[:8]:
                took = getattr(event, time_of)
                yield {
                    "network": arch,
                    "precision": precision,
                    "kernel": event.key[:80],
                    "calls": event.count,
                    "ms": 1e-3 * took,
                    "%": 100 * took / whole,
                }


def resume(card: Card) -> Iterator[Row]:
    """A run stopped and resumed inside its second epoch, against one never stopped.

    cuDNN is deterministic.
    """
    flags = (
        "--width=16",
        "--image-size=16",
        "--limit-train=640",
        "--limit-test=100",
        "--num-steps=5",
    )
    # After so many steps and batches of evaluation: an epoch has 3 or 5 steps, and 2 batches
    stop_at = 7 if card.quick else 9
    for precision in ("default", "bf16"):
        with tempfile.TemporaryDirectory() as folder, deterministic():
            chosen = (*flags, f"--precision={precision}")
            straight = train_digits(card, Path(folder) / "straight", *chosen, "--epochs=2")
            with stopped_at(stop_at) as stopped, contextlib.suppress(Stopped):
                train_digits(card, Path(folder) / "stopped", *chosen, "--epochs=2")
            resumed = train_digits(
                card, Path(folder) / "stopped", *chosen, "--epochs=2", "--resume"
            )
            expected = torch.load(straight / "last_state.pt", weights_only=True)["model"]
            state = torch.load(resumed / "last_state.pt", weights_only=True)["model"]
        equal = 0
        largest = 0.0
        for key, value in expected.items():
            equal += torch.equal(value, state[key])
            difference = (value.double() - state[key].double()).abs().max().item()
            largest = max(largest, difference)
        yield {
            "precision": precision,
            "stopped": bool(stopped),
            "tensors": len(expected),
            "equal bit for bit": equal,
            "largest difference": largest,
        }


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN choose deterministic algorithms inside the context."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def stopped_at(call: int) -> Iterator[list[int]]:
    """Stop a training run at the given call of `check_stop`; yields a list, empty until then."""
    calls = []
    stopped = []
    real = Job.check_stop

    def check(job: Job) -> None:
        calls.append(1)
        if len(calls) == call:
            stopped.append(call)
            job.stop_signal = signal.SIGTERM
        real(job)

    with mock.patch.object(Job, "check_stop", check):
        yield stopped


# Further parts, by --only


def machine(card: Card) -> Iterator[Row]:
    """What the card multiplies, and how long a launch takes."""
    side = 64 if card.quick else 8192
    kinds = {
        "fp32": (torch.float32, "fp32"),
        "tf32": (torch.float32, "tf32"),
        "bf16": (torch.bfloat16, "default"),
    }
    for name, (dtype, precision) in kinds.items():
        a, b = (torch.randn(side, side, device=card.device).to(dtype) for _ in range(2))
        with computing(precision):
            took, _ = card.timed(partial(torch.mm, a, b))
        yield {"product": name, "TFLOP/s": 2e-12 * side**3 / took}
    one = torch.zeros(1, device=card.device)
    _, host = card.timed(lambda: [one.add_(1) for _ in range(1000)])
    yield {"product": "us a launch", "TFLOP/s": 1e3 * host}


STEPS = {  # by what is given on the command line; None: the published loop
    "published": None,
    "--precision fp32": {"precision": "fp32"},
    "--cuda-graph False": {"cuda_graph": False},
    "(no flag)": {},
    "--precision tf32": {"precision": "tf32"},
    "--compile": {"compile": True},
    "--precision bf16 --cuda-graph False": {"precision": "bf16", "cuda_graph": False},
    "--precision bf16": {"precision": "bf16"},
    "--precision bf16 --compile": {"precision": "bf16", "compile": True},
}
RESNET_ONLY = ("--precision tf32", "--cuda-graph False", "--compile")


def repeated(run: Callable[[], object], times: int) -> None:
    """Run something several times."""
    for _ in range(times):
        run()


def flops_of_step(model: nn.Module, x: torch.Tensor, steps: int) -> float:
    """Count the operations of both attacks and of three training forwards and backwards."""
    return forward_flops(model.eval(), x[:2]) * len(x) / 2 * (2 * 2 * steps + 3 * 3)


def step(card: Card) -> Iterator[Row]:
    """A training step of ANCRA-TRADES, batch 128, by flags, ten steps in a row."""
    for arch in card.networks:
        published = None
        evaluation_of = {}  # seconds, by precision
        for name, flags in STEPS.items():
            if arch != "ResNet18" and name in RESNET_ONLY:
                continue
            if "--compile" in name and not card.cuda:
                continue
            torch.compiler.reset()
            changes = flags or {}
            precision = changes.get("precision", "default")
            job = card.job(arch, None if flags is None else precision)
            if precision not in evaluation_of:
                batch = 8 if card.quick else 250
                row = evaluated(card, arch, job, precision, batch)
                evaluation_of[precision] = row["s an epoch"]
            if changes.get("compile"):
                compile_for_training(job.model, card.device)
            work = flops_of_step(job.model, job.x, card.attack_steps)
            job.model.train()
            if flags is None:
                one = partial(job.plain, card.attack_steps)
            else:
                one = partial(job.ours, num_steps=card.attack_steps, **changes)
            in_a_row = 1 if card.quick else 10
            if arch != "ResNet18":
                in_a_row = 1 if precision == "fp32" else 3
            with computing(precision):
                began = time.perf_counter()
                one()
                card.wait()
                first = time.perf_counter() - began
                whole, host = card.timed(partial(repeated, one, in_a_row), 3, 1)
                peak = card.peak(one)
            took = whole / in_a_row
            published = published or took
            epoch = TRAINING_IMAGES / len(job.x) * took + evaluation_of[precision]
            yield {
                "network": arch,
                "step": name,
                "ms": 1e3 * took,
                "host ms": 1e3 * host / in_a_row,
                "published = 1": published / took,
                "TFLOP/s": 1e-12 * work / took,
                "epochs an hour": 3600 / epoch,
                "GB": peak,
                "first s": first,
            }


Part = Callable[[Card], Iterator[Row]]
ORDER: dict[str, Part] = {
    part.__name__: part
    for part in (tests, parts, layouts, compiled, evaluation, autoattack, kernels, resume)
}
EXTRA: dict[str, Part] = {part.__name__: part for part in (machine, step)}
SECONDS = {
    "tests": 150,
    "parts": 25,
    "layouts": 35,
    "compiled": 120,
    "evaluation": 40,
    "autoattack": 130,
    "kernels": 20,
    "resume": 20,
    "machine": 10,
    "step": 180,
}


def answer(
    card: Card, name: str, part: Part, write: Callable[[list[Row], str], None]
) -> tuple[list[Row], str]:
    """Run a part as far as its time goes; each row goes to `write` at once -> rows and a note."""
    rows = []
    note = ""
    try:
        for row in part(card):
            rows.append(row)
            write(rows, "under way")
            if card.left() < 0:
                note = "its time is over"
                break
    except Exception as error:
        traceback.print_exc(limit=8, file=sys.stdout)
        note = f"failed: {first_line(error)}"
    write(rows, note)
    return rows, note


def main(argv: list[str] | None = None) -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument("--only", help=f"some of {', '.join(ORDER)}, {', '.join(EXTRA)}")
    parser.add_argument("--minutes", default=9.0, type=float, help="time for all (default: 9)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny settings, figures without meaning; always on a CPU",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON, too")
    given = parser.parse_args(argv)
    known = ORDER | EXTRA
    names = given.only.split(",") if given.only else [*ORDER]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        device = pick_device(given.device, False)
        if given.out:
            given.out.open("a").close()  # before anything is measured
    except (UsageError, OSError) as error:
        parser.error(str(error))

    end = time.perf_counter() + 60 * given.minutes
    card = Card(device, given.quick or device.type == "cpu")
    record = {"made": provenance(device), "quick": card.quick, "parts": {}}
    print(in_one_line(record["made"]))
    failed = False
    for name in names:
        left = end - time.perf_counter()
        if left < SECONDS[name] / 3:
            print(f"\n{name} left out: {left:.0f} s are left, and {SECONDS[name]} planned")
            continue
        began = time.perf_counter()
        card.deadline = end if card.quick else began + min(left, SECONDS[name])

        def write(rows: list[Row], note: str, name: str = name, began: float = began) -> None:
            record["parts"][name] = {
                "rows": rows,
                "note": note,
                "seconds": time.perf_counter() - began,
            }
            if given.out:
                given.out.write_text(json.dumps(record, indent=1) + "\n")

        print(f"\n{name}: {known[name].__doc__.splitlines()[0]}", flush=True)
        rows, note = answer(card, name, known[name], write)
        if rows:
            show(rows)
        failed = failed or note.startswith("failed") or any(row.get("failed") for row in rows)
        ending = f"; {note}" if note else ""
        print(f"  ({time.perf_counter() - began:.0f} s{ending})", flush=True)
        if card.cuda:
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
