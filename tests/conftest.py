"""Fixtures of several test files, and what has to hold before PyTorch is loaded."""

import functools
import os
import re

# One thread a process: pytest runs a process for each core already, and some tests start further ones.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import urllib.error
import urllib.request
import warnings

import pytest
import sklearn.datasets
import torch

from tests.helpers import digits_checkpoint, digits_network, digits_split, execute, files


def pytest_configure(config):
    """Hide CUDA devices unless `-m cuda` asks for them: figures are those of a CPU on every machine."""
    if not re.search(r"(?<!not )\bcuda\b", config.getoption("markexpr", "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def digits_read_once():
    """scikit-learn parses its file of digits at each call, in hundreds of short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", functools.cache(sklearn.datasets.load_digits))
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a script that must refuse its input, with status 2 and no file touched -> what it says.

    That is one line, or several in tyro's frame where the command line itself is wrong.
    """

    def run(script, *argv, mentions=()):
        before = files(tmp_path)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)  # they would be further lines on standard error
            status = execute(script, *argv)
        lines = capsys.readouterr().err.splitlines() + [str(w.message) for w in said if w.category is UserWarning]
        assert status == 2, lines
        message = " ".join(word for line in lines for word in line.split(" ") if word not in ("", "│"))
        if not message.startswith("╭"):
            assert len(lines) == 1, lines
            assert message.startswith(f"{script}: error: ")
        for word in mentions:
            assert str(word) in message
        assert files(tmp_path) == before
        return message

    return run


def shorten_runs(patch):
    """See `short_runs`; patch: a monkeypatch."""
    from utils.training import loop as training
    from utils.training import records

    real = training.pgd40_heads
    patch.setattr(training, "pgd40_heads", lambda *args, **kwargs: real(*args, **kwargs | {"steps": 2}))
    patch.setattr(records, "save_or_note", lambda draw, file: file.write_bytes(b"\x89PNG" + bytes(2000)) and "")


@pytest.fixture
def short_runs(monkeypatch):
    """Training selects by 2 steps instead of 40, and draws no curves, which take half of a short run's time.

    For tests of the loop; test_evaluation.py looks at the attack, test_figures.py at the curves.
    """
    shorten_runs(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network that knows digits, with reverse attention; the test images; the network as a checkpoint file."""
    file = digits_checkpoint(tmp_path_factory.mktemp("run") / "best_adv_model.pt")
    return digits_network(), digits_split(), file
