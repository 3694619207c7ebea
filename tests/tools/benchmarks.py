"""How fast it is, measured on your machine.

python -m tests.tools.benchmarks                      all but `compiled` and `figures`, less than
                                                      40 minutes on 2 CPU cores
python -m tests.tools.benchmarks step pgd             some: step share heads companions memory
                                                      negatives pgd growth processes waiting data
python -m tests.tools.benchmarks compiled             what --compile brings, 5 minutes more
python -m tests.tools.benchmarks figures              CPU time of what the figures' scripts compute
python -m tests.tools.benchmarks --out figures.json   figures also as JSON, after each benchmark
python -m tests.tools.benchmarks --quick              tiny settings: everything runs, nothing is
                                                      measured

Each prints a table. Times are medians of `runs` runs, which take turns in one process. Let nothing
else run meanwhile. The machine's float32 and bfloat16 rates of matrix products come first, as a
yardstick.
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import attacks
from utils.attacks import (
    cross_entropy,
    cross_entropy_over_heads,
    linf_pgd,
)
from utils.data.datasets import Split, as_input, augment, batches, load_split
from utils.losses import over_heads, trades_loss
from utils.negatives import choose_negatives
from utils.step import training_loss
from utils.system.attack_copy import AttackCopy, frozen, in_precision
from utils.system.devices import compile_for_training, pick_device
from utils.system.errors import UsageError, first_line
from utils.system.provenance import in_one_line, provenance
from utils.system.settings import Training, training_settings
from utils.training.companions import Average, adversarial_weights
from utils.training.loop import attack_batch, backward

ROOT = Path(__file__).parents[2]
EPS = 8 / 255
STEP = 0.007
NETWORKS = (
    ("ResNet18", 64, 32, 10),
    ("PreActResNet18", 16, 64, 200),
    ("WRN-34-10", 16, 32, 10),
)  # batch, side, C
Rows = list[dict]


def wait(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    variants: dict[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    warm_up: bool = True,
) -> dict[str, list]:
    """Run every variant once a round, as variant(round) -> seconds of its runs after warm-up."""
    seconds = {name: [] for name in variants}
    for i in range(-1 if warm_up else 0, rounds):
        for name, variant in variants.items():
            wait(device)
            began = time.perf_counter()
            variant(max(i, 0))
            wait(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[str, list], peer: str, **more: Callable[[str], object]) -> Rows:
    """Make a row a variant: its median, number of runs, speed beside `peer`, and more(name)."""
    rows = []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, runs in seconds.items():
        row = {"variant": name, "seconds": medians[name], "runs": len(runs)}
        row[f"speed, {peer} = 1"] = medians[peer] / medians[name]
        rows.append(row | {key: column(name) for key, column in more.items()})
    return rows


def matrix_products(device: torch.device, side: int) -> dict[str, Callable[[int], Tensor]]:
    """Make a product of square matrices, in float32 and in bfloat16."""

    def product(dtype: torch.dtype) -> Callable[[int], Tensor]:
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        return lambda i: torch.mm(a, b, out=out)

    return {"fp32": product(torch.float32), "bf16": product(torch.bfloat16)}


def machine_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Measure the GFLOP/s of a product of square matrices."""
    rates = {}
    for name in ("fp32", "bf16"):
        side = 2048
        if name == "bf16" and device.type == "cpu":  # a CPU may be a hundred times slower in it
            side = 512
        if quick:
            side = 64
        product = {name: matrix_products(device, side)[name]}
        seconds = take_turns(product, 5, device)[name]
        rates[name] = 2e-9 * side**3 / statistics.median(seconds)
    return rates


def options(**changes: object) -> Training:
    """Return the settings of a training on CIFAR-10, some of them changed."""
    return training_settings(changes)


class Step:
    """One optimiser step of ANCRA-TRADES on a batch of random images, ours or a plain one."""

    def __init__(
        self,
        arch: str,
        batch: int,
        size: int,
        classes: int,
        width: int | None,
        device: torch.device,
        **network: object,
    ) -> None:
        """Make a network and a batch; width None: as published. network: more of `build_model`."""
        torch.manual_seed(0)
        self.model = build_model(arch, classes, width=width, image_size=size, **network)
        self.model.to(device).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4
        )
        self.generator = torch.Generator(device).manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(batch, 3, size, size, generator=generator).to(device)
        self.host_labels = torch.randint(classes, (batch,), generator=generator)
        self.labels = self.host_labels.to(device)
        self.attack_copies: dict[tuple, AttackCopy] = {}

    def attack_copy(self, settings: Training) -> AttackCopy:
        """Return the attack copy for some settings, always the same one."""
        graph = settings.cuda_graph and self.x.is_cuda
        key = settings.precision, settings.compile, graph
        if key not in self.attack_copies:
            self.attack_copies[key] = AttackCopy(self.model, *key)
        return self.attack_copies[key]

    def update(self) -> None:
        """Update the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self, **changes: object) -> None:
        """Take the step as training does."""
        settings = options(**changes)
        attacked = attack_batch(
            self.attack_copy(settings), self.x, self.host_labels, settings, self.generator, 1
        )
        backward(
            partial(training_loss, in_precision(self.model, settings.precision)),
            self.x,
            self.labels,
            attacked,
            settings,
        )
        self.update()

    def plain(self, steps: int = 10) -> None:
        """Take the step as the published scripts compute it.

        The network itself is attacked, in eval mode, neither folded nor channels-last; negatives
        and contrast are loops over the batch; three more forwards, with their graphs, give the
        accuracies of the log.
        """
        x = self.x
        labels = self.labels
        model = self.model
        chosen = loop_random_negatives(labels)
        model.eval()
        adversarial = plain_pgd(model, x, labels, 1, steps)
        negative = plain_pgd(model, x[chosen], labels, -1, steps)
        model.train()
        natural = model(x, labels, heads=True)
        heads = model(adversarial, labels, heads=True)
        negative_heads = model(negative, labels[chosen], heads=True)
        loss = over_heads(
            lambda nat, adv: trades_loss(nat, adv, labels, 6.0),
            natural,
            heads,
            auxiliary_weight=2.0,
        )
        contrast = over_heads(loop_contrast, natural, negative_heads, auxiliary_weight=2.0)
        (loss + 3 * contrast).backward()
        self.update()
        model.eval()
        for images, truth in ((x, labels), (adversarial, labels), (negative, labels[chosen])):
            (model(images).argmax(1) == truth).float().mean().item()
        model.train()


def plain_pgd(model: nn.Module, x: Tensor, labels: Tensor, sign: int, steps: int) -> Tensor:
    """Attack as the published training does; sign: 1 away from the labels, -1 towards them."""
    adversarial = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        heads = model(adversarial, heads=True)
        loss = F.cross_entropy(heads.final, labels)
        auxiliary = [F.cross_entropy(logits, labels) for logits in heads.auxiliary]
        loss = loss + 2 * sum(auxiliary) / len(auxiliary)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach() + sign * STEP * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, x - EPS), x + EPS).clamp(0, 1)
    return adversarial.detach()


def images_by_class(labels: Tensor) -> dict[int, list[int]]:
    """List the images of each class."""
    by_class: dict[int, list[int]] = {}
    for n, label in enumerate(labels):
        by_class.setdefault(label.item(), []).append(n)
    return by_class


def random_negative(by_class: dict[int, list[int]], label: int) -> int:
    """Draw an image of another class than `label`."""
    return random.choice(by_class[random.choice([c for c in by_class if c != label])])


def loop_random_negatives(labels: Tensor) -> Tensor:
    """Draw a negative for each image, one by one."""
    by_class = images_by_class(labels)
    chosen = [random_negative(by_class, label.item()) for label in labels]
    return torch.tensor(chosen, device=labels.device)


def loop_hard_negatives(logits: Tensor, labels: Tensor) -> list[int]:
    """Choose, of the images that are wrongly taken for an anchor's class, that of largest logit.

    Loops as the published ones: a comparison of two tensors a pair, and sets.
    """
    by_class = images_by_class(labels)
    predictions = logits.argmax(1)
    chosen = []
    for n in range(len(labels)):
        predicted = {j for j in range(len(labels)) if predictions[j] == labels[n]}
        label = labels[n].item()
        candidates = list(predicted - set(by_class[label]))
        if candidates:
            chosen.append(candidates[logits[candidates][:, label].topk(1).indices.item()])
        else:
            chosen.append(random_negative(by_class, label))
    return chosen


def loop_contrast(natural: Tensor, negative: Tensor) -> Tensor:
    """Compute ANC with alpha 1, pair by pair of those that agree."""
    q, one = F.softmax(natural, 1).detach().max(1)
    p, other = F.softmax(negative, 1).max(1)
    total = natural.new_zeros(())
    for (n,) in torch.nonzero(one == other):
        total = total + (q[n] * p[n]) ** 0.5
    return total / len(q)


# Each benchmark: (device, quick) -> rows of its table.


def step(device: torch.device, quick: bool) -> Rows:
    """Seconds of a training step: ours against a plain one, as in the published scripts."""
    rows = []
    rates = machine_rates(device, quick)
    rounds, steps = (1, 1) if quick else (5, 10)
    for arch, batch, size, classes in NETWORKS:
        batch, width = (4, 1 if arch.startswith("WRN") else 4) if quick else (batch, None)
        job = Step(arch, batch, size, classes, width, device)
        variants = {
            "ours fp32": partial(job.ours, num_steps=steps),
            "plain": partial(job.plain, steps),
        }
        if arch == "ResNet18" or rates["bf16"] > rates["fp32"]:
            variants["ours bf16"] = partial(job.ours, num_steps=steps, precision="bf16")
        timed = {name: lambda i, variant=variant: variant() for name, variant in variants.items()}
        seconds = take_turns(timed, rounds, device)
        rows += [
            {"network": arch, "batch": batch, **row, "images/s": batch / row["seconds"]}
            for row in compared(seconds, "plain")
        ]
    return rows


def forward_flops(net: nn.Module, x: Tensor) -> int:
    """Count multiplications and additions of a forward pass's convolutions and linear layers."""
    counted = []

    def count(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        counted.append(2 * out.numel() * layer.weight[0].numel())

    hooks = [
        m.register_forward_hook(count)
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def convolution_share(run: Callable[[int], object], device: torch.device) -> float | str:
    """Measure the share of a run inside convolutions, in percent, by PyTorch's CPU profiler."""
    if device.type != "cpu":
        return "-"
    with torch.autograd.profiler.profile(use_kineto=False) as seen:
        run(0)
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return 100 * sum(t for key, t in times.items() if "convolution" in key) / sum(times.values())


def share(device: torch.device, quick: bool) -> Rows:
    """GFLOP/s of an attack, ResNet-18, batch 64, and its share of the rate of matrix products.

    `plain` is the attack of the published scripts, on the network as it is trained.
    """
    steps, side = (1, 64) if quick else (10, 2048)
    job = Step("ResNet18", 4 if quick else 64, 32, 10, 4 if quick else None, device)
    with frozen(job.model) as exact, frozen(job.model, "bf16") as rounded:
        job.model.eval()
        # Once forward, and once to the gradient of the images
        flops = 2 * steps * forward_flops(exact, job.x)

        def attack(net: nn.Module) -> Callable[[int], Tensor]:
            return lambda i: linf_pgd(
                job.x, cross_entropy_over_heads(net, job.labels, 2.0), EPS, STEP, steps, job.x
            )

        attacks_of = {
            "ours fp32": attack(exact),
            "plain": lambda i: plain_pgd(job.model, job.x, job.labels, 1, steps),
            "ours bf16": attack(rounded),
        }
        seconds = take_turns(matrix_products(device, side) | attacks_of, 1 if quick else 5, device)
        times = {name: statistics.median(values) for name, values in seconds.items()}
        rows = []
        for name, run in attacks_of.items():
            precision = "bf16" if "bf16" in name else "fp32"
            rate = 1e-9 * flops / times[name]
            yardstick = 2e-9 * side**3 / times[precision]
            rows.append(
                {
                    "variant": name,
                    "runs": len(seconds[name]),
                    "seconds": times[name],
                    "GFLOP": 1e-9 * flops,
                    "GFLOP/s": rate,
                    "matrix product GFLOP/s": yardstick,
                    "share %": 100 * rate / yardstick,
                    "in convolutions %": convolution_share(run, device),
                }
            )
    return rows


def digits_step(device: torch.device, quick: bool, **network: object) -> Step:
    """Make a step of the digits network, on a batch of 128."""
    batch, width = (8, 4) if quick else (128, 12)
    return Step("ResNet18", batch, 16, 10, width, device, **network)


def heads(device: torch.device, quick: bool) -> Rows:
    """Seconds of a step of the digits network: TRADES, and ANCRA-TRADES with and without a gate."""
    steps = 1 if quick else 10
    plain = digits_step(device, quick, reverse_attention=False)
    ungated = digits_step(device, quick, gate="none")
    gated = digits_step(device, quick)
    variants = {
        "TRADES": lambda i: plain.ours(num_steps=steps, no_ra=True, no_anc=True),
        "gate none": lambda i: ungated.ours(num_steps=steps, gate="none"),
        "gate label": lambda i: gated.ours(num_steps=steps),
    }
    return compared(take_turns(variants, 1 if quick else 15, device), "TRADES")


def companions(device: torch.device, quick: bool) -> Rows:
    """Seconds of a step of the digits network, batch 128, with AWP and with averaged weights."""
    job = digits_step(device, quick)
    settings = options(num_steps=1 if quick else 10)
    average = Average(job.model)
    variants = {"alone": {}, "--awp 0.005": {"awp": 0.005}, "--ema 0.995": {"ema": 0.995}}

    def run(awp: float = 0.0, ema: float = 0.0) -> None:
        attacked = attack_batch(
            job.attack_copy(settings), job.x, job.host_labels, settings, job.generator, 1
        )
        gradients = partial(
            backward, partial(training_loss, job.model), job.x, job.labels, attacked, settings
        )
        with adversarial_weights(job.model, gradients, awp) if awp else nullcontext():
            gradients()
            job.update()
        if ema:
            average.update(job.model, ema)

    timed = {name: lambda i, flags=flags: run(**flags) for name, flags in variants.items()}
    return compared(take_turns(timed, 1 if quick else 15, device), "alone")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: of tensors on CUDA, else, on Linux, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage there includes the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def memory(device: torch.device, quick: bool) -> Rows:
    """Peak memory of a process (of its tensors on CUDA) after 1, 2 and 10 training steps."""
    rows = []
    for arch, batch, size, classes in NETWORKS[:1] if quick else NETWORKS:
        batch, width = (4, 4) if quick else (batch, None)
        code = (
            "import torch\n"
            "from tests.tools.benchmarks import Step, peak_memory\n"
            f"device = torch.device('{device}')\n"
            f"job = Step('{arch}', {batch}, {size}, {classes}, {width}, device)\n"
            "for i in range(10): job.ours(num_steps=1); print(peak_memory(device))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks = [f"{int(line) / 1e9:.2f} GB" for line in done.stdout.splitlines()]
        row = {"network": arch, "batch": batch}
        for count in (1, 2, 10):
            row[f"after {count}"] = peaks[count - 1]
        rows.append(row)
    return rows


def negatives(device: torch.device, quick: bool) -> Rows:
    """Choosing hard negatives of a batch of 128, without their attack: tensors against loops.

    A run of ours is 20 calls in a row, of which the figure is one: after each run of the loops its
    threads are asleep.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(128, 10, generator=generator, device=device)
    labels = torch.randint(10, (128,), generator=generator, device=device)
    looped = torch.tensor(loop_hard_negatives(logits, labels), device=device)
    chosen = choose_negatives(logits, labels, "hard", generator).squeeze(1)
    # The others have no candidate and are drawn at random.
    guided = logits[looped].argmax(1) == labels
    if not torch.equal(chosen[guided], looped[guided]):
        raise RuntimeError("the loops choose other negatives")
    variants = {
        "ours": lambda i: [choose_negatives(logits, labels, "hard", generator) for _ in range(20)],
        "loops": lambda i: loop_hard_negatives(logits, labels),
    }
    seconds = take_turns(variants, 2 if quick else 25, device, warm_up=False)
    seconds["ours"] = [value / 20 for value in seconds["ours"]]
    return compared(seconds, "loops")


def trained_on_digits(
    width: int | None, steps: int, device: torch.device
) -> tuple[nn.Module, Split]:
    """Train a ResNet-18 with reverse attention on digits at 32x32 -> it, and the test set."""
    torch.manual_seed(0)
    data = load_split("digits", "train", "", 32).to(device)
    test = load_split("digits", "test", "", 32).to(device)
    model = build_model("ResNet18", 10, width=width).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for indices in batches(torch.arange(64 * steps) % len(data.labels), 64):
        x = as_input(data.images[indices])
        labels = data.labels[indices]
        heads = model(x, labels, heads=True)
        loss = over_heads(
            lambda logits, y=labels: F.cross_entropy(logits, y), heads, auxiliary_weight=2.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), test


def published_evaluation_pgd(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Attack as the published evaluation does, with gradients of the parameters, too."""
    adversarial = x.clone()
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        optimizer = torch.optim.SGD([adversarial], lr=1e-3)
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), labels).backward()
        eta = STEP * adversarial.grad.sign()
        eta = torch.clamp(adversarial.detach() + eta - x, -EPS, EPS)
        adversarial = torch.clamp(x + eta, 0, 1)
    return adversarial.detach()


def pgd(device: torch.device, quick: bool) -> Rows:
    """PGD-40 of 256 digits at 32x32 on ResNet-18, on the final logits, eps 8/255, from the image.

    Attacks take turns batch by batch of 32, the seconds are those of one; accuracies are those of
    the same float32 network on what each returns for all 256.
    """
    import foolbox
    import torchattacks

    batch, count, steps = (4, 8, 2) if quick else (32, 256, 40)
    model, test = trained_on_digits(4 if quick else None, 2 if quick else 44, device)
    x = as_input(test.images[:count]).split(batch)
    labels = test.labels[:count].split(batch)
    peer = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1))
    with frozen(model) as exact, frozen(model, "bf16") as rounded:
        variants = {
            "ours fp32": lambda x, y: linf_pgd(x, cross_entropy(exact, y), EPS, STEP, steps, x),
            "published loop": lambda x, y: published_evaluation_pgd(model, x, y, steps),
            "torchattacks": peer,
            "foolbox": lambda x, y: attack(foolbox_model, x, y, epsilons=EPS)[1],
            "ours bf16": lambda x, y: linf_pgd(x, cross_entropy(rounded, y), EPS, STEP, steps, x),
        }
        adversarial = {name: {} for name in variants}  # by batch

        def variant(name: str) -> Callable[[int], None]:
            def run(i: int) -> None:
                adversarial[name][i] = variants[name](x[i], labels[i])

            return run

        seconds = take_turns({name: variant(name) for name in variants}, len(x), device)

    def robust(name: str) -> float:
        with torch.no_grad():
            right = [model(adversarial[name][i]).argmax(1) == labels[i] for i in range(len(x))]
        return 100 * torch.cat(right).float().mean().item()

    return compared(seconds, "ours fp32", **{"robust accuracy %": robust})


def growth(device: torch.device, quick: bool) -> Rows:
    """How a step's time grows with batch and classes (ResNet-18 of width 16): the exponent."""
    series = {"batch": (16, 32, 64, 128, 256), "classes": (10, 30, 100, 300, 1000)}
    batch, side, width, steps, rounds = (8, 16, 4, 1, 1) if quick else (64, 32, 16, 10, 5)
    rows = []
    for what, values in series.items():
        values = values[: 2 if quick else None]
        shapes = {v: (v, side, 10) if what == "batch" else (batch, side, v) for v in values}
        jobs = {v: Step("ResNet18", *shape, width, device) for v, shape in shapes.items()}
        variants = {str(v): lambda i, job=job: job.ours(num_steps=steps) for v, job in jobs.items()}
        medians = {v: statistics.median(s) for v, s in take_turns(variants, rounds, device).items()}
        exponent = np.polyfit(np.log(values), np.log(list(medians.values())), 1)[0]
        rows += [
            {"over": what, "value": v, "seconds": s, "exponent": float(exponent)}
            for v, s in medians.items()
        ]
    return rows


def rates_of(rates: dict[str, list[float]], unit: str, peer: str) -> Rows:
    """Make a row a variant: its median of images a second, of how many, and times `peer`."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return [
        {"variant": name, "images/s": m, unit: len(rates[name]), f"times {peer}": m / medians[peer]}
        for name, m in medians.items()
    ]


def processes(device: torch.device, quick: bool) -> Rows:
    """Images a second of 2 processes of one thread against 1, by torchrun: medians over epochs."""
    count = 2 if quick else 4
    flags = f"--dataset=digits --no-cuda --log-interval=1000 --epochs={count}".split()
    flags += [f"--eval-interval={count}", "--limit-test=2"]
    flags += ["--width=4", "--limit-train=64"] if quick else ["--width=16", "--limit-train=512"]
    script = str(ROOT / "train_CIFAR10_ResNet.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = {
        "1 process": [sys.executable, script],
        "2 processes": [sys.executable, *torchrun, script],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if quick else 2):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [*command, *flags, "--model-dir", f"{folder}/run"]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
                (file,) = Path(folder).glob("run*/metrics.csv")
                with open(file) as table:
                    epochs = list(csv.DictReader(table))
                rates[name] += [float(row["train_images_per_second"]) for row in epochs[1:]]
    return rates_of(rates, "epochs", "1 process")


def waiting(device: torch.device, quick: bool) -> Rows:
    """Seconds of a step by what OpenMP's threads do while they wait: alone, and beside a process.

    OpenMP's own threads spin by default. Each figure is the median of the steps of a process of its
    own. The process beside it is busy.
    """
    code = (
        "import statistics, sys, time\n"
        "import torch\n"
        "from tests.tools.benchmarks import Step\n"
        "arch, batch, size, width, steps = sys.argv[1], *map(int, sys.argv[2:])\n"
        "step = Step(arch, batch, size, 10, width, torch.device('cpu'))\n"
        "def timed():\n"
        "    began = time.perf_counter()\n"
        "    step.ours()\n"
        "    return time.perf_counter() - began\n"
        "timed()\n"
        "print(statistics.median(timed() for _ in range(steps)))"
    )
    networks = {
        "main job": ("ResNet18", "128", "16", "12"),
        "WRN-34-10, width 1": ("WRN-34-10", "16", "32", "1"),
    }
    spins = ("100", "1000", "10000", "100000")
    steps = "5"
    if quick:
        networks = {"main job": ("ResNet18", "8", "16", "4")}
        spins = ("1000",)
        steps = "1"
    environment = dict(os.environ)
    environment.pop("OMP_WAIT_POLICY", None)
    environment.pop("GOMP_SPINCOUNT", None)

    def seconds_of(network: tuple[str, ...], setting: dict[str, str]) -> float:
        command = [sys.executable, "-c", code, *network, steps]
        done = subprocess.run(
            command, cwd=ROOT, env=environment | setting, capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    rows = []
    for name, network in networks.items():
        for setting in (
            {},
            {"OMP_WAIT_POLICY": "PASSIVE"},
            *({"GOMP_SPINCOUNT": count} for count in spins),
        ):
            row = {"step": name, "set": ", ".join(map("=".join, setting.items())) or "nothing"}
            row["alone, s"] = seconds_of(network, setting)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                row["beside a busy process, s"] = seconds_of(network, setting)
            finally:
                busy.kill()
                busy.wait()
            show([row])
            rows.append(row)
    return rows


def data(device: torch.device, quick: bool) -> Rows:
    """Batches of 128 of CIFAR-10's shape, cropped and flipped: tensors against torchvision.

    The start of its 2 workers is not counted.
    """
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    count, batch = (300, 32) if quick else (20000, 128)
    pixels = torch.randint(
        256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = Split(pixels, torch.zeros(count, dtype=torch.long), ("one",)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    transform = transforms.Compose(steps)
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()

    class Images(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return transform(Image.fromarray(arrays[i])), 0

    def ours() -> tuple[float, int]:
        images = 0
        began = time.perf_counter()
        order = torch.randperm(count, generator=generator, device=device)
        for indices in batches(order, batch):
            images += len(as_input(augment(split.take(indices).images, "crop-flip", generator)))
        wait(device)
        return time.perf_counter() - began, images

    def torchvision() -> tuple[float, int]:
        loader = iter(DataLoader(Images(), batch, shuffle=True, num_workers=2))
        next(loader)
        began = time.perf_counter()
        images = sum(len(x.to(device)) for x, _ in loader)
        wait(device)
        return time.perf_counter() - began, images

    pipelines = {"ours": ours, "torchvision, 2 workers": torchvision}
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(1 if quick else 5):
        for name, pipeline in pipelines.items():
            seconds, images = pipeline()
            rates[name].append(images / seconds)
    return rates_of(rates, "runs", "torchvision, 2 workers")


def compiled(device: torch.device, quick: bool) -> Rows:
    """A training step with --compile against one without, and what the first such step takes."""
    rows = []
    for network, batch, size, width in (
        ("ResNet-18", 64, 32, None),
        ("the digits network", 128, 16, 12),
    ):
        batch, width, steps = (4, 4, 1) if quick else (batch, width, 10)
        jobs = {
            name: Step("ResNet18", batch, size, 10, width, device) for name in ("eager", "compiled")
        }
        compile_for_training(jobs["compiled"].model, device)

        def variant(name: str, jobs: dict[str, Step] = jobs, steps: int = steps) -> None:
            jobs[name].ours(num_steps=steps, compile=name == "compiled")

        variants = {name: lambda i, run=variant, name=name: run(name) for name in jobs}
        first = take_turns(variants, 1, device, warm_up=False)
        more = {"first step, seconds": lambda name, first=first: first[name][0]}
        seconds = take_turns(variants, 1 if quick else 5, device, warm_up=False)
        rows += [
            {"network": network, "batch": batch, **row}
            for row in compared(seconds, "eager", **more)
        ]
    return rows


def figures(device: torch.device, quick: bool) -> Rows:
    """CPU minutes of what the figures compute of 10,000 random images of CIFAR-10's size.

    The network is a random ResNet-18. Passes through it are measured on 500 images and scaled;
    cluster numbers and UMAP see all 10,000 features.
    """
    from utils.figures.features import embed, extract, measure_clusters

    whole, count = (100, 4) if quick else (10_000, 500)
    labels = torch.arange(whole) % 10
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    numbers = torch.arange(count)
    split = Split(images, labels[:count], tuple("0123456789"), numbers=numbers).to(device)
    features = torch.randn(whole, 512) + 2 * torch.randn(10, 512)[labels]
    attack = attacks.pgd(cross_entropy, EPS, STEP, 10, start="normal", seed=1)
    with frozen(build_model("ResNet18", 10, width=4 if quick else None).to(device)) as net:
        jobs = {
            "features": (whole / count, lambda: extract(net, split, 200)),
            "PGD-10 and features": (whole / count, lambda: extract(net, split, 200, attack)),
            "silhouette and neighbours": (1, lambda: measure_clusters(features, labels)),
            "UMAP's compilation, on 100": (1, lambda: embed(features[:100], 42)),
            "UMAP": (1, lambda: embed(features, 42)),
        }
        table = []
        for what, (scale, job) in jobs.items():
            began = time.process_time()  # which other processes do not change much
            job()
            table.append({"what": what, "CPU minutes": (time.process_time() - began) * scale / 60})
    return table


NAMED = (compiled, figures)  # run by their names only
BENCHMARKS = (
    step,
    share,
    heads,
    companions,
    memory,
    negatives,
    pgd,
    growth,
    processes,
    waiting,
    data,
    *NAMED,
)
BENCHMARKS = {f.__name__: f for f in BENCHMARKS}


def show(rows: Rows) -> None:
    """Print a table."""

    def written(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns]
    lines += [[written(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def machine(device: torch.device) -> dict[str, object]:
    """Describe the processor, where the system tells it, cores, threads and device."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def measured(name: str, device: torch.device, quick: bool) -> dict:
    """Run a benchmark, print its table -> what the JSON says of it."""
    rates = machine_rates(device, quick)
    began = time.perf_counter()
    print(f"\n{name}: {BENCHMARKS[name].__doc__.splitlines()[0]}")
    print(
        f"matrix product {rates['fp32']:.0f} GFLOP/s fp32, {rates['bf16']:.0f} GFLOP/s bf16",
        flush=True,
    )
    try:
        rows = BENCHMARKS[name](device, quick)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        rows = [{"failed": first_line(error)}]
    show(rows)
    seconds = time.perf_counter() - began
    print(f"({seconds:.0f} s)", flush=True)
    return {"matrix product GFLOP/s": rates, "rows": rows, "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m tests.tools.benchmarks",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings, figures without meaning"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    given = parser.parse_args(argv)
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    try:
        device = pick_device(given.device, False)
        if given.out:
            given.out.open("a").close()  # before anything is measured
    except (UsageError, OSError) as error:
        parser.error(str(error))
    record = {
        "made": provenance(device),
        "machine": machine(device),
        "quick": given.quick,
        "benchmarks": {},
    }
    print(in_one_line(record["made"]))
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    for name in given.names or [name for name, f in BENCHMARKS.items() if f not in NAMED]:
        record["benchmarks"][name] = measured(name, device, given.quick)
        if given.out:
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("failed" in row for done in record["benchmarks"].values() for row in done["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
