"""Where an output file comes from: command, commit, versions, device, seed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from utils.system import distributed

ALWAYS = ("torch", "torchvision", "numpy")
WHERE_IMPORTED = {"scikit-learn": "sklearn", "umap-learn": "umap", "pyautoattack": "pyautoattack", "pillow": "PIL"}


def provenance(device: object, seed: int | None = None, packages: Sequence[str] = ()) -> dict:
    """What an output file says about its making, as plain values: for json, or inside a checkpoint.

    device: the torch device that computed. packages: names on PyPI whose versions matter besides those of Python,
    torch, torchvision, numpy and of whatever of scikit-learn, umap-learn, pyautoattack and pillow is imported by now.
    """
    card = {"card": _card(device)} if torch.device(device).type == "cuda" else {}
    imported = [name for name, module in WHERE_IMPORTED.items() if module in sys.modules]
    return {
        "command": f"{distributed.launcher()} {shlex.join(sys.argv)}",
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]}
        | {name: _version(name) for name in dict.fromkeys((*ALWAYS, *imported, *packages))},
        "device": str(device),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "waiting": _waiting(),
        **card,
        "seed": seed,
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def in_one_line(record: dict) -> str:
    """A provenance as one line, for a log."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = ", ".join([record["device"], *map(str, record.get("card", {}).values())])
    threads = f"{record['threads']} threads ({record['waiting']})"
    made = f"commit {record['commit']}, {versions}, {device}, {threads}, seed {record['seed']}"
    return f"{record['started']}  {record['command']}  {made}"


def commit() -> str | None:
    """This code's git commit, `+` behind it where files differ; None where this code is in no repository."""
    here = Path(__file__)

    def git(*args: str) -> str:
        how = dict(cwd=here.parent, capture_output=True, text=True, encoding="utf-8", check=True, timeout=20)
        return subprocess.run(["git", "--no-optional-locks", *args], **how).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails where the code lies, untracked, inside another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    """The processor's name, as far as the system tells; last digits depend on it."""
    with suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _waiting() -> str:
    """What the environment says of OpenMP's threads that wait for work."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or "wait as OpenMP does"


def _card(device: object) -> dict:
    """A CUDA device: its name, memory, driver, and the versions of CUDA and cuDNN."""
    about, driver = torch.cuda.get_device_properties(torch.device(device)), None
    with suppress(OSError):  # Linux
        driver = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    return {
        "name": about.name,
        "memory": f"{about.total_memory / 1e9:.0f} GB",
        "driver": f"driver {driver.group() if driver else 'unknown'}",
        "cuda": f"CUDA {torch.version.cuda}",
        "cudnn": f"cuDNN {torch.backends.cudnn.version()}",
    }


def _version(name: str) -> str | None:
    """The version of an installed package; an imported module's own says more, such as `+cpu`."""
    try:
        version = getattr(sys.modules.get(WHERE_IMPORTED.get(name, name)), "__version__", None)
        return str(version or metadata.version(name))
    except metadata.PackageNotFoundError:
        return None
