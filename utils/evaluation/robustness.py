"""What test_white_attack.py does, in the order in which a row of its table comes about.

`white_attack` evaluates each network that the command names. `evaluate` plans the attacks and runs
them on blocks of 250 images. Each attack and block gives verdicts, which are cached in a file.
Verdicts of all blocks make a row, rows make the worst case, and `report` formats the table.
"""

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import ReverseAttentionNetwork
from utils import attacks
from utils.attacks import NOISE_DRAWS, Attack, cross_entropy, margin, margins, noise, pgd
from utils.data.datasets import Split, as_input, checksum_of, numbers_of
from utils.data.foreign import foreign_checksum
from utils.data.subject import Subject, load_subject, over_images, right_or_not
from utils.evaluation import report, results
from utils.evaluation.adaptive import VERSION as ADAPTIVE_VERSION
from utils.evaluation.adaptive import View, adaptive, views
from utils.evaluation.autoattack import BLOCK, Monitor, autoattack, square
from utils.evaluation.autoattack import VERSION as AUTOATTACK_VERSION
from utils.evaluation.diagnostics import Diagnosis, Probe, diagnose, sanity_warnings
from utils.evaluation.report import Row
from utils.evaluation.results import ADAPTIVE, FILE, WORST_CASES
from utils.system import distributed
from utils.system.attack_copy import AttackCopy
from utils.system.checkpoints import checkpoint_file, load_model
from utils.system.devices import computing
from utils.system.errors import Stopped, UsageError, stop_signals
from utils.system.files import read_arrays, require_writable, write_arrays, write_record
from utils.system.log import open_log
from utils.system.provenance import in_one_line, provenance
from utils.system.settings import BLIND, Evaluation
from utils.system.values import eps_text

PACKAGE = "pyautoattack"  # AutoAttack, Square, and the APGD of the adaptive attack
WORTH_CACHING = 10  # seconds of a part of an attack that are worth a file
RECORDED = (  # settings that white_attack.json keeps
    "num_steps",
    "random",
    "restarts",
    "apgd_steps",
    "seed",
    "surrogate",
    "attacks",
    "test_batch_size",
    "n_examples",
    "diagnostics",
    "precision",
    "predict",
)


def white_attack(settings: Evaluation) -> None:
    """Evaluate the network of --model, or those of --ckpt_url, and compare several."""
    folders = [checkpoint_file(path).resolve().parent for path in settings.ckpt_url or ()]
    if len(set(folders)) < len(folders):
        raise UsageError(
            "--ckpt_url names two checkpoints of one folder, whose files would replace each other"
        )
    records = [evaluate(settings, subject, folder) for subject, folder in subjects(settings)]
    if len(records) > 1 and distributed.first():
        print(*results.table(results.grouped(records)), sep="\n")


def subjects(settings: Evaluation) -> Iterator[tuple[Subject, Path]]:
    """Yield each network with its test images, and the folder of its evaluation."""
    if settings.model:
        name = re.sub(r"\W+", "-", settings.model).strip("-") or "network"
        yield load_subject(settings), Path("evaluated") / name
    for path in settings.ckpt_url or ():
        subject = load_subject(settings, path)
        yield subject, subject.file.parent


def evaluate(settings: Evaluation, subject: Subject, folder: Path) -> dict:
    """Attack a network, and write its table, JSON, log and pictures.

    Files go to `folder`, or beside --log_path. Returns the record that white_attack.json holds, an
    empty one on other ranks than the first.
    """
    batch_size = settings.test_batch_size
    recorded_settings = {name: getattr(settings, name) for name in RECORDED}
    by_gradient = settings.diagnostics or not set(settings.attacks).issubset(BLIND)
    log_file = Path(settings.log_path or folder / "test.log")
    saved_file = Path(settings.save_adversarial) if settings.save_adversarial else None
    split = subject.split
    if settings.diagnostics and subject.eps == 0:
        raise UsageError("--diagnostics looks at balls around eps; give --epsilon above 0")
    surrogate = load_surrogate(settings.surrogate, subject) if settings.surrogate else None
    if saved_file and saved_file.is_dir():
        raise UsageError(f"--save-adversarial {saved_file} is a folder; name a file in it")
    if saved_file:
        hint = f"name another file by --save-adversarial than {saved_file}"
        require_writable(saved_file.resolve().parent, hint)
    if log_file.is_dir():
        raise UsageError(f"--log_path {log_file} is a folder; name a file in it")
    require_writable(log_file.parent, "name another folder by --log_path")

    if settings.model:
        checksum = foreign_checksum(subject.model, subject.info, split)
    else:
        checksum = network_checksum(subject.model, subject.info)
    identity = {"network": checksum, "images": images_checksum(split), "eps": subject.eps}

    subject = subject._replace(model=attack_copy(subject.model))
    surrogate_copy = attack_copy(surrogate.model) if surrogate else None
    origin = provenance(split.labels.device, settings.seed, [PACKAGE])
    made = f"{origin['started']}, {origin['device']}"
    log = open_log(log_file)
    log(in_one_line(origin))
    cache = BlockCache(log_file.parent / "white_attack.blocks", checksum, made)
    view_by_name = views(
        subject.info["reverse_attention"],
        subject.auxiliary_weight,
        surrogate_copy,
        predict=subject.head,
        **subject.gates,
    )
    plans = planned_attacks(settings, subject, view_by_name, surrogate)
    log(f"{subject.file}: {subject.described()}")
    log(
        f"eps {eps_text(subject.eps)}, step {eps_text(subject.step_size)}, "
        f"{'random' if settings.random else 'natural'} start, seed {settings.seed}"
    )
    log(
        f"blocks of {BLOCK} images, each cached in {cache.folder} when an attack has finished it; "
        "AutoAttack and adaptive attacks take long, and --n-examples N takes fewer images"
    )

    with stop_signals(stop), computing(settings.precision):
        warnings = sanity_warnings(subject.model, split, by_gradient)
        rows, worst = run_attacks(subject.model, split, plans, cache, batch_size)
        diagnosis = None
        if settings.diagnostics:
            natural = rows["natural"].right
            rows["diagnostics"], diagnosis = run_diagnostics(
                subject, natural, worst, view_by_name, settings.seed, batch_size
            )
        if not distributed.first():
            return {}
        logits = logits_of(subject.model, as_input(split.images.cpu()), split.labels.device)
        worst_logits = logits_of(subject.model, worst.images, split.labels.device)

    attacked = [name for name in rows if name != "natural"]
    rows |= earlier_rows(log_file.with_name(FILE), identity, rows, warnings)
    rows |= worst_cases(rows, subject.info)
    subject = subject._replace(notes=[*subject.notes, *weaker_than_usual(rows)])

    record = report.record(rows, subject, warnings, recorded_settings, made)
    record["provenance"] = origin
    record["predicted"] = {
        "natural": logits.argmax(1).tolist(),
        "worst case": worst_logits.argmax(1).tolist(),
    }
    record["identity"] = identity
    if diagnosis is not None:
        record["diagnostics"] = report.diagnosis_record(diagnosis)
        for line in report.diagnosis_lines(diagnosis, subject, log_file.parent):
            log(line)
    write_record(log_file.with_name(FILE), record)

    for line in report.table(rows, subject, warnings):
        log(line)
    if attacked:
        picture = log_file.with_name("adversarial_examples.png")
        answers = [logits, worst_logits]
        log(report.draw_worst(picture, subject, worst.images, answers, worst.fooled, attacked))
    if saved_file:
        log(report.save_adversarial(saved_file, subject, worst.images, worst_logits.argmax(1)))
    return record


# The plan: which attacks, with which settings


class PlannedAttack(NamedTuple):
    """An attack of the table.

    build(**arguments) makes it; None stands for no attack. settings: all that its results depend on
    besides network and images, as plain values. An attack by_library also takes a monitor, and all
    images of a block at once.
    """

    build: Callable[..., Attack] | None
    arguments: dict[str, object]
    settings: dict[str, object]
    by_library: bool


class Surrogate(NamedTuple):
    """The network of --surrogate, and its checksum."""

    model: nn.Module
    checksum: str


def planned_attacks(
    settings: Evaluation,
    subject: Subject,
    view_by_name: dict[str, View],
    surrogate: Surrogate | None = None,
) -> dict[str, PlannedAttack]:
    """Return the attacks of --attacks by their names in the table, `natural` first.

    view_by_name: the views of the adaptive attack.
    """
    eps = subject.eps
    steps = settings.num_steps
    half = max(1, steps // 2)
    common = {"eps": eps, "seed": settings.seed}
    stepped = {**common, "step_size": subject.step_size, "steps": steps}
    pgd_arguments = {**stepped, "start": "uniform" if settings.random else "image"}
    adaptive_arguments = {
        **stepped,
        "restarts": settings.restarts,
        "apgd_steps": settings.apgd_steps,
    }
    ce_pgd = partial(pgd, cross_entropy)

    # the flag, the name in the table, what makes the attack, its arguments
    table = [
        ("fgsm", "FGSM", ce_pgd, {**pgd_arguments, "step_size": eps, "steps": 1}),
        ("pgd", f"PGD-{steps}", ce_pgd, pgd_arguments),
        ("cw", f"CW-{half}", partial(pgd, margin), {**pgd_arguments, "steps": half}),
        ("noise", f"noise, {NOISE_DRAWS} draws", noise, {**common, "draws": NOISE_DRAWS}),
        ("square", "Square", square, common),
    ]
    if surrogate is not None:
        transfer = partial(pgd, lambda _, labels: cross_entropy(surrogate.model, labels))
        table.append(("transfer", f"transfer PGD-{steps}", transfer, pgd_arguments))
    table.append(("autoattack", "AutoAttack", autoattack, common))
    for view_name, view in view_by_name.items():
        attack = partial(adaptive, view)
        table.append(("adaptive", ADAPTIVE + view_name, attack, adaptive_arguments))

    library_versions = {
        "square": AUTOATTACK_VERSION,
        "autoattack": AUTOATTACK_VERSION,
        "adaptive": ADAPTIVE_VERSION,
    }
    plans = {"natural": PlannedAttack(None, {}, {"version": attacks.VERSION}, False)}
    for flag, name, build, arguments in table:
        if flag not in settings.attacks:
            continue
        depends = {**arguments, "version": attacks.VERSION}
        if flag in library_versions:
            depends["library"] = f"{library_versions[flag]}, {metadata.version(PACKAGE)}"
        if settings.precision != "default":
            depends["precision"] = settings.precision
        if name == ADAPTIVE + "over heads":
            depends["auxiliary weight"] = subject.auxiliary_weight
        if flag == "transfer" or name == ADAPTIVE + "surrogate":
            depends["surrogate"] = surrogate.checksum
        plans[name] = PlannedAttack(build, arguments, depends, flag in library_versions)
    return plans


# Attacks on blocks of images


class Verdicts(NamedTuple):
    """What an attack finds on a block of n images.

    right: (n,) bool. images: (m, 3, S, S), an adversarial one for each image that it fools, in
    order. margins: (m,), their largest other logit less the label's. notes: what a reader must
    know. parts: names of the attack's parts, how many images each was given, and seconds. made:
    when and where, if an earlier evaluation found them.
    """

    right: Tensor
    images: Tensor
    margins: Tensor
    seconds: float
    notes: list[str]
    parts: list[tuple[str, int, float]]
    made: str = ""


class WorstImages:
    """For each image the adversarial one with the largest margin, or the image if none fools it.

    images: (N, 3, S, S) float32 on the CPU. margins: (N,), -inf where no attack fools the image.
    """

    def __init__(self, split: Split) -> None:
        """Begin with the images themselves."""
        self.images = as_input(split.images.cpu())
        self.margins = torch.full((len(split.labels),), -torch.inf)

    @property
    def fooled(self) -> Tensor:
        """(N,) bool, the images that some attack fools."""
        return self.margins > -torch.inf

    def take(self, rows: Tensor, images: Tensor, margins: Tensor) -> None:
        """Take what is worse than before, for the images at `rows`."""
        worse = margins > self.margins[rows]
        self.images[rows[worse]] = images[worse]
        self.margins[rows[worse]] = margins[worse]

    def join(self) -> None:
        """Take what other ranks have found."""
        rows = self.fooled.nonzero().squeeze(1)
        for others in distributed.gathered((rows, self.images[rows], self.margins[rows])):
            self.take(*others)


def run_attacks(
    model: nn.Module,
    split: Split,
    plans: dict[str, PlannedAttack],
    cache: "BlockCache",
    batch_size: int,
) -> tuple[dict[str, Row], WorstImages]:
    """Run every attack on every block, or read its verdicts from the cache; ranks share blocks."""
    blocks = torch.arange(len(split.labels)).split(BLOCK)
    mine = range(distributed.rank(), len(blocks), distributed.world())
    worst = WorstImages(split)
    verdicts_by_block: list[tuple[int, str, Verdicts]] = []
    bar = tqdm(
        total=len(mine) * len(plans), unit="attack", leave=False, disable=distributed.quiet()
    )
    with bar:
        for i in mine:
            numbers = blocks[i]
            block = split.take(numbers.to(split.labels.device))
            block = block._replace(numbers=numbers_of(split)[numbers])
            natural = None
            for name, plan in plans.items():
                bar.set_description(name)
                bar.set_postfix_str("")
                file = cache.file(name, plan, block)
                verdicts = cache.load(file)
                if verdicts is None:
                    monitor = CachingMonitor(file.with_suffix(".parts"), bar.set_postfix_str)
                    verdicts = attack_block(model, block, plan, natural, batch_size, monitor)
                    cache.save(file, verdicts)
                    monitor.file.unlink(missing_ok=True)
                if natural is None:
                    natural = verdicts.right
                fooled = numbers[natural & ~verdicts.right]
                worst.take(fooled, verdicts.images, verdicts.margins)
                without_images = verdicts._replace(images=None, margins=None)
                verdicts_by_block.append((i, name, without_images))
                bar.update()

    worst.join()
    gathered = [entry for rank in distributed.gathered(verdicts_by_block) for entry in rank]
    gathered.sort(key=lambda entry: entry[0])
    rows = {}
    for name, plan in plans.items():
        verdicts_of_blocks = [verdicts for _, other, verdicts in gathered if other == name]
        rows[name] = joined_row(verdicts_of_blocks, plan)
    return rows, worst


def attack_block(
    model: nn.Module,
    block: Split,
    plan: PlannedAttack,
    natural: Tensor | None,
    batch_size: int,
    monitor: "CachingMonitor",
) -> Verdicts:
    """Attack the images of a block that are right without an attack, all if natural is None."""
    began = time.perf_counter()
    attack = None
    if plan.build is not None:
        extra = {"monitor": monitor} if plan.by_library else {}
        attack = plan.build(**plan.arguments, **extra)
    rows = torch.arange(len(block.labels)) if natural is None else natural.nonzero().squeeze(1)
    right = torch.zeros(len(block.labels), dtype=torch.bool)
    images = as_input(block.images[:0]).cpu()
    over = torch.zeros(0)
    if len(rows):
        size = BLOCK if plan.by_library else batch_size
        work = partial(right_or_not, model, attack)
        right[rows], x, logits = over_images(block, rows, size, work, shared=False)
        if natural is not None:
            fooled = ~right[rows]
            images = x[fooled]
            over = margins(logits, block.labels.cpu()[rows])[fooled]

    seconds = time.perf_counter() - began + monitor.seconds_before
    return Verdicts(right, images, over, seconds, monitor.warnings, monitor.runs)


# Verdicts, cached


class BlockCache:
    """Verdicts of finished blocks, an npz file for each attack and block.

    A file is named by the network, the images, the attack, its settings and its version.
    """

    def __init__(self, folder: Path, network: str, made: str) -> None:
        """Cache in `folder`. network: its checksum. made: when and where verdicts are made."""
        self.folder = folder
        self.network = network
        self.made = made

    def file(self, name: str, plan: PlannedAttack, block: Split) -> Path:
        """Return the file of an attack's verdicts on a block."""
        about = [self.network, name, plan.settings]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(images_checksum(block).encode())
        readable = re.sub("[^a-z0-9]+", "-", name.lower())
        return self.folder / f"{readable}-{digest.hexdigest()[:24]}.npz"

    def load(self, file: Path) -> Verdicts | None:
        """Read verdicts; None where there are none that can be read."""
        try:
            settings, arrays = read_arrays(file)
        except UsageError:
            return None
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return Verdicts(**tensors, **settings)

    def save(self, file: Path, verdicts: Verdicts) -> None:
        """Write verdicts, so that a later evaluation, or this one after a stop, reads them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "seconds": verdicts.seconds,
            "notes": verdicts.notes,
            "parts": verdicts.parts,
            "made": self.made,
        }
        write_arrays(
            file,
            settings,
            right=verdicts.right.numpy(),
            images=verdicts.images.numpy(),
            margins=verdicts.margins.numpy(),
        )


class CachingMonitor(Monitor):
    """Watches an attack on a block, and caches its finished parts, so that a stop loses only one.

    A part's images are used again for the very images and labels that the part was given.
    """

    def __init__(self, file: Path, show: Callable[[str], None] = lambda line: None) -> None:
        """Read what an earlier process has cached in `file`. show: takes lines of progress."""
        self.file = file
        self.progress = show
        self.warnings: list[str] = []
        self.warn = self.warnings.append
        self.runs: list[tuple[str, int, float]] = []  # parts, images they were given, seconds
        self.seconds_before = 0.0
        self.seconds: dict[str, float] = {}
        self.arrays: dict[str, np.ndarray] = {}
        with suppress(UsageError):  # nothing is cached
            self.seconds, self.arrays = read_arrays(file)

    def run_part(
        self, name: str, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor
    ) -> Tensor:
        """Return attack(x, labels), or the images that an earlier process found."""
        key = f"{name} {checksum_of([x, labels])[:24]}"
        if key in self.arrays:
            self.seconds_before += self.seconds[key]
        else:
            began = time.perf_counter()
            self.arrays[key] = attack(x, labels).detach().cpu().numpy()
            self.seconds[key] = time.perf_counter() - began
            if self.seconds[key] >= WORTH_CACHING:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(self.file, self.seconds, **self.arrays)
        self.runs.append((name, len(x), self.seconds[key]))
        return torch.from_numpy(self.arrays[key]).to(x)


def images_checksum(split: Split) -> str:
    """Return a checksum of the images of a split, their labels and their numbers."""
    return checksum_of(value for value in split if isinstance(value, Tensor))


def network_checksum(model: nn.Module, info: dict) -> str:
    """Return a checksum of a network: its weights, and what its checkpoint says it is."""
    keys = ("arch", "width", "image_size", "reverse_attention", "gate", "ra_blocks", "mean", "std")
    about = [info.get(key) for key in keys]
    weights = checksum_of(model.state_dict().values())
    return hashlib.sha256(f"{about} {model.predict} {weights}".encode()).hexdigest()


# Rows of the table


def joined_row(blocks: list[Verdicts], plan: PlannedAttack) -> Row:
    """Join an attack's verdicts on all blocks, in order, to its row of the table.

    Of notes that are alike but for their numbers the first is taken.
    """
    alike: dict[str, list[str]] = {}
    for block in blocks:
        for note in block.notes:
            alike.setdefault(re.sub(r"\d+", "", note), []).append(note)
    notes = []
    for first, *others in alike.values():
        notes.append(f"{first} (and {len(others)} notes like it)" if others else first)

    cached = [block.made for block in blocks if block.made]
    if cached:
        whole = f"{len(cached)} of {len(blocks)} blocks of {BLOCK} images"
        notes.append(f"{whole} were cached by an earlier evaluation ({cached[0]})")

    parts = parts_of_autoattack(blocks) if plan.build is autoattack else {}
    for name, part in parts.items():
        notes.append(f"{part['robust_accuracy']:.2f} % after {name}, {part['seconds']:.1f} s")
    right = torch.cat([block.right for block in blocks])
    return Row(right, sum(block.seconds for block in blocks), notes, plan.settings, parts)


def parts_of_autoattack(blocks: list[Verdicts]) -> dict[str, dict[str, float]]:
    """Return robust accuracy in percent, and seconds, after each part of AutoAttack."""
    count = sum(len(block.right) for block in blocks)
    parts: dict[str, dict[str, float]] = {}
    for block in blocks:
        given = [images for _, images, _ in block.parts]
        left = given[1:] + [int(block.right.sum())]  # what the next part was given
        for (name, _, seconds), images in zip(block.parts, left, strict=False):
            part = parts.setdefault(name, {"robust_accuracy": 0.0, "seconds": 0.0})
            part["robust_accuracy"] += 100 * images / count
            part["seconds"] += seconds
    return parts


def run_diagnostics(
    subject: Subject,
    natural: Tensor,
    worst: WorstImages,
    view_by_name: dict[str, View],
    seed: int,
    batch_size: int,
) -> tuple[Row, Diagnosis]:
    """Look for signs of gradient masking; `worst` takes the images that fool the network."""
    began = time.perf_counter()
    fooling = WorstImages(subject.split)
    bar = tqdm(
        desc="diagnostics",
        bar_format="{desc}: {postfix} {elapsed}",
        leave=False,
        disable=distributed.quiet(),
    )
    with bar, computing("fp32"):
        probe = Probe(
            subject.model,
            subject.split,
            natural,
            subject.eps,
            subject.step_size,
            seed,
            batch_size,
            fooling.take,
            bar.set_postfix_str,
        )
        diagnosis = diagnose(probe, view_by_name)
    rows = fooling.fooled.nonzero().squeeze(1)
    worst.take(rows, fooling.images[rows], fooling.margins[rows])
    settings = {"step_size": subject.step_size, "seed": seed}
    right = natural & ~fooling.fooled
    return Row(right, time.perf_counter() - began, settings=settings), diagnosis


def earlier_rows(
    file: Path, identity: dict, rows: dict[str, Row], warnings: list[str]
) -> dict[str, Row]:
    """Return the rows of earlier evaluations on the same network and images, in the same ball.

    An attack of `rows` may have been run before with other settings. That row stays beside the new
    one, and its name says which settings differ: a weaker search must not hide a stronger one.
    """
    try:
        newest = json.loads(file.read_text(encoding="utf-8"))
        records = [newest, *reversed(newest["earlier"])]
    except (OSError, ValueError, LookupError, TypeError):  # there is none
        return {}
    same = [record for record in records if record.get("identity") == identity]
    if not same:
        return {}

    earlier = {}
    for name, attack in same[0]["attacks"].items():
        if name in WORST_CASES:
            continue
        settings = attack["settings"]
        attack_name = name.partition(" (")[0]
        if attack_name in rows:
            now = rows[attack_name].settings
            differing = [
                f"{key} {settings.get(key)}"
                for key in {**settings, **now}
                if settings.get(key) != now.get(key)
            ]
            if not differing:
                continue
            name = f"{attack_name} ({', '.join(differing)})"
        right = torch.tensor([verdict == "1" for verdict in attack["verdicts"]])
        notes = [note for note in attack["notes"] if note not in warnings]
        earlier[name] = Row(
            right, attack["seconds"], notes, settings, attack["parts"], attack["made"]
        )
    return earlier


def worst_cases(rows: dict[str, Row], network: dict) -> dict[str, Row]:
    """Return the worst case, image by image, over the adaptive attack's views and over all rows.

    A network whose gate hides gradients has a worst case only if the adaptive attack has been run.
    """
    if report.overestimated(rows, network):
        return {}

    def together(several: dict[str, Row]) -> Row:
        seconds = sum(row.seconds for row in several.values())
        return Row(report.lowest(several), seconds, [f"image by image, over {'; '.join(several)}"])

    worst = {}
    of_views = {name: row for name, row in rows.items() if name.startswith(ADAPTIVE)}
    if len(of_views) > 1:
        worst["adaptive, worst case"] = together(of_views)
    if len(rows) > 2:
        worst["worst case"] = together(rows)
    return worst


def logits_of(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return a network's float32 logits, (N, C) on the CPU. images: (N, 3, S, S) on the CPU."""
    with torch.no_grad(), computing("fp32"):
        return torch.cat([model(part.to(device)).cpu() for part in images.split(BLOCK)])


# What comes before the attacks


def load_surrogate(path: str, subject: Subject) -> Surrogate:
    """Load the network of --surrogate, on the subject's device.

    Errors: UsageError where it does not take the subject's images, or has other classes.
    """
    images = subject.split.images
    model, info = load_model(path, images.device)
    classes = len(subject.split.classes)
    side = images.shape[-1]
    other_side = info["arch"].startswith("PreAct") and info["image_size"] != side
    other_data = info["dataset"] not in (None, subject.dataset)
    if other_side or other_data or info["num_classes"] != classes:
        raise UsageError(
            f"--surrogate {path} is a network of {info['num_classes']} classes of "
            f"{info['dataset']}, side {info['image_size']}; name one of {classes} classes of "
            f"{subject.dataset}, side {side}"
        )
    return Surrogate(model, network_checksum(model, info))


def attack_copy(model: nn.Module) -> nn.Module:
    """Return the network that attacks call: a fast copy of one of ours, else the network itself."""
    return AttackCopy(model).net if isinstance(model, ReverseAttentionNetwork) else model


def weaker_than_usual(rows: dict[str, Row]) -> list[str]:
    """Return a note where settings of the adaptive attack are below the defaults."""
    usual_settings = {
        "restarts": Evaluation.restarts,
        "steps": Evaluation.num_steps,
        "apgd_steps": Evaluation.apgd_steps,
    }
    weaker_by_view: dict[str, list[list[str]]] = {}  # of each row of a view
    for name, row in rows.items():
        if name.startswith(ADAPTIVE):
            weaker = [
                f"{key} {row.settings[key]} for {usual}"
                for key, usual in usual_settings.items()
                if row.settings.get(key, usual) < usual
            ]
            weaker_by_view.setdefault(name.partition(" (")[0], []).append(weaker)
    for of_rows in weaker_by_view.values():
        if all(of_rows):
            return [f"a weaker adaptive attack than usual: {', '.join(of_rows[0])}"]
    return []


def stop(signum: int, frame: object) -> None:
    """Handle a signal: end the evaluation, which goes on from its cache."""
    command = f"{distributed.launcher()} {shlex.join(sys.argv)}"
    raise Stopped(
        signum, f"stopped; finished blocks are cached, and the same command goes on: {command}"
    )
