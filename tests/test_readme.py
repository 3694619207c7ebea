"""README.md: what it says to write is written and runs, and what it names is there."""

import re
import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F
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
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    named = re.findall(r"[\w/-]+\.(?:py|txt|md)\b", README) + re.findall(r"`(tests/\w+)`", README)
    assert linked
    assert named
    for name in {*linked, *named}:
        assert any((ROOT / part / name).exists() for part in ("", "utils", "models")), name
    pictures = {f"figure/{file.name}" for file in (ROOT / "figure").glob("*.png")}
    assert pictures == set(linked)


def test_files_of_a_run_have_the_names_that_it_gives():
    names = set(re.findall(r"`([\w-]+\.(?:pt|csv|log|json|png))`", README))
    code = "".join(file.read_text() for file in (ROOT / "utils").rglob("*.py"))
    assert names
    for name in names:
        assert f'"{name}"' in code, name


def test_formulas_are_whole():
    """Figures are filled into tables and sentences, never into a formula, whose braces pair up."""
    formulas = re.findall(r"(?ms)^```math\n(.*?)^```", README)
    formulas += re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", README)
    assert len(formulas) > 10
    for formula in formulas:
        assert not re.search(r"[+-]\d+\.\d", formula), formula
        assert not re.search(r"\\math\w+(?!\w*\{)\W", formula), formula
        braces = "".join(re.findall(r"(?<!\\)[{}]", formula))
        while "{}" in braces:
            braces = braces.replace("{}", "")
        assert braces == "", formula


def test_its_commands_are_accepted():
    seen = set()
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
    text = "".join(code for language, code in blocks if language == "")
    for command in text.replace("&&", "\n").splitlines():
        words = shlex.split(command, comments=True)
        for script in SCRIPTS:
            if script not in words:
                continue
            argv = words[words.index(script) + 1 :]
            if script in SETTINGS:
                parse(SETTINGS[script], "", argv)
            else:
                parse_training("", {}, argv)
            seen.add(script)
    assert seen == {script for script in SCRIPTS if "baseline" not in script}


@pytest.mark.parametrize(
    ("script", "headings"),
    [
        (ANCRA, ("Train", "Your own images", "Many machines")),
        (ATTACK, ("Evaluate",)),
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
    assert code.count("zip((1, 2), *heads)") == 1
    assert fit(lifted(code.replace("zip((1, 2), *heads)", "zip((1, 0), *heads)"))) < 0.4


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
    eps = names["own"].epsilon
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


# Change one idea: each row of the table as code that prints that it is used

LOSS = '''

def pairing_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return the loss of adversarial logit pairing (Kannan et al., arXiv 1803.06373)."""
    print("USED: a loss")
    return F.cross_entropy(adversarial, labels) + beta * (natural - adversarial).square().mean()
'''
NETWORK = """
import torch.nn.functional as F
from torch import nn

from models.reverse_attention import ReverseAttentionNetwork


class Small(ReverseAttentionNetwork):
    def __init__(self, num_classes, reverse_attention=True, width=16, image_size=32):
        super().__init__()
        print("USED: a network")
        self.reverse_attention = reverse_attention
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        blocks = [nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(width, num_classes)

    def trunk(self, x):
        return F.relu(self.stem(x))

    def last_blocks(self):
        return self.blocks
"""
GATE = """def second_gate(auxiliary: Tensor, labels: Tensor | None) -> Tensor:
    print("USED: a gate")
    return auxiliary.topk(2).indices[:, 1]


"""
DATA_SET = """def _stripes(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    print("USED: a data set")
    generator = torch.Generator().manual_seed(len(part))
    images = torch.randint(128, (64, 3, size, size), generator=generator).byte()
    images[::2, :, ::4] += 127
    images[1::2, :, :, ::4] += 127
    return Split(images, torch.arange(64) % 2, ("rows", "columns"))


"""
TRAINING_ATTACK = """def outdone(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    print("USED: a training attack")
    margin = lambda logits: margins(logits, labels).sum()
    return over_heads(margin, heads, auxiliary_weight=auxiliary_weight)


"""
BLUR = """

def blur(eps: float) -> Attack:
    def attack(net, x, labels, numbers):
        print("USED: an attack of the evaluation")
        return x + (F.avg_pool2d(x, 3, 1, 1) - x).clamp(-eps, eps)

    return attack
"""
SETTINGS_FILE = "utils/system/settings.py"

# Row of the table: (file, words before which to write, what to write); None: at the end of the file
CHANGES = {
    "a loss": [
        ("utils/losses.py", None, LOSS),
        ("utils/step.py", "    mart_loss,\n", "    pairing_loss,\n"),
        (
            "utils/step.py",
            '    "pgd": lambda',
            '    "pairing": lambda nat, adv, labels, s: pairing_loss(nat, adv, labels, s.beta),\n',
        ),
        (SETTINGS_FILE, '"pgd", "trades", "mart"]', '"pairing", '),
    ],
    "a strategy": [
        (
            "utils/negatives.py",
            '    elif strategy == "hard":',
            '    elif strategy == "near":\n        print("USED: a strategy")\n',
        ),
        ("utils/negatives.py", '"random", "soft", "hard", "easy")', '"near", '),
        (SETTINGS_FILE, '"random", "random_adv", "soft"', '"near", "near_adv", '),
    ],
    "a gate": [
        ("models/reverse_attention.py", "# Each takes the auxiliary logits", GATE),
        ("models/reverse_attention.py", '    "soft": soft_gate', '    "second": second_gate,\n'),
        (SETTINGS_FILE, '"label", "predicted", "soft", "none"]', '"second", '),
    ],
    "a flag": [
        (
            SETTINGS_FILE,
            '    strategy: Strategy = "random_adv"',
            '    shift: Annotated[float, number("[0, 5]")] = 0.0\n    """shift of the class"""\n',
        ),
        (
            "utils/step.py",
            "    auxiliary_weight = settings.cr_beta",
            '    print("USED: a flag") if settings.shift == 2.5 else None\n',
        ),
        (SETTINGS_FILE, '"strategy", "sample_class_number"', '"shift", '),
    ],
    "a network": [
        ("models/small.py", None, NETWORK),
        ("models/__init__.py", "from models.resnet", "from models.small import Small\n"),
        ("models/__init__.py", '    "ResNet18": ', '    "Small": Small,\n'),
        (SETTINGS_FILE, '"ResNet18", "WRN-34-10"', '"Small", '),
    ],
    "a data set": [
        ("utils/data/datasets.py", "LOADERS = {", DATA_SET),
        ("utils/data/datasets.py", '    "digits": _digits', '    "stripes": _stripes,\n'),
        (SETTINGS_FILE, '"cifar10", "cifar100", "tiny', '"stripes", '),
        (SETTINGS_FILE, '    ("digits",): {', '    ("stripes",): {"epsilon": 0.05},\n'),
    ],
    "a training attack": [
        ("utils/step.py", "def negative_strategy(", TRAINING_ATTACK),
        (
            "utils/step.py",
            '        "ce": ToAttack(',
            '        "margin": ToAttack(x, draws.start, outdone, labels),\n',
        ),
        ("utils/step.py", "summed_cross_entropy\n", "margins, "),
        (SETTINGS_FILE, '"ce", "kl"]', '"margin", '),
    ],
    "a view": [
        (
            "utils/evaluation/adaptive.py",
            '        if gate in ("label", "predicted"):',
            '        print("USED: a view")\n'
            '        add("two", lambda heads: [(1, heads.final), (1, heads.auxiliary[0])])\n',
        ),
    ],
    "an attack of the evaluation": [
        ("utils/attacks.py", None, BLUR),
        ("utils/evaluation/robustness.py", "cross_entropy,", "blur, "),
        (
            "utils/evaluation/robustness.py",
            '        ("square", "Square"',
            '        ("blur", "blur", blur, {"eps": eps}),\n',
        ),
        (SETTINGS_FILE, '    "natural",\n    "fgsm",', '    "blur",\n'),
    ],
}


def change(file, place, words):
    """Write words into a file before a place, or at its end."""
    text = file.read_text() if file.exists() else ""
    if place is None:
        file.write_text(text + words)
        return
    assert text.count(place) == 1, f"{file.name}: {place}"
    file.write_text(text.replace(place, words + place))


def test_every_row_of_the_table_is_made():
    rows = re.findall(r"(?m)^\| (an? [\w ]+) \|", section("Change one idea"))
    assert set(rows) == set(CHANGES)


@pytest.mark.slow
def test_each_idea_is_changed_as_the_table_says(tmp_path):
    copy = tmp_path / "copy"
    for name in ("models", "utils"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for script in (ANCRA, ATTACK):
        shutil.copy(ROOT / script, copy)
    for changes in CHANGES.values():
        for name, place, words in changes:
            change(copy / name, place, words)

    trained = python(
        ANCRA,
        "--dataset=stripes",
        "--image-size=16",
        "--arch=Small",
        "--width=8",
        "--method=pairing",
        "--strategy=near_adv",
        "--gate=second",
        "--inner=margin",
        "--shift=2.5",
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
    assert "at eps 0.05" in trained.stdout
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

    of_evaluation = {"a view", "an attack of the evaluation"}
    for idea in CHANGES.keys() - of_evaluation:
        assert f"USED: {idea}\n" in trained.stdout, idea
    for idea in (*of_evaluation, "a network", "a gate", "a data set"):
        assert f"USED: {idea}\n" in evaluated.stdout, idea
    assert "adaptive: two" in evaluated.stdout
