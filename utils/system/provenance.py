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
from utils.system.values import counted

# Variables that settle how OpenMP's threads wait for work.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Names on PyPI.
PACKAGES = ("torchvision", "numpy", "scikit-learn", "umap-learn", "pyautoattack", "pillow")


def provenance(device: object, seed: int | None = None, packages: Sequence[str] = ()) -> dict:
    """Describe how an output file is made, in plain values for JSON or a checkpoint.

    device: the torch device that computed. packages: further names on PyPI whose versions matter.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in (*PACKAGES, *packages):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    waiting = [f"{name} {os.environ.get(name, 'unset')}" for name in WAITING]
    record = {
        "command": f"{distributed.launcher()} {shlex.join(sys.argv)}",
        "commit": commit(),
        "versions": versions,
        "device": str(device),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "waiting": ", ".join(waiting),
        "seed": seed,
        "started": datetime.now().isoformat(timespec="seconds"),
    }
    if torch.device(device).type == "cuda":
        record["card"] = _card(device)
    return record


def in_one_line(record: dict) -> str:
    """Format a provenance as one line for a log."""
    versions = [f"{name} {version}" for name, version in record["versions"].items()]
    parts = [
        f"commit {record['commit']}",
        *versions,
        record["device"],
        *record.get("card", {}).values(),
        f"{counted(record['threads'], 'thread')} ({record['waiting']})",
        f"seed {record['seed']}",
    ]
    return f"{record['started']}  {record['command']}  {', '.join(parts)}"


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


def _card(device: object) -> dict:
    """Describe a CUDA device: its name, memory, driver, and the versions of CUDA and cuDNN."""
    properties = torch.cuda.get_device_properties(torch.device(device))
    driver = "unknown"
    with suppress(OSError, AttributeError):  # Linux
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = re.search(r"\d+\.[\d.]+", text).group()
    return {
        "name": properties.name,
        "memory": f"{properties.total_memory / 1e9:.0f} GB",
        "driver": f"driver {driver}",
        "cuda": f"CUDA {torch.version.cuda}",
        "cudnn": f"cuDNN {torch.backends.cudnn.version()}",
    }
