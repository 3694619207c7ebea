"""How fast it is on an NVIDIA card: a table of training steps, attacks, evaluation.

python -m tests.tools.card                      all
python -m tests.tools.card --only step,pgd40    some of: machine step formats parts pgd40 noise evaluation
python -m tests.tools.card --minutes 4          what no longer fits is left out, and named
python -m tests.tools.card --device cpu         tiny sizes: shows that everything runs, measures nothing
python -m tests.tools.card --out FILE           figures also as JSON, written anew after each part

`published` is the step that the published scripts compute, on the same card, in PyTorch's own precision. Data are
random images, and digits.

One NVIDIA H200, PyTorch 2.11.0, CUDA 13.0, cuDNN 9.19, 16 cores of an x86 host; bfloat16 products at 717 TFLOP/s (TF32
383, float32 51); ANCRA-TRADES, batch 128; ms a step, times the published loop, share of the bfloat16 rate, peak memory:

                                        ResNet-18                        WRN-34-10
published loop                          190 ms  1      5 %  2.0 GB        628 ms  1     19 %  10.1 GB
--precision fp32                        325     0.59   3    2.4          3159     0.20   4    10.7
(no flag)                                62     3.1   16    2.3           443     1.42  26    10.4
(no flag) --cuda-graph False            114     1.7    9    2.2
--precision tf32                         65     2.9   15    2.3
--compile                                53     3.6   18    2.4
--precision bf16 --cuda-graph False      99     1.9   10    1.6           251     2.5   46     6.2
--precision bf16                         45     4.2   21    1.7           248     2.5   47     6.3
--precision bf16 --compile               34     5.6   28    1.7           208     3.0   56     6.2   first step 20, 32 s

Small kernels wait for the host, and hosts differ: in another run, an hour before on another machine with the same card
(6 us a launch, here 12), the published ResNet-18 loop took 124 ms, ours 63 and, in bfloat16, 44, though its benchmark
still waited once a step. So the gain over it is 2.0 to 3.1 times with no flag, 2.7 to 4.2 in bfloat16, 3.6 to 5.6 with
--compile. WRN-34-10 keeps the card busy, and took 632 ms there.

Tried there and left out: cudnn.benchmark changes no step by more than 1 %; default-format training forwards take 8 ms
(bfloat16) and 8 (TF32) more a ResNet-18 step than channels-last ones; padding the first convolution to 8 channels saves
2 ms a step, fusing convolution, bias and ReLU in cuDNN 7 to 10 (--compile does both, and more). A BatchNorm that no
convolution absorbs is an affine layer in attacks: PyTorch's own gave gradients in the other memory format, which cost
WRN-34-10 a tenth of a step. Refreshing the attack network takes 0.7 ms, making it anew 13. An attack step on 256
images keeps the card busy from ResNet-18 on (3.7 of 4.8 ms are the host's), so evaluation has no graph. Noise of an
image costs the host 31 us at side 32 and 76 at 64: 100 draws of 10,000 take half a minute, beside hours of AutoAttack.

Evaluation, on a third machine with the same card (9 us a launch). PGD-40, images a second at batch 100, 250, 1000:
ResNet-18 545, 1208, 1435; WRN-34-10 137, 172, 182. With --precision fp32 ResNet-18 does 225 at 250. ResNet-18 of
published width on digits at side 32: 16 epochs with their evaluation 40 s (bfloat16 38); AutoAttack on 250 images 43 s.
Small networks wait for the host, and share a card well: of `python -m tests.tools.study --scale main`, training, evaluation
and distances, 9 runs side by side took 114 s and 14, beside three tests, 193.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tests.tools.benchmarks import EPS, STEP, Step, forward_flops, options
from utils.attacks import cross_entropy, cross_entropy_over_heads, image_noise, linf_pgd, pgd
from utils.data.datasets import Split, load_split
from utils.data.subject import percent, verdicts
from utils.evaluation.autoattack import autoattack
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy, frozen, in_precision
from utils.system.checkpoints import load_model
from utils.system.devices import compile_for_training, computing, for_training, pick_device
from utils.system.options import parse_training
from utils.system.provenance import in_one_line, provenance
from utils.training import loop as training
from utils.training.loop import attack_batch, backward

NETWORKS = ("ResNet18", "WRN-34-10")
BATCH = 128
Rows = list[dict]


class Card:
    """A device, and the ways to time and to switch it. On a CPU everything is tiny."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.real, self.rates = device, device.type == "cuda", {}

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], object], rounds: int = 5, warm: int = 2) -> tuple[float, float]:
        """Median seconds of a run, and until its call came back: where both are alike, the host is what is slow."""
        for _ in range(warm if self.real else 0):
            run()
        whole, host = [], []
        for _ in range(rounds if self.real else 1):
            self.wait()
            began = time.perf_counter()
            run()
            host.append(time.perf_counter() - began)
            self.wait()
            whole.append(time.perf_counter() - began)
        return statistics.median(whole), statistics.median(host)

    def peak(self, run: Callable[[], object]) -> float:
        """GB of tensors at most during a run."""
        if not self.real:
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def job(self, arch: str) -> Step:
        """A step of a network at its published size."""
        width, batch, side = (None, BATCH, 32) if self.real else (1 if arch[0] == "W" else 4, 8, 16)
        return Step(arch, batch, side, 10, width, self.device)


def flops_of_step(model: nn.Module, x: torch.Tensor, steps: int) -> float:
    """Operations of both attacks and of the three training forwards and backwards."""
    return forward_flops(model.eval(), x[:2]) * len(x) / 2 * (2 * 2 * steps + 3 * 3)


def machine(card: Card) -> Rows:
    """What the card multiplies and moves."""
    side, rows = 8192 if card.real else 64, []
    for name, dtype, precision in (
        ("fp32", torch.float32, "fp32"),
        ("tf32", torch.float32, "tf32"),
        ("bf16", torch.bfloat16, "default"),
    ):
        a, b = (torch.randn(side, side, device=card.device).to(dtype) for _ in range(2))
        with computing(precision):
            card.rates[name] = 2e-12 * side**3 / card.timed(lambda a=a, b=b: a @ b)[0]
    rows.append({f"matrix product {name}, TFLOP/s": rate for name, rate in card.rates.items()})
    one = torch.zeros(1, device=card.device)
    rows.append({"us a launch": 1e6 * card.timed(lambda: [one.add_(1) for _ in range(1000)])[1] / 1000})
    return rows


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
ONE_NETWORK_ONLY = ("--precision tf32", "--cuda-graph False", "--compile")


def repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def step(card: Card) -> Rows:
    """A training step of ANCRA-TRADES, batch 128, by flags, ten steps in a row: no step waits for the one before."""
    rows, steps, row_of = [], 10 if card.real else 1, 10 if card.real else 1
    for arch in NETWORKS:
        published = None
        for name, flags in STEPS.items():
            if arch != "ResNet18" and name in ONE_NETWORK_ONLY:
                continue
            torch.compiler.reset()
            job, changes = card.job(arch), flags or {}
            precision = changes.get("precision", "default")
            if flags is not None:
                job.model = for_training(job.model, card.device, precision)
            if "compile" in changes:
                if not card.real:
                    continue
                compile_for_training(job.model, card.device)
            work = flops_of_step(job.model, job.x, steps)
            job.model.train()
            one = partial(job.plain, steps) if flags is None else partial(job.ours, num_steps=steps, **changes)
            began = time.perf_counter()
            with computing(precision):
                one()
                card.wait()
                first = time.perf_counter() - began
                slow = arch != "ResNet18"
                some = 1 if slow and precision == "fp32" else 3 if slow else row_of
                took, host = (t / some for t in card.timed(partial(repeated, one, some), 3, 1))
                peak = card.peak(one)
            published = published or took
            rate = 1e-12 * work / took
            row = {
                "network": arch,
                "step": name,
                "ms": 1e3 * took,
                "host ms": 1e3 * host,
                "published = 1": published / took,
            }
            row |= {"TFLOP/s": rate, "% of bf16 products": 100 * rate / card.rates.get("bf16", float("nan"))}
            row |= {"epochs an hour": 3600 / (50_000 / len(job.x) * took), "GB": peak, "first s": first}
            rows.append(row)
            show(rows[-1:])
            del job, one
    return rows


def parts(card: Card) -> Rows:
    """Where a step's time goes."""
    rows, steps = [], 10 if card.real else 1
    for arch in NETWORKS:
        for precision in ("default", "bf16"):
            job = card.job(arch)
            for_training(job.model, card.device, precision)
            settings, found = options(precision=precision, num_steps=steps), {}
            for graph in (False, card.real):
                attack_copy = AttackCopy(job.model, precision, graph=graph)
                attack = partial(attack_batch, attack_copy, job.x, job.host_labels, settings, job.generator, 1)
                attacked = attack()
                found[f"attack, graph {graph}"] = card.timed(attack)
            found["refresh"] = card.timed(attack_copy.sync_weights)
            found["a new copy"] = card.timed(partial(AttackCopy, job.model, precision))
            forwards = partial(backward, partial(training_loss, in_precision(job.model, precision)), job.x, job.labels, attacked, settings)
            found["forwards and backward"] = card.timed(forwards, warm=3)
            found["optimiser"] = card.timed(job.optimizer.step)
            for name, (took, host) in found.items():
                row = {"network": arch, "precision": precision, "part": name}
                rows.append(row | {"ms": 1e3 * took, "host ms": 1e3 * host})
    return rows


def formats(card: Card) -> Rows:
    """A step of an attack on 256 images by precision and memory format."""
    rows = []
    for arch in NETWORKS:
        job = card.job(arch)
        x, labels = job.x.repeat(2, 1, 1, 1), job.labels.repeat(2)
        for precision in ("fp32", "default", "bf16"):
            for layout in (torch.channels_last, torch.contiguous_format):
                with computing(precision), frozen(job.model, precision) as net:
                    net.to(memory_format=layout)
                    objective = cross_entropy_over_heads(net, labels, 2.0)
                    took, host = card.timed(partial(linf_pgd, x, objective, EPS, STEP, 2, x), 3)
                rows.append(
                    {
                        "network": arch,
                        "precision": precision,
                        "format": str(layout)[6:],
                        "ms": 500 * took,
                        "host ms": 500 * host,
                    }
                )
    return rows


def pgd40(card: Card) -> Rows:
    """PGD-40 of the evaluation, images a second by batch and precision."""
    rows, steps = [], 40 if card.real else 2
    for arch, precision, batch in (
        ("ResNet18", "fp32", 250),
        *(("ResNet18", "default", batch) for batch in (100, 250, 1000)),
        *(("WRN-34-10", "default", batch) for batch in (100, 250, 1000)),
    ):
        job, many = card.job(arch), (2000 if arch == "ResNet18" else 1000) if card.real else 8
        images = torch.randint(256, (many, 3, *job.x.shape[2:]), dtype=torch.uint8, device=card.device)
        split = Split(images, torch.randint(10, (many,), device=card.device), tuple("0123456789"))
        with computing(precision), frozen(job.model) as net:
            few = split.take(torch.arange(min(batch, many)))
            verdicts(net, few, batch, pgd(cross_entropy, EPS, STEP, 2, start="uniform", seed=1))
            attack = pgd(cross_entropy, EPS, STEP, steps, start="uniform", seed=1)
            took = card.timed(partial(verdicts, net, split, batch, attack), 1, 0)[0]
        rows.append({"network": arch, "precision": precision, "batch": batch, "images/s": many / took})
    return rows


def noise(card: Card) -> Rows:
    """What the noise of an image costs the host."""
    rows = []
    for side in (32, 64):
        x, numbers = torch.zeros(100, 3, side, side, device=card.device), torch.arange(100)
        took = card.timed(lambda x=x, n=numbers: image_noise(x, n, 1, "uniform", 1))[0] / 100
        rows.append({"side": side, "us an image": 1e6 * took, "s for 100 draws of 10,000": 1e6 * took})
    return rows


def evaluation(card: Card) -> Rows:
    """A ResNet-18 of published width trained on digits at 32x32, and evaluated: accuracies and seconds."""
    small = [] if card.real else ["--width=4", "--limit-train=48", "--limit-test=24", "--num-steps=1", "--epochs=1"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("default", "bf16") if card.real else ("default",):
            flags = ["--dataset=digits", f"--device={card.device}", f"--model-dir={folder}/run", "--image-size=32"]
            flags += ["--width=64", f"--precision={precision}", *small]
            began = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                training.run(parse_training("", {"arch": "ResNet18"}, flags))
            took = time.perf_counter() - began
            run = max(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime)
            model, _ = load_model(run, card.device)
            split = load_split("digits", "test", "", 32).to(card.device)
            split = split.take(torch.arange(250 if card.real else 2, device=card.device))
            row = {"precision": precision, "training s": took}
            with frozen(model) as net:
                natural = verdicts(net, split, 250)
                row |= {"natural": percent(natural)}
                if precision == "default":
                    began = time.perf_counter()
                    attack = autoattack(0.1, 1, warned=lambda line: None, says=lambda line: None)
                    right = verdicts(net, split, 250, attack, natural)
                    searched = time.perf_counter() - began
                    row |= {"AutoAttack": percent(right), "AutoAttack s": searched, "images/s": len(right) / searched}
            rows.append(row)
    return rows


PARTS = {f.__name__: f for f in (machine, step, formats, parts, pgd40, noise, evaluation)}
SECONDS = {"machine": 5, "step": 150, "formats": 15, "parts": 20, "pgd40": 40, "noise": 2, "evaluation": 90}


def show(rows: Rows) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(k, "") for k in keys)] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    for line in (keys, *cells):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--minutes", default=60.0, type=float)
    parser.add_argument("--out", type=Path)
    given, began = parser.parse_args(), time.perf_counter()
    card, found, failed = Card(pick_device(given.device, False)), {}, False
    print(in_one_line(provenance(card.device)))
    for name in given.only.split(","):
        left = 60 * given.minutes - (time.perf_counter() - began)
        if left < SECONDS[name]:
            print(f"\n{name} left out: {left:.0f} s left of --minutes, about {SECONDS[name]} needed")
            continue
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        start = time.perf_counter()
        try:
            found[name] = PARTS[name](card)
            show(found[name])
        except Exception:
            traceback.print_exc(limit=8, file=sys.stdout)
            failed = True
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if card.real:
            torch.cuda.empty_cache()
        if given.out:
            given.out.write_text(json.dumps({"made": provenance(card.device)} | found, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
