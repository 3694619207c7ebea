"""Entry points of the scripts: parse the command line, do the job, end with a status that says how it went."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from utils.system.errors import RunError, Stopped, UsageError, first_line
from utils.system.options import parse, parse_training
from utils.system.settings import S


def train(doc: str, **recipe: object) -> NoReturn:
    """The whole of a training script. doc: its docstring; recipe: its own defaults."""
    _speak_utf8()
    command = parse_training(doc, recipe, sys.argv[1:])
    guarded(lambda: _named("utils.training.loop:run")(command))


def main(job: str, cls: type[S], doc: str) -> NoReturn:
    """The whole of another script. job: `module:function`, called with the settings, of class cls."""
    _speak_utf8()
    settings = parse(cls, doc, sys.argv[1:])
    guarded(lambda: _named(job)(settings))


def _speak_utf8() -> None:
    """What a console's own encoding lacks, as in names of files, is said in UTF-8, and what that lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # one of Python's own
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _named(job: str) -> Callable:
    """The function that `module:function` names, imported now, since it loads torch: --help and errors need none."""
    module, _, function = job.partition(":")
    return getattr(importlib.import_module(module), function)


def guarded(job: Callable[[], None]) -> NoReturn:
    """Run `job` and exit: 0 done, 1 the run failed, 2 wrong use or input, 128 + signal stopped by a signal."""
    prog = os.path.basename(sys.argv[0])

    def end(status: int, line: str) -> NoReturn:
        with suppress(OSError):  # the terminal may be gone
            print(f"{prog}: {line}".replace("\n", r"\n"), file=sys.stderr)  # a path may hold anything
        sys.exit(status)

    try:
        from utils.system.distributed import started

        with started():
            job()
    except UsageError as error:
        end(2, f"error: {error}")
    except RunError as error:
        end(1, f"failed: {error}")
    except OSError as error:  # a full disk, a folder that vanished
        cause = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        end(1, f"failed: {cause}; what was saved before is intact")
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            end(1, f"failed: torch.compile: {first_line(error)}; --resume --compile False continues")
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        end(1, "failed: out of memory; lower --batch-size, --test-batch-size or --width")
    except Stopped as stop:
        signum, line = stop.args
        end(128 + signum, line)
    except KeyboardInterrupt:
        end(128 + signal.SIGINT, "interrupted")
    sys.exit(0)
