"""What test_white_attack.py does, in the order in which a row of its table comes about.

`evaluate` has them all, from top to bottom: it loads a network with its test images, plans the
attacks, and classifies the images without an attack. Each attack on each block of 250 images gives
verdicts, which are cached in a file. Verdicts on all blocks make a row, rows make the worst case,
and `report` formats the table.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import attacks
from utils.attacks import NOISE_DRAWS, Attack, cross_entropy, margin, noise, pgd
from utils.data.datasets import Split, as_input, checksum_of, over_images
from utils.data.subject import (
    Subject,
    load_subject,
    load_surrogate,
    right_or_not,
)
from utils.evaluation import report, results
from utils.evaluation.adaptive import VERSION as ADAPTIVE_VERSION
from utils.evaluation.adaptive import Views, adaptive, views
from utils.evaluation.autoattack import BLOCK, autoattack, square
from utils.evaluation.autoattack import VERSION as AUTOATTACK_VERSION
from utils.evaluation.cache import BlockCache, Monitor, Verdicts, WorstImages
from utils.evaluation.diagnostics import Diagnosis, Probe, diagnose, sanity_warnings
from utils.evaluation.report import Row, Rows
from utils.evaluation.results import ADAPTIVE, FILE, WORST_CASES, needs_adaptive
from utils.system import distributed
from utils.system.attack_copy import SearchedInBfloat16, attack_copy
from utils.system.devices import computing
from utils.system.errors import Stopped, UsageError, stop_signals
from utils.system.files import require_writable, write_record
from utils.system.log import open_log, progress_bar
from utils.system.provenance import in_one_line, provenance
from utils.system.settings import BLIND, Evaluation

PACKAGE = "pyautoattack"  # AutoAttack, Square, and the APGD of the adaptive attack
LIBRARY_VERSIONS = {  # of the attacks that it runs, which take all images of a block at once
    "square": AUTOATTACK_VERSION,
    "autoattack": AUTOATTACK_VERSION,
    "adaptive": ADAPTIVE_VERSION,
}


def white_attack(settings: Evaluation) -> None:
    """Evaluate the network of --model, or those of --ckpt_url, and compare several."""
    records = [evaluate(settings, path) for path in settings.ckpt_url or [None]]
    if len(records) > 1 and distributed.first():
        print(*results.table(results.grouped(records)), sep="\n")


def evaluate(settings: Evaluation, path: str | None) -> dict:
    """Attack a network, and write its table, JSON, log and pictures.

    path: of its checkpoint, or None for --model. Files go beside the checkpoint, to ./evaluated, or
    beside --log_path. Returns the record that white_attack.json holds, an empty one on other ranks
    than the first.
    """
    subject = load_subject(settings, path)
    identity = subject.identity()  # of the network itself, before BatchNorm is folded
    surrogate = load_surrogate(settings, subject)

    judge = attack_copy(subject.model)
    attacked = judge
    if settings.precision == "bf16":
        attacked = SearchedInBfloat16(judge, attack_copy(subject.model, "bf16"))
    subject = subject._replace(model=judge)

    view_by_name = views(
        subject.info["reverse_attention"],
        subject.auxiliary_weight,
        surrogate,
        predict=subject.head,
        **subject.gates,
    )
    log_file, saved_file = output_files(settings, subject)
    file = log_file.with_name(FILE)
    plans = planned_attacks(settings, subject, surrogate, view_by_name)

    origin = provenance(subject.split.labels.device, settings.seed)
    made = f"{origin['started']}, {origin['device']}"
    log = open_log(log_file)
    log(in_one_line(origin))
    for line in report.heading(settings, subject):
        log(line)

    with stop_signals(stop), computing(settings.precision):
        warnings = sanity_warnings(judge, subject.split)
        natural, worst = classify(judge, subject.split, settings.test_batch_size)
        cache = BlockCache(file.with_name("white_attack.blocks"), identity["network"], made)
        blocks = attack_blocks(
            attacked, subject.split, natural.right, plans, settings.test_batch_size, cache, worst
        )
        rows = {"natural": natural}
        for name, plan in plans.items():
            rows[name] = joined_row([block[name] for block in blocks], plan)
        if settings.diagnostics:
            rows["diagnostics"], diagnosis = run_diagnostics(
                settings, subject, view_by_name, natural.right, worst
            )
    if not distributed.first():
        return {}

    rows |= earlier_rows(file, identity, rows, warnings)
    classes = {}  # and no worst case where attacks on the final logits overestimate the network
    if not needs_adaptive(subject.info) or any(name.startswith(ADAPTIVE) for name in rows):
        rows |= worst_cases(rows)
        classes = report.by_class(rows, subject)
    record = report.record(settings, subject, rows, classes, worst, warnings, made)
    record["provenance"] = origin
    record["identity"] = identity
    if settings.diagnostics:
        signs = [sign._asdict() for sign in diagnosis.signs]
        record["diagnostics"] = diagnosis._asdict() | {"signs": signs}
    write_record(file, record)

    if settings.diagnostics:
        for line in report.diagnosis_lines(diagnosis, subject, file.parent):
            log(line)
    for line in report.table_lines(rows, subject, classes, warnings):
        log(line)
    kinds = [kind for kind in settings.attacks if kind != "natural"]
    if kinds:
        picture = file.with_name("adversarial_examples.png")
        log(report.draw_worst(picture, subject, worst, kinds))
    if saved_file:
        log(report.save_adversarial(saved_file, subject, worst))
    return record


def output_files(settings: Evaluation, subject: Subject) -> tuple[Path, Path | None]:
    """Return the log's file, beside which others go, and that of --save-adversarial.

    Errors: UsageError where one of them cannot be written.
    """
    folder = subject.file.parent
    if settings.model:
        folder = Path("evaluated") / re.sub(r"\W+", "-", settings.model).strip("-")
    files = {"--log_path": Path(settings.log_path or folder / "test.log")}
    if settings.save_adversarial:
        files["--save-adversarial"] = Path(settings.save_adversarial)
    for flag, file in files.items():
        if file.is_dir():
            raise UsageError(f"{flag} {file} is a folder; name a file in it")
        require_writable(file.parent, f"name a file in another folder by {flag}")
    return files["--log_path"], files.get("--save-adversarial")


# The plan: which attacks, with which settings


class PlannedAttack(NamedTuple):
    """An attack of the table.

    kind: the word of --attacks that asks for it. build(**arguments) makes it. settings: all that
    its results depend on besides network and images, as plain values.
    """

    kind: str
    build: Callable[..., Attack]
    arguments: dict[str, object]
    settings: dict[str, object]


def planned_attacks(
    settings: Evaluation,
    subject: Subject,
    surrogate: nn.Module | None,
    view_by_name: Views,
) -> dict[str, PlannedAttack]:
    """Return the attacks of --attacks by their names in the table.

    view_by_name: what the adaptive attack ascends.
    """
    eps = subject.eps
    steps = settings.num_steps
    half = max(1, steps // 2)
    common = {**subject.ball, "seed": settings.seed}
    stepped = {**common, "step_size": subject.step_size, "steps": steps}
    from_start = {**stepped, "start": "uniform" if settings.random else "image"}
    one_step = {**from_start, "step_size": eps, "steps": 1}
    searched = {
        **stepped,
        "restarts": settings.restarts,
        "apgd_steps": settings.apgd_steps,
        "apgd_restarts": settings.apgd_restarts,
    }
    ce_pgd = partial(pgd, cross_entropy)

    plans = {}

    def plan(kind: str, name: str, build: Callable, arguments: dict, **further: object) -> None:
        """Add an attack if --attacks names its kind. further: what else its results depend on."""
        if kind not in settings.attacks:
            return
        depends = {**arguments, **further, "version": attacks.VERSION}
        depends["precision"] = settings.precision
        if settings.precision == "bf16" and kind in BLIND:
            depends["precision"] = "default"  # no gradients of the network
        if kind in LIBRARY_VERSIONS:
            depends["library"] = f"{LIBRARY_VERSIONS[kind]}, {metadata.version(PACKAGE)}"
        plans[name] = PlannedAttack(kind, build, arguments, depends)

    plan("fgsm", attacks.ONE_STEP[subject.norm], ce_pgd, one_step)
    plan("pgd", f"PGD-{steps}", ce_pgd, from_start)
    plan("cw", f"CW-{half}", partial(pgd, margin), {**from_start, "steps": half})
    plan("noise", f"noise, {NOISE_DRAWS} draws", noise, {**common, "draws": NOISE_DRAWS})
    plan("square", "Square", square, common)
    if surrogate is not None:
        checksum = checksum_of(surrogate.state_dict().values())
        transfer = partial(pgd, lambda _, labels: cross_entropy(surrogate, labels))
        plan("transfer", f"transfer PGD-{steps}", transfer, from_start, surrogate=checksum)
    plan("autoattack", "AutoAttack", autoattack, common)
    for name, view in view_by_name.items():
        further = {}
        if name == "over heads":
            further["auxiliary weight"] = subject.auxiliary_weight
        if name == "surrogate":
            further["surrogate"] = checksum
        plan("adaptive", ADAPTIVE + name, partial(adaptive, view), searched, **further)
    return plans


# Attacks on blocks of images


def classify(net: nn.Module, split: Split, batch_size: int) -> tuple[Row, WorstImages]:
    """Classify the images without an attack; each rank does so for all of them."""
    began = time.perf_counter()
    work = partial(right_or_not, net, None)
    right, images, logits = over_images(split, batch_size, work, shared=False)
    row = Row(right, time.perf_counter() - began, settings={"version": attacks.VERSION})
    return row, WorstImages(images, logits, split.labels.cpu())


def attack_blocks(
    net: nn.Module,
    split: Split,
    natural: Tensor,
    plans: dict[str, PlannedAttack],
    batch_size: int,
    cache: BlockCache,
    worst: WorstImages,
) -> list[dict[str, Verdicts]]:
    """Run every attack on every block, or read its verdicts from the cache; ranks share blocks.

    natural: (N,) bool, the images to attack, those that are right without an attack. `worst` takes
    the adversarial images. Returns the verdicts on each block by the names of the attacks.
    """
    blocks = torch.arange(len(split.labels)).split(BLOCK)
    mine = range(distributed.rank(), len(blocks), distributed.world())
    verdicts_by_block = {}
    count = len(mine) * len(plans)
    with progress_bar(total=count, unit="attack") as bar:
        for i in mine:
            rows = blocks[i]
            block = split.take(rows)
            verdicts_by_block[i] = {}
            for name, plan in plans.items():
                bar.set_description(name)
                bar.set_postfix_str("")
                file = cache.file(name, plan.settings, block)
                verdicts = cache.load(file)
                if verdicts is None:
                    monitor = Monitor(file.with_suffix(".parts"), bar.set_postfix_str)
                    verdicts = attack_block(net, block, natural[rows], plan, batch_size, monitor)
                    cache.save(file, verdicts)
                    monitor.file.unlink(missing_ok=True)
                worst.take(rows[verdicts.fooled], verdicts.images, verdicts.logits)
                verdicts_by_block[i][name] = verdicts._replace(images=None, logits=None)
                bar.update()

    for of_rank in distributed.gathered(worst.among(worst.fooled)):
        worst.take(*of_rank)
    for of_rank in distributed.gathered(verdicts_by_block):
        verdicts_by_block |= of_rank
    return [verdicts_by_block[i] for i in range(len(blocks))]


def attack_block(
    net: nn.Module,
    block: Split,
    natural: Tensor,
    plan: PlannedAttack,
    batch_size: int,
    monitor: Monitor,
) -> Verdicts:
    """Attack the images of a block that are right without an attack: `natural`, (n,) bool."""
    began = time.perf_counter()
    in_parts = {"monitor": monitor} if plan.kind in ("autoattack", "adaptive") else {}
    attack = plan.build(**plan.arguments, **in_parts)
    rows = natural.nonzero().squeeze(1)
    right = torch.zeros_like(natural)
    images = as_input(block.images[:0]).cpu()
    logits = torch.zeros(0, len(block.classes))
    if len(rows):
        size = BLOCK if plan.kind in LIBRARY_VERSIONS else batch_size
        work = partial(right_or_not, net, attack)
        right[rows], images, logits = over_images(block.take(rows), size, work, shared=False)
    wrong = ~right[rows]
    seconds_of_parts = sum(seconds for _, _, seconds in monitor.parts)  # some of before a stop
    seconds = max(time.perf_counter() - began, seconds_of_parts)
    return Verdicts(
        right, rows[wrong], images[wrong], logits[wrong], seconds, monitor.warnings, monitor.parts
    )


# Rows of the table


def joined_row(blocks: list[Verdicts], plan: PlannedAttack) -> Row:
    """Join an attack's verdicts on all blocks, in order, to its row of the table."""
    # Of notes that are alike but for their numbers one is enough.
    alike = {re.sub(r"\d+", "", note): note for block in blocks for note in block.notes}
    notes = list(alike.values())
    cached = [block.made for block in blocks if block.made]
    if cached:
        whole = f"{len(cached)} of {len(blocks)} blocks of {BLOCK} images"
        notes.append(f"{whole} were cached by an earlier evaluation ({cached[0]})")

    parts = parts_of_autoattack(blocks) if plan.kind == "autoattack" else {}
    for name, part in parts.items():
        notes.append(f"{part['robust_accuracy']:.2f} % after {name}, {part['seconds']:.1f} s")
    right = torch.cat([block.right for block in blocks])
    return Row(right, sum(block.seconds for block in blocks), notes, plan.settings, parts)


def parts_of_autoattack(blocks: list[Verdicts]) -> dict[str, dict[str, float]]:
    """Return robust accuracy in percent, and seconds, after each part of AutoAttack."""
    count = sum(len(block.right) for block in blocks)
    parts = {}
    for block in blocks:
        left = [images for _, images, _ in block.parts[1:]]  # what the next part was given
        left.append(int(block.right.sum()))
        for (name, _, seconds), images in zip(block.parts, left, strict=False):
            part = parts.setdefault(name, {"robust_accuracy": 0.0, "seconds": 0.0})
            part["robust_accuracy"] += 100 * images / count
            part["seconds"] += seconds
    return parts


@computing("fp32")
def run_diagnostics(
    settings: Evaluation,
    subject: Subject,
    view_by_name: Views,
    natural: Tensor,
    worst: WorstImages,
) -> tuple[Row, Diagnosis]:
    """Look for signs of gradient masking; `worst` takes the images that fool the network."""
    began = time.perf_counter()
    fooling = WorstImages(worst.natural_images, worst.natural_logits, worst.labels)
    with progress_bar(desc="diagnostics", unit="img") as bar:
        probe = Probe(
            subject.model,
            subject.split,
            natural,
            subject.eps,
            subject.step_size,
            settings.seed,
            settings.test_batch_size,
            fooling,
            bar.update,
            subject.norm,
        )
        diagnosis = diagnose(probe, view_by_name)
    worst.take(*fooling.among(natural))
    right = natural & ~fooling.fooled
    chosen = {"step_size": subject.step_size, "seed": settings.seed}
    return Row(right, time.perf_counter() - began, settings=chosen), diagnosis


def earlier_rows(file: Path, identity: dict, rows: Rows, warnings: list[str]) -> Rows:
    """Return the rows of earlier evaluations on the same network and images, in the same ball.

    An attack of `rows` may have been run before with other settings. That row stays beside the new
    one, and its name says which settings differ: a weaker search must not hide a stronger one.
    """
    try:
        newest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none
        return {}
    records = [newest, *reversed(newest["earlier"])]
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
                f"{key} {value}" for key, value in settings.items() if value != now.get(key)
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


def worst_cases(rows: Rows) -> Rows:
    """Return the worst case, image by image, over the adaptive attack's views and over all rows."""
    of_adaptive = {name: row for name, row in rows.items() if name.startswith(ADAPTIVE)}
    worst = {}
    for name, several in (("adaptive, worst case", of_adaptive), ("worst case", rows)):
        if len(several.keys() - {"natural"}) > 1:
            seconds = sum(row.seconds for row in several.values())
            notes = [f"image by image, over {'; '.join(several)}"]
            worst[name] = Row(report.lowest(several), seconds, notes)
    return worst


def stop(signum: int, frame: object) -> None:
    """Handle a signal: end the evaluation, which goes on from its cache."""
    command = f"{distributed.launcher()} {shlex.join(sys.argv)}"
    raise Stopped(
        signum, f"stopped; finished blocks are cached, and the same command goes on: {command}"
    )
