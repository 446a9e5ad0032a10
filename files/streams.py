"""stdout and stderr: whole lines, written at once, and errors that name the stream."""

import contextlib
import os
import sys

from files import FileError


def one_line(text: str) -> str:
    """The text with escapes for what is no printable character, such as a line break in a name."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def reason_of(error: OSError) -> str:
    """What failed, in one line, with the file's name where the system gave one."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def write_out(text: str) -> None:
    """Print to stdout at once. Raises FileError when that cannot be written: its disk is full, or
    its reader has gone (`... | head`)."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FileError(f"stdout: {error.strerror}") from error


def write_err(line: str) -> None:
    """Print a line to stderr, if it is open; with None for a file, `print` would take stdout."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)
