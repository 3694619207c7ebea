"""What test_white_attack.py does: run the attacks, keep what is finished, and say what was found."""

import argparse
import copy
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.adaptive import View, adaptive, views
from utils.attacks import cross_entropy, frozen, linf_pgd, margin
from utils.autoattack import BLOCK, autoattack
from utils.checkpoints import load_model, read, save, write_atomically
from utils.data import Split, as_input, load_split, require_same_on_ranks
from utils.diagnostics import Diagnosis, diagnose, diagnostic_passes
from utils.evaluation import (
    NOISE_DRAWS,
    Attack,
    Subject,
    attack_settings,
    judged,
    load_subject,
    method_name,
    noise,
    open_log,
    percent,
    pick_device,
    recipe_weight,
    subset,
    verdicts,
    white_box,
)
from utils.figures import draw_examples, draw_robustness
from utils.options import BY_DATASET, RunError, Stopped, UsageError
from utils.provenance import in_one_line, provenance

ADAPTIVE = "adaptive: "


class Row(NamedTuple):
    """A line of the table. right: (N,) bool, the verdicts image by image. notes: what a reader must know of it."""

    right: Tensor
    seconds: float
    notes: list[str]


class Worst:
    """For each image the one found with the smallest margin of its label in the real logits, wrong ones below 0.

    images: (N, 3, S, S) float32 on the CPU, the natural ones to begin with. margins: (N,).
    """

    def __init__(self, split: Split) -> None:
        self.images = as_input(split.images.cpu())
        self.margins = torch.full((len(split.labels),), torch.inf)

    def see(self, indices: Tensor, x: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Take over what is worse than what was seen before, of the images `indices`."""
        own = labels[:, None]
        others = logits.scatter(1, own, -torch.inf).amax(1)
        margins = (logits.gather(1, own).squeeze(1) - others).cpu()
        # an exact tie counts as the prediction does: argmax takes the first
        margins = torch.where((logits.argmax(1) != labels).cpu(), margins.clamp(max=-1e-30), margins)
        self.take(indices, x.cpu(), margins)

    def join(self) -> None:
        """Take over, on the first rank, what the others found."""
        seen = self.margins.isfinite().nonzero().squeeze(1)
        for indices, images, margins in distributed.collected((seen, self.images[seen], self.margins[seen])):
            self.take(indices, images, margins)

    def take(self, indices: Tensor, images: Tensor, margins: Tensor) -> None:
        worse = margins < self.margins[indices]
        self.images[indices[worse]] = images[worse]
        self.margins[indices[worse]] = margins[worse]


def wilson(right: Tensor) -> tuple[float, float]:
    """95 % interval of a share of true verdicts, in percent (Wilson, 1927)."""
    n, share, z = len(right), right.double().mean().item(), 1.959963984540054
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def foreign_subject(options: argparse.Namespace) -> Subject:
    """The classifier that --model package.module:function builds, with the test images of --dataset."""
    name, _, function = options.model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        built = getattr(importlib.import_module(name), function)()
    except Exception as error:  # whatever the user's own code raises
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"--model {options.model}: {said}; name package.module:function, without arguments") from error
    finally:
        sys.path.pop(0)
    if not callable(built):
        raise UsageError(f"--model {options.model} returns a {type(built).__name__}, not a network")
    model = built if isinstance(built, nn.Module) else _Callable(built)
    dataset = options.dataset or "cifar10"
    size = options.image_size or BY_DATASET[dataset].get("image_size", 32)
    device = pick_device(options.device, options.no_cuda)
    with distributed.first_of_the_node_first():
        whole = load_split(dataset, "test", options.data_dir, size)
    require_same_on_ranks(f"{dataset} in {options.data_dir}", whole)
    split = subset(whole, options.n_examples).to(device)
    try:
        model = model.to(device).eval()
        answer = copy.deepcopy(model)(as_input(split.images[:2]).requires_grad_())  # attacks see a copy, too
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"--model {options.model} fails on images {tuple(split.images[:2].shape)}: {said}") from error
    if not isinstance(answer, Tensor) or answer.shape != (len(split.labels[:2]), len(split.classes)):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UsageError(f"--model {options.model} answers with {got}; logits (N, {len(split.classes)}) are needed")
    blind = {"natural", "noise"}.issuperset(options.attacks) and not options.diagnostics
    if not answer.requires_grad and not blind:
        raise UsageError(
            f"--model {options.model} answers without a gradient with respect to the images; only --attacks "
            "natural,noise does without"
        )
    info = {"arch": options.model, "reverse_attention": False, "recipe": None}
    if getattr(model, "reverse_attention", None) is True:  # it answers with heads, as those of `models` do
        info["reverse_attention"] = True
    return Subject(
        Path(options.model), model, info, dataset, split, *attack_settings(options, dataset), len(whole.labels)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class _Callable(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Blocks:
    """What is finished of the long attacks, a file for each block of images, so that a stopped evaluation goes on.

    A file counts only for the same network, images, settings and library versions (`fingerprint`).
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder / f"white_attack-{fingerprint[:12]}.partial", fingerprint

    def load(self, start: int) -> dict:
        file = self._file(start)
        if file.exists():
            try:
                part = read(file)
            except UsageError:  # cut off or foreign: attacked anew
                part = {}
            if part.get("fingerprint") == self.fingerprint:
                return part
        return {"fingerprint": self.fingerprint, "verdicts": {}, "seconds": {}, "notes": {}}

    def save(self, start: int, part: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self._file(start), part)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, start: int) -> Path:
        return self.folder / f"images-{start:06d}.pt"


def fingerprint(nets: list[nn.Module], split: Split, settings: dict, foreign: bool) -> str:
    """What the verdicts depend on: weights, images, labels, settings, versions and the attacks' code.

    A foreign network may keep its weights anywhere: it is known by its answers to a block of images, bit for bit.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in ("adaptive", "attacks", "autoattack"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    tensors = [tensor for net in nets for tensor in net.state_dict().values()] + [split.images, split.labels]
    if foreign:
        with torch.no_grad():
            tensors.append(nets[0](as_input(split.images[:BLOCK])))
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def stoppable(line: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the job at once, by Stopped with this line; finished blocks are on disk already."""

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum, line)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def quick_attacks(options: argparse.Namespace, subject: Subject) -> dict[str, tuple[str, Attack]]:
    """The table's shorter attacks, and noise: by flag, the name in the table and the attack."""
    settings = dict(eps=subject.eps, random=options.random, seed=options.seed)
    half = max(1, options.num_steps // 2)
    step = subject.step_size
    return {
        "fgsm": ("FGSM", white_box(cross_entropy, step_size=subject.eps, steps=1, **settings)),
        "pgd": (
            f"PGD-{options.num_steps}",
            white_box(cross_entropy, step_size=step, steps=options.num_steps, **settings),
        ),
        "cw": (f"CW-{half}", white_box(margin, step_size=step, steps=half, **settings)),
        "noise": (f"noise, {NOISE_DRAWS} draws", noise(subject.eps, options.seed)),
    }


class Long(NamedTuple):
    """An attack that goes block by block.

    attack: called with `says`, a function that sees how far it is. gradients, forwards: passes an image at most, for an
    estimate of its time. notes: the library's warnings, of the block under way.
    """

    attack: Callable[..., Attack]
    gradients: int
    forwards: int
    notes: list[str]


def long_attacks(options: argparse.Namespace, subject: Subject, ways: dict[str, View]) -> dict[str, Long]:
    """AutoAttack, and the adaptive attack on each view, by their names in the table."""
    targets = min(9, len(subject.split.classes) - 1)
    found: dict[str, Long] = {}
    if "autoattack" in options.attacks:
        notes: list[str] = []
        attack = partial(autoattack, subject.eps, options.seed, noting(notes))
        found["AutoAttack"] = Long(attack, 101 + 240 * targets, 5000, notes)
    if "adaptive" in options.attacks:
        for name, view in ways.items():
            settings = dict(eps=subject.eps, step_size=subject.step_size, steps=options.num_steps, seed=options.seed)
            notes = []
            attack = partial(adaptive, view, restarts=options.restarts, warned=noting(notes), **settings)
            passes = options.restarts * options.num_steps + 101 * (1 + targets)
            passes *= 2 if name in ("smooth gates", "surrogate") else 1  # two networks' passes a step
            found[f"{ADAPTIVE}{name}"] = Long(attack, passes, 0, notes)
    return found


def noting(notes: list[str]) -> Callable[[str], None]:
    """A function that notes a line; of lines alike but for their numbers the one with the largest first number."""

    def note(line: str) -> None:
        number = re.compile(r"\d+(\.\d+)?")
        alike = [known for known in notes if number.sub("N", known) == number.sub("N", line)]
        if not alike:
            notes.append(line)
        elif float(number.search(line + " 0")[0]) > float(number.search(alike[0] + " 0")[0]):
            notes[notes.index(alike[0])] = line

    return note


def expected_seconds(net: nn.Module, split: Split, passes: list[tuple[int, int]], images: int) -> float:
    """How long passes take on so many images, from two gradient passes and a forward one of a block, timed.

    passes: (gradient passes, forward passes) an image, summed over the list.
    """
    x, labels = as_input(split.images[:BLOCK]), split.labels[:BLOCK]
    objective = cross_entropy(net, labels)
    took = []
    for steps in (1, 2, 2, 0):  # the first two are a warm-up
        began = time.perf_counter()
        if steps:
            linf_pgd(x, objective, 0.01, 0.01, steps, x)
        else:
            with torch.no_grad():
                net(x)
        float(x.flatten()[0])  # waits for the device
        took.append(time.perf_counter() - began)
    return sum(gradients * took[2] / 2 + forwards * took[3] for gradients, forwards in passes) * images / len(x)


def run_long(
    net: nn.Module, split: Split, natural: Tensor, jobs: dict[str, Long], blocks: Blocks, worst: Worst
) -> dict[str, Row]:
    """The long attacks, block by block; what an earlier, stopped evaluation finished is taken from its files."""
    parts = []
    with tqdm(total=len(jobs) * int(natural.sum()), unit="img", leave=False, disable=distributed.quiet()) as bar:
        everything = torch.arange(len(natural)).split(BLOCK)
        for here in everything[distributed.rank() :: distributed.world()]:  # a block is one rank's
            part = blocks.load(int(here[0]))
            if "images" in part:
                worst.take(here, part["images"], part["margins"])
            candidates = here[natural[here]]
            for name, job in jobs.items():
                bar.set_description(name)
                if name not in part["verdicts"]:
                    job.notes.clear()
                    began = time.perf_counter()
                    right = torch.zeros_like(natural)
                    if len(candidates):
                        attack = job.attack(says=bar.set_postfix_str)
                        right[candidates] = judged(net, split, candidates, attack, worst.see)
                    part["verdicts"][name], part["notes"][name] = right[here], list(job.notes)
                    part["seconds"][name] = time.perf_counter() - began
                    part |= {"images": worst.images[here].clone(), "margins": worst.margins[here].clone()}
                    blocks.save(int(here[0]), part)
                bar.update(len(candidates) * distributed.world())
            verdicts_only = {key: part[key] for key in ("verdicts", "seconds", "notes")}
            parts.append((int(here[0]), verdicts_only))
    together = distributed.collected(parts)
    if not distributed.first():
        return {}
    parts = [part for _, part in sorted((entry for parts in together for entry in parts), key=itemgetter(0))]
    rows = {}
    for name in jobs:
        notes: list[str] = []
        noted = [part["notes"][name] for part in parts]
        for line in (line for block in noted for line in block):
            noting(notes)(line)
        if len(parts) > 1:
            where = f"in {sum(map(bool, noted))} of {len(parts)} blocks of {BLOCK} images, of numbers the largest: "
            notes = [where + line for line in notes]
        right = torch.cat([part["verdicts"][name] for part in parts])
        rows[name] = Row(right, sum(part["seconds"][name] for part in parts), notes)
    return rows


def white_attack(options: argparse.Namespace) -> None:
    """Evaluate a network under the attacks of --attacks: table, white_attack.json, test.log and a picture."""
    subject = foreign_subject(options) if options.model else load_subject(options, options.ckpt_url)
    split = subject.split
    surrogate = load_surrogate(options.surrogate, subject) if options.surrogate else None
    if options.diagnostics and subject.eps == 0:
        raise UsageError("--diagnostics looks at balls around eps; give --epsilon above 0")
    folder = Path(options.log_path or subject.file).parent
    log = Path(options.log_path) if options.log_path else folder / "test.log"
    distributed.from_first(lambda: refuse_unwritable(log, options.save_adversarial))  # said before the attacks
    say = open_log(log)
    origin = provenance(split.labels.device, options.seed, ["pyautoattack"])
    settings = {
        "eps": subject.eps,
        "step_size": subject.step_size,
        **{key: getattr(options, key) for key in ("num_steps", "random", "restarts", "seed", "surrogate", "attacks")},
    }
    say(in_one_line(origin))
    say(f"{subject.file}: {subject.described()}")
    say(
        f"eps {subject.eps:.5g}, step {subject.step_size:.5g}, {'random' if options.random else 'natural'} start, "
        f"seed {options.seed}"
    )
    worst = Worst(split)
    again = (
        "stopped; finished blocks of AutoAttack and adaptive are kept, and the same command goes on: "
        f"{distributed.launcher()} {shlex.join(sys.argv)}"
    )
    with ExitStack() as stack:
        stack.enter_context(stoppable(again))
        net = stack.enter_context(frozen(subject.model))
        surrogate = None if surrogate is None else stack.enter_context(frozen(surrogate))
        rows: dict[str, Row] = {}

        def run_quick(name: str, attack: Attack | None, candidates: Tensor | None) -> Tensor:
            began = time.perf_counter()
            images = len(split.labels) if candidates is None else int(candidates.sum())
            with tqdm(total=images, desc=name, unit="img", leave=False, disable=distributed.quiet()) as bar:
                right = verdicts(net, split, options.test_batch_size, attack, candidates, bar.update, worst.see)
            rows[name] = Row(right, time.perf_counter() - began, [])
            return right

        natural = run_quick("natural", None, None)
        for flag, (name, attack) in quick_attacks(options, subject).items():
            if flag in options.attacks:
                run_quick(name, attack, natural)
        ways = views(subject.info["reverse_attention"], recipe_weight(subject), surrogate)
        blocks, jobs = None, long_attacks(options, subject, ways)
        if jobs:
            nets = [net] if surrogate is None else [net, surrogate]
            depends = settings | origin["versions"] | {"reverse_attention": subject.info["reverse_attention"]}
            blocks = Blocks(folder, fingerprint(nets, split, depends, foreign=bool(options.model)))
        if jobs or options.diagnostics:
            passes = [(job.gradients, job.forwards) for job in jobs.values()]
            passes += [diagnostic_passes(len(ways))] if options.diagnostics else []
            what = [*dict.fromkeys(name.split(":")[0] for name in jobs), *(["diagnostics"] * options.diagnostics)]
            rounds = -(-len(split.labels) // BLOCK)  # blocks, which ranks share
            share = -(-rounds // distributed.world()) / rounds
            minutes = share * expected_seconds(net, split, passes, int(natural.sum())) / 60
            kept = "; finished blocks of AutoAttack and adaptive are kept if it is stopped" if jobs else ""
            say(
                f"{' and '.join(what)}: up to {minutes:.0f} min here for {int(natural.sum())} images; --n-examples N "
                f"takes fewer{kept}"
            )
        if jobs:
            rows |= run_long(net, split, natural, jobs, blocks, worst)
        diagnosis = None
        if options.diagnostics:
            diagnosis = run_diagnostics(net, subject, natural, options, ways, folder, say)
        worst.join()
        if not distributed.first():
            return
        add_worst_cases(rows)
        how = {key: getattr(options, key) for key in ("test_batch_size", "n_examples", "diagnostics")}
        record = {"provenance": origin, "checkpoint": str(subject.file), **describe(subject, settings | how)}
        write_json(folder / "white_attack.json", record, rows, diagnosis)
        for line in table(rows, subject):
            say(line)
        if len(rows) > 1:
            picture = folder / "adversarial_examples.png"
            shown = examples(net, split, worst, natural)
            write_atomically(picture, lambda file: draw_examples(*shown, subject.eps, split.classes, file))
            say(f"picture    {picture}")
        if options.save_adversarial:
            right = rows["worst case" if "worst case" in rows else list(rows)[-1]].right
            say(save_adversarial(Path(options.save_adversarial), net, split, worst, right, subject.eps))
        if blocks is not None:
            blocks.clear()


def refuse_unwritable(log: Path, saved: str | None) -> None:
    """UsageError where the log, the files beside it or the one of --save-adversarial cannot be written."""
    try:
        log.open("a").close()
        tempfile.TemporaryFile(dir=log.parent).close()
    except OSError as error:
        raise UsageError(f"{log} cannot be written ({error.strerror}); name another by --log_path") from error
    if saved is None:
        return
    try:
        tempfile.TemporaryFile(dir=Path(saved).resolve().parent).close()
    except OSError as error:
        raise UsageError(f"--save-adversarial {saved} cannot be written ({error.strerror}); name another") from error
    if Path(saved).is_dir():
        raise UsageError(f"--save-adversarial {saved} is a folder; name a file in it")


def load_surrogate(path: str, subject: Subject) -> nn.Module:
    """The network of --surrogate, on the device of the subject; UsageError where it does not take its images."""
    surrogate, info = load_model(path, subject.split.labels.device)
    if info["num_classes"] != len(subject.split.classes) or info["dataset"] not in (None, subject.dataset):
        raise UsageError(
            f"--surrogate {path} is a network of {info['num_classes']} classes of {info['dataset'] or 'unknown data'}; "
            f"name one of {subject.dataset}, {len(subject.split.classes)} classes"
        )
    if info["image_size"] != subject.split.images.shape[-1] and info["arch"].startswith("PreAct"):
        raise UsageError(f"--surrogate {path} takes images of side {info['image_size']}; name one of the same data set")
    return surrogate


def add_worst_cases(rows: dict[str, Row]) -> None:
    """Add the worst case, image by image, over the views of the adaptive attack and over all attacks of the run."""
    adapted = [row for name, row in rows.items() if name.startswith(ADAPTIVE)]
    if len(adapted) > 1:
        rows["adaptive, worst case"] = _together(adapted)
    if len(rows) > 2:
        rows["worst case"] = _together(list(rows.values()))


def _together(rows: list[Row]) -> Row:
    return Row(torch.stack([row.right for row in rows]).all(0), sum(row.seconds for row in rows), [])


def table(rows: dict[str, Row], subject: Subject) -> Iterator[str]:
    """The lines of the table, notes below it, and the row in Markdown."""
    width = max(map(len, rows))
    yield f"{'attack':<{width}}  {'robust %':>8}  {'95 % interval':>14}  {'images':>6}  {'seconds':>8}"
    for name, row in rows.items():
        low, high = wilson(row.right)
        interval = f"{low:.2f} - {high:.2f}"
        yield (
            f"{name:<{width}}  {percent(row.right):>8.2f}  {interval:>14}  {len(row.right):>6}  "
            f"{'' if 'worst case' in name else f'{row.seconds:.1f}':>8}"
        )
    if subject.of > len(subject.split.labels):
        yield f"note: {len(subject.split.labels)} of {subject.of} test images, the first after a fixed shuffle"
    for name, row in rows.items():
        for note in row.notes:
            yield f"note, {name}: {note}"
    if subject.info["reverse_attention"] and "adaptive, worst case" not in rows:
        yield "note: attacks on the final logits overestimate networks with reverse attention; add --attacks all"
    yield "| network | " + " | ".join(rows) + " |"
    yield "|" + "---|" * (len(rows) + 1)
    yield (
        f"| {method_name(subject)}, {subject.info['arch']}, {subject.dataset}, eps {subject.eps:.4g}, "
        f"{len(subject.split.labels)} images | " + " | ".join(f"{percent(r.right):.2f}" for r in rows.values()) + " |"
    )


def describe(subject: Subject, settings: dict) -> dict:
    """What white_attack.json says of the network, the images and the settings."""
    known = ("arch", "width", "reverse_attention", "epoch", "image_size", "recipe")
    return {
        "network": {"method": method_name(subject)} | {key: subject.info.get(key) for key in known},
        "dataset": subject.dataset,
        "images": len(subject.split.labels),
        "image_numbers": None if subject.split.numbers is None else subject.split.numbers.tolist(),
        "settings": settings | {"auxiliary_weight": recipe_weight(subject)},
    }


def write_json(file: Path, record: dict, rows: dict[str, Row], diagnosis: Diagnosis | None) -> None:
    """white_attack.json: this evaluation, and those before it under `earlier`.

    verdicts: a character an image, 1 where it is right, in the order of the test set or of the shuffle of --n-examples.
    """
    record["attacks"] = {
        name: {
            "robust_accuracy": percent(row.right),
            "interval_95": wilson(row.right),
            "images": len(row.right),
            "seconds": round(row.seconds, 2),
            "notes": row.notes,
            "verdicts": "".join("01"[right] for right in row.right.tolist()),
        }
        for name, row in rows.items()
    }
    if diagnosis is not None:
        record["diagnostics"] = {
            "signs": [sign._asdict() for sign in diagnosis.signs],
            "by_eps": diagnosis.by_eps,
            "by_steps": diagnosis.by_steps,
        }
    try:
        before = json.loads(file.read_text())
        record["earlier"] = [*before.pop("earlier", []), before]
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or none of ours
        record["earlier"] = []
    write_atomically(file, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))


def examples(net: nn.Module, split: Split, worst: Worst, natural: Tensor, count: int = 8) -> tuple[Tensor, ...]:
    """Images for the picture, fooled ones first -> natural, adversarial (n, 3, S, S), probabilities of both, labels."""
    fooled = natural & (worst.margins < 0)
    chosen = torch.cat([fooled.nonzero().squeeze(1), (~fooled).nonzero().squeeze(1)])[:count]
    batch = split.take(chosen.to(split.labels.device))
    pair = as_input(batch.images), worst.images[chosen].to(batch.images.device)
    with torch.no_grad():
        probabilities = [net(x).softmax(1).cpu() for x in pair]
    return (*(x.cpu() for x in pair), *probabilities, batch.labels.cpu())


def save_adversarial(file: Path, net: nn.Module, split: Split, worst: Worst, right: Tensor, eps: float) -> str:
    """Write the worst image found for each one to an npz, after what is written was read and tried again.

    images: (N, 3, S, S) float32 in [0, 1] and in the ball. labels: (N,). right: (N,) the verdicts on just these images,
    those of the table's worst case but for an image on the edge of two classes, judged in another batch by rounding.
    """
    images, labels = worst.images, split.labels.cpu()
    off = (images - as_input(split.images.cpu())).abs().amax().item()
    if off > eps + 1e-6 or images.min() < 0 or images.max() > 1:
        raise RunError(f"an attack left the ball of {eps:.5g} (by {off - eps:.2g}) or [0, 1]; nothing is saved")

    def still_right(images: Tensor) -> Tensor:
        with torch.no_grad():
            answers = [net(x.to(split.labels.device)).argmax(1).cpu() for x in images.split(BLOCK)]
        return torch.cat(answers) == labels

    found = still_right(images)

    def write(part: Path) -> None:
        content = {"images": images.numpy(), "labels": labels.numpy(), "right": found.numpy(), "eps": np.float32(eps)}
        with open(part, "wb") as out:
            np.savez_compressed(out, **content)
        with np.load(part) as stored:
            if not torch.equal(still_right(torch.from_numpy(stored["images"])), found):
                raise RunError(f"{file}: the network answers otherwise to images read again; nothing is saved")

    write_atomically(file, write)
    differ = int((found != right).sum())
    return (
        f"saved      {file}: {len(labels)} images, {int((~found).sum())} of which the network gets wrong, read again"
        + (f"; {differ} of them judged otherwise than in the table, by rounding" if differ else "")
    )


def run_diagnostics(
    net: nn.Module,
    subject: Subject,
    natural: Tensor,
    options: argparse.Namespace,
    ways: dict[str, View],
    folder: Path,
    say: Callable[[str], None],
) -> Diagnosis:
    """--diagnostics: the signs of masking, a line each, and two pictures."""
    style = dict(desc="diagnostics", bar_format="{desc}: {postfix} {elapsed}", leave=False, disable=distributed.quiet())
    with tqdm(**style) as bar:
        diagnosis = diagnose(
            net,
            subject.split,
            natural,
            ways,
            eps=subject.eps,
            step_size=subject.step_size,
            seed=options.seed,
            batch_size=options.test_batch_size,
            progress=bar.set_postfix_str,
        )
    if not distributed.first():
        return diagnosis
    for sign in diagnosis.signs:
        say(f"{'SIGN' if sign.raised else 'ok':<5} {sign.name}: {sign.figure}")
    for curve, label, name in (
        (diagnosis.by_eps, "eps", "robust_vs_eps.png"),
        (diagnosis.by_steps, "steps", "robust_vs_steps.png"),
    ):
        if curve:
            write_atomically(folder / name, partial(draw_robustness, curve, label))
            say(f"picture    {folder / name}")
    return diagnosis
