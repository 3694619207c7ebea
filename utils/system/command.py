"""Runs the job of a script and ends the program with a status that says how it went."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from utils.system.errors import RunError, Stopped, UsageError


def guarded(job: Callable[[], None]) -> NoReturn:
    """Run a job and exit: 0 done, 1 failed, 2 wrong use or input, 128 + N stopped by signal N."""
    try:
        from utils.system.distributed import started

        with started():
            job()
    except UsageError as error:
        end(2, f"error: {error}")
    except RunError as error:
        end(1, f"failed: {error}")
    except OSError as error:  # a full disk, a folder that vanished
        end(1, f"failed: {error}; what was saved before is intact")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        end(1, "failed: out of memory; lower --batch-size, --test-batch-size or --width")
    except Stopped as stop:
        signum, line = stop.args
        end(128 + signum, line)
    except KeyboardInterrupt:
        end(128 + signal.SIGINT, "interrupted")
    sys.exit(0)


def end(status: int, line: str) -> NoReturn:
    """End the program with a line on standard error."""
    with suppress(OSError):  # the terminal may be gone
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
    sys.exit(status)
