"""Evaluations side by side: a table in Markdown from what test_white_attack.py has written of any number of runs.

python -m utils.results RUN...        run folders or files; runs of one recipe and several seeds share a row

Each row: mean robust accuracy in %, and the range where there are several seeds; `worst case`, image by image, over the
attacks that all of the runs have; and its difference from the first row on the same images, with a 95 % interval by
resampling images and seeds.

The file is `white_attack.json`. This of it is stable, and "format" is raised when it changes:

network         method, arch, width, reverse_attention, gate, epoch; recipe: every setting of its training
dataset, images, image_numbers, labels         the test images; image_numbers is null where they are all of them
threat_model, settings                         eps and step size on [0, 1], and what else the evaluation was told
attacks.NAME    robust_accuracy and interval_95 in %, seconds, notes; verdicts, a character an image, 1 where it is
                right. `natural` is no attack, `adaptive: VIEW` one of the views, `worst case` image by image over all
provenance      command, commit, versions, device, processor, threads, seed, time
earlier         the records of evaluations before this one, in the same format
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.errors import UsageError
from utils.recipes import Training, described

FORMAT = 1
FILE = "white_attack.json"
TOGETHER = ("worst case", "adaptive, worst case")  # lines that are made of others
ADAPTIVE = "adaptive: "
Groups = dict[str, list[dict]]  # records by the name of their row


def read(path: str) -> dict:
    """What the evaluation of a run, a folder or its white_attack.json, has written. UsageError where that is not so."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found = [one["verdicts"] for one in record["attacks"].values()]
        fits = len({len(one) for one in found}) == 1 and set("".join(found)) <= set("01") and found[0]
        if not fits or record.get("format", FORMAT) != FORMAT:
            raise ValueError
        if not isinstance(record["network"], dict) or not isinstance(record["labels"], list):
            raise TypeError
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; test_white_attack.py --ckpt_url RUN writes it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is no {FILE} of today's test_white_attack.py; evaluate the run anew") from error
    return record


def grouped(records: list[dict]) -> Groups:
    """Records by recipe, seeds aside. A name is the method's, and where several share it what tells them apart."""
    unlike = {name for name, about in described(Training).items() if about.free}
    unlike |= {"seed", "model_dir", "data_dir", "tag", "device", "no_cuda", "ckpt_url"}
    keys, groups = [], {}
    for i, record in enumerate(records):
        network = record["network"]
        recipe = network.get("recipe")
        if not isinstance(recipe, dict):  # of a file from elsewhere
            recipe = {"file": record.get("checkpoint")}
        own = {key: value for key, value in recipe.items() if key not in unlike or key == "epochs"}
        own |= {"network": network.get("arch"), "data": record.get("dataset"), "attack": record.get("threat_model")}
        keys.append(own | {"predict": record.get("settings", {}).get("predict", "final")})
        groups.setdefault(json.dumps(keys[-1], sort_keys=True), []).append(i)
    named: Groups = {}
    for members in groups.values():
        own, method = keys[members[0]], str(records[members[0]]["network"].get("method"))
        rivals = [keys[of[0]] for of in groups.values() if str(records[of[0]]["network"].get("method")) == method]
        apart = [key for key in own if any(own[key] != other.get(key) for other in rivals)]
        named[", ".join([method, *(f"{key} {own[key]}" for key in apart)])] = [records[i] for i in members]
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


def cell(values: list[float], digits: int = 2) -> str:
    """A mean, and the range of several values."""
    mean, low, high = (f"{of:.{digits}f}" for of in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def table(groups: Groups) -> Iterator[str]:
    """The rows in Markdown, a note of what `worst case` is below. A record's `also` are further columns, numbers."""
    found = {name: [verdicts(record) for record in records] for name, records in groups.items()}
    everything = [attacks for of in found.values() for attacks in of]
    columns = list(dict.fromkeys(name for attacks in everything for name in attacks))
    common = [name for name in columns if all(name in attacks for attacks in everything)]
    also = list(dict.fromkeys(key for of in groups.values() for record in of for key in record.get("also", {})))
    first = next(iter(groups))
    heads = ["network", "runs", *columns, "worst case", f"less {first}", *also]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    base = None
    for name, seeds in found.items():
        cells = [name, str(len(seeds))]
        for column in columns:
            cells.append(cell([100 * of[column].mean() for of in seeds if column in of] or [np.nan]).replace("nan", ""))
        worst = np.stack([np.minimum.reduce([attacks[key] for key in common]) for attacks in seeds])
        cells.append(f"**{cell([100 * of.mean() for of in worst])}**")
        if base is None:
            base, labels = worst, groups[name][0].get("labels")
            cells.append("")
        elif all(record.get("labels") == labels for record in groups[name]):
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*difference(worst, base)))
        else:
            cells.append("other images")
        for key in also:
            values = [record["also"][key] for record in groups[name] if key in record.get("also", {})]
            cells.append(f"{sum(values) / len(values):.3g}" if values else "")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"Worst case: image by image, the lowest of {', '.join(common)}."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m utils.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"a folder that holds {FILE}, or such a file")
    try:
        records = [read(path) for path in parser.parse_args(argv).runs]
        sizes = {len(record["labels"]) for record in records}
        if len(sizes) > 1:
            counts = " and ".join(map(str, sorted(sizes)))
            raise UsageError(f"the evaluations are of {counts} images; give those of the same images")
        print(*table(grouped(records)), sep="\n")
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
