"""What each part is worth against an attacker who knows it: trained and attacked runs, as tables.

python -m tests.tools.study digits                all rows and seeds of one, --jobs at once
python -m tests.tools.study digits --seeds 1,2 --rows "TRADES;gate none"
python -m tests.tools.study fashion-mnist --data-dir FOLDER
python -m tests.tools.study digits --print        the tables of what there is
python -m tests.tools.study digits --commands     the commands of all runs, to be run by hand

A study adds each finished run to its file, tests/golden/study_NAME.json, with the verdict on every
image, and never makes a run again that is there: it can be stopped, and goes on with the same
command. Unfinished runs lie in --out (./study) and are resumed. All runs of a file are trained and
attacked on one kind of machine; --file names another file, for another machine.

The last epoch is evaluated, which no test image has chosen. When all else is done, AutoAttack is
run for the first seed of each row. It is no part of the worst case, since other seeds have none.

Equal effort: the adaptive attack starts `STARTS` times on a plain network, and at least as often,
over all views, on one with heads. A start is 40 steps of PGD, 20 of APGD and 20 of targeted APGD
for each of 9 targets. APGD takes a gradient at its start, too: that makes 250 gradients of an image
that stays right.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from utils.evaluation.results import (
    Groups,
    difference,
    read,
    seed_of,
    table,
    verdicts,
    worst_of,
)
from utils.system.errors import RunError, UsageError, stop_signals
from utils.system.files import write_atomically

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
STARTS = 6  # the largest number of views
FIRST_SEED = 1
ATTACKS = "natural,fgsm,pgd,cw,adaptive"
PLAIN = ("--no-ra", "--no-anc")
AWP = ("--awp=0.005", "--awp-warmup=1")
LONGER = ("--epochs=30", "--milestones=21,26")


class Row(NamedTuple):
    """Flags of the training, the number of seeds, and of views that the adaptive attack has."""

    flags: tuple[str, ...] = ()
    seeds: int = 3
    views: int = 1


Rows = dict[str, Row]


class Study(NamedTuple):
    """Flags of all trainings and of all evaluations, and rows by table, the baseline first."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]
    tables: dict[str, Rows]

    def rows(self) -> Rows:
        """Return the rows of all tables."""
        return {name: row for rows in self.tables.values() for name, row in rows.items()}


def gates(seeds: int, ema: float) -> Rows:
    """Is it the supervision of both blocks, the attention, or the learning rate?"""
    average = f"--ema={ema}"
    own = "--classifier=own"
    none = "--gate=none"
    return {
        "TRADES": Row(PLAIN, seeds),
        # Three heads weigh threefold.
        "TRADES, three times the rate": Row((*PLAIN, "--lr=0.09"), seeds),
        # As much computing as 16 epochs with heads, and the same with heads
        "TRADES, 30 epochs": Row((*PLAIN, *LONGER), 3),
        "gate none, 30 epochs": Row((none, *LONGER), 3, 4),
        "TRADES + EMA": Row((*PLAIN, average), seeds),
        "gate label": Row((), seeds, 6),
        "gate label, own classifiers": Row((own,), seeds, 6),
        "gate soft": Row(("--gate=soft",), 3, 5),
        "gate none": Row((none,), seeds, 4),
        "gate none, own classifiers": Row((own, none), seeds, 5),
        "gate none + EMA": Row((none, average), 3, 4),
        "gate none + AWP": Row((none, *AWP), 3, 4),
    }


def of_method(name: str) -> Rows:
    """The published gate and none, added to another kind of adversarial training."""
    method = f"--method={name.lower()}"
    return {
        name: Row((method, *PLAIN)),
        f"{name}, gate label": Row((method,), views=6),
        f"{name}, gate none": Row((method, "--gate=none"), views=4),
    }


def tables(seeds: int, ema: float) -> dict[str, Rows]:
    """The tables of both data sets. ema: the decay, which was chosen on seed 0 of TRADES."""
    return {"trades": gates(seeds, ema), "pgd": of_method("PGD"), "mart": of_method("MART")}


def first_rows() -> Rows:
    """Those of digits that were run before the others."""
    rows = tables(5, 0.9)["trades"]
    plain = "TRADES", "TRADES, three times the rate", "TRADES, 30 epochs"
    with_heads = "gate label", "gate none", "gate none, 30 epochs"
    return {name: rows[name] for name in plain + with_heads}


def gates_and_contrast() -> Rows:
    """Every gate with and without ANC, and heads in the losses or in the attack alone."""
    none = "--gate=none"
    return {
        "TRADES": Row(PLAIN),
        "TRADES, three times the rate": Row((*PLAIN, "--lr=0.09")),
        "gate label": Row((), views=6),
        "gate label, no ANC": Row(("--no-anc",), views=6),
        "gate predicted": Row(("--gate=predicted",), 1, 6),
        "gate predicted, no ANC": Row(("--gate=predicted", "--no-anc"), 1, 6),
        "gate soft": Row(("--gate=soft",), 3, 5),
        "gate soft, no ANC": Row(("--gate=soft", "--no-anc"), 1, 5),
        "gate none": Row((none,), 3, 4),
        "gate none, no ANC": Row((none, "--no-anc"), 3, 4),
        "gate none, heads in the losses alone": Row((none, "--attack-cr-beta=0"), 3, 4),
        "gate none, heads in the attack alone": Row(
            (none, "--cr_beta=0", "--attack-cr-beta=2"), 1, 4
        ),
    }


def companions(name: str, flags: tuple[str, ...], views: int) -> Rows:
    """A method with perturbed weights, averaged weights, both, and another schedule."""
    average = "--ema=0.995"
    added = {"AWP": AWP, "EMA": (average,), "AWP + EMA": (*AWP, average)}
    added["cosine"] = ("--lr-schedule=cosine",)
    rows = {f"{name} + {word}": Row((*flags, *more), 3, views) for word, more in added.items()}
    return {name: Row(flags, 3, views)} | rows


def parts(name: str) -> Rows:
    """A method alone, with each part and with both."""
    method = f"--method={name.lower()}"
    return {
        name: Row((method, *PLAIN)),
        f"{name} + ANC": Row((method, "--no-ra"), 1),
        f"{name} + RA": Row((method, "--no-anc"), 1, 6),
        f"{name} + both": Row((method,), 3, 6),
    }


def ablations() -> Rows:
    """The paper's, in small. Strategies act from the first epoch."""
    rows = {"ANCRA-TRADES": Row((), 3, 6)}
    # random_adv is the first row: nothing else acts while it warms up.
    for name in ("random", "soft", "soft_adv", "hard", "hard_adv", "easy", "easy_adv"):
        rows[f"strategy {name}"] = Row((f"--strategy={name}", "--warmup-epochs=0"), 1, 6)
    for flag, values in {"alpha": (0, 0.5), "zeta": (0, 1, 6), "cr_beta": (0, 1)}.items():
        for value in values:
            rows[f"{flag} {value}"] = Row((f"--{flag}={value}",), 1, 6)
    return rows


LEAN = ("--apgd-steps=20",)
DIGITS = ("--dataset=digits", "--eval-interval=16")
STUDIES = {
    "digits": Study(DIGITS, LEAN, tables(5, 0.9)),
    # Some of these rows on another processor, where they were run first
    "digits-epyc": Study(DIGITS, LEAN, {"trades": first_rows()}),
    "fashion-mnist": Study(
        (
            "--dataset=fashion-mnist",
            "--image-size=16",
            "--width=12",
            "--limit-train=4000",
            "--limit-test=200",
            "--epochs=10",
            "--milestones=7,9",
            "--eval-interval=10",
        ),
        (*LEAN, "--n-examples=2000"),
        tables(3, 0.95),
    ),
    "exploratory": Study(DIGITS, LEAN, {"gates": gates_and_contrast()}),
    "companions": Study(
        DIGITS,
        LEAN,
        {
            "trades": companions("TRADES", PLAIN, 1),
            "ancra": companions("ANCRA-TRADES", (), 6),
        },
    ),
    "ablations": Study(
        (
            "--dataset=digits",
            "--width=8",
            "--epochs=6",
            "--milestones=5,6",
            "--warmup-epochs=2",
            "--eval-interval=6",
        ),
        LEAN,
        {"pgd": parts("PGD"), "mart": parts("MART"), "ancra": ablations()},
    ),
}

# The comparisons that carry the finding, named before their runs: study, row, baseline. Together
# their intervals are to cover in 95 % of studies (Bonferroni). All others explore.
CLAIMS = [
    ("digits-epyc", "gate none", "TRADES"),
    ("digits-epyc", "gate none", "TRADES, three times the rate"),
    ("fashion-mnist", "gate none", "TRADES"),
]
CLAIM_LEVEL = 1 - 0.05 / len(CLAIMS)


class Run(NamedTuple):
    """A row's run of one seed: its folder, and its commands without the run's own folder.

    attacks: commands of test_white_attack.py. The second one adds AutoAttack to the first's rows.
    """

    row: Row
    seed: int
    folder: Path
    train: list[str]
    attacks: list[list[str]]


def run_of(
    study: Study,
    row: Row,
    seed: int,
    out: Path,
    data_dir: Path | None = None,
    with_autoattack: bool = False,
) -> Run:
    """Make the commands of a row's run, which lies in a folder of `out`."""
    name = "-".join(flag.lstrip("-") for flag in row.flags) or "ANCRA-TRADES"
    folder = out / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '', name)}-{seed}"
    data = [] if data_dir is None else [f"--data-dir={data_dir}"]
    train = ["train_CIFAR10_ResNet.py", *study.training, *row.flags, f"--seed={seed}", *data]
    starts = -(-STARTS // row.views)
    evaluate = ["test_white_attack.py", *study.evaluation, *data]
    searched = [*evaluate, f"--attacks={ATTACKS}", f"--restarts={starts}"]
    attacks = [[*searched, f"--apgd-restarts={starts}"]]
    if with_autoattack:
        attacks.append([*evaluate, "--attacks=autoattack"])
    return Run(row, seed, folder, train, attacks)


def phases_of(
    study: Study, out: Path, rows: list[str], seeds: list[int] | None, data_dir: Path | None
) -> list[list[Run]]:
    """List the runs of some rows, seed by seed, and then those of the first seed with AutoAttack.

    seeds: None for as many as each row asks for.
    """
    chosen = [study.rows()[name] for name in rows]
    numbers = seeds or range(1, 1 + max(row.seeds for row in chosen))
    runs = []
    with_autoattack = []
    for seed in numbers:
        for row in chosen:
            if seeds or seed <= row.seeds:
                runs.append(run_of(study, row, seed, out, data_dir))
            if seed == FIRST_SEED:
                with_autoattack.append(run_of(study, row, seed, out, data_dir, True))
    return [runs, with_autoattack]


# Making runs


class Workshop:
    """Makes runs in processes of their own, each with one thread, until it is asked to stop."""

    def __init__(self) -> None:
        """Start with no process."""
        self.children: list[subprocess.Popen] = []
        self.signal: int | None = None

    def stop(self, signum: int, frame: object) -> None:
        """Ask all processes to save and to end, once: a second signal would end them at once."""
        if self.signal is None:
            self.signal = signum
            for child in self.children:
                child.terminate()

    def execute(self, argv: list[str], output: Path) -> None:
        """Run a script of this repository; what it prints is added to `output`.

        Errors: RunError where it fails or was stopped.
        """
        if self.signal is not None:
            raise RunError("not begun")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with open(output, "a", encoding="utf-8") as file:
            print("\npython", shlex.join(argv), file=file, flush=True)
            # A session of its own: Ctrl-C in a terminal reaches this process alone.
            child = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(child)
        if self.signal is not None:  # which came while it started
            child.terminate()
        if child.wait():
            raise RunError(f"status {child.returncode}, see {output}")

    def make(self, run: Run) -> dict:
        """Train and attack a run, as far as it is not there yet, and return its record."""
        run.folder.mkdir(parents=True, exist_ok=True)
        output = run.folder / "output.txt"
        train = [*run.train, f"--model-dir={run.folder / 'run'}"]
        states = list(run.folder.glob("run*/last_state.pt"))
        if states:
            train.append(f"--resume={states[0].parent}")
        else:
            train.append("--overwrite")
        self.execute(train, output)
        (trained,) = run.folder.glob("run*/")
        for attack in run.attacks:
            self.execute([*attack, f"--ckpt_url={trained / 'model-wrn-last.pt'}"], output)
        return record_of(run, trained)

    def make_all(self, runs: list[Run], jobs: int) -> Iterator[tuple[Run, dict | Exception]]:
        """Make runs, `jobs` at once, and yield each with its record, or with its error."""
        with stop_signals(self.stop), ThreadPoolExecutor(jobs) as pool:
            begun = {pool.submit(self.make, run): run for run in runs}
            for future in as_completed(begun):
                error = future.exception()
                yield begun[future], error or future.result()


def record_of(run: Run, trained: Path) -> dict:
    """Return what the tables need of a run, and its origin."""
    record = read(str(trained))
    origin = record["provenance"]
    commands = [[arg for arg in argv if "-dir=" not in arg] for argv in (run.train, *run.attacks)]
    columns = verdicts(record)
    return {
        "row": list(run.row.flags),
        "seed": run.seed,
        "commands": [shlex.join(["python", *argv]) for argv in commands],
        "commit": origin.get("commit"),
        "versions": origin.get("versions"),
        "machine": origin.get("card", {}).get("name") or "CPU",
        "cpu": origin.get("cpu"),
        "threads": origin.get("threads"),
        "dataset": record["dataset"],
        "threat_model": record["threat_model"],
        "image_numbers": record["image_numbers"],
        "labels": record["labels"],
        "network": {key: record["network"][key] for key in ("reverse_attention", "gate")},
        "attacks": {
            name: {"verdicts": "".join(map(str, right))} for name, right in columns.items()
        },
    }


# Files


def file_of(name: str) -> Path:
    """Return the file of a study's verdicts."""
    return GOLDEN / f"study_{name}.json"


def save(records: list[dict], file: Path) -> None:
    """Write a study's file: what all records share once, and the rest of each in a line."""
    first = records[0]
    same = {key: first[key] for key in first if all(r[key] == first[key] for r in records)}
    in_order = sorted(records, key=lambda record: (record["seed"], record["row"]))
    lines = [
        json.dumps({key: record[key] for key in record if key not in same}) for record in in_order
    ]
    head = json.dumps({"same": same, "runs": []})
    text = head[:-2] + "\n" + ",\n".join(lines) + "]}\n"
    write_atomically(file, lambda temporary: temporary.write_text(text))


def saved(file: Path) -> list[dict]:
    """Read the records that `save` has written.

    Errors: UsageError where it holds none.
    """
    try:
        content = json.loads(file.read_text())
        records = [content["same"] | record for record in content["runs"]]
        if not all(record.keys() >= {"row", "seed", "machine", "attacks"} for record in records):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} holds no runs of a study") from error
    return records


# Tables


def groups_of(rows: Rows, records: list[dict]) -> Groups:
    """Return the records of each row that has some, by seed."""
    groups = {}
    for name, row in rows.items():
        group = [record for record in records if tuple(record["row"]) == row.flags]
        if group:
            groups[name] = sorted(group, key=lambda record: record["seed"])
    return groups


def claimed(records: dict[str, list[dict]]) -> Iterator[tuple[str, str, str, tuple]]:
    """Yield study, row, baseline and the difference with its corrected interval, of each claim.

    records: by study. Claims are left out that have a row without several seeds.
    """
    for name, row, baseline in CLAIMS:
        groups = groups_of(STUDIES[name].rows(), records.get(name, []))
        if min(len(groups.get(row, [])), len(groups.get(baseline, []))) > 1:
            yield name, row, baseline, gain(groups[row], groups[baseline], CLAIM_LEVEL)


def gain(group: list[dict], baseline: list[dict], level: float = 0.95) -> tuple:
    """Return the difference of two rows' worst cases, in points, and the ends of its interval."""
    row_verdicts = [verdicts(record) for record in group]
    baseline_verdicts = [verdicts(record) for record in baseline]
    runs = row_verdicts + baseline_verdicts
    common = [name for name in runs[0] if all(name in run for run in runs)]
    worsts = worst_of(row_verdicts, common), worst_of(baseline_verdicts, common)
    paired = list(map(seed_of, group)) == list(map(seed_of, baseline))
    return difference(*worsts, paired, level)


def show(study: Study, records: list[dict]) -> None:
    """Print the tables of a study that have a run."""
    for rows in study.tables.values():
        groups = groups_of(rows, records)
        if groups:
            print("", *table(groups), sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Make the runs and print the tables that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--rows", help="some rows alone, between semicolons")
    parser.add_argument("--seeds", help="these, of every row, such as 1,2,3")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the runs")
    parser.add_argument("--file", type=Path, help="for the verdicts, see above")
    parser.add_argument("--data-dir", type=Path, help="of the data set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--print", action="store_true", help="print the tables, and run nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    given = parser.parse_args(argv)

    study = STUDIES[given.study]
    rows = given.rows.split(";") if given.rows else list(study.rows())
    if unknown := set(rows) - set(study.rows()):
        parser.error(f"no row {', '.join(sorted(unknown))}; known: {'; '.join(study.rows())}")
    if not re.fullmatch(r"\d+(,\d+)*", given.seeds or "1") or given.jobs < 1:
        parser.error("--seeds takes numbers such as 1,2,3, and --jobs one of at least 1")
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else None
    file = given.file or file_of(given.study)
    out = (given.out / given.study).resolve()
    phases = phases_of(study, out, rows, seeds, given.data_dir)
    if given.commands:
        last = {run.folder: run for run in itertools.chain(*phases)}
        print_commands(last.values())
        return 0

    try:
        records = saved(file) if file.exists() else []
    except UsageError as error:
        parser.error(str(error))
    if given.print:
        if not records:
            parser.error(f"{file} holds no run")
        show(study, records)
        return 0
    return make(study, phases, records, file, given.jobs)


def make(study: Study, phases: list[list[Run]], records: list[dict], file: Path, jobs: int) -> int:
    """Make the runs that are not among the records, add them to the file, and print all tables."""
    by_run = {(tuple(record["row"]), record["seed"]): record for record in records}
    workshop = Workshop()
    failed = False
    for phase in phases:
        missing = [run for run in phase if not is_made(run, by_run.get((run.row.flags, run.seed)))]
        for run, made in workshop.make_all(missing, jobs):
            try:
                if isinstance(made, Exception):
                    raise made
                require_same_machine(made, by_run.values())
            except (OSError, RunError, UsageError) as error:
                failed = True
                if workshop.signal is None:
                    print(f"{run.folder.name}: {error}", file=sys.stderr)
            else:
                by_run[run.row.flags, run.seed] = made
                save([*by_run.values()], file)
                print(f"{run.folder.name}: done", flush=True)
    if workshop.signal is not None:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + workshop.signal
    show(study, [*by_run.values()])
    return 1 if failed else 0


def is_made(run: Run, record: dict | None) -> bool:
    """Whether the record of a run, if there is one, has all its attacks."""
    return record is not None and (len(run.attacks) == 1 or "AutoAttack" in record["attacks"])


def require_same_machine(made: dict, records: Iterable[dict]) -> None:
    """Refuse a record that was made on another kind of machine: UsageError."""
    for record in records:
        if made["machine"] != record["machine"]:
            machines = f"{made['machine']}, the others of the file on {record['machine']}"
            raise UsageError(f"made on {machines}; name another file by --file")


def print_commands(runs: Iterable[Run]) -> None:
    """Print the commands of each run, in a line."""
    for run in runs:
        model_dir = f"--model-dir={shlex.quote(str(run.folder / 'run'))}"
        checkpoint = f"--ckpt_url {shlex.quote(str(run.folder))}/run*/model-wrn-last.pt"
        commands = [f"python {shlex.join(run.train)} {model_dir}"]
        commands += [f"python {shlex.join(attack)} {checkpoint}" for attack in run.attacks]
        print(*commands, sep=" && ")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
