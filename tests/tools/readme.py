"""Fills in README.md from committed data, and redraws its pictures.

python -m tests.tools.readme             write README.md, and the pictures that are out of date
python -m tests.tools.readme --check     say what is not up to date; exit status 1 if anything is
python -m tests.tools.readme --katex FOLDER
                                         the same, and of every formula by KaTeX, which
                                         `npm install katex` has put into FOLDER
python -m tests.tools.readme --record FOLDER
                                         make the runs that the page shows anew, in FOLDER, and
                                         write tests/golden/readme_runs.json; 15 minutes on 2 cores

README.md is made of tests/tools/README.template.md, by replacing what stands between two @@:

digits.trades: gate none: PGD-40         a cell of a study's table: study, table, row, column
digits.trades: gate none: PGD-40, mean   its figure without the deviation of the seeds
digits.trades: gate none: gain           the column of differences from the first row
digits.trades: gate none: PGD-40, seed 1  its figure in the run of one seed
digits.trades: gate label - TRADES: PGD-40, seed 1
                                         a difference of two rows, of the runs of one seed
digits: MART - TRADES: gain              a difference of two rows' worst cases, with its interval;
                                         without a table, of rows of all tables
table digits.trades                      a whole table
claims                                   the comparisons that were named before their runs
truth judges                             a table of tests.tools.truth: networks, judges
log                                      what the quick start prints

A picture holds a checksum of the data that it was drawn from and of its pixels.
"""

import argparse
import difflib
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.tools import readme_pictures, study, truth
from tests.tools.readme_runs import RUNS, record
from utils.evaluation.results import Groups, table, verdicts

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(__file__).parent / "README.template.md"
PAGE = ROOT / "README.md"
FIGURES = ROOT / "figure"
NOTICE = "<!-- Made by `python -m tests.tools.readme` of tests/tools/README.template.md -->\n"
CHECKSUM = "Drawn-From"
KATEX = """
const katex = require(process.cwd() + "/node_modules/katex")
const errors = []
for (const formula of JSON.parse(require("fs").readFileSync(0))) {
    try { katex.renderToString(formula, {displayMode: true, strict: "error"}) }
    catch (error) { errors.push(error.message) }
}
console.log(JSON.stringify(errors))
"""

Cells = dict[str, dict[str, str]]  # of a table, by row and column


def groups(name: str) -> Groups:
    """Return the runs of a table of a study, such as `digits.trades`, or of a study, by row."""
    study_name, _, table_name = name.partition(".")
    whole = study.STUDIES[study_name]
    rows = whole.tables[table_name] if table_name else whole.rows()
    return study.groups_of(rows, study.saved(study.file_of(study_name)))


@cache
def table_lines(name: str) -> list[str]:
    """Return the lines of a table of a study in Markdown."""
    return [line for line in table(groups(name)) if line.startswith("|")]


def claims() -> Iterator[str]:
    """Yield a table of the comparisons that carry the finding, as far as they have runs."""
    yield f"| worst case of | minus | on | points, {100 * study.CLAIM_LEVEL:.1f} % interval |"
    yield "|---|---|---|---|"
    files = {name: study.file_of(name) for name, _, _ in study.CLAIMS}
    records = {name: study.saved(file) for name, file in files.items() if file.exists()}
    for name, row, baseline, (mean, low, high) in study.claimed(records):
        where = readme_pictures.PANELS[name]
        yield f"| {row} | {baseline} | {where} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |"


def accuracy(group: list[dict], column: str, seed: int) -> float:
    """Return the accuracy in % of the run of one seed of a row."""
    (right,) = (verdicts(record)[column] for record in group if record["seed"] == seed)
    return 100 * right.mean()


@cache
def cells_of(name: str) -> Cells:
    """Return the cells of a table of the study."""
    lines = [line.removeprefix("| ").removesuffix(" |") for line in table_lines(name)]
    heads, _, *rows = (line.split(" | ") for line in lines)
    heads = ["gain" if head.startswith("minus ") else head for head in heads]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def number(cell: str) -> str:
    """Return the figure that a cell begins with: 78.89 of **78.89 (78.06 to 79.72)**."""
    return re.match(r"\**([+-]?[\d.]+)", cell)[1]


def value(placeholder: str) -> str:
    """Return what a placeholder stands for.

    Errors: KeyError, ValueError or TypeError where there is no such figure.
    """
    if placeholder == "log":
        return "\n".join(json.loads(RUNS.read_text())["log"])
    if placeholder == "claims":
        return "\n".join(claims())
    if placeholder.startswith("truth "):
        record = json.loads(truth.FILE.read_text())
        return "\n".join(truth.TABLES[placeholder.removeprefix("truth ")](record))
    if placeholder.startswith("table "):
        return "\n".join(table_lines(placeholder.removeprefix("table ")))
    table_name, row, column = placeholder.split(": ")
    column, _, part = column.partition(", ")
    names = row.split(" - ")
    if part.startswith("seed "):
        seed = int(part.removeprefix("seed "))
        one, *other = (accuracy(groups(table_name)[name], column, seed) for name in names)
        return f"{one - sum(other):.1f}"
    if len(names) > 1 and column == "gain":
        mean, low, high = study.gain(*(groups(table_name)[name] for name in names))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    cells = cells_of(table_name)
    cell = cells[row][column].strip("*")
    return number(cell) if part == "mean" else cell


def filled(template: str) -> str:
    """Return the page: the template without comments, and with figures for placeholders.

    Errors: ValueError where a placeholder stands for nothing.
    """

    def replaced(match: re.Match) -> str:
        try:
            return value(match[1])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TEMPLATE.name}: @@{match[1]}@@ stands for nothing") from error

    text = re.sub(r"(?s)<!--.*?-->\n", "", template)
    return NOTICE + re.sub(r"@@(.+?)@@", replaced, text)


def checksum(data: object, image: Image.Image) -> str:
    """Return a checksum of what a picture was drawn from, and of its pixels."""
    content = json.dumps(data, sort_keys=True).encode() + image.convert("RGB").tobytes()
    return hashlib.sha256(content).hexdigest()


def is_current(file: Path, data: object) -> bool:
    """Whether a picture was drawn from this data, and not changed since."""
    if not file.exists():
        return False
    with Image.open(file) as image:
        return image.info.get(CHECKSUM) == checksum(data, image)


def redraw(file: Path, data: object, draw: Callable[[object, Path], None]) -> None:
    """Draw a picture, and save it in few colours with its checksum."""
    draw(data, file)
    with Image.open(file) as drawn:
        image = drawn.convert("RGB").quantize(255, dither=Image.Dither.NONE)
        info = PngInfo()
        info.add_text(CHECKSUM, checksum(data, image))
        image.save(file, pnginfo=info, optimize=True)


def formulas(page: str) -> list[str]:
    """Return the formulas of a page, in blocks and in lines, outside code."""
    blocks = re.findall(r"(?ms)^```math\n(.*?)^```", page)
    prose = re.sub(r"(?ms)^```.*?^```", "", page)
    return blocks + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", re.sub(r"`[^`\n]*`", "", prose))


def formula_errors(page: str, folder: str | Path) -> list[str]:
    """Return what KaTeX says of the formulas of a page that it cannot set.

    folder: where `npm install katex` was run.
    """
    found = subprocess.run(
        ["node", "-e", KATEX],
        cwd=folder,
        input=json.dumps(formulas(page)),
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(found.stdout)


def differences() -> Iterator[str]:
    """Yield the lines in which README.md differs, and the pictures that are out of date."""
    lines = PAGE.read_text().splitlines()
    wanted = filled(TEMPLATE.read_text()).splitlines()
    yield from difflib.unified_diff(lines, wanted, PAGE.name, "what it must be", "", "", 0, "")
    for name, (data, _) in readme_pictures.pictures().items():
        if not is_current(FIGURES / name, data):
            yield f"figure/{name} was not drawn from the data of today, or was changed since"


def main(argv: list[str] | None = None) -> int:
    """Write or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--katex", type=Path, metavar="FOLDER", help="--check, and all formulas")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="make the page's runs anew")
    given = parser.parse_args(argv)

    if given.record:
        record(given.record)
    if given.check or given.katex:
        problems = list(differences())
        if given.katex:
            problems += formula_errors(PAGE.read_text(), given.katex)
        if problems:
            print(*problems, sep="\n")
            print("Change the template or the data, then run python -m tests.tools.readme")
        return 1 if problems else 0

    PAGE.write_text(filled(TEMPLATE.read_text()))
    for name, (data, draw) in readme_pictures.pictures().items():
        file = FIGURES / name
        if not is_current(file, data):
            redraw(file, data, draw)
            print(f"drew figure/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
