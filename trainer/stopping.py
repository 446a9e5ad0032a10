"""What Ctrl-C, SIGTERM and a closed terminal do: they end a command, and leave its files whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Self

from files.streams import ending_signals
from hardware import processes


class Interrupted(BaseException):
    """Ctrl-C or another signal, after the run was saved; holds the message and its number. As with
    KeyboardInterrupt, nobody who expects errors of any kind takes it for one."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise Interrupted, so that nothing half written is left, as after
    Ctrl-C. Not in a group of processes, which torchrun ends, nor in a thread, where Python takes no
    signals."""
    if processes.in_group() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise Interrupted("terminated", number)

    former = {kind: signal.signal(kind, stop) for kind in ending_signals()}
    try:
        yield
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)


class StopSignals:
    """Keeps Ctrl-C, SIGTERM and SIGHUP until the loop asks for them; a second one ends at once.

    Under torchrun a second one is ignored. torchrun hands on each signal that it gets, so one
    Ctrl-C comes twice. It also ends the other processes when one fails, which must not cut off
    their messages.
    """

    def __enter__(self) -> Self:
        self.received = 0
        kinds = (signal.SIGINT, *ending_signals())
        self.former = {kind: signal.signal(kind, self._keep) for kind in kinds}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and processes.world_size() > 1:
            return
        for kind, handler in self.former.items():
            signal.signal(kind, handler)

    def _keep(self, number: int, _: object) -> None:
        if self.received and processes.world_size() == 1:
            raise KeyboardInterrupt
        self.received = number
