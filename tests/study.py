"""What each part is worth against an attacker who knows it: runs of digits, seed by seed, as one table.

python -m tests.study                          every table, days on 2 CPU cores
python -m tests.study gates --seeds 1,2        some of: gates grid companions controls ablations
python -m tests.study gates --print            what is there so far, as a table in Markdown
python -m tests.study --commands               the two commands of every row, and nothing else

It can be stopped and goes on: a run that is there is resumed, a finished one is kept, and so is every finished block of
an evaluation. The last epoch is evaluated, which no test image has chosen. Runs lie in --out (default ./study).
`worst case` is the lowest of all attacks of the table, image by image. Against the first row of a table: the difference
of the mean worst cases on the same images, with a 95 % interval by resampling images and seeds.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
ATTACKS = ("natural", "fgsm", "pgd", "cw", "autoattack", "adaptive")
PLAIN, NO_ANC, NO_RA = ("--no-ra", "--no-anc"), ("--no-anc",), ("--no-ra",)


def gates() -> dict[str, tuple[str, ...]]:
    """Is it the supervision of both blocks, the contrast or the attention?"""
    rows = {"TRADES": PLAIN}
    for gate in ("label", "predicted", "soft", "none"):
        rows[f"ANCRA-TRADES, gate {gate}"] = (f"--gate={gate}",)
        rows[f"TRADES-RA, gate {gate}, without ANC"] = (f"--gate={gate}", *NO_ANC)
    return rows


def grid() -> dict[str, tuple[str, ...]]:
    """Every method alone, with each part and with both."""
    parts = {"": PLAIN, " +ANC": NO_RA, " +RA": NO_ANC, " +both": ()}
    methods = {"TRADES": "trades", "PGD": "pgd", "MART": "mart"}
    return {f"{name}{part}": (f"--method={m}", *flags) for name, m in methods.items() for part, flags in parts.items()}


def companions() -> dict[str, tuple[str, ...]]:
    """What the method is combined with."""
    awp, ema, cosine = ("--awp=0.005", "--awp-warmup=2"), ("--ema=0.995",), ("--lr-schedule=cosine",)
    more = {"": (), " +AWP": awp, " +EMA": ema, " +both": (*awp, *ema), " +cosine": cosine}
    methods = {"TRADES": PLAIN, "ANCRA-TRADES": ()}
    return {f"{name}{word}": (*own, *flags) for name, own in methods.items() for word, flags in more.items()}


def controls() -> dict[str, tuple[str, ...]]:
    """What a reviewer asks for: the sum over heads weighs three times as much, so the baseline at a threefold rate."""
    return {"TRADES": PLAIN, "TRADES, lr 0.09": (*PLAIN, "--lr=0.09"), "heads of weight 0": ("--cr_beta=0",)}


def ablations() -> dict[str, tuple[str, ...]]:
    """The paper's, in small. Strategies act from the first epoch."""
    strategies = [name + adv for name in ("random", "soft", "hard", "easy") for adv in ("_adv", "")]
    rows = {f"strategy {name}": (f"--strategy={name}", "--warmup-epochs=0") for name in strategies}
    rows |= {f"alpha {value}": (f"--alpha={value}",) for value in (0, 0.5)}
    rows |= {f"zeta {value}": (f"--zeta={value}",) for value in (0, 1, 6)}
    return rows | {f"lambda {value}": (f"--cr_beta={value}",) for value in (0, 1)}


TABLES = {f.__name__: f for f in (gates, grid, companions, controls, ablations)}


def commands(out: Path, flags: tuple[str, ...], seed: int) -> tuple[Path, list[str], list[str]]:
    """Of a row and a seed: the beginning of its folder's name, the training, the evaluation but for its checkpoint."""
    name = re.sub(r"[^\w.=-]+", "", "-".join(flag.lstrip("-") for flag in flags) or "ANCRA-TRADES") + f"-{seed}"
    train = ["train_CIFAR10_ResNet.py", "--dataset=digits", f"--seed={seed}", f"--model-dir={out / name / 'run'}"]
    return out / name, [*train, *flags], ["test_white_attack.py", f"--attacks={','.join(ATTACKS)}", "--ckpt_url"]


def python(*argv: object) -> None:
    """Run a script to its end; stop where it stops."""
    print("python", shlex.join(map(str, argv)), flush=True)
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def make(out: Path, flags: tuple[str, ...], seed: int, evaluation: tuple[str, ...]) -> None:
    """Train and evaluate what is not there yet."""
    folder, train, evaluate = commands(out, flags, seed)
    runs = list(folder.glob("run*"))
    python(*train, *(["--resume", runs[0]] if runs else []))
    (run,) = folder.glob("run*")
    if not (run / "white_attack.json").exists():
        python(*evaluate, run / "model-wrn-last.pt", *evaluation)


def verdicts(out: Path, flags: tuple[str, ...], seeds: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Of each seed that has been evaluated: which images are right, by attack; `worst` is the lowest of all."""
    for seed in seeds:
        for file in commands(out, flags, seed)[0].glob("run*/white_attack.json"):
            attacks = json.loads(file.read_text())["attacks"]
            found = {name: np.array(list(map(int, a["verdicts"]))) for name, a in attacks.items()}
            yield found | {"worst": np.minimum.reduce(list(found.values()))}


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


def table(out: Path, rows: dict[str, tuple[str, ...]], seeds: list[int]) -> Iterator[str]:
    """The rows that have been evaluated, in Markdown."""
    yield "| digits, % of images | seeds | natural | PGD-40 | AutoAttack | worst case, range | against the first row |"
    yield "|---|---|---|---|---|---|---|"
    base = None
    for name, flags in rows.items():
        found = list(verdicts(out, flags, seeds))
        if not found:
            continue
        worst = np.stack([seed["worst"] for seed in found])
        base = worst if base is None else base
        cells = [f"{100 * np.mean([s[key].mean() for s in found]):.2f}" for key in columns(found[0])]
        each = 100 * worst.mean(1)
        spread = f"**{each.mean():.2f}**, {each.min():.2f} to {each.max():.2f}"
        against = "" if base is worst else "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference(worst, base))
        yield f"| {name} | {len(found)} | {' | '.join(cells)} | {spread} | {against} |"


def columns(found: dict[str, np.ndarray]) -> tuple[str, ...]:
    return "natural", next(name for name in found if name.startswith("PGD-")), "AutoAttack"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--print", action="store_true", help="print what is there")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    parser.add_argument("--flags", default="", help="more flags of every training, for trials")
    parser.add_argument("--evaluation", default="", help="more flags of every evaluation, for trials")
    given = parser.parse_args(argv)
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    seeds, out = [int(seed) for seed in given.seeds.split(",")], given.out.resolve()
    more, evaluation = shlex.split(given.flags), shlex.split(given.evaluation)
    for name in given.tables or TABLES:
        rows = {row: (*flags, *more) for row, flags in TABLES[name]().items()}
        for seed in () if given.print else seeds:  # seed by seed: a table of one seed is there first
            for flags in rows.values():
                if given.commands:
                    folder, train, evaluate = commands(given.out, flags, seed)
                    print(
                        shlex.join(["python", *train]),
                        "&&",
                        shlex.join(["python", *evaluate]),
                        f"{folder}/run*/model-wrn-last.pt",
                    )
                else:
                    make(out, flags, seed, tuple(evaluation))
        if not given.commands:
            print(f"\n{name}: {TABLES[name].__doc__}\n", *table(out, rows, seeds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
