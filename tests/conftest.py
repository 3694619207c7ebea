"""Fixtures of several test files, and what has to hold before PyTorch is loaded."""

import os
import re
import urllib.error
import urllib.request
from functools import cache, partial

# pytest runs a process for each core already, and some tests start further ones.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import sklearn.datasets
import torch

from tests.helpers import digits_checkpoint, digits_network, digits_split, execute, files
from utils.training import loop, records


def pytest_configure(config):
    """Hide CUDA devices unless `-m cuda` asks for them."""
    if not re.search(r"(?<!not )\bcuda\b", config.getoption("markexpr", "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def digits_read_once():
    """Let scikit-learn parse its file of digits once, not in each of hundreds of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", cache(sklearn.datasets.load_digits))
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Seed every test, whichever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch):
    """Let every download fail as it does without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a script that must refuse its input, with status 2 and no file touched."""

    def run(script, *argv, mentions=()):
        """Return what the script says, without tyro's frame; it must mention some words."""
        before = files(tmp_path)
        capsys.readouterr()
        status = execute(script, *argv)
        words = [word for word in capsys.readouterr().err.split() if word != "│"]
        message = " ".join(words)
        assert status == 2, message
        assert message.startswith((f"{script}: error: ", "╭"))
        for word in mentions:
            assert str(word) in message
        assert files(tmp_path) == before
        return message

    return run


def shorten_runs(patch):
    """Shorten runs as `short_runs` does, by a monkeypatch."""
    patch.setattr(loop, "pgd40_heads", partial(loop.pgd40_heads, steps=2))
    patch.setattr(records, "save_or_note", draw_nothing)


def draw_nothing(draw, file):
    """Write a file that begins like a picture."""
    file.write_bytes(b"\x89PNG" + bytes(2000))
    return ""


@pytest.fixture
def short_runs(monkeypatch):
    """Select epochs by 2 steps instead of 40, and draw no curves, in tests of the loop."""
    shorten_runs(monkeypatch)


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw no picture in evaluations."""
    monkeypatch.setattr("utils.evaluation.report.save_or_note", lambda draw, file: "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a small network that knows digits, the test images, and the network's checkpoint."""
    file = digits_checkpoint(tmp_path_factory.mktemp("run") / "best_adv_model.pt")
    return digits_network(), digits_split(), file
