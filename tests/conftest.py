"""Fixtures of several test files."""

import urllib.error
import urllib.request
import warnings

import pytest

from tests.helpers import execute, files


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a script that must refuse its input, with status 2 and no file touched -> the one line it says."""

    def run(script, *argv, mentions=()):
        before = files(tmp_path)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)  # they would be further lines on standard error
            status = execute(script, *argv)
        lines = capsys.readouterr().err.splitlines() + [str(w.message) for w in said if w.category is UserWarning]
        assert status == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{script}: error: ")
        for word in mentions:
            assert str(word) in lines[0]
        assert files(tmp_path) == before
        return lines[0]

    return run
