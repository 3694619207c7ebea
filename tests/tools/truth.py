"""Is the evaluator right? Tricked and honest networks whose robust accuracy is known.

python -m tests.tools.truth                all networks; about a quarter of an hour of a core
python -m tests.tools.truth scaled mart    some of them; which there are: --help
python -m tests.tools.truth --print        the tables of tests/golden/truth.json, or of a FILE

tests/tools/truth_networks.py has the networks: small ones of digits, whose robustness a planted
trick hides, and honest ones. Each is evaluated as a user would do it, by `test_white_attack.py
--model tests.tools.truth_networks:NAME` with the flags below. An attacker who knows the trick finds
the truth: AutoAttack and the adaptive attack on a network of the same decisions without the trick.
Its images are judged by the tricked network.

An attack is right where it leaves at most MARGIN points more than the truth. A trick counts as
exposed where an attack is right or a warning is given. A warning of an honest network is a false
alarm. The folder --out keeps what finished attacks have found, so that the same command goes on.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tests.tiny_networks import EPS
from tests.tools.truth_networks import CONTROLS, SIDE, TRICKS, Known
from utils.data.datasets import as_input, load_split
from utils.data.subject import percent
from utils.evaluation import robustness
from utils.evaluation.adaptive import adaptive, plain
from utils.evaluation.autoattack import autoattack
from utils.evaluation.cache import Monitor
from utils.system.files import write_atomically
from utils.system.options import parse
from utils.system.provenance import provenance
from utils.system.settings import Evaluation

FILE = Path(__file__).parents[1] / "golden" / "truth.json"
NETWORKS = [*TRICKS, *CONTROLS]
FLAGS = ("--attacks=natural,pgd,autoattack,adaptive", "--diagnostics")
FLAGS += ("--restarts=2", "--apgd-steps=30")
MARGIN = 5.0  # points
LISTED = 5  # tricks that a judge missed, in a cell
ANSWERS = 20  # of a network to the images that fool it; those of a random one differ
SEED = 1
KINDS = {  # of AutoAttack's warnings: a part of each, and a word for the table
    "randomized defense": "random",
    "probability distribution": "probabilities",
    "dynamic defense": "dynamic",
    "zero gradient": "zero gradients",
    "Square Attack has decreased": "Square finds more",
}


def known_accuracy(name: str, images: int, folder: Path) -> float:
    """Return the accuracy in percent that an attacker who knows the trick leaves.

    folder: where finished parts of the attack are kept while it runs.
    """
    trick = TRICKS[name]
    tricked = trick.network()
    around = trick.around()
    target = around if trick.random else Known(tricked, around)
    split = load_split("digits", "test", "", SIDE, images)
    batch = (as_input(split.images), split.labels, split.numbers)

    monitors = [Monitor(folder / f"known-{attack}.parts", str) for attack in ("aa", "adaptive")]
    searched = {"step_size": EPS / 5, "steps": 100, "restarts": 4, "apgd_steps": 50}
    adversarial = batch[0]
    with torch.no_grad():
        for attack in (
            autoattack(EPS, SEED, monitors[0]),
            adaptive(plain, eps=EPS, seed=SEED, monitor=monitors[1], **searched),
        ):
            candidates = attack(target, *batch)
            fooled = target(candidates).argmax(1) != split.labels
            adversarial = torch.where(fooled[:, None, None, None], candidates, adversarial)
        answers = [tricked(adversarial).argmax(1) == split.labels for _ in range(ANSWERS)]
    return percent(torch.cat(answers))


def measured(name: str, folder: Path, images: int) -> dict:
    """Evaluate a network by the script's own function -> figures in percent, and warnings."""
    began = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the networks are small
    (folder / name).mkdir(parents=True, exist_ok=True)
    command = [f"--model=tests.tools.truth_networks:{name}", "--dataset=digits", *FLAGS]
    command += [f"--image-size={SIDE}", f"--n-examples={images}"]
    command += [f"--log_path={folder / name / 'test.log'}"]
    with contextlib.redirect_stdout(sys.stderr):
        record = robustness.evaluate(parse(Evaluation, "", command), None)

    attacks = record["attacks"]
    accuracies = {row: attack["robust_accuracy"] for row, attack in attacks.items()}
    by_autoattack = [
        note for note in attacks["AutoAttack"]["notes"] if any(part in note for part in KINDS)
    ]
    signs = record["diagnostics"]["signs"]
    raised = [f"{sign['name']}: {sign['figure']}" for sign in signs if sign["raised"]]
    views = [accuracy for row, accuracy in accuracies.items() if row.startswith("adaptive")]
    figures = {
        "natural": accuracies["natural"],
        "PGD-40": accuracies["PGD-40"],
        "AutoAttack": accuracies["AutoAttack"],
        "adaptive": min(views),
    }
    figures["truth"] = min(figures.values())
    if name in TRICKS:
        figures["truth"] = known_accuracy(name, images, folder / name)
    return {
        "words": TRICKS[name].words if name in TRICKS else CONTROLS[name][0],
        "figures": figures,
        "warnings": {
            "AutoAttack": by_autoattack,
            "sanity_warnings": attacks["natural"]["notes"],
            "--diagnostics": raised,
        },
        "seconds": round(time.perf_counter() - began, 1),
    }


# Tables


def is_right(figures: dict[str, float], attack: str) -> bool:
    """Whether the figure of an attack is at most MARGIN points above the truth."""
    return figures[attack] <= figures["truth"] + MARGIN


class Judge(NamedTuple):
    """What may expose a trick: attacks whose figures are right, and givers of warnings."""

    attacks: tuple[str, ...] = ()
    warners: tuple[str, ...] = ()

    def exposes(self, network: dict) -> bool:
        """Whether an attack finds the truth of a tricked network, or a warning is given."""
        right = any(is_right(network["figures"], attack) for attack in self.attacks)
        return right or self.warns(network)

    def warns(self, network: dict) -> bool:
        """Whether a warning is given."""
        return any(network["warnings"][warner] for warner in self.warners)


CHECKS = ("sanity_warnings",)
SIGNS = ("--diagnostics",)
JUDGES = {
    "PGD-40": Judge(("PGD-40",)),
    "AutoAttack's figure": Judge(("AutoAttack",)),
    "AutoAttack's warnings": Judge(warners=("AutoAttack",)),
    "AutoAttack, figure or warnings": Judge(("AutoAttack",), ("AutoAttack",)),
    "the adaptive attack's figure": Judge(("adaptive",)),
    "the checks of every evaluation": Judge(warners=CHECKS),
    "`--diagnostics`": Judge(warners=SIGNS),
    "adaptive attack, checks and `--diagnostics`": Judge(("adaptive",), CHECKS + SIGNS),
}


def networks_table(record: dict) -> Iterator[str]:
    """Yield a row in Markdown for each network; figures that are right are bold."""
    yield (
        "| network | natural | truth | PGD-40 | AutoAttack | it warns | adaptive | checks | signs |"
    )
    yield "|---" * 9 + "|"
    for network in record["networks"].values():
        figures = network["figures"]
        shown = {attack: f"{figure:.0f}" for attack, figure in figures.items()}
        for attack in ("PGD-40", "AutoAttack", "adaptive"):
            if is_right(figures, attack):
                shown[attack] = f"**{shown[attack]}**"
        warnings = network["warnings"]
        by_autoattack = " ".join(warnings["AutoAttack"])
        kinds = [word for part, word in KINDS.items() if part in by_autoattack]
        checks = [re.split(",| at ", warning)[0] for warning in warnings["sanity_warnings"]]
        signs = len(warnings["--diagnostics"])
        yield (
            f"| {network['words']} | {shown['natural']} | {shown['truth']} | {shown['PGD-40']} "
            f"| {shown['AutoAttack']} | {', '.join(kinds)} | {shown['adaptive']} "
            f"| {', '.join(checks)} | {signs or ''} |"
        )


def judges_table(record: dict) -> Iterator[str]:
    """Yield a row in Markdown for each judge: tricks that it exposes, and its false alarms."""
    networks = record["networks"]
    tricked = [network for name, network in networks.items() if name in TRICKS]
    honest = [network for name, network in networks.items() if name in CONTROLS]
    yield f"| judge | tricks exposed, of {len(tricked)} | false alarms, of {len(honest)} | missed |"
    yield "|---|---|---|---|"
    for name, judge in JUDGES.items():
        missed = [network["words"] for network in tricked if not judge.exposes(network)]
        alarms = sum(judge.warns(network) for network in honest)
        count = str(alarms) if judge.warners else ""
        names = "; ".join(missed) if len(missed) <= LISTED else f"{len(missed)}, see below"
        yield f"| {name} | {len(tricked) - len(missed)} | {count} | {names} |"


TABLES: dict[str, Callable[[dict], Iterator[str]]] = {
    "networks": networks_table,
    "judges": judges_table,
}


def show(record: dict) -> None:
    """Print the tables, and all warnings."""
    for lines in TABLES.values():
        print(*lines(record), "", sep="\n")
    for name, network in record["networks"].items():
        for warner, warnings in network["warnings"].items():
            for warning in warnings:
                print(f"{name}: {warner}: {warning}")


def count(text: str) -> int:
    """Return the number of at least 1 that an argument gives. Errors: ValueError for others."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> None:
    """Evaluate the networks that the command line names, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.truth",
        description=f"{__doc__}\nFlags of each evaluation: {' '.join(FLAGS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("truth"), help="folder, default ./truth")
    parser.add_argument("--images", type=count, default=60, help="test images, default 60")
    parser.add_argument("--jobs", type=count, default=1, help="networks at once, default 1")
    parser.add_argument("--print", nargs="?", type=Path, const=FILE, metavar="FILE")
    given = parser.parse_args(argv)
    if given.print:
        try:
            show(json.loads(given.print.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{given.print} holds no tables: {error}")
        return
    if unknown := set(given.names) - set(NETWORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(NETWORKS)}")

    names = [name for name in NETWORKS if name in (given.names or NETWORKS)]
    work = partial(measured, folder=given.out, images=given.images)
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        networks = dict(zip(names, pool.map(work, names), strict=True))
    record = {
        "images": given.images,
        "eps": EPS,
        "flags": list(FLAGS),
        "machine": provenance(torch.device("cpu"))["cpu"],
        "networks": networks,
    }
    file = given.out / "truth.json"
    write_atomically(file, partial(Path.write_text, data=json.dumps(record, indent=1)))
    show(record)


if __name__ == "__main__":
    main()
