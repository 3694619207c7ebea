"""How fast it is, measured on your machine.

python -m tests.benchmarks                      all but `compiled`, 40 minutes on 2 CPU cores
python -m tests.benchmarks step pgd             some: step share together memory negatives pgd growth processes data
python -m tests.benchmarks compiled             what --compile brings, 5 minutes more; by its name only
python -m tests.benchmarks --out figures.json   figures also as JSON, written anew after each benchmark
python -m tests.benchmarks --quick              tiny settings: shows that everything runs, measures nothing

Each prints a table. Times are medians of `runs` runs, which take turns in one process. Let nothing else run meanwhile.
Each is preceded by the machine's own float32 and bfloat16 matrix-product rate, as a yardstick.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Heads, build_model
from utils import attacks
from utils.attacks import (
    ToAttack,
    cross_entropy,
    cross_entropy_over_heads,
    frozen,
    linf_pgd,
    linf_pgd_together,
    summed_cross_entropy,
)
from utils.data import Split, as_input, augment, batches, load_split
from utils.evaluation import pick_device
from utils.losses import over_heads, trades_loss
from utils.negatives import choose_negatives
from utils.options import TRAINING, UsageError
from utils.precision import bfloat16_gain, compile_for_training
from utils.provenance import in_one_line, provenance
from utils.training import attack_batch, backward, training_loss

ROOT = Path(__file__).parent.parent
EPS, STEP = 8 / 255, 0.007
NETWORKS = (("ResNet18", 64, 32, 10), ("PreActResNet18", 16, 64, 200), ("WRN-34-10", 16, 32, 10))  # batch, side, C


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(variants: dict[str, Callable[[int], object]], rounds: int, device: torch.device) -> dict[str, list]:
    """Run every variant once a round, variant(round) -> seconds of each of its runs."""
    seconds = {name: [] for name in variants}
    for i in range(rounds):
        for name, variant in variants.items():
            wait(device)
            began = time.perf_counter()
            variant(i)
            wait(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[str, list], peer: str, **more: Callable[[str], object]) -> list[dict]:
    """A row a variant: its median, its number of runs, how many times as fast as `peer` it is, and more(name)."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "variant": name,
            "seconds": medians[name],
            "runs": len(seconds[name]),
            f"speed, {peer} = 1": medians[peer] / medians[name],
            **{key: column(name) for key, column in more.items()},
        }
        for name in seconds
    ]


def matrix_product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[int], Tensor]:
    a, b, product = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda i: torch.mm(a, b, out=product)


def machine_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """GFLOP/s of a square matrix product."""
    side = 64 if quick else 2048
    products = {"fp32": torch.float32, "bf16": torch.bfloat16}
    products = {name: matrix_product(device, dtype, side) for name, dtype in products.items()}
    take_turns(products, 1, device)
    seconds = take_turns(products, 5, device)
    return {name: 2e-9 * side**3 / statistics.median(values) for name, values in seconds.items()}


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**(TRAINING | changes))


def random_batch(count: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, size, size, generator=generator)
    return x.to(device), torch.randint(classes, (count,), generator=generator).to(device)


class Step:
    """One optimiser step of ANCRA-TRADES on a batch of random images, ours or a plain one."""

    def __init__(self, arch: str, batch: int, size: int, classes: int, width: int | None, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build_model(arch, classes, width=width, image_size=size).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)
        self.generator = torch.Generator(device).manual_seed(0)
        self.x, self.labels = random_batch(batch, size, classes, device)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self, **changes: object) -> None:
        o = options(**changes)
        attacked = attack_batch(self.model, self.x, self.labels, o, self.generator, 1)
        figures, _ = backward(partial(training_loss, self.model), self.x, self.labels, attacked, o)
        figures.tolist()
        self.update()

    def plain(self, steps: int = 10) -> None:
        """The step as the published scripts compute it.

        The network itself is attacked, in eval mode, neither folded nor channels-last; negatives and contrast are loops
        over the batch; three more forwards, with their graphs, give the accuracies of the log.
        """
        x, labels, model = self.x, self.labels, self.model
        chosen = loop_random_negatives(labels)
        model.eval()
        adversarial = plain_pgd(model, x, labels, 1, steps)
        negative = plain_pgd(model, x[chosen], labels, -1, steps)
        model.train()
        natural = model(x, labels, heads=True)
        heads = model(adversarial, labels, heads=True)
        negative_heads = model(negative, labels[chosen], heads=True)
        loss = over_heads(lambda nat, adv: trades_loss(nat, adv, labels, 6.0), natural, heads, auxiliary_weight=2.0)
        (loss + 3 * over_heads(loop_contrast, natural, negative_heads, auxiliary_weight=2.0)).backward()
        self.update()
        model.eval()
        for images, truth in ((x, labels), (adversarial, labels), (negative, labels[chosen])):
            (model(images).argmax(1) == truth).float().mean().item()
        model.train()


def plain_pgd(model: nn.Module, x: Tensor, labels: Tensor, sign: int, steps: int) -> Tensor:
    adversarial = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        heads = model(adversarial, heads=True)
        loss = F.cross_entropy(heads.final, labels)
        loss = loss + 2 * sum(F.cross_entropy(logits, labels) for logits in heads.auxiliary) / len(heads.auxiliary)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach() + sign * STEP * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, x - EPS), x + EPS).clamp(0, 1)
    return adversarial.detach()


def images_by_class(labels: Tensor) -> dict[int, list[int]]:
    by_class: dict[int, list[int]] = {}
    for n, label in enumerate(labels):
        by_class.setdefault(label.item(), []).append(n)
    return by_class


def random_negative(by_class: dict[int, list[int]], own: int) -> int:
    return random.choice(by_class[random.choice([c for c in by_class if c != own])])


def loop_random_negatives(labels: Tensor) -> Tensor:
    by_class = images_by_class(labels)
    return torch.tensor([random_negative(by_class, label.item()) for label in labels], device=labels.device)


def loop_hard_negatives(logits: Tensor, labels: Tensor) -> list[int]:
    """For each anchor, of the images of other classes that are taken for its class, the one with the largest logit.

    Loops as the published ones: a comparison of two tensors a pair, and sets.
    """
    by_class, predictions, chosen = images_by_class(labels), logits.argmax(1), []
    for n in range(len(labels)):
        taken = {j for j in range(len(labels)) if predictions[j] == labels[n]}
        own = labels[n].item()
        candidates = list(taken - set(by_class[own]))
        if candidates:
            chosen.append(candidates[logits[candidates][:, own].topk(1).indices.item()])
        else:
            chosen.append(random_negative(by_class, own))
    return chosen


def loop_contrast(natural: Tensor, negative: Tensor) -> Tensor:
    """ANC with alpha 1, pair by pair of those that agree."""
    (q, one), (p, other) = F.softmax(natural, 1).detach().max(1), F.softmax(negative, 1).max(1)
    total = natural.new_zeros(())
    for (n,) in torch.nonzero(one == other):
        total = total + (q[n] * p[n]) ** 0.5
    return total / len(q)


# Each benchmark: (device, quick) -> rows of its table.


def step(device: torch.device, quick: bool) -> list[dict]:
    """Seconds of a training step: ours against a plain one, which computes as the published scripts do."""
    rows = []
    for arch, batch, size, classes in NETWORKS:
        batch, width = (4, 1 if arch.startswith("WRN") else 4) if quick else (batch, None)
        rows += steps_of(Step(arch, batch, size, classes, width, device), arch, *((1, 1) if quick else (5, 10)))
    return rows


def steps_of(job: Step, arch: str, rounds: int, attack_steps: int) -> list[dict]:
    device = job.x.device
    variants = {"ours fp32": lambda steps: job.ours(num_steps=steps), "plain": job.plain}
    if arch == "ResNet18" or bfloat16_gain(device) > 1:
        variants["ours bf16"] = lambda steps: job.ours(num_steps=steps, amp="bf16")
    for warm_up in variants.values():
        warm_up(1)
    timed = {name: lambda i, variant=variant: variant(attack_steps) for name, variant in variants.items()}
    rows = compared(take_turns(timed, rounds, device), "plain")
    batch = len(job.x)
    return [{"network": arch, "batch": batch, **row, "images/s": batch / row["seconds"]} for row in rows]


def forward_flops(net: nn.Module, x: Tensor) -> int:
    """Operations of the convolutions and linear layers of a forward pass, a multiplication and an addition each."""
    counted = []

    def count(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        counted.append(2 * out.numel() * layer.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def convolution_share(run: Callable[[int], object], device: torch.device) -> float | str:
    """Share of a run's time that passes inside convolutions, in percent, by PyTorch's profiler on a CPU."""
    if device.type != "cpu":
        return "-"
    with torch.autograd.profiler.profile(use_kineto=False) as seen:
        run(0)
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return 100 * sum(t for key, t in times.items() if "convolution" in key) / sum(times.values())


def share(device: torch.device, quick: bool) -> list[dict]:
    """GFLOP/s of an attack, ResNet-18, batch 64, and its share of the matrix-product rate of the same minutes.

    `plain` is the attack of the published scripts, on the network as it is trained.
    """
    steps, side = (1, 64) if quick else (10, 2048)
    job = Step("ResNet18", 4 if quick else 64, 32, 10, 4 if quick else None, device)
    with frozen(job.model) as exact, frozen(job.model, "bf16") as rounded:
        job.model.eval()
        flops = 2 * steps * forward_flops(exact, job.x)  # once forward, once to the gradient of the images

        def attack(net: nn.Module) -> Callable[[int], Tensor]:
            return lambda i: linf_pgd(job.x, cross_entropy_over_heads(net, job.labels, 2.0), EPS, STEP, steps, job.x)

        attacks_of = {
            "ours fp32": attack(exact),
            "plain": lambda i: plain_pgd(job.model, job.x, job.labels, 1, steps),
            "ours bf16": attack(rounded),
        }
        products = {
            "fp32": matrix_product(device, torch.float32, side),
            "bf16": matrix_product(device, torch.bfloat16, side),
        }
        take_turns(products | attacks_of, 1, device)
        seconds = take_turns(products | attacks_of, 1 if quick else 5, device)
        times = {name: statistics.median(values) for name, values in seconds.items()}
        rows = []
        for name, run in attacks_of.items():
            yardstick = 2e-9 * side**3 / times["bf16" if "bf16" in name else "fp32"]
            rows.append(
                {
                    "variant": name,
                    "runs": len(seconds[name]),
                    "seconds": times[name],
                    "GFLOP": 1e-9 * flops,
                    "GFLOP/s": 1e-9 * flops / times[name],
                    "matrix product GFLOP/s": yardstick,
                    "share %": 1e-7 * flops / times[name] / yardstick,
                    "in convolutions %": convolution_share(run, device),
                }
            )
    return rows


def together(device: torch.device, quick: bool) -> list[dict]:
    """Both attacks of a step as one batch against one after the other, on batches of growing size."""
    cases = [("ResNet18", batch, 32, None) for batch in (4, 16, 32, 64)] + [("WRN-34-10", 16, 32, None)]
    cases += [("PreActResNet18", 16, 64, None)]
    cases += [("ResNet18", batch, 16, 12) for batch in (16, 64, 128, 256)]  # the digits network
    rows = []
    for arch, batch, size, width in cases[:1] if quick else cases:
        job = Step(arch, batch, size, 10, 4 if quick else width, device)
        with frozen(job.model) as net:

            def attack(small: float, job: Step = job, net: nn.Module = net) -> None:
                def ascended(heads: Heads) -> Tensor:
                    return over_heads(summed_cross_entropy(job.labels), heads, auxiliary_weight=2.0)

                both = [ToAttack(job.x, job.x, ascended), ToAttack(job.x, job.x, lambda heads: -ascended(heads))]
                with mock.patch.object(attacks, "SMALL", small):
                    linf_pgd_together(net, both, EPS, STEP, 1 if quick else 4)

            variants = {
                "apart": lambda i, attack=attack: attack(0),
                "as one": lambda i, attack=attack: attack(math.inf),
            }
            work = 2 * batch * size**2 * sum(p.numel() for p in net.parameters())
            take_turns(variants, 1, device)
            seconds = take_turns(variants, 1 if quick else 5 if work > 2e11 else 25, device)
        used = "as one" if work <= attacks.SMALL else "apart"
        for row in compared(seconds, "apart"):
            shape = {"network": arch, "width": width or "as published", "side": size, "batch": batch, "work": work}
            rows.append({**shape, **row, "used": "yes" if row["variant"] == used else ""})
    return rows


def memory(device: torch.device, quick: bool) -> list[dict]:
    """Peak memory of a process (of its tensors on CUDA) after 1, 2 and 10 training steps."""
    rows = []
    for arch, batch, size, classes in NETWORKS[:1] if quick else NETWORKS:
        batch, width = (4, 4) if quick else (batch, None)
        code = (
            "import torch; from tests.benchmarks import Step; from utils.precision import peak_memory\n"
            f"device = torch.device('{device}'); job = Step('{arch}', {batch}, {size}, {classes}, {width}, device)\n"
            "for i in range(10): job.ours(num_steps=1); print(peak_memory(device))"
        )
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks = [f"{int(line) / 1e9:.2f} GB" for line in said.stdout.splitlines()]
        rows.append({"network": arch, "batch": batch} | {f"after {n}": peaks[n - 1] for n in (1, 2, 10)})
    return rows


def negatives(device: torch.device, quick: bool) -> list[dict]:
    """Choosing hard negatives of a batch of 128, without their attack: tensor code against loops over the batch.

    A run of ours is 20 calls in a row, of which the figure is one: after each run of the loops its threads are asleep.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(128, 10, generator=generator, device=device)
    labels = torch.randint(10, (128,), generator=generator, device=device)
    looped = torch.tensor(loop_hard_negatives(logits, labels), device=device)
    chosen = choose_negatives(logits, labels, "hard", generator).squeeze(1)
    guided = logits[looped].argmax(1) == labels  # the others have no candidate and are drawn at random
    if not torch.equal(chosen[guided], looped[guided]):
        raise RuntimeError("the loops choose other negatives")
    variants = {
        "ours": lambda i: [choose_negatives(logits, labels, "hard", generator) for _ in range(20)],
        "loops": lambda i: loop_hard_negatives(logits, labels),
    }
    seconds = take_turns(variants, 2 if quick else 25, device)
    seconds["ours"] = [value / 20 for value in seconds["ours"]]
    return compared(seconds, "loops")


def trained_on_digits(width: int | None, steps: int, device: torch.device) -> tuple[nn.Module, Split]:
    """A ResNet-18 with reverse attention after some steps of natural training on digits at 32x32, and the test set."""
    torch.manual_seed(0)
    data, test = (load_split("digits", part, "", 32).to(device) for part in ("train", "test"))
    model = build_model("ResNet18", 10, width=width).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for indices in batches(torch.arange(64 * steps) % len(data.labels), 64):
        x, labels = as_input(data.images[indices]), data.labels[indices]
        heads = model(x, labels, heads=True)
        loss = over_heads(lambda logits, y=labels: F.cross_entropy(logits, y), heads, auxiliary_weight=2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), test


def published_evaluation_pgd(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """PGD as the published evaluation computes it: backward() through a network whose parameters want gradients."""
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


def pgd(device: torch.device, quick: bool) -> list[dict]:
    """PGD-40 of 256 digits at 32x32 on ResNet-18, cross-entropy of the final logits, eps 8/255, started at the image.

    Attacks take turns batch by batch of 32, the seconds are those of one; accuracies are those of the same float32
    network on what each returns for all 256.
    """
    import foolbox
    import torchattacks

    batch, count, steps = (4, 8, 2) if quick else (32, 256, 40)
    model, test = trained_on_digits(4 if quick else None, 2 if quick else 44, device)
    x, labels = as_input(test.images[:count]), test.labels[:count]
    parts = [slice(i, i + batch) for i in range(0, count, batch)]
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
        found = {}

        def variant(name: str) -> Callable[[int], None]:
            return lambda i: found.setdefault(name, []).append(variants[name](x[parts[i]], labels[parts[i]]))

        by_batch = {name: variant(name) for name in variants}
        take_turns(by_batch, 1, device)
        found.clear()
        seconds = take_turns(by_batch, len(parts), device)

    def robust(name: str) -> float:
        with torch.no_grad():
            right = [model(images).argmax(1) == labels[s] for images, s in zip(found[name], parts, strict=True)]
        return 100 * torch.cat(right).float().mean().item()

    return compared(seconds, "ours fp32", **{"robust accuracy %": robust})


def growth(device: torch.device, quick: bool) -> list[dict]:
    """How a step's time grows with batch and classes (ResNet-18 of width 16): the exponent fitted to its medians."""
    series = {"batch": (16, 32, 64, 128, 256), "classes": (10, 30, 100, 300, 1000)}
    rows = []
    for what, values in series.items():
        if quick:
            values = values[:2]
        jobs = {
            value: Step("ResNet18", *((value, 32, 10) if what == "batch" else (64, 32, value)), 16, device)
            if not quick
            else Step("ResNet18", *((value, 16, 10) if what == "batch" else (8, 16, value)), 4, device)
            for value in values
        }
        variants = {str(v): lambda i, job=job: job.ours(num_steps=1 if quick else 10) for v, job in jobs.items()}
        for job in jobs.values():
            job.ours(num_steps=1)
        medians = {v: statistics.median(s) for v, s in take_turns(variants, 1 if quick else 5, device).items()}
        exponent = np.polyfit(np.log(values), np.log(list(medians.values())), 1)[0]
        rows += [{"over": what, "value": v, "seconds": s, "exponent": float(exponent)} for v, s in medians.items()]
    return rows


def processes(device: torch.device, quick: bool) -> list[dict]:
    """Images a second of 2 processes of one thread against 1, through torchrun and metrics.csv: medians over epochs."""
    flags = ["--dataset", "digits", "--no-cuda", "--log-interval", "1000"]
    flags += ["--width", "4" if quick else "16", "--limit-train", "64" if quick else "512", "--limit-test", "2"]
    epochs = 2 if quick else 4
    flags += ["--epochs", str(epochs), "--eval-interval", str(epochs)]
    script = str(ROOT / "train_CIFAR10_ResNet.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = {"1 process": [sys.executable, script], "2 processes": [sys.executable, *torchrun, script]}
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if quick else 2):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [*command, *flags, "--model-dir", f"{folder}/run"]
                done = subprocess.run(
                    command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
                )
                if done.returncode:
                    raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
                (file,) = Path(folder).glob("run*/metrics.csv")
                with open(file) as table:
                    rates[name] += [float(row["train_images_per_second"]) for row in csv.DictReader(table)][1:]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return [
        {
            "variant": name,
            "images/s": median,
            "epochs": len(rates[name]),
            "times 1 process": median / medians["1 process"],
        }
        for name, median in medians.items()
    ]


def data(device: torch.device, quick: bool) -> list[dict]:
    """Batches of 128 of CIFAR-10's shape, cropped and flipped: tensor code against torchvision and 2 workers.

    The workers' start is not counted.
    """
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    count, batch = (300, 32) if quick else (20000, 128)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(pixels, torch.zeros(count, dtype=torch.long), ("one",)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose(steps)
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()

    class Images(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return transform(Image.fromarray(arrays[i])), 0

    def ours() -> tuple[float, int]:
        began, images = time.perf_counter(), 0
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

    rates: dict[str, list[float]] = {"ours": [], "torchvision, 2 workers": []}
    for _ in range(1 if quick else 5):
        for name, pipeline in (("ours", ours), ("torchvision, 2 workers", torchvision)):
            seconds, images = pipeline()
            rates[name].append(images / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    slow = medians["torchvision, 2 workers"]
    return [
        {"variant": n, "images/s": m, "runs": len(rates[n]), "times torchvision": m / slow} for n, m in medians.items()
    ]


def compiled(device: torch.device, quick: bool) -> list[dict]:
    """A training step with --compile against one without, and what the first such step takes."""
    rows = []
    for network, batch, size, width in (("ResNet-18", 64, 32, None), ("the digits network", 128, 16, 12)):
        batch, width = (4, 4) if quick else (batch, width)
        steps = 1 if quick else 10
        jobs = {name: Step("ResNet18", batch, size, 10, width, device) for name in ("eager", "compiled")}
        compile_for_training(jobs["compiled"].model, device)
        variants = {
            "eager": lambda i, job=jobs["eager"], steps=steps: job.ours(num_steps=steps),
            "compiled": lambda i, job=jobs["compiled"], steps=steps: job.ours(num_steps=steps, compile=True),
        }
        first = take_turns(variants, 1, device)
        more = {"first step, seconds": lambda name, first=first: first[name][0]}
        rows += [
            {"network": network, "batch": batch, **row}
            for row in compared(take_turns(variants, 1 if quick else 5, device), "eager", **more)
        ]
    return rows


BENCHMARKS = {f.__name__: f for f in (step, share, together, memory, negatives, pgd, growth, processes, data, compiled)}


def show(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [
        [f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.benchmarks"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny settings, figures without meaning")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    try:
        device = pick_device(given.device, False)
        if given.out:
            given.out.open("a").close()  # before it is measured, not behind it
    except (UsageError, OSError) as error:
        parser.error(str(error))
    record = {
        "made": provenance(device, packages=("torchattacks", "foolbox")),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "quick": given.quick,
        "benchmarks": {},
    }
    print(in_one_line(record["made"]))
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    for name in given.names or [name for name in BENCHMARKS if name != "compiled"]:
        rates = machine_rates(device, given.quick)
        began = time.perf_counter()
        print(f"\n{name}: {BENCHMARKS[name].__doc__.splitlines()[0]}")
        print(f"matrix product {rates['fp32']:.0f} GFLOP/s fp32, {rates['bf16']:.0f} GFLOP/s bf16", flush=True)
        try:
            rows = BENCHMARKS[name](device, given.quick)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            rows = [{"failed": (str(error) or type(error).__name__).splitlines()[0]}]
        show(rows)
        seconds = time.perf_counter() - began
        print(f"({seconds:.0f} s)", flush=True)
        record["benchmarks"][name] = {"matrix product GFLOP/s": rates, "rows": rows, "seconds": seconds}
        if given.out:
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("failed" in row for done in record["benchmarks"].values() for row in done["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
