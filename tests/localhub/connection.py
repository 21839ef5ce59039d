"""One connection of the local Hub: a request is read, an answer sent, or what a fault wants in its place."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.localhub.repos import Refused

if TYPE_CHECKING:
    from tests.localhub.server import LocalHub


@dataclass
class Fault:
    """What goes wrong with an operation, and how many times before all is well."""

    times: float = math.inf
    status: int | None = None  # answered instead
    location: str | None = None  # the right answer, but as a redirect to there
    content: bytes | None = None  # the body answered instead of the right one
    cut_after: int | None = None  # bytes before the connection breaks: of the answer, of an upload ("put") those read
    stalls: bool = False  # silence instead of what would come after `cut_after`; if that is None, instead of an answer
    drops: bool = False  # the connection is closed instead of an answer
    done: bool = False  # all this after the operation was carried out, not in its place
    whole: bool = False  # Range is ignored


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    server: str  # "hub", or "cdn", the other origin
    operation: str  # "get" and "head" of files; else the name of a method of the Hub's handler: "commit", "put", ...
    method: str
    path: str  # of the file, or of the API
    range: str | None
    token: str | None
    status: int  # 0 where the connection was broken before an answer


class Broken(Exception):
    """The connection ends here."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def as_json(answer: object, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(answer, default=str).encode())


class Server(ThreadingHTTPServer):
    """One origin, on a port of this machine."""

    def __init__(self, hub: LocalHub, name: str, port: int, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.hub, self.name = hub, name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.stopped = threading.Event()
        self.connections: set[socket.socket] = set()

    def stop(self) -> None:
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the other side may have closed it
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients are killed in tests
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """All but what is answered, which is `operate`'s."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def operate(self) -> Answer:
        """The answer; sets `operation`, and `shown` if the path of the log is not that of the request."""
        raise NotImplementedError

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.unread = int(self.headers.get("Content-Length", 0))
        self.fault, self.shown, self.operation = Fault(), unquote(self.url.path), "unknown"
        try:
            answer = self.operate()
        except Refused as refused:
            answer = as_json({"error": refused.message, "errors": [{"message": refused.message}]}, refused.status)
            line = " ".join(refused.message.split()).encode("ascii", "replace").decode()  # as headers must be
            answer.headers |= {"X-Error-Message": line, **refused.headers}
            answer.headers |= {"X-Error-Code": refused.code} if refused.code else {}
        except Broken:
            self._log(0)
            self._hang_up()
            return
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def meet(self, what: str) -> None:
        """The fault of this operation is known from here on; it ends here unless it is to be done first."""
        self.fault = self.hub.fault_of(self.operation, what)
        if not self.fault.done:
            self.fail()

    def fail(self) -> None:
        """End here, where the fault has no use for the right answer."""
        if self.fault.status is not None:
            raise Refused(self.fault.status, None, "out of order")
        if self.fault.drops or (self.fault.stalls and self.fault.cut_after is None):
            raise Broken

    def body(self, limit: int | None = None) -> bytes:
        """What is not yet read of the request's body, or so many bytes of it."""
        body = self.rfile.read(self.unread if limit is None else min(limit, self.unread))
        self.unread -= len(body)
        return body

    def _send(self, answer: Answer) -> None:
        self.body()  # what was not wanted stands between this answer and the next request
        self._log(answer.status)
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body[: self.fault.cut_after])
        if self.fault.cut_after is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        if self.fault.stalls:
            self.server.stopped.wait()
        self.close_connection = True
        with contextlib.suppress(OSError):  # the other side may have closed it
            self.connection.shutdown(socket.SHUT_RDWR)

    def _log(self, status: int) -> None:
        asked = self.headers.get("Range")
        line = Request(self.server.name, self.operation, self.command, self.shown, asked, self.token, status)
        with self.hub.lock:
            self.hub.log.append(line)
