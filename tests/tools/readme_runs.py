"""The runs that README.md shows: its quick start, and the two networks of its figures."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests/golden/readme_runs.json"
ANCRA = "model/ANCRA-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1-digits"
TRADES = "model/TRADES-ResNet18-beta-6.0-seed-1-digits"
FIRST_LOOK = "--attacks natural,pgd,adaptive --restarts 1 --apgd-steps 20"


def run(command: str, folder: Path) -> str:
    """Run a script of this repository in a folder, and return what it prints."""
    script, *flags = shlex.split(command)
    argv = [sys.executable, str(ROOT / script), *flags]
    print(command, flush=True)
    done = subprocess.run(argv, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def record(folder: Path) -> None:
    """Make what is not there of the page's runs in a folder, and write their figures to `RUNS`."""
    folder.mkdir(parents=True, exist_ok=True)
    for script, trained in (
        ("train_CIFAR10_ResNet.py", ANCRA),
        ("train_ResNet18_baseline.py", TRADES),
    ):
        if not (folder / trained).exists():
            run(f"{script} --dataset digits", folder)
        run(f"feature_distance.py --model_dir {trained} --target_label all", folder)
    evaluation = run(f"test_white_attack.py --ckpt_url {ANCRA} {FIRST_LOOK}", folder)
    run(f"draw_umap.py --model_dir {TRADES} {ANCRA} --name umap", folder)

    content = {
        "log": quick_start(folder / ANCRA / "train.log", evaluation),
        "metrics": (folder / ANCRA / "metrics.csv").read_text(),
        "cosines": {name: cosines_of(folder, name) for name in ("TRADES", "ANCRA-TRADES")},
        "embedding": embedding_of(folder / "plots/umap.npz"),
    }
    RUNS.write_text(json.dumps(content).replace(', "', ',\n"') + "\n")


def quick_start(log: Path, evaluation: str) -> list[str]:
    """Return ten lines or so of what training and evaluation print; ... marks what is left out."""
    shown = []
    for start in ("epoch 1/", "epoch 2/", "best epoch"):
        line = next(line for line in log.read_text().splitlines() if line.startswith(start))
        shown.append(line[: line.rindex("%") + 1])  # without times, which tell of the machine
    shown.insert(2, "...")
    shown.append("")
    rows = evaluation.splitlines()
    head = next(row for row in rows if row.startswith("attack  "))
    width = head.index("seconds")
    for start in ("attack", "natural", "PGD-40", "adaptive: final", "adaptive: auxiliary 1"):
        shown += [row[:width].rstrip() for row in rows if row.startswith(f"{start}  ")]
    shown.append("...")
    return shown + [row[:width].rstrip() for row in rows if row.startswith("worst case  ")]


def cosines_of(folder: Path, method: str) -> list[float]:
    """Return the cosines of all test images' features with those of their negatives."""
    content = np.load(folder / f"distances/{method}-ResNet18-digits-all.npz")
    return content["weighted_NP_cosine"].round(4).tolist()


def embedding_of(file: Path) -> dict:
    """Return the labels of the test images, and each network's points and how it clusters them."""
    content = np.load(file)
    settings = json.loads(str(content["settings"]))
    panels = {}
    for i, (name, measured) in enumerate(zip(settings["names"], settings["measured"], strict=True)):
        points = content[f"embedding_{i}"].astype(float).round(3).tolist()
        panels[name] = {"points": points, "measured": measured}
    return {"labels": content["labels"].tolist(), "panels": panels}
