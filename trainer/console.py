"""What a command says: its log on stdout, errors in one line on stderr, and its exit code."""

from collections.abc import Callable, Iterable

import hardware
from data import DataError
from files import FileError
from files.streams import one_line, run_command, write_err, write_out
from hardware import processes
from trainer.settings import ConfigError
from trainer.stopping import Interrupted, terminable


class TrainingError(ValueError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


BAD_INPUT = (
    ConfigError, DataError, FileError, TrainingError, hardware.DeviceError, processes.GroupError,
    FloatingPointError,  # of a model that cannot write
)  # fmt: skip


def say(*lines: str) -> None:
    """Print lines to the log, each whole and at once; of several processes the main one does."""
    for line in lines if processes.is_main_process() else ():
        write_out(one_line(line) + "\n")


def indent(lines: Iterable[str]) -> list[str]:
    """The lines of a section of the log."""
    return [f"   {line}".rstrip() for line in lines]


def exit_code_of(work: Callable[[], None], saves_memory: str = "") -> int:
    """Do a command's work; returns 0, or says in one line what failed and returns its exit code.

    `saves_memory` is the advice where memory does not suffice.
    """

    def terminably() -> None:
        with terminable():
            work()

    try:
        return run_command(terminably, *BAD_INPUT, fail=fail)
    except (MemoryError, RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is the second
        if processes.is_connection_lost(error):
            return fail("lost another process; RESUME=True goes on from what was saved", 1)
        if not hardware.is_out_of_memory(error):
            raise
        return fail("; ".join(filter(None, ("not enough memory", saves_memory))), 2)
    except Interrupted as stop:
        message, number = stop.args
        return fail(message, 128 + number)


def fail(message: str, exit_code: int) -> int:
    """Say what failed, on stderr; returns the exit code."""
    number = f" (process {processes.rank()})" if processes.world_size() > 1 else ""
    write_err(f"error{number}: {message}")
    return exit_code
