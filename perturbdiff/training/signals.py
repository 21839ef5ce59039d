"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) ask a run to save and stop after the step it is in."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
ECHO = 3.0  # seconds in which a launcher may pass on a Ctrl-C that the terminal sent to all processes already


class StopRequest:
    """A context in which the first signal sets `signal_name`; a second SIGINT, seconds later, interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for name in SIGNALS:
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            raise KeyboardInterrupt
