"""Functions that run in a copy of this process, where a new interpreter would import for seconds."""

import os
import sys
import traceback
from collections.abc import Callable


def run_forked(function: Callable[[], object]) -> tuple[int, str]:
    """Run a function that may be killed, end its process or set limits of its own.

    Returns:
        exit status (minus the signal that killed it) and standard error, as of a process that only calls the function.
    """
    reading, writing = os.pipe()  # a file would count for the limits
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            function()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:  # without the end of this process: its fixtures belong to the other
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as errors:
        text = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
