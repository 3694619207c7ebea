"""Every flag of every script against wrong values; the flags are read off the parsers, so that new ones are covered."""

import argparse
import runpy
import sys

import pytest

from tests.helpers import ROOT, SCRIPTS, execute

NUMBERS = ("", " ", "nonsense", "nan", "inf", "-inf", "1e999", "-1", "1,", "0x10", "٣x", "--", "9" * 5000)
WHOLE = ("0.5", "1e2", "99999999999999999999")


class Captured(BaseException):
    """Carries a parser out of a script."""


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a script."""

    def find(script):
        def capture(parser, *args, **kwargs):
            raise Captured(parser)

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", capture)
            patch.setattr(sys, "argv", [script])
            with pytest.raises(Captured) as caught:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return caught.value.args[0]

    return find


def accepts(action, text):
    try:
        action.type(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return True


def wrong_uses(action):
    """Command lines that misuse one flag. A flag counts as a number's where its type refuses a word."""
    name = action.option_strings[0]
    if action.nargs == 0:
        return [[f"{name}=yes"], [f"{name}="]]
    wrong = [] if action.nargs in ("?", "*") else [[name]]
    if action.choices is not None:
        return wrong + [[f"{name}={value}"] for value in ("", "nonsense", str(next(iter(action.choices))) + "x")]
    assert action.type is not None, f"{name} takes any text, an empty one too"
    if accepts(action, "nonsense"):  # a path or a name
        return [*wrong, [f"{name}="], [f"{name}= "]]
    values = [value for value in NUMBERS if value != "-1" or not str(action.default).startswith("-")]
    values += [value for value in WHOLE if not accepts(action, "0.5")]
    return wrong + [[f"{name}={value}"] for value in values]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_refuses_wrong_values_in_one_line(parser_of, no_network, tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    flags = [action for action in parser_of(script)._actions if action.option_strings and action.dest != "help"]
    assert len(flags) >= 6
    tried = 0
    for action in flags:
        uses = wrong_uses(action)
        assert uses, action.option_strings
        for use in uses:
            status = execute(script, *use)
            said = capsys.readouterr()
            lines = said.err.splitlines()
            assert status == 2, (use, said)
            assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), (use, lines)
            assert any(name in lines[0] for name in action.option_strings), (use, lines)
            assert lines[0].isprintable(), use
            tried += 1
    assert tried > 2 * len(flags) - 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_both_spellings_and_says_what_it_is(parser_of, script):
    for action in parser_of(script)._actions:
        assert action.help, action.option_strings
        for name in action.option_strings:
            if name.startswith("--"):
                bare = name[2:]
                assert {"--" + bare.replace("-", "_"), "--" + bare.replace("_", "-")} <= set(action.option_strings)
