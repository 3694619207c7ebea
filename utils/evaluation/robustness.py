"""What test_white_attack.py does: run the attacks block by block, keep what is finished, and say what was found."""

import ast
import hashlib
import inspect
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import ReverseAttentionNetwork
from utils import attacks
from utils.attacks import NOISE_DRAWS, Attack, cross_entropy, margin, margins, noise, pgd
from utils.data.datasets import Split, as_input, numbers_of
from utils.data.subject import Subject, at_home, foreign_subject, load_subject, over_images, right_or_not
from utils.evaluation import report, results
from utils.evaluation.adaptive import VERSION as ADAPTIVE_VERSION
from utils.evaluation.adaptive import View, adaptive, views
from utils.evaluation.autoattack import BLOCK, Says, autoattack, square, take_part
from utils.evaluation.autoattack import VERSION as AUTOATTACK_VERSION
from utils.evaluation.diagnostics import doubts
from utils.evaluation.report import Row, Worst
from utils.evaluation.results import ADAPTIVE
from utils.system import distributed
from utils.system.attack_copy import AttackCopy
from utils.system.checkpoints import checkpoint_file, load_model, told
from utils.system.devices import computing
from utils.system.errors import Stopped, UsageError, stop_signals
from utils.system.files import read_arrays, require_writable, write_arrays
from utils.system.log import open_log
from utils.system.provenance import in_one_line, provenance
from utils.system.settings import APGD_STEPS, BLIND, Evaluation
from utils.system.values import eps_text

FEW, SOME = 16, 64  # images whose answers tell a foreign network; those that are looked at for doubts
WORTH_KEEPING = 10  # seconds of attacks in a block under way, after which what its parts have found is written
LIBRARY = "pyautoattack"  # AutoAttack, and the APGD of the adaptive attack


class Planned(NamedTuple):
    """An attack of the table.

    build(warned=, says=, keep=) makes it, None for no attack; the first two functions take a library's warnings and its
    progress, the third keeps what its parts find.
    depends: all that its results depend on besides network and images, as plain values. version: raised by hand when
    its results change, so that those kept from before are not taken for its own.
    """

    build: Callable[..., Attack | None]
    depends: dict
    version: int


def planned_attacks(
    settings: Evaluation, subject: Subject, ways: dict[str, View], surrogate: nn.Module | None = None
) -> dict[str, Planned]:
    """The attacks of --attacks by their names in the table, `natural` first, on which all others depend.

    ways: the views of the adaptive attack. surrogate: the network that one of them takes its gradients from.
    """
    eps, step, seed, steps = subject.eps, subject.step_size, settings.seed, settings.num_steps
    half = max(1, steps // 2)

    searched = {} if settings.precision == "default" else {"precision": settings.precision}

    def quick(attack: Callable[..., Attack], **how: object) -> Planned:
        return Planned(lambda **_: attack(**how), how | searched, attacks.VERSION)

    def long(attack: Callable[..., Attack], version: int, also: dict, **how: object) -> Planned:
        return Planned(partial(attack, **how), how | also | shared | searched, version)

    shared = {LIBRARY: metadata.version(LIBRARY), "attacks": attacks.VERSION}
    ball = {"eps": eps, "seed": seed, "start": "uniform" if settings.random else "image"}
    on_view = dict(eps=eps, step_size=step, steps=steps, restarts=settings.restarts, seed=seed)
    if settings.apgd_steps != APGD_STEPS:  # else as before there was the flag: what was kept then is good
        on_view["apgd_steps"] = settings.apgd_steps
    also, transfer = {"over heads": {"auxiliary weight": subject.auxiliary_weight}}, {}
    if surrogate is not None:
        also["surrogate"] = {"surrogate": fingerprint(surrogate)}
        alone = quick(partial(pgd, lambda _, y: cross_entropy(surrogate, y)), step_size=step, steps=steps, **ball)
        transfer = {f"transfer PGD-{steps}": alone._replace(depends=alone.depends | also["surrogate"])}
    plans = {
        "natural": {"natural": Planned(lambda **_: None, {}, attacks.VERSION)},
        "fgsm": {"FGSM": quick(partial(pgd, cross_entropy), step_size=eps, steps=1, **ball)},
        "pgd": {f"PGD-{steps}": quick(partial(pgd, cross_entropy), step_size=step, steps=steps, **ball)},
        "cw": {f"CW-{half}": quick(partial(pgd, margin), step_size=step, steps=half, **ball)},
        "noise": {f"noise, {NOISE_DRAWS} draws": quick(noise, eps=eps, seed=seed, draws=NOISE_DRAWS)},
        "square": {"Square": long(square, AUTOATTACK_VERSION, {}, eps=eps, seed=seed)},
        "transfer": transfer,
        "autoattack": {"AutoAttack": long(autoattack, AUTOATTACK_VERSION, {}, eps=eps, seed=seed)},
        "adaptive": {
            ADAPTIVE + name: long(partial(adaptive, view), ADAPTIVE_VERSION, also.get(name, {}), **on_view)
            for name, view in ways.items()
        },
    }
    wanted = {"natural", *settings.attacks}
    return {name: plan for flag, group in plans.items() if flag in wanted for name, plan in group.items()}


def fingerprint(model: nn.Module, foreign: str = "", images: Tensor | None = None) -> str:
    """What a network is: its weights, the plain attributes of its modules, and their code, comments aside.

    foreign: the module that built it, of --model. Its network may keep anything anywhere, so its code counts as well,
    and its answers to images (n, 3, S, S) and their gradients, bit for bit.
    """
    digest, sources = hashlib.sha256(), {foreign} if foreign else set()
    for name, module in model.named_modules():
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if _plain(value))
        digest.update(repr((name, type(module).__qualname__, plain)).encode())
        sources |= {cls.__module__ for cls in type(module).__mro__}
    for source in sorted(s for s in sources - {Subject.__module__} if s.split(".")[0] not in ("torch", "builtins")):
        digest.update(_code(source).encode())
    values = list(model.state_dict().values())
    if images is not None:
        images = images.detach().requires_grad_()
        values.append(model(images))
        if values[-1].requires_grad:
            values += torch.autograd.grad(values[-1].sum(), images, allow_unused=True)
    for value in values:
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def images_checksum(split: Split) -> str:
    """What the images of a split are, with their labels and their numbers."""
    digest = hashlib.sha256()
    for tensor in (split.images, split.labels, numbers_of(split)):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _plain(value: object) -> bool:
    return all(map(_plain, value)) if isinstance(value, tuple) else isinstance(value, bool | int | float | str | None)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _code(module: str) -> str:
    """A module's code without comments and docstrings; empty where its source is not to be had."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


class Found(NamedTuple):
    """What an attack found in a block of n images.

    right: (n,) bool. images: (m, 3, S, S), an adversarial one for each image that it fools, in order. margins: (m,),
    their largest other logit less the label's. notes: what a reader must know. made: when, and on which device.
    parts: how many images stand after each part of AutoAttack, and its seconds; None where an older file does not say.
    """

    right: Tensor
    images: Tensor
    margins: Tensor
    seconds: float
    notes: list[str]
    made: str = ""
    parts: dict[str, tuple[int, float]] | None = None


class Kept:
    """What is finished, an npz for each attack and block: whoever asks for the same again has it.

    The same means: network, images, attack and its settings (`file`), whatever else a command says.
    """

    def __init__(self, folder: Path, network: str, now: str) -> None:
        self.folder, self.network, self.now = folder / "white_attack.blocks", network, now

    def file(self, name: str, plan: Planned, block: Split) -> Path:
        about = [self.network, name, plan.version, plan.depends, numbers_of(block).tolist()]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for tensor in (block.images, block.labels):
            digest.update(_bytes(tensor))
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest.hexdigest()[:24]}.npz"

    def load(self, file: Path, natural: Tensor | None, shape: torch.Size) -> Found | None:
        """None where there is nothing, or nothing that can be right: cut off, or foreign."""
        try:
            settings, arrays = read_arrays(file)
            right, images, found = (torch.from_numpy(arrays[key]) for key in ("right", "images", "margins"))
            told = float(settings["seconds"]), [str(note) for note in settings["notes"]], str(settings["made"])
            parts = settings.get("parts")  # None in files of the first release
            parts = parts and {str(name): (int(count), float(s)) for name, (count, s) in parts.items()}
            fooled = 0 if natural is None else int((natural & ~right.bool()).sum())
            fits = right.shape == shape[:1] and images.shape == (fooled, *shape[1:]) and found.shape == (fooled,)
        except (UsageError, KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            return None
        return Found(right.bool(), images.float(), found.float(), *told, parts) if fits else None

    def save(self, file: Path, found: Found) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {key: getattr(found, key).numpy() for key in ("right", "images", "margins")}
        told = {"seconds": found.seconds, "notes": found.notes, "made": self.now, "parts": found.parts}
        write_arrays(file, told, **arrays)


class KeptParts:
    """What the finished parts of an attack have found in a block under way, in an npz: a stop loses one part at most.

    Called as a `Keep`. A part belongs to the very images and labels that it was given, whatever else has changed.
    replayed: seconds of the parts that an earlier process has attacked, by name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.with_suffix(".parts")
        self.images: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}
        self.replayed: dict[str, float] = {}
        self.saved = time.perf_counter()
        with suppress(UsageError, KeyError, TypeError, ValueError, AttributeError):  # none yet, or a damaged one
            settings, arrays = read_arrays(self.file)
            self.seconds = {key: float(seconds) for key, seconds in settings["seconds"].items()}
            self.images = {key: torch.from_numpy(images) for key, images in arrays.items() if key in self.seconds}

    def __call__(self, name: str, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
        key = f"{name} {hashlib.sha256(_bytes(x) + _bytes(labels)).hexdigest()[:24]}"
        kept_images = self.images.get(key)
        if kept_images is not None and kept_images.shape == x.shape:
            self.replayed[name] = self.seconds[key]
            return kept_images.to(x)
        began = time.perf_counter()
        images = attack(x, labels)
        self.images[key] = images.detach().cpu()
        now = time.perf_counter()
        self.seconds[key] = now - began
        if now - self.saved >= WORTH_KEEPING:
            arrays = {key: images.numpy() for key, images in self.images.items()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(self.file, {"seconds": self.seconds}, **arrays)
            self.saved = time.perf_counter()
        return images

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def attack_block(
    net: nn.Module,
    block: Split,
    plan: Planned,
    natural: Tensor | None,
    batch_size: int,
    says: Says,
    kept_parts: KeptParts,
) -> Found:
    """Attack the images of a block that are right without an attack, all of them where natural is None."""
    began, notes, parts = time.perf_counter(), [], {}

    def take_line(line: str) -> None:
        says(line)
        take_part(line, len(rows), parts)

    attack = plan.build(warned=notes.append, says=take_line, keep=kept_parts)
    rows = torch.arange(len(block.labels)) if natural is None else natural.nonzero().squeeze(1)
    right = torch.zeros(len(block.labels), dtype=torch.bool)
    images, found = as_input(block.images[:0]).cpu(), torch.zeros(0)
    if len(rows):
        # a library draws the noise of a block at once
        size = BLOCK if LIBRARY in plan.depends else even_batches(len(rows), batch_size)
        right[rows], x, logits = over_images(block, rows, size, partial(right_or_not, net, attack), shared=False)
        if natural is not None:
            fooled = ~right[rows]
            images, found = x[fooled], margins(logits, block.labels.cpu()[rows])[fooled]
    for name, seconds in kept_parts.replayed.items():
        if name in parts:
            parts[name] = parts[name][0], parts[name][1] + seconds
    seconds = time.perf_counter() - began + sum(kept_parts.replayed.values())
    return Found(right, images, found, seconds, notes, parts=parts)


def even_batches(count: int, most: int) -> int:
    """The size of batches, all but alike, in which `count` images take as few passes as in batches of `most`."""
    passes = math.ceil(count / most)
    return math.ceil(count / passes)


def run_attacks(
    subject: Subject, plans: dict[str, Planned], kept: Kept, batch_size: int, say: Says
) -> tuple[dict[str, Row], Worst]:
    """Every attack on every block, ranks taking turns; what was finished before, by whatever command, is taken over."""
    split = subject.split
    blocks = torch.arange(len(split.labels)).split(BLOCK)
    own = range(distributed.rank(), len(blocks), distributed.world())
    worst, finished, timed = Worst(split), [], False
    with tqdm(total=len(own) * len(plans), unit="attack", leave=False, disable=distributed.quiet()) as bar:
        for left, i in zip(reversed(range(len(own))), own, strict=True):
            here, natural, seconds = blocks[i], None, 0.0
            block = split.take(here.to(split.labels.device))._replace(numbers=numbers_of(split)[here])
            for name, plan in plans.items():
                bar.set_description(name)
                bar.set_postfix_str("")
                file = kept.file(name, plan, block)
                found = kept.load(file, natural, block.images.shape)
                if found is None:
                    parts = KeptParts(file)
                    found = attack_block(subject.model, block, plan, natural, batch_size, bar.set_postfix_str, parts)
                    kept.save(file, found)
                    parts.remove()
                    seconds += found.seconds
                if natural is None:
                    natural = found.right
                worst.take(here[natural & ~found.right], found.images, found.margins)
                finished.append((i, name, *found._replace(images=None, margins=None)))
                bar.update()
            if seconds and left and not timed:
                minutes, timed = seconds * left / 60, True
                say(f"block {i + 1} of {len(blocks)} is done; about {minutes:.0f} min more, less what is kept already")
    worst.join()
    everything = sorted((f for one in distributed.gathered(finished) for f in one), key=lambda f: f[0])
    return {name: joined_row([Found(*f) for _, own, *f in everything if own == name]) for name in plans}, worst


def joined_row(blocks: list[Found]) -> Row:
    """An attack's line of the table, from its blocks in order. Notes alike but for their numbers are said once."""
    alike: dict[str, tuple[str, set[int]]] = {}  # by what they say but for numbers: the first, and the blocks' numbers
    for i, block in enumerate(blocks):
        for note in block.notes:
            alike.setdefault(re.sub(r"\d+", "", note), (note, set()))[1].add(i)
    whole, kept = f"of {len(blocks)} blocks", [block.made for block in blocks if block.made]
    notes = [f"in {len(of)} {whole}, first: {n}" if len(blocks) > 1 else n for n, of in alike.values()]
    if kept:
        notes.append(f"{len(kept)} {whole} of {BLOCK} images kept from an earlier evaluation ({kept[0]})")
    right, parts = torch.cat([block.right for block in blocks]), {}
    if all(block.parts is not None for block in blocks):
        for name in dict.fromkeys(name for block in blocks for name in block.parts):
            standing, seconds = map(sum, zip(*(block.parts.get(name, (0, 0)) for block in blocks), strict=True))
            parts[name] = {"robust_accuracy": 100 * standing / len(right), "seconds": seconds}
    notes += [f"{part['robust_accuracy']:.2f} % after {name}, {part['seconds']:.1f} s" for name, part in parts.items()]
    return Row(right, sum(block.seconds for block in blocks), notes, parts)


def load_surrogate(path: str, subject: Subject) -> nn.Module:
    """The network of --surrogate, on the device of the subject; UsageError where it does not take its images."""
    split = subject.split
    surrogate, info = load_model(path, split.labels.device)
    told(Path(path), info["notes"])
    classes, dataset, side = info["num_classes"], info["dataset"], info["image_size"]
    fits = side == split.images.shape[-1] or not info["arch"].startswith("PreAct")  # others take any size
    if not fits or classes != len(split.classes) or dataset not in (None, subject.dataset):
        raise UsageError(
            f"--surrogate {path} is a network of {classes} classes of {dataset or 'unknown data'}, side {side}; "
            f"name one of {subject.dataset}, {len(split.classes)} classes, side {split.images.shape[-1]}"
        )
    return surrogate


def attacked(model: nn.Module) -> nn.Module:
    """The network that attacks call: that of an `AttackCopy`, or a foreign one itself, which copying might break."""
    if any(isinstance(module, ReverseAttentionNetwork) for module in model.modules()):
        with suppress(Exception):  # of one of ours in something that cannot be copied, whatever that raises
            return AttackCopy(model).net
    return model


def folder_name(model: str) -> str:
    """The folder of what --model names: letters, digits and dashes, of which none is at an end."""
    return re.sub(r"\W+", "-", model).strip("-") or "network"


def white_attack(settings: Evaluation) -> None:
    """Evaluate the network of --model, or those of --ckpt_url one after the other, then side by side."""
    if settings.model:
        with at_home(settings.model):
            subject, folder = foreign_subject(settings), Path("evaluated") / folder_name(settings.model)
            if not settings.log_path:
                require_writable(folder, "name another by --log_path")
            evaluate(settings, subject, folder)
    files = [checkpoint_file(path).resolve() for path in settings.ckpt_url or ()]
    if len({file.parent for file in files}) < len(files):
        raise UsageError("--ckpt_url names two checkpoints of one folder, whose files would replace each other")
    records = []
    for path in settings.ckpt_url or ():
        subject = load_subject(settings, path)
        records.append(evaluate(settings, subject, subject.file.parent))
    if len(records) > 1 and distributed.first():
        print(*results.table(results.grouped(records)), sep="\n")


def weaker(settings: Evaluation) -> list[str]:
    """What a reader of the adaptive attack's figures must know of its settings."""
    usual = {name: getattr(Evaluation, name) for name in ("restarts", "num_steps", "apgd_steps")}
    few = [f"{name} {getattr(settings, name)} for {of}" for name, of in usual.items() if getattr(settings, name) < of]
    return [f"a weaker adaptive attack than usual: {', '.join(few)}"] * bool(few and "adaptive" in settings.attacks)


def evaluate(settings: Evaluation, subject: Subject, folder: Path) -> dict:
    """Attack a network; its table goes to `folder`, or where --log_path says, with JSON, log and pictures.

    Returns what the JSON holds; nothing on other ranks than the first.
    """
    surrogate = load_surrogate(settings.surrogate, subject) if settings.surrogate else None
    if settings.diagnostics and subject.eps == 0:
        raise UsageError("--diagnostics looks at balls around eps; give --epsilon above 0")
    log = Path(settings.log_path or folder / "test.log")
    distributed.from_first(lambda: report.refuse_unwritable(log, settings.save_adversarial))  # before the attacks
    split, say = subject.split, open_log(log)
    origin = provenance(split.labels.device, settings.seed, [LIBRARY])

    def stop(signum: int, frame: object) -> None:
        again = f"{distributed.launcher()} {shlex.join(sys.argv)}"
        raise Stopped(signum, f"stopped; finished blocks are kept, and the same command goes on: {again}")

    foreign = (subject.info["module"], as_input(split.images[:FEW])) if settings.model else ()
    subject = subject._replace(notes=[*subject.notes, *weaker(settings)])
    kept = Kept(log.parent, fingerprint(subject.model, *foreign), f"{origin['started']}, {origin['device']}")
    identity = {"network": kept.network, "images": images_checksum(split), "eps": subject.eps}
    subject = subject._replace(model=attacked(subject.model))
    other = surrogate and attacked(surrogate)
    with stop_signals(stop), computing(settings.precision):
        how = {"predict": subject.answers, **subject.gates}
        ways = views(subject.info["reverse_attention"], subject.auxiliary_weight, other, **how)
        plans = planned_attacks(settings, subject, ways, surrogate)
        say(in_one_line(origin))
        say(f"{subject.file}: {subject.described()}")
        start = "random" if settings.random else "natural"
        say(f"eps {eps_text(subject.eps)}, step {eps_text(subject.step_size)}, {start} start, seed {settings.seed}")
        if settings.diagnostics or any(LIBRARY in plan.depends for plan in plans.values()):
            say(
                f"AutoAttack, adaptive attacks and diagnostics take long: blocks of {BLOCK} images, each kept in "
                f"{kept.folder} when it is finished, and its parts before; --n-examples N takes fewer"
            )
        by_gradient = settings.diagnostics or not set(settings.attacks).issubset(BLIND)
        with computing("fp32"):
            doubted = doubts(subject.model, as_input(split.images[:SOME]), split.labels[:SOME], by_gradient)
        rows, worst = run_attacks(subject, plans, kept, settings.test_batch_size, say)
        for name, plan in plans.items():
            rows[name] = rows[name]._replace(settings=plan.depends | {"version": plan.version})
        diagnosis, record = None, {}
        if settings.diagnostics:
            right = rows["natural"].right
            rows["diagnostics"], diagnosis = report.run_diagnostics(subject, right, worst, ways, settings, log, say)
            looked = {"step_size": subject.step_size, "seed": settings.seed}
            rows["diagnostics"] = rows["diagnostics"]._replace(settings=looked)
        if distributed.first():
            attacked_now = rows  # whose images are at hand
            rows = rows | report.earlier_rows(log.with_name(results.FILE), identity, rows, doubted)
            rows |= report.worst_cases(rows, subject.info)
            rows = {name: row._replace(notes=[*doubted, *row.notes]) for name, row in rows.items()}
            more = {"provenance": origin, "predicted": report.predictions(subject, worst), "identity": identity}
            record = report.write_json(log.with_name(results.FILE), settings, subject, rows, diagnosis, more)
            for line in report.table(rows, subject, doubted):
                say(line)
            if len(attacked_now) > 1:
                say(report.write_picture(log.with_name("adversarial_examples.png"), subject, worst, attacked_now))
            if settings.save_adversarial:
                right = report.lowest(attacked_now)
                saved = Path(settings.save_adversarial), subject, worst, more["predicted"]["worst case"], right
                say(report.save_adversarial(*saved))
    return record
