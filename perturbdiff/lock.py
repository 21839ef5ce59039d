"""One process at a time in a folder, over hosts: a file that says who it is and that it lives.

A lock of the operating system would end with its process, but not where the host fails with it, and some network file
systems have none. So the holder touches the file every few seconds. Of a process of this machine one can ask whether it
is there; any other is dead once its file has not changed for `SILENCE` seconds, by the clock of the one that waits.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perturbdiff.files import printable

BEAT = 10.0  # seconds between two touches
SILENCE = 100.0  # seconds without one until a holder counts as dead


class Lock:
    """Held from `held` on; `check` it before what another process must not do at the same time."""

    def __init__(self, path: Path, doing: str) -> None:
        self.path, self._doing = path, doing
        self._content = {**_this_process(), "token": secrets.token_hex(8)}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def check(self) -> None:
        """Raises FileExistsError where another process holds the lock, since this one was taken for dead."""
        holder = _read(self.path)
        if holder is not None and holder != self._content:
            raise FileExistsError(f"{_named(holder)} is {self._doing} too: it took this one for dead ({self.path}).")

    def take(self) -> None:
        """Raises FileExistsError where somebody has it who lives."""
        while not self._create():
            if (holder := _read(self.path)) is not None and not _is_dead(self.path, holder):
                raise FileExistsError(
                    f"another process is {self._doing}: {_named(holder)}, by {self.path}. Wait for its end, or stop it "
                    "and give the same command again."
                )
            if holder is not None:
                self._put_away(holder)
            elif self.path.is_symlink():
                raise FileExistsError(f"{self.path} is a link to nothing; remove it.")
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        with suppress(OSError):  # the work is done; without its process the file means nothing
            if _read(self.path) == self._content:
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._content, file)
        except OSError:  # no room: others would wait for nobody
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _put_away(self, holder: dict[str, Any]) -> None:
        # Of several that found it dead one gets it; another may by then have a new one in its hands.
        away = self.path.with_name(f"{self.path.name}.{self._content['token']}")
        with suppress(FileNotFoundError):
            self.path.rename(away)
            if _read(away) == holder:
                away.unlink()
            else:
                away.rename(self.path)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the next may reach it
                if _read(self.path) == self._content:
                    os.utime(self.path)


@contextmanager
def alone(path: Path, doing: str) -> Iterator[Lock]:
    """Keep others away by the file `path`, in a folder that is there; `doing` is what a message says this one does.

    Raises FileExistsError where another process holds it, at once or when it has shown that it lives.
    """
    lock = Lock(path, doing)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def _this_process() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "job": job, **_born(os.getpid())}


def _machine() -> str:
    # Process ids mean the same in one boot of one machine, and within one container.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _born(pid: int) -> dict[str, Any]:
    # When a process began, where /proc says it: its number may have been given to another.
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {"began": None if fields[0] in "ZX" else fields[19]}
    return {"began": None}


def _is_dead(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("machine") == _machine() and isinstance(holder.get("pid"), int):
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return bool(_born(holder["pid"])["began"] != holder.get("began"))
    print(f"waiting     {path} is of {_named(holder)}; until it is {SILENCE:g} s silent", file=sys.stderr, flush=True)
    seen, since = _touched(path), time.monotonic()
    while time.monotonic() - since < SILENCE:
        time.sleep(min(1.0, SILENCE / 5))
        if (now := _touched(path)) != seen:
            return now is None
    return True


def _touched(path: Path) -> tuple[int, int] | None:
    # Opened, not only looked at: NFS then asks its server.
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds it, None if nobody; nothing is known of one that is being written, or was left half-written."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = {}
    return content if isinstance(content, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    said = [("host", holder.get("host")), ("process", holder.get("pid")), ("job", holder.get("job"))]
    known = ", ".join(f"{name} {printable(str(value))[:80]}" for name, value in said if value is not None)
    return known or "a process that has not said its name"
