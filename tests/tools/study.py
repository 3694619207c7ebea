"""What each part is worth against an attacker who knows it: runs of digits, seed by seed, as tables and a figure.

python -m tests.tools.study                          all tables, 2 to 3 hours on 2 CPU cores
python -m tests.tools.study gates mart --seeds 1     some of its tables and seeds; which there are: --help
python -m tests.tools.study --scale main             of the main job's training, for a card; full: the whole evaluation, too
python -m tests.tools.study --print                  the tables of what is there; of a file: --out tests/golden/study.json
python -m tests.tools.study --commands               the three commands of every run, and nothing else

It can be stopped and goes on: a run that is there is resumed, a finished one is kept, and so is every finished block of
an evaluation. Runs lie in --out (./study), their verdicts together in study.json there, the figure in study.png. Each
run has one thread, --jobs run side by side. The last epoch is evaluated, which no test image has chosen.

SMALL and LEAN below are the settings of all rows; --scale main trains as the main job, and evaluates as LEAN says. The
adaptive attack makes 40 steps of PGD and 20 of each APGD on each view: of 250 images of a network of 4 epochs 25 with
one start and 20 with two left 55.6 % right, as 50 with two did; of the main job's `gate none`, seed 2, it leaves
79.72 % of 360 images, as the standard one (5 starts, 100 steps) and AutoAttack do. A plain network has one view, others
four to six, so its PGD has six starts. AutoAttack is run for seed 1 of TRADES and of the small gates with ANC.
Alignment and exclusion: mean cosine of features with those of the adversarial image, and of a negative. EMA's decay,
(1 + t) / (10 + t) at first, is 0.89 at the end of a small run and 0.96 of a main one, never --ema's 0.995.

All 90 small evaluations, with their trainings, took 134 minutes of 2 cores of an AMD EPYC, beside other work. At scale
main a run takes 5 to 10 minutes of one core; of tests/golden/study_main.json 37 are an H200's, 14 of them side by side
in 193 s. Trained and evaluated on the CPU, seed 1, TRADES attained 75.83 % and ANCRA-TRADES 76.39, on the card 75.00
and 74.44; seeds 2 and 3 lie between 74.72 and 76.11. AutoAttack left 75.83 and 83.89 % of those of the CPU, which
tests/golden/study_cpu.json holds (--evaluation=--attacks=natural,fgsm,pgd,cw,adaptive,autoattack).
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.evaluation.results import FILE, Groups, read, table, verdicts, worst_of
from utils.system.errors import UsageError, stop_signals
from utils.system.options import parse, parse_training
from utils.system.settings import Evaluation, stored

ROOT = Path(__file__).parents[2]
SMALL = ("--width=8", "--epochs=6", "--milestones=5,6", "--warmup-epochs=2", "--eval-interval=6")
LEAN = ("--apgd-steps=20",)
ATTACKS = ("natural", "fgsm", "pgd", "cw", "adaptive")
SEEDS = (1, 2, 3)
PLAIN_STARTS = 6  # as many as another network has views at most
SCALES = ("small", "main", "full")
CLASSES = 10
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
MARKS, COLOURS = "osD^vP*", 10


class Row(NamedTuple):
    """Flags of the training, how many seeds, and whether AutoAttack is run for the first one, too."""

    flags: tuple[str, ...] = ()
    seeds: int = 1
    autoattack: bool = False
    predict: str = "final"


Rows = dict[str, Row]
TRADES = Row(("--no-ra", "--no-anc"), 3, True)


def gates() -> Rows:
    """Is it the supervision of both blocks, the contrast or the attention?"""
    rows = {"TRADES": TRADES}
    for gate in ("label", "predicted", "soft", "none"):
        flags = () if gate == "label" else (f"--gate={gate}",)
        rows[f"gate {gate}"] = Row(flags, 3, True)
        rows[f"gate {gate}, no ANC"] = Row((*flags, "--no-anc"), 3 if gate in ("label", "none") else 1)
    return rows


def parts_of(name: str, *flags: str) -> Rows:
    """A method alone, with each part and with both."""
    return {
        name: Row((*flags, *TRADES.flags), 3, not flags),
        f"{name} +ANC": Row((*flags, "--no-ra"), 1 if flags else 3),
        f"{name} +RA": Row((*flags, "--no-anc"), 1 if flags else 3),
        f"{name} +both": Row(flags, 3, not flags),
    }


def trades() -> Rows:
    """TRADES alone, with each part and with both."""
    return parts_of("TRADES")


def pgd() -> Rows:
    """PGD adversarial training alone, with each part and with both."""
    return parts_of("PGD", "--method=pgd")


def mart() -> Rows:
    """MART alone, with each part and with both."""
    return parts_of("MART", "--method=mart")


def contrast() -> Rows:
    """What ANC adds beside the published gate."""
    return {name: gates()[name] for name in ("gate label, no ANC", "gate label")}


def contrast_alone() -> Rows:
    """What ANC adds where nothing is weighted."""
    return {name: gates()[name] for name in ("gate none, no ANC", "gate none")}


AWP, EMA = ("--awp=0.005", "--awp-warmup=1"), ("--ema=0.995",)
ADDED = {"AWP": AWP, "EMA": EMA, "AWP +EMA": (*AWP, *EMA), "cosine": ("--lr-schedule=cosine",)}


def with_each(name: str, own: Row, seeds: int, words: Iterable[str] = tuple(ADDED)) -> Rows:
    """A row alone, and with each of its companions."""
    return {name: own} | {f"{name} +{word}": Row((*own.flags, *ADDED[word]), seeds) for word in words}


def companions_trades() -> Rows:
    """What TRADES is combined with: does it add?"""
    return with_each("TRADES", TRADES, 3)


def companions_ancra() -> Rows:
    """The same for the published method."""
    return with_each("ANCRA-TRADES", Row((), 3, True), 3)


def best() -> Rows:
    """The same without a gate."""
    return with_each("gate none", Row(("--gate=none",), 3, True), 1, ("AWP", "EMA", "AWP +EMA"))


def controls() -> Rows:
    """What a reviewer asks for. A sum over three heads weighs three times as much: the baseline at a threefold rate."""
    return {
        "TRADES": TRADES,
        "TRADES, lr 0.09": Row((*TRADES.flags, "--lr=0.09"), 3),
        "gate none": Row(("--gate=none",), 3, True),
        "gate none, heads in the losses alone": Row(("--gate=none", "--attack-cr-beta=0")),
        "gate none, heads in the attack alone": Row(("--gate=none", "--cr_beta=0", "--attack-cr-beta=2")),
    }


def rate() -> Rows:
    """What a threefold rate leaves of the gain without a gate."""
    return {name: (controls() | gates())[name] for name in ("TRADES, lr 0.09", "gate none", "gate none, no ANC")}


def ablations() -> Rows:
    """The paper's, in small. Strategies act from the first epoch."""
    rows = {"ANCRA-TRADES": Row((), 3, True)}
    rows |= {f"answer by {head}": Row((), predict=head) for head in ("auxiliary1", "auxiliary2")}
    for name in [name + adversarial for name in ("random", "soft", "hard", "easy") for adversarial in ("", "_adv")]:
        if name != "random_adv":  # the row above: nothing else acts while it warms up
            rows[f"strategy {name}"] = Row((f"--strategy={name}", "--warmup-epochs=0"))
    rows |= {f"alpha {value}": Row((f"--alpha={value}",)) for value in (0, 0.5)}
    rows |= {f"zeta {value}": Row((f"--zeta={value}",)) for value in (0, 1, 6)}  # 0: negatives, but no contrast
    return rows | {f"lambda {value}": Row((f"--cr_beta={value}",)) for value in (0, 1)}


TABLES = (gates, contrast, contrast_alone, trades, pgd, mart, companions_trades, companions_ancra, best, controls)
TABLES = {f.__name__: f for f in (*TABLES, rate, ablations)}


class Run(NamedTuple):
    """A row's run of one seed: where it lies, and its three commands, of which the run folder is left out."""

    row: Row
    seed: int
    folder: Path
    train: list[str]
    evaluate: list[str]
    measure: list[str]


def small_of(scale: str) -> tuple[str, ...]:
    return SMALL if scale == "small" else ()


def run_of(out: Path, row: Row, seed: int, scale: str = "small", more: tuple = (), evaluation: tuple = ()) -> Run:
    name = re.sub(r"[^\w.=-]+", "", "-".join(flag.lstrip("-") for flag in row.flags) or "ANCRA-TRADES") + f"-{seed}"
    folder = out / name
    train = ["train_CIFAR10_ResNet.py", "--dataset=digits", *small_of(scale), *row.flags, f"--seed={seed}"]
    full, first = scale == "full", scale == "small" and row.autoattack and seed == 1
    attacks = (*ATTACKS, "autoattack") if full or first else ATTACKS
    restarts = f"--restarts={PLAIN_STARTS if '--no-ra' in row.flags else 1}"
    evaluate = ["test_white_attack.py", f"--attacks={','.join(attacks)}", *(() if full else (restarts, *LEAN))]
    evaluate += evaluation
    if row.predict != "final":
        evaluate += [f"--predict={row.predict}", f"--log_path={folder / row.predict / 'test.log'}"]
    measure = ["feature_distance.py", "--target_label=all", f"--out={folder / 'distances'}"]
    return Run(row, seed, folder, [*train, *more, f"--model-dir={folder / 'run'}"], evaluate, measure)


def runs_of(out: Path, tables: Iterable[str], seeds: Iterable[int], all_seeds: bool, *how: object) -> list[Run]:
    """Seed by seed, table by table, each run once. all_seeds: of every row, not only as many as it asks for."""
    found = {}
    for seed in seeds:
        for row in (row for name in tables for row in TABLES[name]().values()):
            if all_seeds or seed <= row.seeds:
                found[row.flags, row.predict, seed] = run_of(out, row, seed, *how)
    return list(found.values())


def script(argv: list[object]) -> None:
    """Run a script in this process, which has PyTorch loaded, and end the process where a signal ended the script.

    RuntimeError where it fails.
    """
    sys.argv = [str(arg) for arg in argv]
    print("\npython", shlex.join(sys.argv), flush=True)
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        if end.code in STOPPED:
            os._exit(end.code)  # before this process takes up another run
        if end.code:
            raise RuntimeError(f"status {end.code}: python {shlex.join(sys.argv)}") from end


def make(runs: list[Run]) -> float:
    """Make the runs of a folder, one after the other -> seconds."""
    began = time.perf_counter()
    for run in runs:
        make_one(run)
    return time.perf_counter() - began


def make_one(run: Run) -> None:
    """Train, evaluate and measure what is not there yet; what the scripts say goes to output.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(open(run.folder / "output.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        there = sorted(run.folder.glob("run*"))
        if not (there and (there[0] / FILE).exists()):
            again = ["--resume", there[0]] if there and (there[0] / "last_state.pt").exists() else ["--overwrite"]
            script([*run.train, *again])
        (trained,) = run.folder.glob("run*")
        checkpoint = ["--ckpt_url", trained / "model-wrn-last.pt"]
        written = (trained if run.row.predict == "final" else run.folder / run.row.predict) / FILE
        written.parent.mkdir(exist_ok=True)
        if not written.exists():
            script([*run.evaluate, *checkpoint])
        if len(list((run.folder / "distances").glob("*.npz"))) < CLASSES:
            script([*run.measure, *checkpoint])


def record_of(run: Run) -> dict | None:
    """What the tables need of a finished run, and where it comes from; None where there is none.

    UsageError where other settings than today's have made it.
    """
    row = run.row
    files = list(run.folder.glob(f"run*/{FILE}" if row.predict == "final" else f"{row.predict}/{FILE}"))
    if not files:
        return None
    record = read(str(files[0]))
    recipe, looked = record["network"]["recipe"], record["settings"]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:  # of flags without an effect the run has told
            wanted = stored(parse_training("", {}, run.train[1:]).settings)
    except SystemExit as error:
        raise UsageError(said.getvalue().strip()) from error
    evaluation = parse(Evaluation, "", [*run.evaluate[1:], f"--ckpt_url={files[0].parent}"])
    other = [key for key, value in wanted.items() if key not in ("model_dir", "resume") and recipe[key] != value]
    told = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(evaluation).items() if name in looked}
    told["step_size"], told["eps"] = evaluation.step_size or looked["step_size"], evaluation.epsilon or looked["eps"]
    other += [name for name, value in told.items() if looked[name] != value]
    if other:
        raise UsageError(f"{files[0]} is of another {', '.join(other)}; give another --out, or remove its folder")
    found = {
        "row": row.flags,
        "predict": row.predict,
        "seed": run.seed,
        "train": shlex.join(["python", *run.train[:-1]]),
    }
    found |= {"evaluate": shlex.join(["python", *run.evaluate]).replace(f"{run.folder.parent}{os.sep}", "")}
    found |= {key: record["provenance"].get(key) for key in ("commit", "versions", "device", "cpu", "threads")}
    found["card"] = record["provenance"].get("card", {}).get("name")
    found |= {key: record.get(key) for key in ("dataset", "threat_model", "image_numbers", "labels")}
    attacks = {name: {"verdicts": "".join(map(str, right))} for name, right in verdicts(record).items()}
    return found | {"attacks": attacks, "also": also(run)}


def also(run: Run) -> dict[str, float]:
    """Of a run: alignment, exclusion, and seconds of its fastest epoch, on one thread beside another run."""
    if run.row.predict != "final":
        return {}
    files = sorted((run.folder / "distances").glob("*.npz"))
    found = {}
    for word, pair in {"alignment": "PP", "exclusion": "NP"}.items():
        of = [np.load(file)[f"weighted_{pair}_cosine"] for file in files]
        found |= {word: float(np.concatenate(of).mean())} if len(of) == CLASSES else {}
    for metrics in run.folder.glob("run*/metrics.csv"):
        with metrics.open() as lines:
            found["s an epoch"] = min(float(line["seconds"]) for line in csv.DictReader(lines))
    return found


def groups_of(rows: Rows, records: list[dict]) -> Groups:
    """The records of each row that has some, by seed."""
    found = {}
    for name, row in rows.items():
        own = [r for r in records if (tuple(r["row"]), r["predict"]) == (row.flags, row.predict)]
        found |= {name: sorted(own, key=lambda r: r["seed"])} if own else {}
    return found


def with_more(groups: Groups, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a table, its rows with what else is known of their runs: means."""
    keys = list(dict.fromkeys(key for records in groups.values() for record in records for key in record["also"]))
    found = [[[r["also"][key] for r in records if key in r["also"]] for key in keys] for records in groups.values()]
    cells = [keys, ["---"] * len(keys), *([f"{sum(v) / len(v):.3g}" if v else "" for v in row] for row in found)]
    for i, line in enumerate(lines):
        yield line + "".join(f" {cell} |" for cell in cells[i]) if i < len(cells) else line


def draw(records: list[dict], file: Path, title: str) -> None:
    """Worst case against natural accuracy, a mark a row, bars for the range over seeds; and the ablations' rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    every = {**controls(), **trades(), **pgd(), **mart(), **gates()}
    once = {row.flags: (name, row) for name, row in every.items()}  # names of gates where both have one
    shown = [groups_of(dict(once.values()), records), groups_of(ablations(), records)]
    attacks = [set(verdicts(record)) for of in shown for group in of.values() for record in group]
    names = sorted(set.intersection(*attacks))  # those that every run has

    def spread(group: list[dict], names: list[str] = names) -> tuple[float, float, float]:
        each = 100 * worst_of([verdicts(record) for record in group], names).mean(1)
        return each.mean(), max(0, each.mean() - each.min()), max(0, each.max() - each.mean())  # rounding

    for i, (name, group) in enumerate(shown[0].items()):
        (x, *across), (y, *up) = spread(group, ["natural"]), spread(group)
        how = {"fmt": MARKS[i % len(MARKS)], "color": f"C{i % COLOURS}", "label": f"{name}: {y:.1f}", "ms": 7}
        left.errorbar(x, y, [[up[0]], [up[1]]], [[across[0]], [across[1]]], **how)
    left.set(xlabel="natural accuracy, %", ylabel="worst case, %", title=title)
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for i, group in enumerate(reversed(shown[1].values())):
        y, low, high = spread(group)
        right.errorbar(y, i, xerr=[[low], [high]], fmt="o", color="C0")
    right.set(yticks=range(len(shown[1])), yticklabels=[*reversed(shown[1])], xlabel="worst case, %", title="ablations")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def save(records: list[dict], file: Path, **settings: object) -> None:
    """study.json: what is the same in all records once, and a line for each record with the rest."""
    same = {key: value for key, value in records[0].items() if all(r[key] == value for r in records)}
    lines = ",\n".join(json.dumps({key: r[key] for key in r if key not in same}) for r in records)
    file.write_text(json.dumps(settings | {"same": same, "runs": []})[:-2] + f"\n{lines}]}}\n")


def saved(file: Path) -> list[dict]:
    """The records that `save` has written."""
    try:
        content = json.loads(file.read_text())
        records = [content["same"] | record for record in content["runs"]]
        if not all({"row", "predict", "seed", "attacks", "labels", "also"} <= record.keys() for record in records):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no study.json") from error
    return records


def show(tables: list[str], records: list[dict], seeds: tuple[int, ...]) -> None:
    """Print tables; UsageError where none of them has a run."""
    records = [record for record in records if record["seed"] in seeds]
    if not any(groups_of(TABLES[name](), records) for name in tables):
        raise UsageError(f"no finished run of {', '.join(tables)} with seeds {', '.join(map(str, seeds))}")
    for name in tables:
        groups = groups_of(TABLES[name](), records)
        if groups:
            print(f"\n{name}: {TABLES[name].__doc__}\n", *with_more(groups, table(groups)), sep="\n", flush=True)


def work(wanted: list[Run], jobs: int) -> list[str]:
    """Make the runs, `jobs` at once; what failed."""
    folders: dict[Path, list[Run]] = {}
    for run in wanted:
        folders.setdefault(run.folder, []).append(run)
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker loads PyTorch
    failed, spawn = [], multiprocessing.get_context("spawn")

    def stop(signum: int, frame: object) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()  # its script saves and ends
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signum)

    with stop_signals(stop), ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        begun = {pool.submit(make, runs): folder for folder, runs in folders.items()}
        for i, future in enumerate(as_completed(begun), 1):
            error = future.exception()
            failed += [f"{begun[future]}: {error}"] * (error is not None)
            said = f"failed: {error}" if error else f"{future.result():.0f} s"
            print(f"{i} of {len(begun)}  {begun[future].name}  {said}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", help="these, of every row; otherwise up to 3, as many as the row asks for")
    parser.add_argument("--out", type=Path, help="default ./study, with --scale ./study-main, ./study-full")
    parser.add_argument("--scale", choices=SCALES, default="small", help="full: also 3 seeds of every row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, also on one card")
    parser.add_argument("--print", action="store_true", help="print what is there, or in a study.json that --out names")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    parser.add_argument("--flags", default="", help="more flags of every training, for trials")
    parser.add_argument("--evaluation", default="", help="more flags of every evaluation, for trials")
    given = parser.parse_args(argv)
    scale, tables = given.scale, given.tables or list(TABLES)
    out = given.out or Path("study" if scale == "small" else f"study-{scale}")
    if unknown := set(tables) - set(TABLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    if not re.fullmatch(r"\d+(,\d+)*", given.seeds or "1") or given.jobs < 1:
        parser.error("--seeds takes numbers such as 1,2,3, and --jobs one of at least 1")
    seeds = tuple(map(int, given.seeds.split(","))) if given.seeds else SEEDS
    try:
        if out.suffix == ".json":
            if not given.print:
                parser.error("--out takes a folder; a study.json is only printed, by --print")
            return show(tables, saved(out), seeds)
        how = scale, tuple(shlex.split(given.flags)), tuple(shlex.split(given.evaluation))
        out = out if given.commands else out.resolve()
        wanted = runs_of(out, tables, seeds, scale == "full" or bool(given.seeds), *how)
        if given.commands:
            for run in wanted:
                checkpoint = f"--ckpt_url {shlex.quote(str(run.folder))}/run*/model-wrn-last.pt"
                train, *looks = (f"python {shlex.join(argv)}" for argv in (run.train, run.evaluate, run.measure))
                print(train, *(f"{look} {checkpoint}" for look in looks), sep=" && ")
            return
        failed = [] if given.print else work(wanted, given.jobs)
        if failed:
            print("", *failed, sep="\n", file=sys.stderr)
        records = [r for run in runs_of(out, list(TABLES), {*SEEDS, *seeds}, True, *how) if (r := record_of(run))]
        if not records:
            parser.error(f"{out} holds no finished run")
        save(records, out / "study.json", small=small_of(scale), flags=given.flags, evaluation=given.evaluation)
        show(tables, records, seeds)
        draw(records, out / "study.png", "digits, eps 0.1" + ", small networks" * (scale == "small"))
    except (OSError, ValueError, KeyError, UsageError) as error:
        parser.error(str(error))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
