"""Evaluations side by side: a table in Markdown from what test_white_attack.py has written of any number of runs.

python -m utils.evaluation.results RUN...        run folders or files; runs of one recipe and several seeds share a row

Each row: mean robust accuracy in %, and the range where there are several seeds; `worst case`, image by image, over the
attacks that all of the runs have; and its difference from the first row on the same images. A network with reverse
attention that is gated by a label or a prediction has a worst case with the adaptive attack only.

The file is `white_attack.json`. This of it is stable, and "format" is raised when it changes:

network         method, arch, width, reverse_attention, gate, epoch; recipe: every setting of its training
dataset, images, image_numbers, labels         the test images; image_numbers is null where they are all of them
threat_model, settings                         eps and step size on [0, 1], and what else the evaluation was told
attacks.NAME    robust_accuracy and interval_95 in %, seconds, notes; verdicts, a character an image, 1 where it is
                right; settings, those of the attack; made, when and where. `natural` is no attack, `adaptive: VIEW` one
                of the views, `worst case` image by image over all. Rows of earlier evaluations stay where `identity`
                is the same
identity        checksums of the network and of the images, and eps
provenance      command, commit, versions, device, processor, threads, seed, time
earlier         the records of evaluations before this one
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils.system.errors import UsageError
from utils.system.options import fitting
from utils.system.settings import APGD_STEPS, FREE, idle, restored

FORMAT = 1
FILE = "white_attack.json"
TOGETHER = ("worst case", "adaptive, worst case")  # lines that are made of others
ADAPTIVE = "adaptive: "
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


def needs_adaptive(network: Mapping[str, Any]) -> bool:
    """Whether attacks on the final logits overestimate a network: its gate is of a label or a prediction."""
    return network.get("reverse_attention") is True and network.get("gate") not in ("soft", "none")


def identity(record: dict) -> dict[str, Any]:
    """What makes two runs the same but for their seed: the recipe of the training, and what was attacked."""
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
    own |= {"network": network.get("arch"), "answers": settings.get("predict", "final")}
    return own | {"evaluated at eps": settings.get("eps", record.get("threat_model"))}


def evaluated(record: dict) -> dict[str, set[str]]:
    """How the attacks of a record were run, as far as their names do not say it, by `attack's setting`."""
    whole = record.get("settings", {})
    older = whole | {"steps": whole.get("num_steps"), "start": "uniform" if whole.get("random", True) else "image"}
    found: dict[str, set[str]] = {}
    for name, attack in record["attacks"].items():
        keys: tuple[str, ...] = ()
        if name.startswith(ADAPTIVE):
            keys = ("steps", "step_size", "restarts", "apgd_steps")
        elif name.startswith(("PGD-", "CW-", "transfer ")):
            keys = ("step_size", "start")
        settings = {"apgd_steps": APGD_STEPS} | attack["settings"] if attack.get("settings") else older
        for key in keys:
            if settings.get(key) is not None:
                found.setdefault(f"{column_of(name)}'s {key}", set()).add(str(settings[key]))
    return found


def grouped(records: list[dict]) -> Groups:
    """Records by recipe and evaluation, seeds aside. A name is the method's, and what tells apart those that share it.

    UsageError where a run is there twice, or seeds of a row were attacked on other images than one another.
    """
    groups: list[tuple[dict, list[dict]]] = []
    for record in records:
        own = identity(record)
        candidates = (members for key, members in groups if key == own and alike(record, members[0]))
        members = next(candidates, None)
        if members is None:
            groups.append((own, members := []))
        if any(record.get("checkpoint") == other.get("checkpoint") for other in members):
            raise UsageError(f"the evaluation of {record.get('checkpoint')} is there twice; give it once")
        if members and images_of(record) != images_of(members[0]):
            said = f"the runs of {record['network'].get('method')}"
            raise UsageError(f"{said} were evaluated on other images than one another")
        members.append(record)
    methods = [str(members[0]["network"].get("method")) for _, members in groups]
    named: Groups = {}
    for i, (method, (own, members)) in enumerate(zip(methods, groups, strict=True)):
        rivals = [key for other, (key, _) in zip(methods, groups, strict=True) if other == method]
        against = {key: [rival.get(key) for rival in rivals] for rival in rivals for key in rival}
        apart = [f"{key} {own.get(key)}" for key, values in against.items() if any(own.get(key) != v for v in values)]
        name = ", ".join([method, *apart])
        before = [key for key, _ in groups[:i]].count(own)  # the same training, evaluated otherwise
        named[f"{name}, evaluation {before + 1}" if before else name] = members
    return named


def alike(one: dict, other: dict) -> bool:
    """Whether two records were evaluated alike, as far as they have the same attacks."""
    first, second = evaluated(one), evaluated(other)
    return all(first[key] & second[key] for key in first.keys() & second.keys())


def column_of(attack: str) -> str:
    """The views of the adaptive attack share a column of the table."""
    return "adaptive" if attack.startswith(ADAPTIVE) else attack


def verdicts(record: dict) -> dict[str, np.ndarray]:
    """Which images are right, (n,) of 0 and 1, by attack; the views of the adaptive attack together as `adaptive`."""
    found: dict[str, np.ndarray] = {}
    for name, attack in record["attacks"].items():
        if name not in TOGETHER:
            right = np.frombuffer(attack["verdicts"].encode(), dtype=np.uint8) - ord("0")
            column = column_of(name)
            found[column] = np.minimum(found[column], right) if column in found else right
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
    columns = list(dict.fromkeys(column for seeds in found.values() for attacks in seeds for column in attacks))
    gated = {name for name, rows in groups.items() if any(needs_adaptive(row.get("network", {})) for row in rows)}
    lacking = {name for name in gated if any("adaptive" not in attacks for attacks in found[name])}
    compared = [attacks for name, seeds in found.items() if name not in lacking for attacks in seeds]
    common = [column for column in columns if compared and all(column in attacks for attacks in compared)]
    over = {name: [c for c in columns if c in common or (c == "adaptive" and name in gated)] for name in found}

    first = next(iter(groups))
    heads = ["network", "runs", *columns, "worst case", f"less {first}"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name, seeds in found.items():
        cells = [name, str(len(seeds))]
        for column in columns:
            values = [100 * attacks[column].mean() for attacks in seeds if column in attacks]
            part = f", {len(values)} of {len(seeds)} runs" if 0 < len(values) < len(seeds) else ""
            cells.append(cell(values) + part if values else "")
        if name in lacking:
            yield f"| {' | '.join([*cells, 'needs adaptive', ''])} |"
            continue

        worst = worst_of(seeds, over[name])
        beside = [f"with {column}" for column in over[name] if column not in common]
        left = [c for c in columns if c not in over[name] and any(c in attacks for attacks in seeds)]
        if left:
            beside.append(f"without {', '.join(left)}")
        figure = f"**{cell([100 * right.mean() for right in worst])}**"
        cells.append(", ".join([figure, *beside]))
        if name == first or first in lacking:
            cells.append("")
        elif any(images_of(record) != images_of(groups[first][0]) for record in groups[name]):
            cells.append("other images or eps")
        elif over[name] != over[first]:
            cells.append("other attacks")
        else:
            cells.append(less(worst, worst_of(found[first], over[first])))
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from explained(groups, columns, common, lacking)


def less(worst: np.ndarray, base: np.ndarray) -> str:
    """The difference of two rows' worst cases, with its interval."""
    alone = ", images alone" if min(len(worst), len(base)) == 1 else ""
    value, low, high = difference(worst, base)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}{alone})"


def explained(groups: Groups, columns: list[str], common: list[str], lacking: set[str]) -> Iterator[str]:
    """The lines below a table."""
    left = [column for column in columns if column not in common]
    if common:
        without = f"; without {', '.join(left)}, which not every run has" if left else ""
        yield f"Worst case: image by image, the lowest of {', '.join(common)}{without}."
    if lacking:
        yield (
            f"No worst case of {', '.join(sorted(lacking))}: attacks on the final logits overestimate a gated network; "
            "evaluate by --attacks adaptive, what is there already is kept."
        )
    told = {name: evaluated(records[0]) for name, records in groups.items()}
    for key in dict.fromkeys(key for settings in told.values() for key in settings):
        names: dict[str, list[str]] = {}
        for name, settings in told.items():
            if key in settings:
                names.setdefault(" and ".join(sorted(settings[key])), []).append(name)
        if len(names) > 1:
            parts = [f"{value} for {', '.join(rows)}" for value, rows in names.items()]
            yield f"Evaluated with {key} {'; '.join(parts)}."
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
