"""Evaluations side by side: a table in Markdown of what test_white_attack.py wrote for any runs.

python -m utils.evaluation.results RUN...       folders of runs, or their white_attack.json

Runs of one recipe and several seeds share a row: the mean robust accuracy in %, and the range of
the seeds. `worst case` is taken image by image over the attacks that all runs have, and the last
column is its difference from the first row on the same images. A network with reverse attention
whose gate is a label or a prediction has a worst case with the adaptive attack only.

white_attack.json keeps these entries; "format" is raised when they change:

network         method, arch, width, reverse_attention, gate, epoch; recipe: the training's settings
dataset, images, image_numbers, labels      the test images; image_numbers is null if they are all
threat_model, settings      eps and step size on [0, 1], and the other settings of the evaluation
attacks.NAME    robust_accuracy and interval_95 in %, seconds, notes; verdicts, a character an
                image, 1 where it is right; settings, those of the attack; made, when and where.
                `natural` is no attack, `adaptive: VIEW` one of the views, `worst case` the worst
                of all, image by image. Rows of earlier evaluations stay where `identity` is equal
identity        checksums of the network and of the images, and eps
provenance      command, commit, versions, device, processor, threads, seed, time
earlier         the records of earlier evaluations
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils.system.errors import UsageError
from utils.system.settings import FREE, fitting, idle, restored

FORMAT = 1
FILE = "white_attack.json"
ADAPTIVE = "adaptive: "
WORST_CASES = ("worst case", "adaptive, worst case")  # rows that are made of others
Groups = dict[str, list[dict]]  # records by the name of their row

# Settings of a training that do not make it another one; with epochs it does.
NOT_OF_THE_RECIPE = FREE - {"epochs"} | {"seed", "model_dir", "ckpt_url"}


def read(path: str) -> dict:
    """Read the record of an evaluation. path: a run's folder, or its white_attack.json.

    Of the evaluations of the newest one's network, in the same ball, that is the newest of those
    with the most images: a quick look at a few does not hide a whole table.
    Errors: UsageError where there is none, or none that this version reads.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        lengths = {len(attack["verdicts"]) for attack in record["attacks"].values()}
        if record["format"] != FORMAT or lengths != {len(record["labels"])}:
            raise ValueError
    except OSError as error:
        hint = "run test_white_attack.py --ckpt_url RUN first"
        raise UsageError(f"{file}: {error.strerror}; {hint}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is no {FILE} of this version; evaluate the run anew") from error
    newest_first = [record, *reversed(record.get("earlier", []))]
    same_subject = [one for one in newest_first if _subject(one) == _subject(record)]
    return max(same_subject, key=lambda one: len(one["labels"]))


def _subject(record: dict) -> tuple:
    """Return what tells the network and the ball of an evaluation, if the record says it."""
    identity = record.get("identity") or {}
    return record.get("format"), identity.get("network"), identity.get("eps")


def images_of(record: dict) -> list:
    """Return which images were attacked, and in which ball, to be compared."""
    return [record.get(key) for key in ("dataset", "threat_model", "image_numbers", "labels")]


def needs_adaptive(network: dict) -> bool:
    """Whether attacks on the final logits overestimate a network, as hard gates make them."""
    return network.get("reverse_attention") is True and network.get("gate") not in ("soft", "none")


def recipe_of(record: dict) -> dict[str, Any]:
    """Return what two runs have in common if they differ in their seeds only."""
    network = record["network"]
    file = str(record.get("checkpoint"))
    if isinstance(network.get("recipe"), dict):
        trained = restored(fitting(network["recipe"]))
        without = NOT_OF_THE_RECIPE.union(idle(trained))
        recipe = {key: value for key, value in asdict(trained).items() if key not in without}
        for key in ("extra_data", "ckpt_url"):
            recipe[key] = os.path.basename(getattr(trained, key) or "")
        best = os.path.basename(file) == "best_adv_model.pt"
        recipe["weights"] = "of the best epoch" if best else f"of epoch {network.get('epoch')}"
    else:
        recipe = {"file": file, "gate": network.get("gate"), "ra_blocks": network.get("ra_blocks")}
    recipe["network"] = network.get("arch")
    recipe["answers"] = record["settings"].get("predict", "final")
    recipe["evaluated at eps"] = record["settings"].get("eps", record.get("threat_model"))
    return recipe


def attack_settings(record: dict) -> dict[str, str]:
    """Return the settings of a record's attacks that their names do not show, by `attack's key`."""
    values: dict[str, str] = {}
    for name, attack in record["attacks"].items():
        keys = ()
        if name.startswith(ADAPTIVE):
            keys = ("steps", "step_size", "restarts", "apgd_steps")
        elif name.startswith(("PGD-", "CW-", "transfer ")):
            keys = ("step_size", "start")
        for key in keys:
            if key in attack.get("settings", {}):
                values.setdefault(f"{column_of(name)}'s {key}", str(attack["settings"][key]))
    return values


def alike(one: dict, other: dict) -> bool:
    """Whether the attacks that two records share were run with the same settings."""
    settings = attack_settings(one)
    return all(settings.get(key, value) == value for key, value in attack_settings(other).items())


def grouped(records: list[dict]) -> Groups:
    """Group records that differ in their seeds only, and name the groups.

    A name is the method's and, where several share it, what tells them apart.
    Errors: UsageError where a run is there twice, or the seeds of a row have other images.
    """
    groups: list[tuple[dict, list[dict]]] = []
    for record in records:
        recipe = recipe_of(record)
        for other_recipe, members in groups:
            if other_recipe == recipe and alike(record, members[0]):
                break
        else:
            members = []
            groups.append((recipe, members))
        checkpoint = record.get("checkpoint")
        if any(checkpoint == member.get("checkpoint") for member in members):
            raise UsageError(f"the evaluation of {checkpoint} is there twice; give it once")
        if members and images_of(record) != images_of(members[0]):
            raise UsageError(f"{checkpoint} was evaluated on other images than another of its row")
        members.append(record)

    named: Groups = {}
    for recipe, members in groups:
        name = _method(members)
        rivals = [other for other, others in groups if _method(others) == name]
        for key in dict.fromkeys(key for rival in rivals for key in rival):
            if any(rival.get(key) != recipe.get(key) for rival in rivals):
                name += f", {key} {recipe.get(key)}"
        copies = [other for other in named if other.partition(", evaluation ")[0] == name]
        if copies:  # of the same recipe, evaluated with other settings
            name += f", evaluation {len(copies) + 1}"
        named[name] = members
    return named


def _method(records: list[dict]) -> str:
    return str(records[0]["network"].get("method"))


def column_of(attack: str) -> str:
    """Return the column of an attack: the views of the adaptive attack share one."""
    return "adaptive" if attack.startswith(ADAPTIVE) else attack


def verdicts(record: dict) -> dict[str, np.ndarray]:
    """Return which images are right, (N,) of 0 and 1, by column of the table."""
    columns: dict[str, np.ndarray] = {}
    for name, attack in record["attacks"].items():
        if name not in WORST_CASES:
            right = np.frombuffer(attack["verdicts"].encode(), dtype=np.uint8) - ord("0")
            column = column_of(name)
            columns[column] = np.minimum(columns.get(column, right), right)
    return columns


def difference(one: np.ndarray, other: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Return the mean of one less that of other, and the ends of its 95 % interval, in points.

    one, other: (seeds, images) of 0 and 1. Images and seeds are resampled.
    """
    random = np.random.default_rng(0)
    images = one.shape[1]
    differences = []
    for _ in range(draws):
        columns = random.integers(images, size=images)
        rows = random.integers(len(one), size=len(one))
        other_rows = random.integers(len(other), size=len(other))
        differences.append(one[rows][:, columns].mean() - other[other_rows][:, columns].mean())
    low, high = np.percentile(differences, (2.5, 97.5))
    return 100 * (one.mean() - other.mean()), 100 * low, 100 * high


def cell(values: list[float]) -> str:
    """Return a mean, and the range of several values."""
    mean = f"{sum(values) / len(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.2f} to {max(values):.2f})"


def worst_of(seeds: list[dict[str, np.ndarray]], names: list[str]) -> np.ndarray:
    """Return which images are right under all the attacks named, (seeds, images)."""
    return np.stack([np.minimum.reduce([attacks[name] for name in names]) for attacks in seeds])


def table(groups: Groups) -> Iterator[str]:
    """Yield the rows in Markdown, and below them what `worst case` and the last column are."""
    right = {name: [verdicts(record) for record in records] for name, records in groups.items()}
    columns = list(dict.fromkeys(key for seeds in right.values() for run in seeds for key in run))
    gated = {
        name
        for name, records in groups.items()
        if any(needs_adaptive(record.get("network", {})) for record in records)
    }
    lacking = {name for name in gated if any("adaptive" not in run for run in right[name])}
    compared = [run for name, seeds in right.items() if name not in lacking for run in seeds]
    common = [column for column in columns if all(column in run for run in compared)]

    first = next(iter(groups))
    heads = ["network", "runs", *columns, "worst case", f"less {first}"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name, seeds in right.items():
        cells = [name, str(len(seeds))]
        for column in columns:
            values = [100 * run[column].mean() for run in seeds if column in run]
            part = f", {len(values)} of {len(seeds)} runs" if len(values) < len(seeds) else ""
            cells.append(cell(values) + part if values else "")
        if name in lacking:
            yield f"| {' | '.join([*cells, 'needs adaptive', ''])} |"
            continue

        alone = ["adaptive"] if name in gated and "adaptive" not in common else []
        worst = worst_of(seeds, common + alone)
        figure = [f"**{cell([100 * run.mean() for run in worst])}**"]
        figure += [f"with {column}" for column in alone]
        left = {column for run in seeds for column in run}.difference(common, alone)
        if left:
            figure.append(f"without {', '.join(column for column in columns if column in left)}")
        cells.append(", ".join(figure))

        if name == first:
            first_worst = worst
            first_alone = alone
            less = ""
        elif first in lacking:
            less = ""
        elif any(images_of(record) != images_of(groups[first][0]) for record in groups[name]):
            less = "other images or eps"
        elif alone != first_alone:
            less = "other attacks"
        else:
            less = "{:+.1f} ({:+.1f} to {:+.1f}".format(*difference(worst, first_worst))
            less += ", images alone)" if min(len(worst), len(first_worst)) == 1 else ")"
        yield f"| {' | '.join([*cells, less])} |"
    yield ""
    yield from _explanations(groups, columns, common, lacking)


def _explanations(
    groups: Groups, columns: list[str], common: list[str], lacking: set[str]
) -> Iterator[str]:
    """Yield the lines below a table."""
    if len(lacking) < len(groups):
        left = [column for column in columns if column not in common]
        without = f"; without {', '.join(left)}, which not every run has" if left else ""
        yield f"Worst case: image by image, the lowest of {', '.join(common)}{without}."
    if lacking:
        yield (
            f"No worst case of {', '.join(sorted(lacking))}: attacks on the final logits "
            "overestimate a gated network; evaluate it with --attacks adaptive, too."
        )

    rows_by_value: dict[str, dict[str, list[str]]] = {}
    for name, records in groups.items():
        for key, value in attack_settings(records[0]).items():
            rows_by_value.setdefault(key, {}).setdefault(value, []).append(name)
    for key, rows in rows_by_value.items():
        if len(rows) > 1:
            parts = [f"{value} for {', '.join(names)}" for value, names in rows.items()]
            yield f"Evaluated with {key} {'; '.join(parts)}."

    for name, records in groups.items():
        recipes = [record.get("network", {}).get("recipe") for record in records]
        seeds = [str(recipe.get("seed")) for recipe in recipes if isinstance(recipe, dict)]
        if len(set(seeds)) < len(seeds):
            yield (
                f"{name}: runs of seeds {', '.join(seeds)}; a seed that is there twice says "
                "nothing about other seeds."
            )
    yield (
        "Less the first row: on the same images, with a 95 % interval by resampling images and "
        "seeds. `images alone`: a row has one run, and another seed may differ by more."
    )


def main(argv: list[str]) -> int:
    """Print the table of the runs that a command line names, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluation.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"a folder with {FILE}, or the file")
    try:
        records = [read(path) for path in parser.parse_args(argv).runs]
        print(*table(grouped(records)), sep="\n")
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
