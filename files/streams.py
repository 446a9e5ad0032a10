"""stdout and stderr: whole lines, written at once, and errors that name the stream; signals."""

import array
import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, NoReturn

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
        _give_up(sys.stdout)
        raise FileError(f"stdout: {reason_of(error)}") from error


def fail(message: str, exit_code: int) -> int:
    """Say what failed, on stderr; returns the exit code."""
    write_err(f"error: {message}")
    return exit_code


def run_command(
    work: Callable[[], None],
    *bad_input: type[Exception],
    fail: Callable[[str, int], int] = fail,
) -> int:
    """Do a command's work; returns 0, or says in one line what failed and returns its exit code: 2
    for `bad_input` and for what the system refuses, 130 for Ctrl-C. `fail` is what says it."""
    set_stdout(errors="backslashreplace")
    try:
        work()
    except bad_input as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OSError as error:
        return fail(reason_of(error), 2)
    return 0


def read_stdin() -> str:
    """All of stdin, with surrogates for bytes that are no UTF-8. Raises FileError when it cannot be
    read, or is empty."""
    try:
        content = sys.stdin.buffer.read()
    except (OSError, ValueError, AttributeError) as error:  # the caller has closed it
        raise FileError(f"stdin: {reason_of(error)}") from error
    if not content:
        raise FileError("stdin is empty")
    return content.decode("utf-8", "surrogateescape")


def waits_on_stdin() -> bool:
    """Whether a pipe or a file at stdin has something to read; False where no system call says."""
    try:
        import fcntl
        import termios

        size = array.array("i", [0])
        fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, size)
        return size[0] > 0 and not sys.stdin.isatty()
    except (ImportError, OSError, ValueError, AttributeError):
        return False


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The nearest of the known words, for the error of another one; empty where none is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def reason_of(error: Exception) -> str:
    """What the system says of an error, and of which file where that is known, in one line."""
    what = getattr(error, "strerror", None) or str(error) or repr(error)
    name = getattr(error, "filename", None)
    return one_line(what if name is None else f"{name}: {what}")


def ending_signals() -> list[signal.Signals]:
    """The signals that end a process: SIGTERM, and SIGHUP of a closed terminal, but not those that
    it is to ignore, as after nohup."""
    kinds = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    return [kind for kind in kinds if kind and signal.getsignal(kind) is not signal.SIG_IGN]


def exit_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as an error does, so that nothing half written is
    left."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for kind in ending_signals():
        signal.signal(kind, stop)


def report_ctrl_c_in_a_line() -> None:
    """Have Ctrl-C that nothing catches end in a line; other errors are shown as Python does."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        write_err("error: interrupted")
        os._exit(130)  # Python itself would now end by the signal, and without this exit code

    sys.excepthook = report


def write_err(line: str) -> None:
    """Print a line to stderr, if it is open; with None for a file, `print` would take stdout."""
    try:
        if sys.stderr is not None:
            print(one_line(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _give_up(sys.stderr)


def _give_up(stream: Any) -> None:
    """Have a stream that cannot be written take all: Python would try again at exit, and end with
    another exit code. One that is no file does not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
