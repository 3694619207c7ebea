"""A run of two epochs on digits that several test files compare others with."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import shorten_runs
from tests.helpers import train


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory):
    """A run of `--milestones 2` that nothing stopped -> its folder, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        return train(tmp_path_factory.mktemp("straight"), "--milestones", 2)


@pytest.fixture
def run(straight_run, tmp_path):
    """A copy of that run -> its folder; `tmp_path / "run"` is its --model-dir."""
    return Path(shutil.copytree(straight_run, tmp_path / straight_run.name))
