"""README.md: what it says to write is written and runs, and what it names is there."""

import importlib.util
import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from tests.golden_numbers import assert_near
from tests.helpers import (
    ANCRA,
    ATTACK,
    ROOT,
    SCRIPTS,
    assert_equal,
    digits_checkpoint,
    execute,
    folder,
    python,
    settings,
)
from tests.tiny_networks import Tiny, undefended
from tests.tools import readme, study
from utils.evaluation.results import verdicts
from utils.negatives import choose_negatives
from utils.step import Attacked, training_loss
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation, Histograms, Umap

README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())
SETTINGS = {
    ATTACK: Evaluation,
    "feature_distance.py": Distances,
    "draw_hist.py": Histograms,
    "draw_umap.py": Umap,
}


def section(heading):
    """Return what stands below a heading, up to the next one."""
    (text,) = re.findall(rf"(?ms)^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README)
    return text


def snippet(heading):
    """Return the Python code below a heading."""
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", section(heading))
    return code


def run(code, **names):
    """Run code with these names, and return the names that it leaves."""
    exec(compile(code, "README.md", "exec"), names)
    return names


# What it says


def test_files_that_it_names_exist():
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README) + re.findall(r'src="(.+?)"', README)
    named = re.findall(r"[\w/.-]+\.(?:py|txt|md)\b", README) + re.findall(r"`(tests/\w+)`", README)
    assert linked
    assert named
    files = [str(file) for file in ROOT.rglob("*")]
    for name in {*linked, *named} - {"models/small.py", "FILE.py"}:  # the reader writes those
        assert any(file.endswith(f"/{name}") for file in files), name
    pictures = {f"figure/{file.name}" for file in (ROOT / "figure").glob("*.png")}
    assert pictures == set(linked)


def test_files_of_a_run_have_the_names_that_it_gives():
    names = set(re.findall(r"`([\w-]+\.(?:pt|csv|log|json|png))`", README))
    code = "".join(file.read_text() for file in (ROOT / "utils").rglob("*.py"))
    assert names
    for name in names:
        assert f'"{name}"' in code, name


def test_its_commands_are_accepted(tmp_path, monkeypatch):
    settings_of_a_run = tmp_path / "RUN_FOLDER/run.json"
    settings_of_a_run.parent.mkdir()
    settings_of_a_run.write_text('{"settings": {"method": "mart"}}')
    monkeypatch.chdir(tmp_path)
    seen = set()
    text = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```$", README))
    for command in text.replace("\\\n", "").replace("&&", "\n").splitlines():
        words = shlex.split(command)
        if "-m" in words:
            assert importlib.util.find_spec(words[words.index("-m") + 1]), command
        for script in SCRIPTS:
            if script not in words:
                continue
            argv = words[words.index(script) + 1 :]
            if script in SETTINGS:
                parse(SETTINGS[script], "", argv)
            else:
                parse_training("", {}, argv)
            seen.add(script)
    assert seen == {ANCRA, *SETTINGS}


@pytest.mark.parametrize(
    ("script", "headings"),
    [
        (ANCRA, ("Settings", "Stop, and go on", "Your own images", "Several cards or machines")),
        (ATTACK, ("Evaluate", "Checkpoints from elsewhere")),
        ("feature_distance.py", ("Figures",)),
    ],
)
def test_flags_that_it_names_exist(script, headings, capsys):
    text = re.sub(r"(?ms)^```.*?^```", "", "".join(map(section, headings)))
    named = re.findall(r"`(--[^`]+)`", text)
    assert named
    assert execute(script, "--help") == 0
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)  # spelled with hyphens
    for words in named:
        flag, *values = words.split()
        assert flag.replace("_", "-") in known, flag
        if script == ANCRA and values not in ([], ["FILE"]) and "--restart_epoch" not in words:
            parse_training("", {}, [flag, *values])


# Its snippets


def test_reverse_attention_and_contrast_taken_elsewhere_are_the_methods():
    """The same heads, loss and gradients as in a network with one block of reverse attention."""
    model = Tiny(True)
    model.ra_blocks = 1

    class YourNetwork(nn.Module):
        """The network of a reader."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(model.stem, nn.ReLU(), model.blocks)
            self.fc = model.fc

    names = run(snippet("Take ANC and RA elsewhere"), YourNetwork=YourNetwork)
    lifted = names["WithRA"]()
    weights = list(model.parameters())
    x, adversarial = torch.rand(2, 6, 3, 16, 16)
    assert_equal(lifted(x), model(x))
    for labels in (torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(6, dtype=torch.long)):
        chosen = choose_negatives(None, labels, "random", torch.Generator().manual_seed(0))
        attacked = Attacked(adversarial)
        if chosen is not None:
            chosen = chosen.flatten()
            attacked = Attacked(adversarial, x[chosen], labels[chosen])
        stats = training_loss(model, x, labels, attacked, settings("--method=pgd"))
        assert (stats.contrast > 0) == (chosen is not None)

        generator = torch.Generator().manual_seed(0)
        loss = names["training_loss"](lifted, x, adversarial, labels, generator)
        assert_near(loss, stats.loss)
        expected = torch.autograd.grad(stats.loss, weights)
        for gradient, other in zip(torch.autograd.grad(loss, weights), expected, strict=True):
            assert_near(gradient, other)


def test_the_other_two_snippets(tmp_path, capsys):
    digits_checkpoint(tmp_path / "best_adv_model.pt")
    names = run(snippet("From Python").replace("RUN_FOLDER", str(tmp_path)))
    natural, robust = map(float, re.findall(r"[\d.]+(?= %)", capsys.readouterr().out))
    assert natural == pytest.approx(95.28, abs=0.6)  # as tests/golden/README.md says
    assert 10 < robust < natural - 5

    model = undefended()  # so that AutoAttack needs seconds, and no library may fail
    names = run(snippet("Other libraries"), **names | {"model": model})
    for library in ("autoattack", "torchattacks", "foolbox"):
        adversarial = names[f"by_{library}"]
        changed = (adversarial - names["images"]).abs().max()
        assert changed < names["eps"] + 1e-5
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        assert (model(adversarial).argmax(1) != names["labels"]).all(), library
    assert names["fooled"].all()


# Change one idea: what each section says to write is written, and runs

IDEAS = re.search(r"(?ms)^## Change one idea\n(.*?)^### Take ANC and RA elsewhere", README)[1]
CODE = r"\s+```python\n(?P<code>.*?)^```"
# What a section says, where in the file that is (an expression whose end is the place), and what
# is written there.
CHANGES = [
    (
        rf"[Ii]n `(?P<file>[\w/.]+)`,\s+above\s+`(?P<place>.+?)`{CODE}",
        r"^(?=[^\n]*{place})",
        "{code}",
    ),
    (rf"At the end of `(?P<file>[\w/.]+)`[^`]*?:{CODE}", r"\Z", "\n\n{code}"),
    (
        r"\* In `(?P<file>[\w/.]+)`, add `(?P<name>[^\n]+?)` to `(?P<table>\w+)`",
        r"^ *{table}(: [^=\n]+)? = (Literal)?[\[({{]",
        "{name}, ",
    ),
    (
        r"\* In `(?P<file>[\w/.]+)`, import `(?P<name>\w+)` from `(?P<module>[\w.]+)`",
        r"\A.*?^(?=from (utils|models))",
        "from {module} import {name}\n",
    ),
]


def change(root, idea, text):
    """Change a copy of the repository as a section says, and return how many changes it names.

    A function or a branch that is added prints that it is used.
    """
    count = 0
    for pattern, place, addition in CHANGES:
        for match in re.finditer(f"(?ms){pattern}", text):
            file = root / match["file"]
            before = file.read_text() if file.exists() else ""
            parts = match.groupdict()
            escaped = {name: re.escape(part) for name, part in parts.items()}
            places = list(re.finditer("(?ms)" + place.format(**escaped), before))
            assert len(places) == 1, match[0]
            end = places[0].end()
            added = re.sub(
                r"\A(\s*)((?:def|elif) [^\n]*:\n)",
                rf"\1\2\1    print('USED: {idea}')\n",
                addition.format(**parts),
            )
            file.write_text(before[:end] + added + before[end:])
            count += 1
    return count


@pytest.mark.slow
def test_each_idea_is_changed_as_its_section_says(tmp_path):
    copy = tmp_path / "copy"
    for name in ("models", "utils"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for script in (ANCRA, ATTACK):
        shutil.copy(ROOT / script, copy)
    _, *parts = re.split(r"(?m)^### (.+)\n", IDEAS)
    for idea, text in zip(parts[::2], parts[1::2], strict=True):
        count = change(copy, idea, text)
        assert count == text.count("```python") + len(re.findall(r"(?m)^\* ", text)), idea

    train = (
        "--dataset=stripes --image-size=16 --arch=Small --width=8 --method=pairing"
        " --strategy=correct_adv --gate=second --inner=margin --temperature=2.5 --warmup-epochs=0"
        " --batch-size=16 --limit-train=32 --limit-test=4 --epochs=1 --num-steps=2 --device=cpu"
    )
    model_dir = f"--model-dir={tmp_path / 'run'}"
    trained = python(ANCRA, *train.split(), model_dir, cwd=copy, PYTHONPATH="")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((folder(tmp_path) / "run.json").read_text())["settings"]["epsilon"] == 0.05
    for idea in ("A loss", "A choice of negatives", "A gate", "A data set", "A training attack"):
        assert f"USED: {idea}\n" in trained.stdout, idea

    attacks = (
        "--attacks=natural,blur,adaptive --n-examples=4 --restarts=1 --num-steps=2 --device=cpu"
    )
    checkpoint = f"--ckpt_url={folder(tmp_path)}"
    evaluated = python(ATTACK, checkpoint, *attacks.split(), cwd=copy, PYTHONPATH="")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "USED: An attack of the evaluation\n" in evaluated.stdout
    assert "adaptive: two" in evaluated.stdout
    assert "\nblur " in evaluated.stdout


def test_what_it_says_of_the_runs_of_fashion_mnist_agrees_with_their_file():
    """How many are missing, and which were made on another processor than the rest."""
    groups = readme.groups("fashion-mnist")
    runs = [(name, run) for name, group in groups.items() for run in group]
    wanted = sum(row.seeds for row in study.STUDIES["fashion-mnist"].rows().values())
    left = f"{wanted - len(runs)} of {wanted} runs are still to be made"
    assert f"{left}, and AutoAttack on all but two runs" in PROSE
    assert sum("AutoAttack" in run["attacks"] for _, run in runs) == 2

    assert {(name, run["seed"]) for name, run in runs if "Xeon" in run["cpu"]} == {
        *(("gate label", seed) for seed in (1, 2, 3)),
        *((name, seed) for name in ("TRADES", "gate none") for seed in (2, 3)),
        ("TRADES, three times the rate", 1),
    }
    assert {run["cpu"] for _, run in runs if "Xeon" not in run["cpu"]} == {"AMD EPYC"}
    assert (
        "On the Xeon are all runs of `gate label`, the second and third ones of TRADES and of"
        " `gate none`, and the first one of TRADES at three times the rate; all others are on the"
        " EPYC"
    ) in PROSE


def test_sentences_about_the_studies_agree_with_their_files():
    digits, first, exploratory = map(readme.groups, ("digits", "digits-epyc", "exploratory"))

    pairs = zip(digits["TRADES"], digits["TRADES + EMA"], strict=True)
    answers = [[run["attacks"]["adaptive"]["verdicts"] for run in pair] for pair in pairs]
    assert [one == other for one, other in answers].count(True) == 4
    assert "In four of five pairs of TRADES" in PROSE

    machines = [run["machine"] for group in exploratory.values() for run in group]
    assert f"{machines.count('NVIDIA H200')} of the {len(machines)} runs" in PROSE

    def without(seed):
        rows = (first["gate none"], first["TRADES"])
        kept = ([run for run in group if run["seed"] != seed] for group in rows)
        return study.gain(*kept, study.CLAIM_LEVEL)[1]

    assert [seed for seed in range(1, 6) if without(seed) <= 0] == [3, 5]
    assert "Without seed 3, or without seed 5" in PROSE
    assert study.gain(digits["gate none"], digits["TRADES"], study.CLAIM_LEVEL)[1] <= 0
    assert "one of 98.3 % contains 0" in PROSE

    intervals = set(re.findall(r"\([+-][\d.]+ to [+-][\d.]+\b", section("What we found")))
    assert f"of more than {len(intervals) // 10 * 10} intervals" in PROSE


def test_what_it_says_of_autoattack_agrees_with_the_first_runs():
    """Images that only the adaptive attack fools, and that only AutoAttack does."""
    alone = {}
    for name, (run, *_) in readme.groups("digits").items():
        right = verdicts(run)
        autoattack, adaptive = right["AutoAttack"], right["adaptive"]
        alone[name] = (autoattack > adaptive).sum(), (autoattack < adaptive).sum()
    gated = [alone.pop(name) for name in list(alone) if "gate label" in name]
    low, high = (100 * count / 360 for count in (min(gated)[0], max(gated)[0]))
    assert {fewer for _, fewer in gated} == {0}
    assert f"{low:.1f} to {high:.1f} points more right than the adaptive attack" in PROSE
    differing = {name: counts for name, counts in alone.items() if any(counts)}
    assert differing == {"TRADES, three times the rate": (1, 0), "gate soft": (0, 2)}
    assert "one that AutoAttack misses (TRADES at three times the rate)" in PROSE
    assert "two that the adaptive attack misses (the soft gate)" in PROSE


# The command that fills it in


@pytest.mark.slow
def test_a_changed_figure_formula_picture_or_number_is_named(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "figure", tmp_path / "figure")
    monkeypatch.setattr(readme, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(readme, "FIGURES", tmp_path / "figure")
    readme.PAGE.write_text(re.sub(r"\(-\d+\.\d to ", "(-99.9 to ", README, count=1))
    with Image.open(ROOT / "figure/forest.png") as image:
        image.putpixel((0, 0), 0)
        image.save(tmp_path / "figure/forest.png")
    with Image.open(ROOT / "figure/idea.png") as image:
        image.save(tmp_path / "figure/idea.png")

    text = "\n".join(readme.differences())
    assert "(-99.9 to " in text
    assert "forest.png" in text
    assert "idea.png" in text
    assert "hist" not in text


def test_a_placeholder_that_stands_for_nothing_is_named():
    for placeholder in ("main.gates: gate: PGD-40", "main.none: a: b", "log: 1"):
        with pytest.raises(ValueError, match=placeholder):
            readme.filled(f"@@{placeholder}@@")
