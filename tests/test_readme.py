"""README.md: what it says to write is written and runs, its snippets run as printed, what it names is there."""

import re
import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import ANCRA, ATTACK, ROOT, SCRIPTS, digits_checkpoint, digits_split, execute, folder, python
from utils.attacks import cross_entropy, linf_pgd
from utils.data.datasets import as_input, load_split
from utils.system.attack_copy import frozen
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation, Histograms, Umap

README = (ROOT / "README.md").read_text()
CLASSES = {ATTACK: Evaluation, "feature_distance.py": Distances, "draw_hist.py": Histograms, "draw_umap.py": Umap}


def section(heading):
    """What stands below a heading, up to the next one."""
    (found,) = re.findall(rf"(?ms)^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README)
    return found


def snippet(heading):
    (found,) = re.findall(r"(?ms)^```python\n(.*?)^```", section(heading))
    return found


def run(code, **names):
    exec(compile(code, "README.md", "exec"), names)
    return names


# What it says


def test_files_that_it_names_exist():
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    named = re.findall(r"[\w/-]+\.(?:py|txt|md)\b", README) + re.findall(r"`(tests/\w+)`", README)
    assert len(linked) > 3 and len(named) > 20
    for name in {*linked, *named}:
        assert any((ROOT / part / name).exists() for part in ("", "utils", "models")), name
    headings = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.*)", README)]
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings
    pictures = [file for file in (ROOT / "figure").iterdir() if file.suffix == ".png"]
    assert {f"figure/{file.name}" for file in pictures} == set(linked)
    assert max(file.stat().st_size for file in pictures) < 200_000


def test_files_of_a_run_have_the_names_that_it_gives():
    named = set(re.findall(r"`([\w-]+\.(?:pt|csv|log|json|png))`", README))
    code = "".join(file.read_text() for file in (ROOT / "utils").rglob("*.py"))
    assert len(named) > 6
    for name in named:
        assert f'"{name}"' in code, name


def test_formulas_are_whole():
    """Figures are filled into tables and sentences, never into a formula, whose braces pair up."""
    formulas = re.findall(r"(?ms)^```math\n(.*?)^```", README) + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", README)
    assert len(formulas) > 10
    for formula in formulas:
        assert not re.search(r"[+-]\d+\.\d", formula), formula
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", formula):
            depth += 1 if brace == "{" else -1
            assert depth >= 0, formula
        assert depth == 0, formula
        assert not re.search(r"\\math\w+(?!\w*\{)\W", formula), formula


def test_its_commands_are_accepted():
    seen = set()
    fenced = [code for language, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README) if not language]
    for line in "".join(fenced).splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            script = next((word for word in words if word in SCRIPTS), None)
            if script is None:
                continue
            argv = words[words.index(script) + 1 :]
            if script in CLASSES:
                parse(CLASSES[script], "", argv)
            else:
                parse_training("", {}, argv)
            seen.add(script)
    assert seen == {s for s in SCRIPTS if "baseline" not in s}


@pytest.mark.parametrize(
    "script, headings",
    [
        (ANCRA, ("Train", "Your own images", "Many machines")),
        (ATTACK, ("Evaluate",)),
        ("feature_distance.py", ("Figures",)),
    ],
)
def test_flags_that_it_names_exist(script, headings, capsys):
    text = re.sub(r"(?ms)^```.*?^```", "", "".join(map(section, headings)))
    named = re.findall(r"`(--[^`]+)`", text)
    assert execute(script, "--help") == 0
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert named
    for words in named:
        flag, *values = words.split()
        assert flag in known, flag
        if values and values != ["FILE"] and script == ANCRA and "--restart_epoch" not in words:
            parse_training("", {}, [flag, *values])


# Its snippets


class YourNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [(nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 24), (24, 48))]
        self.body, self.fc = nn.Sequential(*sum(layers, ())), nn.Linear(48, 10)


def lifted(code):
    return run(code, YourNetwork=YourNetwork)


def fit(names):
    """Train the snippet's network by its loss, on digits under a weak attack -> the share of test images right."""
    torch.manual_seed(0)
    model, split, generator = names["WithRA"](), load_split("digits", "train", "", 16), torch.Generator()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(2):
        for rows in torch.randperm(len(split.labels)).split(32):
            x, labels = as_input(split.images[rows]), split.labels[rows]
            with frozen(model) as net:
                adversarial = linf_pgd(x, cross_entropy(net, labels), 0.02, 0.02, 1, x)
            optimizer.zero_grad()
            names["training_loss"](model, x, adversarial, labels, generator).backward()
            optimizer.step()
    test = digits_split()
    with frozen(model) as net, torch.no_grad():
        return (net(as_input(test.images)).argmax(1) == test.labels).double().mean().item()


def test_lifted_reverse_attention_and_contrast_train_a_network():
    """It reaches 0.93; chance is 0.1, and without a loss on the auxiliary logits, as once printed, 0.08 is reached."""
    code = snippet("Take ANC and RA elsewhere")
    assert fit(lifted(code)) > 0.7
    assert code.count("zip((1, 2), *heads)") == 1
    assert fit(lifted(code.replace("zip((1, 2), *heads)", "zip((1, 0), *heads)"))) < 0.4


def test_lifted_contrast_is_the_methods_and_needs_two_classes():
    names = lifted(snippet("Take ANC and RA elsewhere"))
    torch.manual_seed(0)
    model, x, labels = names["WithRA"](), torch.rand(4, 3, 16, 16), torch.tensor([0, 0, 1, 1])
    model.fc.bias.data[3] = 12  # every head takes every image for class 3, with a softmax of nearly 1: S = 1

    def loss(labels):
        return names["training_loss"](model, x, x, labels, torch.Generator().manual_seed(0))

    final, auxiliary = model(x, labels)
    entropy = F.cross_entropy(final, labels) + 2 * F.cross_entropy(auxiliary, labels)
    assert loss(labels).item() == pytest.approx(entropy.item() + 3 * (1 + 2 * 1), abs=0.05)
    final, auxiliary = model(x, 0 * labels)
    entropy = F.cross_entropy(final, 0 * labels) + 2 * F.cross_entropy(auxiliary, 0 * labels)
    torch.testing.assert_close(loss(0 * labels), entropy)


def test_the_other_two_snippets(tmp_path, capsys):
    digits_checkpoint(tmp_path / "best_adv_model.pt")
    names = run(snippet("From Python").replace("RUN_FOLDER", str(tmp_path)))
    model, split, eps = names["model"], names["split"], names["own"].epsilon
    x, labels = as_input(split.images), split.labels
    with torch.no_grad():
        right = model(x).argmax(1) == labels
    natural, robust = map(float, re.findall(r"[\d.]+(?= %)", capsys.readouterr().out))
    assert natural == pytest.approx(100 * right.double().mean().item(), abs=0.005)
    assert 10 < robust < natural - 5
    assert names["images"].shape == (8, 3, 16, 16) and names["labels"].equal(labels[:8])

    # images that fall at half the radius: no library is to fail on them, and AutoAttack needs seconds, not minutes
    half = linf_pgd(x, cross_entropy(model, labels), eps / 2, eps / 10, 10, x)
    with torch.no_grad():
        rows = (right & (model(half).argmax(1) != labels)).nonzero().squeeze(1)[:4]
    assert len(rows) == 4
    names |= {"images": x[rows], "labels": labels[rows]}
    names = run(snippet("Other libraries"), **names)
    for library in ("autoattack", "torchattacks", "foolbox"):
        found = names[f"by_{library}"]
        assert (found - x[rows]).abs().max() < eps + 1e-5 and found.min() >= 0 and found.max() <= 1
        with torch.no_grad():
            assert (model(found).argmax(1) != labels[rows]).all(), library
    assert names["fooled"].all()


# Change one idea: each row of the table as code, which says that it was used

LOSS = '''

def pairing_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Adversarial logit pairing (Kannan et al., arXiv 1803.06373)."""
    print("USED: a loss")
    return F.cross_entropy(adversarial, labels) + beta * (natural - adversarial).square().mean()
'''
PAIRING = '''    "pairing": lambda nat, adv, labels, s: pairing_loss(nat, adv, labels, s.beta),
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
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()) for _ in range(2))
        self.fc = nn.Linear(width, num_classes)

    def trunk(self, x):
        return F.relu(self.stem(x))

    def last_blocks(self):
        return self.blocks
"""
DATA_SET = '''
def _stripes(dataset: str, part: str, data_dir: Path, size: int) -> Split:
    """Noise with bright rows or bright columns."""
    print("USED: a data set")
    images = torch.randint(128, (64, 3, size, size), generator=torch.Generator().manual_seed(len(part))).byte()
    images[::2, :, ::4] += 127
    images[1::2, :, :, ::4] += 127
    return Split(images, torch.arange(64) % 2, ("rows", "columns"))

'''
TRAINING_ATTACK = """def outdone(heads: Heads, labels: Tensor, auxiliary_weight: float) -> Tensor:
    print("USED: a training attack")
    return over_heads(lambda logits: margins(logits, labels).sum(), heads, auxiliary_weight=auxiliary_weight)


"""
VIEW = """        add("two", lambda heads: print("USED: a view") or [(1, heads.final), (1, heads.auxiliary[0])])
"""
BLUR = """

def blur(eps: float) -> Attack:
    def attack(net, x, labels, numbers):
        print("USED: an attack of the evaluation")
        return x + (F.avg_pool2d(x, 3, 1, 1) - x).clamp(-eps, eps)

    return attack
"""
FLAG = """    shift: float = setting(0.0, number(0, 5), "of the anchor's class")
"""
SHIFTED = """    print("USED: a flag" if settings.shift == 2.5 else settings.shift)
"""
RADIUS = 'epsilon: float = setting(8 / 255, number(0, 1, of=255), "L-infinity radius", by={'
MODELS = "from models.reverse_attention import GATES, Heads, ReverseAttentionNetwork\n"
BEFORE, AFTER = "before", "after"

# row of the table: (file, BEFORE or AFTER which line or words, what to write there); no place: at the end of the file
CHANGES = {
    "a loss": [
        ("utils/losses.py", "", "", LOSS),
        ("utils/step.py", AFTER, "    over_heads,\n", "    pairing_loss,\n"),
        ("utils/step.py", AFTER, "Callable[..., Tensor]] = {\n", PAIRING),
        ("utils/system/settings.py", AFTER, 'METHODS = ("pgd", ', '"pairing", '),
    ],
    "a strategy": [
        (
            "utils/negatives.py",
            BEFORE,
            '    elif strategy == "hard":',
            '    elif strategy == "near":\n        print("USED: a strategy")\n',
        ),
        ("utils/negatives.py", AFTER, 'STRATEGIES = ("random", ', '"near", '),
        ("utils/system/settings.py", AFTER, 'STRATEGIES = ("random", ', '"near", '),
    ],
    "a flag": [
        ("utils/system/settings.py", BEFORE, '    strategy: str = setting("random_adv"', FLAG),
        (
            "utils/step.py",
            BEFORE,
            "    auxiliary_weight = settings.cr_beta",
            '    print("USED: a flag") if settings.shift == 2.5 else None\n',
        ),
        ("utils/system/settings.py", AFTER, 'of_anc = ("strategy", ', '"shift", '),
    ],
    "a network": [
        ("models/small.py", "", "", NETWORK),
        ("models/__init__.py", AFTER, MODELS, "from models.small import Small\n"),
        ("models/__init__.py", AFTER, "ARCHS = {\n", '    "Small": Small,\n'),
        ("utils/system/settings.py", AFTER, "ARCHS = (", '"Small", '),
    ],
    "a data set": [
        ("utils/data/datasets.py", BEFORE, "\nLOADERS = {", DATA_SET),
        ("utils/data/datasets.py", AFTER, "\nLOADERS = {", '"stripes": _stripes, '),
        ("utils/system/settings.py", AFTER, 'DATASETS = ("cifar10", ', '"stripes", '),
        ("utils/system/settings.py", AFTER, RADIUS, '"stripes": 0.05, '),
    ],
    "a training attack": [
        ("utils/step.py", BEFORE, "def negative_strategy(", TRAINING_ATTACK),
        (
            "utils/step.py",
            AFTER,
            "    untargeted = {\n",
            '        "margin": ToAttack(x, draws.start, outdone, labels),\n',
        ),
        ("utils/step.py", AFTER, "gaussian_start, ", "margins, "),
        ("utils/system/settings.py", AFTER, 'inner: str = setting("ce", ("ce", ', '"margin", '),
    ],
    "a view": [("utils/evaluation/adaptive.py", BEFORE, '        if gate in ("label", "predicted"):', VIEW)],
    "an attack of the evaluation": [
        ("utils/attacks.py", "", "", BLUR),
        ("utils/evaluation/robustness.py", AFTER, "import NOISE_DRAWS, Attack, ", "blur, "),
        ("utils/evaluation/robustness.py", AFTER, "    plans = {\n", '        "blur": {"blur": quick(blur, eps=eps)},\n'),
        ("utils/system/settings.py", AFTER, 'ATTACKS = ("natural", ', '"blur", '),
    ],
}


def change(file, place, anchor, words):
    text = file.read_text() if file.exists() else ""
    if place:
        assert text.count(anchor) == 1, f"{file.name}: {anchor}"
        words = words + anchor if place == BEFORE else anchor + words
    file.write_text(text.replace(anchor, words) if place else text + words)


def test_every_row_of_the_table_is_made():
    assert re.findall(r"(?m)^\| (an? [\w ]+) \|", section("Change one idea")) == list(CHANGES)


@pytest.mark.slow
def test_each_idea_is_changed_as_the_table_says(tmp_path):
    copy = tmp_path / "copy"
    for name in ("models", "utils"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (ANCRA, ATTACK):
        shutil.copy(ROOT / script, copy)
    for changes in CHANGES.values():
        for name, *how in changes:
            change(copy / name, *how)
    flags = (
        "--dataset=stripes --image-size=16 --arch=Small --width=8 --method=pairing --strategy=near_adv --inner=margin "
        "--shift=2.5 "
        "--warmup-epochs=0 --batch-size=16 --limit-train=32 --limit-test=4 --epochs=1 --num-steps=2 --device=cpu"
    )
    trained = python(ANCRA, *flags.split(), "--model-dir", tmp_path / "run", cwd=copy, PYTHONPATH="")
    assert trained.returncode == 0, trained.stderr
    argv = ("--ckpt_url", folder(tmp_path), "--attacks", "natural,blur,adaptive", "--n-examples=4", "--restarts=1")
    evaluated = python(ATTACK, *argv, "--num-steps=2", "--device=cpu", cwd=copy, PYTHONPATH="")
    assert evaluated.returncode == 0, evaluated.stderr
    used = {"training": trained.stdout, "evaluation": evaluated.stdout}
    for job, ideas in {
        "training": ("a loss", "a strategy", "a flag", "a network", "a data set", "a training attack"),
        "evaluation": ("a network", "a data set", "a view", "an attack of the evaluation"),
    }.items():
        for idea in ideas:
            assert f"USED: {idea}\n" in used[job], (job, idea)
    assert "at eps 0.05" in trained.stdout
    assert "adaptive: two" in evaluated.stdout and "blur" in evaluated.stdout
