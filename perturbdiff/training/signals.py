"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) ask a run to save and stop after the step it is in."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
ECHO = 3.0  # seconds in which a launcher may pass on a Ctrl-C that the terminal sent to all processes already


class Stopped(SystemExit):
    """A signal ended a run that had nothing to save; the process ends with status 0 if nobody catches it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__()
        self.signal_name = signal_name


class StopRequest:
    """A context in which the first signal sets `signal_name`; a second SIGINT, seconds later, interrupts at once.

    One that is entered within another takes over what that was asked. With `at_once`, for when there is nothing to
    save, the first SIGTERM or SIGUSR1 raises `Stopped` and the first SIGINT KeyboardInterrupt.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal_name: str | None = None
        self._at_once, self._since = at_once, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for name in SIGNALS:
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._note)
        asked = [outer for outer in self._outer() if outer.signal_name is not None]
        if asked and self.signal_name is None:
            self.signal_name, self._since = asked[0].signal_name, asked[0]._since
            if self._at_once:
                self.__exit__()
                self._end()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _outer(self) -> list[StopRequest]:
        of = [getattr(handler, "__self__", None) for handler in self._previous.values()]
        return [outer for outer in of if isinstance(outer, StopRequest)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            if self._at_once:
                self._end()
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            raise KeyboardInterrupt

    def _end(self) -> None:
        assert self.signal_name is not None, "a signal was noted"
        raise KeyboardInterrupt if self.signal_name == "SIGINT" else Stopped(self.signal_name)
