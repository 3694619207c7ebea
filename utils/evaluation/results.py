"""Evaluations side by side: a table in Markdown of what test_white_attack.py wrote for any runs.

python -m utils.evaluation.results RUN...       folders of runs, or their white_attack.json

Runs of one recipe and several seeds share a row: mean ± standard deviation of their accuracy in %.
`worst case` is taken image by image over the attacks that all runs have, and the last column is its
difference from the first row on the same images. A network with reverse attention whose gate is a
label or a prediction has a worst case only if the adaptive attack is among them. Below the table
stands how many seeds and images it would take to see a difference of one and of two points.

white_attack.json keeps these entries; "format" is raised when they change:

network         method, arch, width, reverse_attention, gate, classifier, epoch; recipe: settings of
                the training
dataset, images, image_numbers, labels      the test images; image_numbers is null if they are all
threat_model, settings      norm, eps and step size on [0, 1], and other settings of the evaluation
attacks.NAME    robust_accuracy and interval_95 in %, seconds, notes; verdicts, a character an
                image, 1 where it is right; settings, those of the attack; made, when and where.
                `natural` is no attack, `adaptive: VIEW` one of the views, `worst case` the worst
                of all, image by image. Rows of earlier evaluations stay where `identity` is equal
identity        checksums of the network and of the images, eps, and the norm where it is not Linf
provenance      command, commit, versions, device, card, processor, threads and how they wait,
                seed, time
earlier         the records of earlier evaluations
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from utils.system.errors import UsageError
from utils.system.settings import FREE, Training, fitting, idle

FORMAT = 1
FILE = "white_attack.json"
ADAPTIVE = "adaptive: "
WORST_CASES = ("worst case", "adaptive, worst case")  # rows that are made of others
# Settings that say how hard an attack searches
SEARCH = (
    "steps",
    "step_size",
    "start",
    "restarts",
    "apgd_steps",
    "apgd_restarts",
    "precision",
)
POWER = 0.8  # with which a difference is to be seen
PLANS = (3, 5, 10)  # numbers of seeds for which it is said how many images it takes
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
        if newest["format"] != FORMAT:
            raise ValueError(newest["format"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{file} is missing or no {FILE} of this version; "
            "run test_white_attack.py --ckpt_url RUN first"
        ) from error
    records = [newest, *reversed(newest["earlier"])]
    same_subject = [record for record in records if _subject(record) == _subject(newest)]
    return max(same_subject, key=lambda record: len(record["labels"]))


def _subject(record: dict) -> tuple:
    """Return what tells the network and the ball of an evaluation."""
    return record.get("format"), record.get("identity", {}) | {"images": None}


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
    columns = {}
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
    settings = record["settings"]
    file = str(record.get("checkpoint"))
    if network.get("recipe") is None:
        recipe = {"file": file, "gate": network.get("gate"), "ra_blocks": network.get("ra_blocks")}
    else:
        trained = Training(**fitting(network["recipe"]))
        without = NOT_OF_THE_RECIPE.union(idle(trained))
        recipe = {key: value for key, value in asdict(trained).items() if key not in without}
        best = file.endswith("best_adv_model.pt")
        recipe["weights"] = "of the best epoch" if best else f"of epoch {network.get('epoch')}"
    return recipe | {
        "name": network.get("method"),
        "network": network.get("arch"),
        "answers": settings.get("predict"),
        "evaluated in": settings.get("norm"),
        "evaluated at eps": settings.get("eps"),
    }


def seed_of(record: dict) -> int | None:
    """Return the seed of the training of an evaluated network, None where it is not known."""
    recipe = record.get("network", {}).get("recipe") or {}
    return record.get("seed", recipe.get("seed"))


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

        members.sort(key=lambda member: seed_of(member) or 0)

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


def quantile(probability: float, seeds: float = math.inf) -> float:
    """Return a quantile of Student's t of so many seeds, of the normal distribution for inf."""
    return float(stdtrit(seeds - 1, probability))


def at_chance(natural: float, labels: Sequence[int]) -> str:
    """Return a remark on an accuracy that one class for all images attains too, or ''."""
    one_class = 100 * (max(Counter(labels).values()) / len(labels))
    if natural <= one_class < 100:
        return f", at chance: one class for every image attains {one_class:.2f} %"
    return ""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the share of right ones, in percent (Wilson, 1927)."""
    from scipy.stats import binomtest  # takes a second to load

    low, high = binomtest(right, count).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)  # plain floats, for JSON


def difference(
    one: np.ndarray, other: np.ndarray, paired: bool = False, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean of one less that of other, and the ends of its interval, in points.

    one, other: (seeds, images) of 0 and 1, on the same images. paired: whether row s of both is of
    the same seed. level: how often the interval covers.
    The squared half width is z² times the variance of a mean over images, and t² times that of a
    mean over seeds, with Student's t for so few. Such a sum covers at least as often as each of its
    terms would alone, since the distribution function of chi-squared with one degree of freedom is
    concave (Banerjee, 1961). Where a row has one run, the interval is that of images alone.
    """
    by_image = one.mean(0) - other.mean(0)
    by_seed = [one.mean(1), other.mean(1)]
    if paired:
        by_seed = [one.mean(1) - other.mean(1)]
    upper = (1 + level) / 2
    squared = quantile(upper) ** 2 * by_image.var(ddof=1) / len(by_image)
    if min(len(one), len(other)) > 1:
        for means in by_seed:
            squared += quantile(upper, len(means)) ** 2 * means.var(ddof=1) / len(means)
    mean = 100 * by_image.mean()
    half = 100 * math.sqrt(squared)
    return mean, mean - half, mean + half


def variances(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Estimate the variances of a difference: between seeds, between images, and the rest.

    one, other: (seeds, images), of which the first seeds that both have are taken. The rest is
    what neither seed nor image explains of a verdict.
    """
    seeds = min(len(one), len(other))
    gains = one[:seeds].astype(float) - other[:seeds]
    by_seed = gains.mean(1)
    by_image = gains.mean(0)
    images = len(by_image)
    residuals = gains - by_seed[:, None] - by_image + gains.mean()
    rest = (residuals**2).sum() / (seeds - 1) / (images - 1)
    of_seeds = by_seed.var(ddof=1) - rest / images
    of_images = by_image.var(ddof=1) - rest / seeds
    return max(of_seeds, 0.0), max(of_images, 0.0), rest


def images_needed(
    points: float, seeds: int, of_seeds: float, of_images: float, rest: float
) -> int | None:
    """Return how many images show a difference in points with `seeds` runs a row; None: too many.

    Shown means that the 95 % interval leaves out 0, with a probability of about `POWER`.
    of_seeds, of_images, rest: the `variances` of the difference.
    """
    by_seeds = (quantile(0.975, seeds) + quantile(POWER, seeds)) ** 2 / seeds
    by_images = (quantile(0.975) + quantile(POWER)) ** 2
    left = (points / 100) ** 2 - by_seeds * of_seeds
    if left <= 0:
        return None
    variance = by_seeds * rest + by_images * (of_images + rest / seeds)  # of a single image
    return math.ceil(variance / left)


def worst_of(seeds: list[Verdicts], names: list[str]) -> np.ndarray:
    """Return which images are right under all the attacks named, (seeds, images)."""
    by_attack = [[attacks[name] for attacks in seeds] for name in names]
    return np.min(by_attack, axis=0)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format figures of several runs as mean ± standard deviation, and that of one run alone."""
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text


def _cell(runs: list[Verdicts], column: str) -> str:
    """Return the accuracy in % of those of a row's runs that have an attack."""
    accuracies = [100 * run[column].mean() for run in runs if column in run]
    if not accuracies:
        return ""
    text = mean_and_deviation(accuracies)
    if len(accuracies) < len(runs):
        text += f", {len(accuracies)} of {len(runs)} runs"
    return text


def table(groups: Groups) -> Iterator[str]:
    """Yield the rows in Markdown, and below them what `worst case` and the last column are."""
    right = {name: [verdicts(record) for record in records] for name, records in groups.items()}
    runs = list(chain.from_iterable(right.values()))
    columns = list(dict.fromkeys(chain.from_iterable(runs)))
    common = [column for column in columns if all(column in run for run in runs)]
    first = next(iter(groups))
    heads = ["network", "runs", *columns, "worst case", f"minus {first}"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)

    worst = {}
    compared = []
    for name, records in groups.items():
        worst_case = "needs adaptive"
        gain = ""
        if "adaptive" in common or not needs_adaptive(records[0].get("network", {})):
            worst[name] = worst_of(right[name], common)
            worst_case = f"**{mean_and_deviation(100 * worst[name].mean(1))}**"
        if name != first and name in worst and first in worst:
            gain = "other images, norm or eps"
            if images_of(records[0]) == images_of(groups[first][0]):
                compared.append((worst[name], worst[first]))
                paired = list(map(seed_of, records)) == list(map(seed_of, groups[first]))
                mean, low, high = difference(*compared[-1], paired)
                one_run = ", images alone" if 1 in map(len, compared[-1]) else ""
                gain = f"{mean:+.1f} ({low:+.1f} to {high:+.1f}{one_run})"
        cells = [_cell(right[name], column) for column in columns]
        yield f"| {' | '.join([name, str(len(records)), *cells, worst_case, gain])} |"

    yield ""
    yield f"Worst case: image by image over the attacks that all runs have, {', '.join(common)}."
    if len(worst) < len(groups):
        yield (
            "`needs adaptive`: attacks on the final logits overestimate this network, so there is "
            "a worst case only when all runs are evaluated with --attacks adaptive, too."
        )
    yield from _search_notes(groups)
    yield (
        "Minus the first row: on the same images, seed by seed where both rows have the same "
        "seeds, with a 95 % interval over images and seeds, Student's t for so few seeds. "
        "`images alone`: a row has one run, and another seed may differ by more."
    )
    if compared:
        yield _power(compared)


def _search_settings(record: dict) -> dict[str, object]:
    """Return how hard the attacks of a record search, by `attack's setting`."""
    settings = {}
    for name, attack in record["attacks"].items():
        for key, value in attack.get("settings", {}).items():
            if key in SEARCH:
                settings[f"{column_of(name)}'s {key}"] = value
    return settings


def _search_notes(groups: Groups) -> Iterator[str]:
    """Yield a line for each setting in which attacks differ, or which is a first look in bf16."""
    uses = defaultdict(dict)  # by setting, and by value and row in words: the value
    for name, records in groups.items():
        for record in records:
            for setting, value in _search_settings(record).items():
                uses[setting][f"{value} for {name}"] = value
    for setting, values in uses.items():
        different = set(values.values())
        if len(different) > 1 or "bf16" in different:
            yield f"Evaluated with {setting} {'; '.join(values)}."


def _power(rows: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Say how many seeds and images show a difference, from the mean variances of rows.

    rows: the worst cases of a row and of the first, (seeds, images) each.
    """
    several = [variances(*pair) for pair in rows if min(map(len, pair)) > 1]
    if not several:
        return (
            "Power: unknown, since a single seed says nothing about others; train by --seed 1,2,3."
        )
    mean = np.mean(several, axis=0)
    plans = {}
    for points in (1, 2):
        needed = {seeds: images_needed(points, seeds, *mean) for seeds in PLANS}
        ways = [f"{seeds} seeds x {count:,} images" for seeds, count in needed.items() if count]
        plans[points] = ", ".join(ways) or f"more than {PLANS[-1]} seeds"
    return (
        f"Power: a difference of one point is seen in {100 * POWER:.0f} % of studies with any of "
        f"{plans[1]}; of two points with {plans[2]}. A rough guide, estimated from the few seeds "
        "here."
    )


def main(argv: list[str]) -> None:
    """Print the table of the runs that a command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    try:
        records = [read(path) for path in parser.parse_args(argv).runs]
        print(*table(grouped(records)), sep="\n")
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
