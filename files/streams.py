"""stdout and stderr: whole lines, written at once, and errors that name the stream; SIGTERM."""

import contextlib
import os
import signal
import sys
from typing import NoReturn

from files import FileError


def one_line(text: str) -> str:
    """The text with escapes for what is no printable character, such as a line break in a name."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def set_stdout(**options: str) -> None:
    """Set the encoding or the handling of `errors` of stdout, where it has any: the caller may have
    closed it, and a notebook's has none."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(**options)


def write_out(text: str) -> None:
    """Print to stdout at once. Raises FileError when that cannot be written: its disk is full, its
    reader has gone (`... | head`), or it was closed."""
    try:
        print(text, end="", flush=True)
    except (OSError, ValueError) as error:
        # Python would try again at exit, and complain. A stdout that is no file does not.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FileError(f"stdout: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What the system says of an error, and of which file where that is known, in one line."""
    what = getattr(error, "strerror", None) or str(error) or repr(error)
    name = getattr(error, "filename", None)
    return one_line(what if name is None else f"{name}: {what}")


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as an error does, so that nothing half written is left."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def write_err(line: str) -> None:
    """Print a line to stderr, if it is open; with None for a file, `print` would take stdout."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)
