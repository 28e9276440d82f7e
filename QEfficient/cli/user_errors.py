"""What goes wrong on the command line, as one sentence and an exit code."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator

from QEfficient.errors import QEfficientError

#: Exit codes: 1 is the answer "no" of a command that checks something, 2 a mistake, 130 Ctrl-C (128 + SIGINT).
USER_ERROR, INTERRUPTED = 2, 130


@contextlib.contextmanager
def user_errors(debug: bool = False) -> Iterator[None]:
    """Turns errors a user can cause into one line on stderr; ``debug`` prints the traceback before it.

    Anything else passes: it is a bug, and its traceback is what a report needs.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning  # type: ignore[assignment]
            yield
    except QEfficientError as error:
        _end(str(error), USER_ERROR, debug)
    except ModuleNotFoundError as error:
        from QEfficient.cli.installed import EXPORT, requirements

        package = (error.name or "").partition(".")[0]
        if package not in {name.replace("-", "_") for name in requirements(EXPORT)}:
            raise
        _end(f"this needs {package}, which is not installed: pip install 'qefficient[{EXPORT}]'.", USER_ERROR, debug)
    except KeyboardInterrupt:
        _end("interrupted; what was finished is kept, what was half done is not.", INTERRUPTED, debug)


def _end(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    # Some reasons come from other libraries, in several lines.
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    # Not typer.Exit: the argparse programs of QEfficient.cloud use this too.
    raise SystemExit(code)


def _one_line_warning(message: Warning | str, *place: object) -> None:
    """Prints a warning without the source line that Python adds."""
    print("warning:", " ".join(str(message).splitlines()), file=sys.stderr)
