"""Where an output file comes from: command, commit, versions, device, seed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from utils.system import distributed

# Variables that settle how OpenMP's threads wait for work.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Names on PyPI.
PACKAGES = (
    "torchvision",
    "numpy",
    "scikit-learn",
    "umap-learn",
    "pillow",
    "pyautoattack",
    "torchattacks",
    "foolbox",
)


def provenance(device: torch.device, seed: int | None = None) -> dict:
    """Describe how an output file is made, in plain values for JSON or a checkpoint.

    device: the one that computes.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    record = {
        "command": f"{distributed.launcher()} {shlex.join(sys.argv)}",
        "commit": commit(),
        "versions": versions,
        "device": str(device),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "waiting": " ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
        or "by default",
        "seed": seed,
        "started": datetime.now().isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        record["card"] = {
            "name": card.name,
            "memory": f"{card.total_memory / 1e9:.0f} GB",
            "cudnn": torch.backends.cudnn.version(),
        }
        with suppress(OSError, AttributeError):  # Linux
            text = Path("/proc/driver/nvidia/version").read_text()
            record["card"]["driver"] = re.search(r"\d+\.[\d.]+", text).group()
    return record


def in_one_line(record: dict) -> str:
    """Format a provenance as one line for a log."""
    names = ("commit", "device", "waiting", "threads", "seed")
    facts = record["versions"] | record.get("card", {}) | {name: record[name] for name in names}
    text = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{record['started']}  {record['command']}  {text}"


def commit() -> str | None:
    """Return this code's git commit, with `+` where files differ; None outside a repository."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # This fails where the code lies, untracked, inside another repository.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    """Return the processor's name, as far as the system tells; last digits depend on it."""
    with suppress(OSError, AttributeError):  # Linux
        return re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return platform.processor() or platform.machine()
