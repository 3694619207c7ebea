"""What each part is worth against an attacker who knows it: runs of digits, as tables and a figure.

python -m tests.tools.study                        all tables, 2 to 3 hours on 2 CPU cores
python -m tests.tools.study gates mart --seeds 1   some tables and seeds; which there are: --help
python -m tests.tools.study --scale main           with the main job's training, for a card;
                                                   full: with the whole evaluation, too
python -m tests.tools.study --print                the tables of what is there; of a file:
                                                   --out tests/golden/study.json
python -m tests.tools.study --commands             print the three commands of every run

It can be stopped and goes on: unfinished runs are resumed, finished runs and finished blocks of an
evaluation are kept. Runs lie in --out (./study), with all verdicts in study.json and the figure in
study.png. Each run has one thread, and --jobs run side by side. The last epoch is evaluated, which
no test image has chosen.

SMALL and LEAN below are the settings of all rows; --scale main trains as the main job does, and
evaluates as LEAN says. The adaptive attack makes 40 steps of PGD and 20 of each APGD on each view.
A plain network has one view, others four to six, so its PGD has six starts. AutoAttack is run for
seed 1 of TRADES and of the small gates with ANC. Alignment and exclusion are the mean cosine of
features with those of the adversarial image and of a negative. The decay of EMA is
(1 + t) / (10 + t) at first, 0.89 at the end of a small run and 0.96 of a main one, never --ema's
0.995.
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
MARKS = "osD^vP*"
COLOURS = 10


class Row(NamedTuple):
    """Flags of the training, the number of seeds, and whether AutoAttack is run for the first."""

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
        rows[f"gate {gate}, no ANC"] = Row(
            (*flags, "--no-anc"), 3 if gate in ("label", "none") else 1
        )
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


AWP = ("--awp=0.005", "--awp-warmup=1")
EMA = ("--ema=0.995",)
ADDED = {"AWP": AWP, "EMA": EMA, "AWP +EMA": (*AWP, *EMA), "cosine": ("--lr-schedule=cosine",)}


def with_each(name: str, own: Row, seeds: int, words: Iterable[str] = tuple(ADDED)) -> Rows:
    """A row alone, and with each of its companions."""
    return {name: own} | {
        f"{name} +{word}": Row((*own.flags, *ADDED[word]), seeds) for word in words
    }


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
    """What a reviewer asks for. Three heads weigh threefold: the baseline at a threefold rate."""
    return {
        "TRADES": TRADES,
        "TRADES, lr 0.09": Row((*TRADES.flags, "--lr=0.09"), 3),
        "gate none": Row(("--gate=none",), 3, True),
        "gate none, heads in the losses alone": Row(("--gate=none", "--attack-cr-beta=0")),
        "gate none, heads in the attack alone": Row(
            ("--gate=none", "--cr_beta=0", "--attack-cr-beta=2")
        ),
    }


def rate() -> Rows:
    """What a threefold rate leaves of the gain without a gate."""
    return {
        name: (controls() | gates())[name]
        for name in ("TRADES, lr 0.09", "gate none", "gate none, no ANC")
    }


def ablations() -> Rows:
    """The paper's, in small. Strategies act from the first epoch."""
    rows = {"ANCRA-TRADES": Row((), 3, True)}
    for head in ("auxiliary1", "auxiliary2"):
        rows[f"answer by {head}"] = Row(predict=head)
    # random_adv is the first row: nothing else acts while it warms up.
    for name in ("random", "soft", "soft_adv", "hard", "hard_adv", "easy", "easy_adv"):
        rows[f"strategy {name}"] = Row((f"--strategy={name}", "--warmup-epochs=0"))
    for value in (0, 0.5):
        rows[f"alpha {value}"] = Row((f"--alpha={value}",))
    for value in (0, 1, 6):  # 0: negatives, but no contrast
        rows[f"zeta {value}"] = Row((f"--zeta={value}",))
    for value in (0, 1):
        rows[f"lambda {value}"] = Row((f"--cr_beta={value}",))
    return rows


TABLES = {
    "gates": gates,
    "contrast": contrast,
    "contrast_alone": contrast_alone,
    "trades": trades,
    "pgd": pgd,
    "mart": mart,
    "companions_trades": companions_trades,
    "companions_ancra": companions_ancra,
    "best": best,
    "controls": controls,
    "rate": rate,
    "ablations": ablations,
}


class Run(NamedTuple):
    """A row's run of one seed: its folder, and its three commands without the run folder."""

    row: Row
    seed: int
    folder: Path
    train: list[str]
    evaluate: list[str]
    measure: list[str]


def settings_of(scale: str) -> tuple[str, ...]:
    """Return the flags that make all trainings small, where they are."""
    return SMALL if scale == "small" else ()


def run_of(
    out: Path,
    row: Row,
    seed: int,
    scale: str = "small",
    training_flags: tuple[str, ...] = (),
    evaluation_flags: tuple[str, ...] = (),
) -> Run:
    """Make the commands of a row's run."""
    name = "-".join(flag.lstrip("-") for flag in row.flags) or "ANCRA-TRADES"
    folder = out / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '', name)}-{seed}"

    train = ["train_CIFAR10_ResNet.py", "--dataset=digits", *settings_of(scale)]
    train += [*row.flags, f"--seed={seed}", *training_flags, f"--model-dir={folder / 'run'}"]

    attacks = ATTACKS
    if scale == "full" or (scale == "small" and row.autoattack and seed == 1):
        attacks += ("autoattack",)
    evaluate = ["test_white_attack.py", f"--attacks={','.join(attacks)}"]
    if scale != "full":
        restarts = PLAIN_STARTS if "--no-ra" in row.flags else 1
        evaluate += [f"--restarts={restarts}", *LEAN]
    evaluate += evaluation_flags
    if row.predict != "final":
        evaluate += [f"--predict={row.predict}", f"--log_path={folder / row.predict / 'test.log'}"]

    measure = ["feature_distance.py", "--target_label=all", f"--out={folder / 'distances'}"]
    return Run(row, seed, folder, train, evaluate, measure)


def runs_of(
    out: Path,
    tables: Iterable[str],
    seeds: Iterable[int],
    all_seeds: bool,
    scale: str,
    training_flags: tuple[str, ...],
    evaluation_flags: tuple[str, ...],
) -> list[Run]:
    """List the runs of tables, seed by seed and table by table, each once.

    all_seeds: take every seed of every row, not only as many as the row asks for.
    """
    runs = {}
    for seed in seeds:
        for name in tables:
            for row in TABLES[name]().values():
                if all_seeds or seed <= row.seeds:
                    run = run_of(out, row, seed, scale, training_flags, evaluation_flags)
                    runs[row.flags, row.predict, seed] = run
    return list(runs.values())


def script(argv: list[object]) -> None:
    """Run a script in this process; end the process where a signal has ended the script.

    Errors: RuntimeError where the script fails.
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
    """Train, evaluate and measure what is not there yet; what scripts print goes to output.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(run.folder / "output.txt", "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        existing = sorted(run.folder.glob("run*"))
        if not existing:
            script([*run.train, "--overwrite"])
        elif not (existing[0] / FILE).exists():
            resumable = (existing[0] / "last_state.pt").exists()
            script([*run.train, *(["--resume", existing[0]] if resumable else ["--overwrite"])])
        (trained,) = run.folder.glob("run*")
        checkpoint = ["--ckpt_url", trained / "model-wrn-last.pt"]
        written = (trained if run.row.predict == "final" else run.folder / run.row.predict) / FILE
        written.parent.mkdir(exist_ok=True)
        if not written.exists():
            script([*run.evaluate, *checkpoint])
        if len(list((run.folder / "distances").glob("*-[0-9].npz"))) < CLASSES:
            script([*run.measure, *checkpoint])


def other_settings(run: Run, record: dict, folder: Path) -> list[str]:
    """Name the settings of a run's training and evaluation that are not those of its commands."""
    recipe = record["network"]["recipe"]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            wanted = stored(parse_training("", {}, run.train[1:]).settings)
    except SystemExit as error:
        raise UsageError(errors.getvalue().strip()) from error
    names = []
    for name, value in wanted.items():
        if name not in ("model_dir", "resume") and recipe[name] != value:
            names.append(name)

    evaluated = record["settings"]
    evaluation = parse(Evaluation, "", [*run.evaluate[1:], f"--ckpt_url={folder}"])
    wanted = asdict(evaluation) | {"eps": evaluation.epsilon}
    for name, value in evaluated.items():
        if name in ("norm", "eps", "step_size") and wanted[name] is None:  # the data set's
            continue
        if name in wanted and value != json.loads(json.dumps(wanted[name])):
            names.append(name)
    return names


def record_of(run: Run) -> dict | None:
    """Return what the tables need of a finished run, and its origin; None where there is none.

    Errors: UsageError where it was made with other settings.
    """
    row = run.row
    pattern = f"run*/{FILE}" if row.predict == "final" else f"{row.predict}/{FILE}"
    files = list(run.folder.glob(pattern))
    if not files:
        return None
    record = read(str(files[0]))
    if others := other_settings(run, record, files[0].parent):
        raise UsageError(
            f"{files[0]} is of another {', '.join(others)}; "
            "give another --out, or remove its folder"
        )
    origin = record["provenance"]
    evaluate = shlex.join(["python", *run.evaluate])
    attacks = {}
    for name, right in verdicts(record).items():
        attacks[name] = {"verdicts": "".join(map(str, right))}
    return {
        "row": row.flags,
        "predict": row.predict,
        "seed": run.seed,
        "train": shlex.join(["python", *run.train[:-1]]),
        "evaluate": evaluate.replace(f"{run.folder.parent}{os.sep}", ""),
        "commit": origin.get("commit"),
        "versions": origin.get("versions"),
        "device": origin.get("device"),
        "cpu": origin.get("cpu"),
        "threads": origin.get("threads"),
        "card": origin.get("card", {}).get("name"),
        "dataset": record.get("dataset"),
        "threat_model": record.get("threat_model"),
        "image_numbers": record.get("image_numbers"),
        "labels": record.get("labels"),
        "attacks": attacks,
        "also": also(run),
    }


def also(run: Run) -> dict[str, float]:
    """Return a run's alignment, exclusion, and the seconds of its fastest epoch on one thread."""
    if run.row.predict != "final":
        return {}
    figures = {}
    files = sorted((run.folder / "distances").glob("*-[0-9].npz"))
    if len(files) == CLASSES:
        for word, pair in {"alignment": "PP", "exclusion": "NP"}.items():
            cosines = [np.load(file)[f"weighted_{pair}_cosine"] for file in files]
            figures[word] = float(np.concatenate(cosines).mean())
    for metrics in run.folder.glob("run*/metrics.csv"):
        with metrics.open() as lines:
            figures["s an epoch"] = min(float(line["seconds"]) for line in csv.DictReader(lines))
    return figures


def groups_of(rows: Rows, records: list[dict]) -> Groups:
    """Return the records of each row that has some, by seed."""
    groups = {}
    for name, row in rows.items():
        group = [
            record
            for record in records
            if tuple(record["row"]) == row.flags and record["predict"] == row.predict
        ]
        if group:
            groups[name] = sorted(group, key=lambda record: record["seed"])
    return groups


def with_more(groups: Groups, lines: Iterable[str]) -> Iterator[str]:
    """Add the means of what else is known of the runs to the rows of a table."""
    keys: dict[str, None] = {}  # ordered
    for group in groups.values():
        for record in group:
            keys |= dict.fromkeys(record["also"])
    added = [list(keys), ["---" for _ in keys]]
    for group in groups.values():
        cells = []
        for key in keys:
            values = [record["also"][key] for record in group if key in record["also"]]
            cells.append(f"{sum(values) / len(values):.3g}" if values else "")
        added.append(cells)

    for i, line in enumerate(lines):
        if i < len(added):
            yield line + "".join(f" {cell} |" for cell in added[i])
        else:
            yield line


def draw(records: list[dict], file: Path, title: str) -> None:
    """Draw the worst case against natural accuracy by row, and the ablations; bars span seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    every = {**controls(), **trades(), **pgd(), **mart(), **gates()}
    once = {row.flags: (name, row) for name, row in every.items()}  # the names of gates last
    compared = groups_of(dict(once.values()), records)
    ablated = groups_of(ablations(), records)
    attacks = []
    for group in (*compared.values(), *ablated.values()):
        attacks += [set(verdicts(record)) for record in group]
    common = sorted(set.intersection(*attacks))

    def spread(group: list[dict], names: list[str]) -> tuple[float, float, float]:
        """Return the mean over seeds of the worst case in %, and its distances to the extremes."""
        each = 100 * worst_of([verdicts(record) for record in group], names).mean(1)
        mean = each.mean()
        return mean, max(0, mean - each.min()), max(0, each.max() - mean)  # not below 0 by rounding

    for i, (name, group) in enumerate(compared.items()):
        x, x_low, x_high = spread(group, ["natural"])
        y, y_low, y_high = spread(group, common)
        left.errorbar(
            x,
            y,
            yerr=[[y_low], [y_high]],
            xerr=[[x_low], [x_high]],
            fmt=MARKS[i % len(MARKS)],
            color=f"C{i % COLOURS}",
            label=f"{name}: {y:.1f}",
            ms=7,
        )
    left.set(xlabel="natural accuracy, %", ylabel="worst case, %", title=title)
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    for i, group in enumerate(reversed(ablated.values())):
        y, low, high = spread(group, common)
        right.errorbar(y, i, xerr=[[low], [high]], fmt="o", color="C0")
    right.set(
        yticks=range(len(ablated)),
        yticklabels=[*reversed(ablated)],
        xlabel="worst case, %",
        title="ablations",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def save(records: list[dict], file: Path, **settings: object) -> None:
    """Write study.json: what all records share once, and the rest of each in a line of its own."""
    first = records[0]
    same = {key: first[key] for key in first if all(r[key] == first[key] for r in records)}
    different = [key for key in first if key not in same]
    lines = [json.dumps({key: record[key] for key in different}) for record in records]
    head = json.dumps(settings | {"same": same, "runs": []})
    file.write_text(head[:-2] + "\n" + ",\n".join(lines) + "]}\n")


def saved(file: Path) -> list[dict]:
    """Read the records that `save` has written."""
    try:
        content = json.loads(file.read_text())
        records = [content["same"] | record for record in content["runs"]]
        if not all(
            {"row", "predict", "seed", "attacks", "labels", "also"} <= record.keys()
            for record in records
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no study.json") from error
    return records


def show(tables: list[str], records: list[dict], seeds: tuple[int, ...]) -> None:
    """Print tables; UsageError where none of them has a run."""
    records = [record for record in records if record["seed"] in seeds]
    if not any(groups_of(TABLES[name](), records) for name in tables):
        raise UsageError(
            f"no finished run of {', '.join(tables)} with seeds {', '.join(map(str, seeds))}"
        )
    for name in tables:
        groups = groups_of(TABLES[name](), records)
        if groups:
            print(
                f"\n{name}: {TABLES[name].__doc__}\n",
                *with_more(groups, table(groups)),
                sep="\n",
                flush=True,
            )


def work(wanted: list[Run], jobs: int) -> list[str]:
    """Make the runs, `jobs` at once -> a line for each folder that has failed."""
    folders: dict[Path, list[Run]] = {}
    for run in wanted:
        folders.setdefault(run.folder, []).append(run)
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker loads PyTorch
    failed = []

    def stop(signum: int, frame: object) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()  # its script saves and ends
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signum)

    spawn = multiprocessing.get_context("spawn")
    with stop_signals(stop), ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        begun = {pool.submit(make, runs): folder for folder, runs in folders.items()}
        for i, future in enumerate(as_completed(begun), 1):
            folder = begun[future]
            if error := future.exception():
                failed.append(f"{folder}: {error}")
                print(f"{i} of {len(begun)}  {folder.name}  failed: {error}", flush=True)
            else:
                print(f"{i} of {len(begun)}  {folder.name}  {future.result():.0f} s", flush=True)
    return failed


def print_commands(runs: list[Run]) -> None:
    """Print the three commands of each run, in a line."""
    for run in runs:
        checkpoint = f"--ckpt_url {shlex.quote(str(run.folder))}/run*/model-wrn-last.pt"
        train = f"python {shlex.join(run.train)}"
        evaluate = f"python {shlex.join(run.evaluate)} {checkpoint}"
        measure = f"python {shlex.join(run.measure)} {checkpoint}"
        print(train, evaluate, measure, sep=" && ")


def main(argv: list[str] | None = None) -> None:
    """Make the runs and print the tables that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--seeds", help="these, of every row; otherwise up to 3, as many as the row asks for"
    )
    parser.add_argument(
        "--out", type=Path, help="default ./study, with --scale ./study-main, ./study-full"
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="small", help="full: also 3 seeds of every row"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, also on one card"
    )
    parser.add_argument(
        "--print",
        action="store_true",
        help="print what is there, or in a study.json that --out names",
    )
    parser.add_argument("--commands", action="store_true", help="print the commands")
    parser.add_argument("--flags", default="", help="more flags of every training, for trials")
    parser.add_argument(
        "--evaluation", default="", help="more flags of every evaluation, for trials"
    )
    given = parser.parse_args(argv)
    tables = given.tables or list(TABLES)
    out = given.out or Path("study" if given.scale == "small" else f"study-{given.scale}")
    if unknown := set(tables) - set(TABLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    if not re.fullmatch(r"\d+(,\d+)*", given.seeds or "1") or given.jobs < 1:
        parser.error("--seeds takes numbers such as 1,2,3, and --jobs one of at least 1")
    seeds = SEEDS
    if given.seeds:
        seeds = tuple(map(int, given.seeds.split(",")))
    if out.suffix == ".json" and not given.print:
        parser.error("--out takes a folder; a study.json is only printed, by --print")

    failed = []
    try:
        if out.suffix == ".json":
            show(tables, saved(out), seeds)
            return
        flags = (
            given.scale,
            tuple(shlex.split(given.flags)),
            tuple(shlex.split(given.evaluation)),
        )
        all_seeds = given.scale == "full" or given.seeds is not None
        if given.commands:
            print_commands(runs_of(out, tables, seeds, all_seeds, *flags))
            return
        out = out.resolve()
        if not given.print:
            failed = work(runs_of(out, tables, seeds, all_seeds, *flags), given.jobs)
        if failed:
            print("", *failed, sep="\n", file=sys.stderr)

        every = [record_of(run) for run in runs_of(out, TABLES, {*SEEDS, *seeds}, True, *flags)]
        records = [record for record in every if record is not None]
        if not records:
            parser.error(f"{out} holds no finished run")
        save(
            records,
            out / "study.json",
            small=settings_of(given.scale),
            flags=given.flags,
            evaluation=given.evaluation,
        )
        show(tables, records, seeds)
        title = "digits, eps 0.1"
        if given.scale == "small":
            title += ", small networks"
        draw(records, out / "study.png", title)
    except (OSError, ValueError, KeyError, UsageError) as error:
        parser.error(str(error))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
