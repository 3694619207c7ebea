"""Evaluations side by side: a table in Markdown from what test_white_attack.py has written of any number of runs.

python -m utils.evaluation.results RUN...        run folders or files; runs of one recipe and several seeds share a row

Each row: mean robust accuracy in %, and the range where there are several seeds; `worst case`, image by image, over the
attacks that all of the runs have; and its difference from the first row on the same images.

The file is `white_attack.json`. This of it is stable, and "format" is raised when it changes:

network         method, arch, width, reverse_attention, gate, epoch; recipe: every setting of its training
dataset, images, image_numbers, labels         the test images; image_numbers is null where they are all of them
threat_model, settings                         eps and step size on [0, 1], and what else the evaluation was told
attacks.NAME    robust_accuracy and interval_95 in %, seconds, notes; verdicts, a character an image, 1 where it is
                right. `natural` is no attack, `adaptive: VIEW` one of the views, `worst case` image by image over all
provenance      command, commit, versions, device, processor, threads, seed, time
earlier         the records of evaluations before this one
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
from utils.system.options import fitting
from utils.system.settings import FREE, Evaluation, idle, restored

FORMAT = 1
FILE = "white_attack.json"
TOGETHER = ("worst case", "adaptive, worst case")  # lines that are made of others
ADAPTIVE = "adaptive: "
EVALUATED = {name: getattr(Evaluation, name) for name in ("num_steps", "random", "restarts", "apgd_steps", "predict")}
Groups = dict[str, list[dict]]  # records by the name of their row


def read(path: str) -> dict:
    """What the evaluation of a run, a folder or its white_attack.json, has written. UsageError where that is not so."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if Path(path).is_dir() and not file.exists():
        raise UsageError(f"{path} holds no {FILE}; name a run's folder, after test_white_attack.py --ckpt_url RUN")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        images, found = len(record["labels"]), [attack["verdicts"] for attack in record["attacks"].values()]
        whole = images and "natural" in record["attacks"] and all(len(one) == images for one in found)
        if not whole or set("".join(found)) - set("01") or record.get("format", FORMAT) != FORMAT:
            raise ValueError
        if not all(isinstance(record[key], dict) for key in ("network", "settings")):
            raise TypeError
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is no {FILE} of today's test_white_attack.py; evaluate the run anew") from error
    return record


def images_of(record: dict) -> object:
    """Which images were attacked, and within which ball."""
    return [record.get(key) for key in ("dataset", "threat_model", "image_numbers", "labels")]


def identity(record: dict) -> dict[str, Any]:
    """What makes two runs the same but for their seed: the recipe of the training, and how it was evaluated."""
    network, settings, recipe = record["network"], record["settings"], record["network"].get("recipe")
    file = str(record.get("checkpoint"))
    own: dict[str, Any] = {"file": file, "gate": network.get("gate"), "ra_blocks": network.get("ra_blocks")}
    if isinstance(recipe, dict):  # a run's
        trained = restored(fitting(recipe))
        away = FREE - {"epochs"} | {"seed", "model_dir", "data_dir", "device", "no_cuda", "ckpt_url", *idle(trained)}
        own = {name: value for name, value in asdict(trained).items() if name not in away}
        own |= {name: os.path.basename(getattr(trained, name) or "") for name in ("extra_data", "ckpt_url")}
        best = os.path.basename(file) == "best_adv_model.pt"
        own["weights"] = "of the best epoch" if best else f"of epoch {network.get('epoch')}"
    own |= {"network": network.get("arch"), "attack": record.get("threat_model")}
    return own | {f"evaluation's {name}": settings.get(name, default) for name, default in EVALUATED.items()}


def grouped(records: list[dict]) -> Groups:
    """Records by recipe and evaluation, seeds aside. A name is the method's, and what tells apart those that share it.

    UsageError where a run is there twice, or seeds of a row were attacked on other images than one another.
    """
    groups: list[tuple[dict, list[dict]]] = []
    for record in records:
        own = identity(record)
        members = next((members for key, members in groups if key == own), None)
        if members is None:
            groups.append((own, members := []))
        if any(record.get("checkpoint") == other.get("checkpoint") for other in members):
            raise UsageError(f"the evaluation of {record.get('checkpoint')} is there twice; give it once")
        if members and images_of(record) != images_of(members[0]):
            said = f"the runs of {record['network'].get('method')}"
            raise UsageError(f"{said} were evaluated on other images than one another")
        members.append(record)
    methods, named = [str(members[0]["network"].get("method")) for _, members in groups], {}
    for method, (own, members) in zip(methods, groups, strict=True):
        rivals = [key for other, (key, _) in zip(methods, groups, strict=True) if other == method]
        against = {key: [rival.get(key) for rival in rivals] for rival in rivals for key in rival}
        against |= {key: [other.get(key) for other, _ in groups] for key in own if key.startswith("evaluation's")}
        apart = [f"{key} {own.get(key)}" for key, values in against.items() if any(own.get(key) != v for v in values)]
        named[", ".join([method, *apart])] = members
    return named


def verdicts(record: dict) -> dict[str, np.ndarray]:
    """Which images are right, (n,) of 0 and 1, by attack; the views of the adaptive attack together as `adaptive`."""
    found: dict[str, np.ndarray] = {}
    for name, attack in record["attacks"].items():
        if name not in TOGETHER:
            right = np.frombuffer(attack["verdicts"].encode(), dtype=np.uint8) - ord("0")
            name = "adaptive" if name.startswith(ADAPTIVE) else name
            found[name] = np.minimum(found[name], right) if name in found else right
    return found


def difference(one: np.ndarray, other: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of one less that of other, (seeds, images) each, with a 95 % interval over images and seeds, in points."""
    random, images = np.random.default_rng(0), one.shape[1]
    found = []
    for _ in range(draws):
        shown = random.integers(images, size=images)
        means = [part[random.integers(len(part), size=len(part))][:, shown].mean() for part in (one, other)]
        found.append(means[0] - means[1])
    low, high = np.percentile(found, (2.5, 97.5))
    return 100 * (one.mean() - other.mean()), 100 * low, 100 * high


def cell(values: list[float]) -> str:
    """A mean, and the range of several values."""
    mean, low, high = (f"{of:.2f}" for of in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def worst_of(seeds: list[dict[str, np.ndarray]], names: list[str]) -> np.ndarray:
    """Which images stand all the attacks named, (seeds, images)."""
    return np.stack([np.minimum.reduce([attacks[name] for name in names]) for attacks in seeds])


def table(groups: Groups) -> Iterator[str]:
    """The rows in Markdown, and below them what `worst case` and the last column are."""
    found = {name: [verdicts(record) for record in records] for name, records in groups.items()}
    everything = [attacks for of in found.values() for attacks in of]
    columns = list(dict.fromkeys(name for attacks in everything for name in attacks))
    common = [name for name in columns if all(name in attacks for attacks in everything)]
    first, images = next(iter(groups)), images_of(next(iter(groups.values()))[0])
    heads = ["network", "runs", *columns, "worst case", f"less {first}"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    base = worst_of(found[first], common)
    for name, seeds in found.items():
        cells = [name, str(len(seeds))]
        for column in columns:
            values = [100 * of[column].mean() for of in seeds if column in of]
            part = f", {len(values)} of {len(seeds)} runs" if 0 < len(values) < len(seeds) else ""
            cells.append(cell(values) + part if values else "")
        worst = worst_of(seeds, common)
        cells.append(f"**{cell([100 * of.mean() for of in worst])}**")
        if name == first:
            cells.append("")
        elif any(images_of(record) != images for record in groups[name]):
            cells.append("other images or eps")
        else:
            alone = ", images alone" * (min(len(worst), len(base)) == 1)
            cells.append("{:+.1f} ({:+.1f} to {:+.1f}{})".format(*difference(worst, base), alone))
        yield f"| {' | '.join(cells)} |"
    yield ""
    left = [name for name in columns if name not in common]
    without = f"; without {', '.join(left)}, which not every run has" if left else ""
    yield f"Worst case: image by image, the lowest of {', '.join(common)}{without}."
    for name, records in groups.items():
        recipes = [record.get("network", {}).get("recipe") for record in records]
        seeds = [recipe.get("seed") for recipe in recipes if isinstance(recipe, dict)]
        if len(set(map(str, seeds))) < len(seeds):
            yield f"{name}: runs of seeds {', '.join(map(str, seeds))}; one seed twice tells nothing of other seeds."
    yield (
        "Less the first row: on the same images, with a 95 % interval by resampling images and seeds; where a row has "
        "one run, `images alone`: another seed may differ by more."
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluation.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"a folder that holds {FILE}, or such a file")
    try:
        print(*table(grouped([read(path) for path in parser.parse_args(argv).runs])), sep="\n", flush=True)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of a reader that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
