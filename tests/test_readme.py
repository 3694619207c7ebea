"""README.md: what it says to write is written and runs, and what it names is there."""

import importlib.util
import json
import os
import re
import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.helpers import (
    ANCRA,
    ATTACK,
    ROOT,
    SCRIPTS,
    digits_checkpoint,
    digits_split,
    execute,
    folder,
    python,
)
from tests.tools import readme
from utils.attacks import cross_entropy, linf_pgd
from utils.data.datasets import as_input, load_split
from utils.system.attack_copy import frozen
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation, Histograms, Umap

README = (ROOT / "README.md").read_text()
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


class YourNetwork(nn.Module):
    """The network of a reader: `body` up to the last ReLU, and `fc`."""

    def __init__(self):
        """Make two convolutions and a linear layer."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 4, 2, 1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
        )
        self.fc = nn.Linear(48, 10)


def lifted(code):
    """Run the snippet that lifts ANC and RA out, on `YourNetwork`."""
    return run(code, YourNetwork=YourNetwork)


def fit(names):
    """Train the snippet's network by its loss, on digits under a weak attack.

    Returns the share of test images that it classifies right.
    """
    torch.manual_seed(0)
    model = names["WithRA"]()
    split = load_split("digits", "train", "", 16)
    generator = torch.Generator()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(2):
        for rows in torch.randperm(len(split.labels)).split(32):
            x = as_input(split.images[rows])
            labels = split.labels[rows]
            with frozen(model) as net:
                adversarial = linf_pgd(x, cross_entropy(net, labels), 0.02, 0.02, 1, x)
            optimizer.zero_grad()
            names["training_loss"](model, x, adversarial, labels, generator).backward()
            optimizer.step()
    test = digits_split()
    with frozen(model) as net, torch.no_grad():
        return (net(as_input(test.images)).argmax(1) == test.labels).double().mean().item()


def test_lifted_reverse_attention_and_contrast_train_a_network():
    """Without a loss on the auxiliary logits, the network learns nothing."""
    code = snippet("Take ANC and RA elsewhere")
    assert fit(lifted(code)) > 0.7
    assert code.count(" + 2 * ") == 1
    assert fit(lifted(code.replace(" + 2 * ", " + 0 * "))) < 0.4


def test_lifted_contrast_is_the_methods_and_needs_two_classes():
    names = lifted(snippet("Take ANC and RA elsewhere"))
    torch.manual_seed(0)
    model = names["WithRA"]()
    model.fc.bias.data[3] = 12  # every head is sure that every image is of class 3, so S = 1
    x = torch.rand(4, 3, 16, 16)
    for labels, contrast in ((torch.tensor([0, 0, 1, 1]), 1), (torch.zeros(4, dtype=int), 0)):
        final, auxiliary = model(x, labels)
        entropy = F.cross_entropy(final, labels) + 2 * F.cross_entropy(auxiliary, labels)
        generator = torch.Generator().manual_seed(0)
        loss = names["training_loss"](model, x, x, labels, generator)
        assert loss.item() == pytest.approx(entropy.item() + 3 * 3 * contrast, abs=0.05)


def test_the_other_two_snippets(tmp_path, capsys):
    digits_checkpoint(tmp_path / "best_adv_model.pt")
    names = run(snippet("From Python").replace("RUN_FOLDER", str(tmp_path)))
    model = names["model"]
    split = names["split"]
    eps = names["defaults"].epsilon
    x = as_input(split.images)
    labels = split.labels
    with torch.no_grad():
        is_right = model(x).argmax(1) == labels
    natural, robust = map(float, re.findall(r"[\d.]+(?= %)", capsys.readouterr().out))
    assert natural == pytest.approx(100 * is_right.double().mean().item(), abs=0.005)
    assert 10 < robust < natural - 5
    assert names["images"].shape == (8, 3, 16, 16)
    assert names["labels"].equal(labels[:8])

    # Images that fall at half the radius: no library may fail, and AutoAttack needs seconds.
    half = linf_pgd(x, cross_entropy(model, labels), eps / 2, eps / 10, 10, x)
    with torch.no_grad():
        falls = is_right & (model(half).argmax(1) != labels)
    rows = falls.nonzero().squeeze(1)[:4]
    assert len(rows) == 4
    names |= {"images": x[rows], "labels": labels[rows]}
    names = run(snippet("Other libraries"), **names)
    for library in ("autoattack", "torchattacks", "foolbox"):
        adversarial = names[f"by_{library}"]
        assert (adversarial - x[rows]).abs().max() < eps + 1e-5
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        with torch.no_grad():
            assert (model(adversarial).argmax(1) != labels[rows]).all(), library
    assert names["fooled"].all()


# Change one idea: what each section says to write is written, and runs

IDEAS = re.search(r"(?ms)^## Change one idea\n(.*?)^### Take ANC and RA elsewhere", README)[1]
ABOVE = r"[Ii]n `(?P<file>[\w/.]+)`,\s+above\s+`(?P<place>.+?)`\s+```python\n(?P<code>.*?)^```"
AT_END = r"At the end of `(?P<file>[\w/.]+)`[^`]*?:\s+```python\n(?P<code>.*?)^```"
NAME = r"\* In `(?P<file>[\w/.]+)`, add `(?P<name>.+?)` to `(?P<table>\w+)`"
IMPORT = r"\* In `(?P<file>[\w/.]+)`, import `(?P<name>\w+)` from `(?P<module>[\w.]+)`"


def substituted(pattern, replacement, file):
    """Replace the one place in a file that a pattern matches."""
    text, count = re.subn(pattern, lambda match: match.expand(replacement), file.read_text())
    assert count == 1, f"{file.name}: {pattern}"
    file.write_text(text)


def marked(idea, code):
    """Let the function or branch that code begins with print that it is used."""
    return re.sub(r"\A( *)((?:def|elif) [^\n]*:\n)", rf"\1\2\1    print('USED: {idea}')\n", code)


def escaped(text):
    """Return text for a replacement, where a backslash would mean something."""
    return text.replace("\\", r"\\")


def change(root, idea, text):
    """Change a copy of the repository as a section says, and return how many changes it names."""
    count = 0
    for match in re.finditer(f"(?ms){AT_END}", text):
        file = root / match["file"]
        before = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(before + marked(idea, match["code"]))
        count += 1
    for match in re.finditer(f"(?ms){ABOVE}", text):
        line = rf"(?m)^(.*{re.escape(match['place'])})"
        code = marked(idea, match["code"])
        if code.startswith("def "):
            code += "\n\n"
        substituted(line, escaped(code) + r"\1", root / match["file"])
        count += 1
    for match in re.finditer(NAME, text):
        table = rf"(?m)^( *{match['table']}(?:: [^=\n]+)? = (?:Literal)?[\[({{])"
        substituted(table, rf"\1{escaped(match['name'])}, ", root / match["file"])
        count += 1
    for match in re.finditer(IMPORT, text):
        file = root / match["file"]
        line = f"from {match['module']} import {match['name']}\n"
        substituted(r"(?ms)\A(.*?)^(from (?:utils|models))", rf"\1{line}\2", file)
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

    trained = python(
        ANCRA,
        "--dataset=stripes",
        "--image-size=16",
        "--arch=Small",
        "--width=8",
        "--method=pairing",
        "--strategy=correct_adv",
        "--gate=second",
        "--inner=margin",
        "--temperature=2.5",
        "--warmup-epochs=0",
        "--batch-size=16",
        "--limit-train=32",
        "--limit-test=4",
        "--epochs=1",
        "--num-steps=2",
        "--device=cpu",
        f"--model-dir={tmp_path / 'run'}",
        cwd=copy,
        PYTHONPATH="",
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads((folder(tmp_path) / "run.json").read_text())["settings"]["epsilon"] == 0.05
    for idea in ("A loss", "A choice of negatives", "A gate", "A data set", "A training attack"):
        assert f"USED: {idea}\n" in trained.stdout, idea

    evaluated = python(
        ATTACK,
        f"--ckpt_url={folder(tmp_path)}",
        "--attacks=natural,blur,adaptive",
        "--n-examples=4",
        "--restarts=1",
        "--num-steps=2",
        "--device=cpu",
        cwd=copy,
        PYTHONPATH="",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert "USED: An attack of the evaluation\n" in evaluated.stdout
    assert "adaptive: two" in evaluated.stdout
    assert "\nblur " in evaluated.stdout


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


def test_a_formula_that_katex_cannot_set_is_named():
    folder = os.environ.get("KATEX")
    if folder is None:
        pytest.skip("KATEX is the folder in which `npm install katex` was run")
    page = "Good: $x^2$. Bad: $\\frac{1}$\n```math\n\\sqrt{2\n```\n"
    assert len(list(readme.formula_errors(page, folder))) == 2
