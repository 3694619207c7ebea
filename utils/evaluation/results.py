"""Evaluations side by side: a table in Markdown of what test_white_attack.py wrote for any runs.

python -m utils.evaluation.results RUN...       folders of runs, or their white_attack.json

Runs of one recipe and several seeds share a row: the mean robust accuracy in %, and the range of
the seeds. `worst case` is taken image by image over the attacks that all runs have, and the last
column is its difference from the first row on the same images. A network with reverse attention
whose gate is a label or a prediction has a worst case only if the adaptive attack is among them.

white_attack.json keeps these entries; "format" is raised when they change:

network         method, arch, width, reverse_attention, gate, classifier, epoch; recipe: settings of
                the training
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
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from utils.system.errors import UsageError
from utils.system.settings import FREE, fitting, idle, restored

FORMAT = 1
FILE = "white_attack.json"
ADAPTIVE = "adaptive: "
WORST_CASES = ("worst case", "adaptive, worst case")  # rows that are made of others
SEARCH = ("steps", "step_size", "start", "restarts", "apgd_steps")  # settings of an attack
Groups = dict[str, list[dict]]  # records by the name of their row
Verdicts = dict[str, np.ndarray]  # of N images, (N,) of 0 and 1 by column of the table

# Settings of a training that do not make it another one; with epochs it does.
NOT_OF_THE_RECIPE = FREE - {"epochs"} | {"seed", "model_dir", "ckpt_url"}


# Records


def read(path: str) -> dict:
    """Read the record of an evaluation. path: a run's folder, or its white_attack.json.

    Of the evaluations of the newest one's network, in the same ball, that is the newest of those
    with the most images: a quick look at a few does not hide a whole table.
    Errors: UsageError where there is none, or none that this version reads.
    """
    file = Path(path)
    if file.is_dir():
        file /= FILE
    try:
        newest = json.loads(file.read_text(encoding="utf-8"))
        is_readable = newest["format"] == FORMAT
    except OSError as error:
        hint = "run test_white_attack.py --ckpt_url RUN first"
        raise UsageError(f"{file}: {error.strerror}; {hint}") from error
    except (ValueError, KeyError, TypeError):
        is_readable = False
    if not is_readable:
        raise UsageError(f"{file} is no {FILE} of this version; evaluate the run anew")
    records = [newest, *reversed(newest.get("earlier", []))]
    same_subject = [record for record in records if _subject(record) == _subject(newest)]
    return max(same_subject, key=lambda record: len(record["labels"]))


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


def column_of(attack: str) -> str:
    """Return the column of an attack: the views of the adaptive attack share one."""
    return "adaptive" if attack.startswith(ADAPTIVE) else attack


def verdicts(record: dict) -> Verdicts:
    """Return which images are right under the attacks of a record."""
    columns: Verdicts = {}
    for name, attack in record["attacks"].items():
        if name not in WORST_CASES:
            right = np.frombuffer(attack["verdicts"].encode(), dtype=np.uint8) - ord("0")
            column = column_of(name)
            columns[column] = np.minimum(columns.get(column, right), right)
    return columns


# Rows


def recipe_of(record: dict) -> dict[str, Any]:
    """Return what two runs have in common if they differ in their seeds only."""
    network = record["network"]
    file = str(record.get("checkpoint"))
    if network.get("recipe") is None:
        recipe = {"file": file, "gate": network.get("gate"), "ra_blocks": network.get("ra_blocks")}
    else:
        trained = restored(fitting(network["recipe"]))
        without = NOT_OF_THE_RECIPE.union(idle(trained))
        recipe = {key: value for key, value in asdict(trained).items() if key not in without}
        best = file.endswith("best_adv_model.pt")
        recipe["weights"] = "of the best epoch" if best else f"of epoch {network.get('epoch')}"
    return recipe | {
        "name": network.get("method"),
        "network": network.get("arch"),
        "answers": record["settings"].get("predict", "final"),
        "evaluated at eps": record["settings"].get("eps"),
    }


def grouped(records: list[dict]) -> Groups:
    """Group records that differ in their seeds only, and name the groups.

    Errors: UsageError where a run is there twice, or the seeds of a row have other images.
    """
    groups = defaultdict(list)
    for record in records:
        groups[str(recipe_of(record))].append(record)
    for members in groups.values():
        files = {member.get("checkpoint") for member in members}
        if len(files) < len(members):
            raise UsageError(f"an evaluation of {', '.join(files)} is there twice; give it once")
        if any(images_of(member) != images_of(members[0]) for member in members):
            raise UsageError(f"{', '.join(files)} share a row, but not their test images and eps")

    recipes = [recipe_of(members[0]) for members in groups.values()]
    names = [_row_name(recipe, recipes) for recipe in recipes]
    return dict(zip(names, groups.values(), strict=True))


def _row_name(recipe: dict, recipes: list[dict]) -> str:
    """Return the method's name and, where several recipes share it, what tells them apart."""
    name = recipe["name"]
    rivals = [other for other in recipes if other["name"] == recipe["name"]]
    for key in dict.fromkeys(chain.from_iterable(rivals)):
        if any(rival.get(key) != recipe.get(key) for rival in rivals):
            name += f", {key} {recipe.get(key)}"
    return name


# The table


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
        mean = one[rows][:, columns].mean()
        other_mean = other[other_rows][:, columns].mean()
        differences.append(mean - other_mean)
    low, high = np.percentile(differences, (2.5, 97.5))
    return 100 * (one.mean() - other.mean()), 100 * low, 100 * high


def worst_of(seeds: list[Verdicts], names: list[str]) -> np.ndarray:
    """Return which images are right under all the attacks named, (seeds, images)."""
    return np.stack([np.minimum.reduce([attacks[name] for name in names]) for attacks in seeds])


def cell(right: list[np.ndarray], runs: int) -> str:
    """Return the mean accuracy in % of those of a row's runs that have an attack, and its range.

    right: (N,) for each of them.
    """
    values = [100 * run.mean() for run in right]
    if not values:
        return ""
    text = f"{sum(values) / len(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f} to {max(values):.2f})"
    if len(values) < runs:
        text += f", {len(values)} of {runs} runs"
    return text


def _difference_cell(worst: np.ndarray, first_worst: np.ndarray) -> str:
    """Return the paired difference of a row's worst case from the first row's."""
    mean, low, high = difference(worst, first_worst)
    one_run = ", images alone" if 1 in (len(worst), len(first_worst)) else ""
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}{one_run})"


def table(groups: Groups) -> Iterator[str]:
    """Yield the rows in Markdown, and below them what `worst case` and the last column are."""
    right = {name: [verdicts(record) for record in records] for name, records in groups.items()}
    runs = list(chain.from_iterable(right.values()))
    columns = list(dict.fromkeys(chain.from_iterable(runs)))
    common = [column for column in columns if all(column in run for run in runs)]

    worst = {}
    for name, records in groups.items():
        if "adaptive" in common or not needs_adaptive(records[0].get("network", {})):
            worst[name] = worst_of(right[name], common)

    first = next(iter(groups))
    heads = ["network", "runs", *columns, "worst case", f"less {first}"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name, seeds in right.items():
        count = len(seeds)
        cells = [name, str(count)]
        for column in columns:
            attacked = [run[column] for run in seeds if column in run]
            cells.append(cell(attacked, count))
        if name in worst:
            cells.append(f"**{cell(worst[name], count)}**")
        else:
            cells.append("needs adaptive")

        if name == first or name not in worst or first not in worst:
            cells.append("")
        elif images_of(groups[name][0]) != images_of(groups[first][0]):
            cells.append("other images or eps")
        else:
            cells.append(_difference_cell(worst[name], worst[first]))
        yield f"| {' | '.join(cells)} |"

    yield ""
    yield f"Worst case: image by image over the attacks that all runs have, {', '.join(common)}."
    if len(worst) < len(groups):
        yield (
            "`needs adaptive`: attacks on the final logits overestimate this network, so there is "
            "a worst case only when all runs are evaluated with --attacks adaptive, too."
        )
    yield from _other_settings(groups)
    yield (
        "Less the first row: on the same images, with a 95 % interval by resampling images and "
        "seeds. `images alone`: a row has one run, and another seed may differ by more."
    )


def _search_settings(record: dict) -> dict[str, str]:
    """Return how hard the attacks of a record search, by `attack's setting`."""
    settings = {}
    for name, attack in record["attacks"].items():
        for key in SEARCH:
            if key in attack.get("settings", {}):
                settings[f"{column_of(name)}'s {key}"] = str(attack["settings"][key])
    return settings


def _other_settings(groups: Groups) -> Iterator[str]:
    """Yield a line for each setting of an attack in which evaluations differ."""
    rows_by_value = defaultdict(lambda: defaultdict(list))
    for name, records in groups.items():
        for record in records:
            for setting, value in _search_settings(record).items():
                rows_by_value[setting][value].append(name)
    for setting, rows in rows_by_value.items():
        if len(rows) > 1:
            parts = []
            for value, names in rows.items():
                names = ", ".join(dict.fromkeys(names))
                parts.append(f"{value} for {names}")
            yield f"Evaluated with {setting} {'; '.join(parts)}."


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
