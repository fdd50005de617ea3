"""A small server of files on loopback: real HTTP, scripted faults, and a record of what was asked.

What kind of place it is, and at which paths its files are, is said by those who derive from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


@dataclass(frozen=True)
class Asked:
    """One request: its path, the bytes from where on (None: all of them), its query and its headers in lower case."""

    path: str
    start: int | None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass
class Fault:
    """What happens instead of the right answer, `times` times, to requests whose path contains `part`."""

    part: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    reset_after: int | None = None
    """Send so many bytes, wait for `before_reset`, then reset the connection."""
    before_reset: Callable[[], object] | None = None
    change: Callable[[bytes], bytes] | None = None
    """Serve other content, in all other ways right."""
    ignores_range: bool = False


@dataclass(frozen=True)
class Answer:
    """What a path is answered with: a status with a body, or a file."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    is_file: bool = False


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: a client that hangs up in mid-answer is what some tests are about."""


class FakeServer:
    """Files by name on a port of loopback; use it as a context manager. `secure` has it speak TLS."""

    def __init__(self, files: Mapping[str, bytes], secure: ssl.SSLContext | None = None) -> None:
        self.begin_anew(files)
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self._scheme = "https" if secure else "http"
        if secure:
            self._server.socket = secure.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def begin_anew(self, files: Mapping[str, bytes]) -> None:
        """Have these files, and nothing of what was before."""
        self.files = dict(files)
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.claimed_sizes: dict[str, int] = {}
        self.sent = 0
        """Bytes of all answers."""

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        """Return what is at a path: here, the file of that name."""
        return self.file(path.lstrip("/"))

    def file(self, name: str) -> Answer:
        """Return the answer that a file is, or that it is not there."""
        data = self.files.get(name)
        return (
            Answer(404, headers={"X-Error-Code": "EntryNotFound"}) if data is None else Answer(body=data, is_file=True)
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering; from now on its address refuses connections."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def fault(self, part: str, **what: object) -> None:
        self.faults.append(Fault(part, **what))  # type: ignore[arg-type]

    def asked_for(self, part: str) -> list[Asked]:
        return [one for one in self.asked if part in one.path]

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                path, query = unquote(parts.path), {name: one[0] for name, one in parse_qs(parts.query).items()}
                asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else None
                end = int(asked[2]) + 1 if asked and asked[2] else None
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append(Asked(path, start, query, headers, self.command))
                fault = server._next_fault(f"{path}?{parts.query}")
                if fault and fault.status:
                    self._answer(fault.status, b"{}", fault.headers)
                    return
                answer = server.answer(path, query)
                if answer.is_file:
                    self._file(answer.body, start, end, fault)
                else:
                    self._answer(answer.status, answer.body, answer.headers)

            def _file(self, data: bytes, start: int | None, end: int | None, fault: Fault | None) -> None:
                if fault and fault.change:
                    data = fault.change(data)
                if start is None or (fault and fault.ignores_range):
                    self._answer(200, data, {}, fault)
                elif start >= len(data):
                    self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                else:
                    part = data[start:end]
                    place = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
                    self._answer(206, part, {"Content-Range": place}, fault)

            def _answer(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                server.sent += len(body)
                if fault is None or fault.reset_after is None:
                    self.wfile.write(body)
                    return
                self.wfile.write(body[: fault.reset_after])
                self.wfile.flush()
                if fault.before_reset:
                    fault.before_reset()
                # Lingering for zero seconds makes closing send a reset instead of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                self.rfile = self.wfile = contextlib.nullcontext()  # type: ignore[assignment]

            def finish(self) -> None:
                with contextlib.suppress(OSError, AttributeError):
                    super().finish()

        return Handler

    def _next_fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class FakeFolder(FakeServer):
    """A web server with a folder `/models/tiny/`, and in it the list of checksums of what was there at first."""

    def __init__(self, files: Mapping[str, bytes], **more: Any) -> None:
        super().__init__(files, **more)
        self.files["SHA256SUMS"] = sums(files)

    @property
    def url(self) -> str:
        return f"{self.endpoint}/models/tiny/"

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        folder, _, name = path.rpartition("/")
        return self.file(name) if folder == "/models/tiny" else Answer(404)


class FakeS3(FakeFolder):
    """An object store with a bucket `shelf`, and the same folder in it; who asks is not looked at."""

    url = "s3://shelf/models/tiny"

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        if path.startswith("/shelf/models/tiny/"):
            found = super().answer(path.removeprefix("/shelf"), query)
            if found.status == 200:
                return found
        if "list-type" in query:
            return Answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        return Answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")


@dataclass(frozen=True)
class Place:
    """A server with a model, and the name that the model has there."""

    server: FakeServer
    model: str
    setting: str | None

    def move_to(self, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the setting lead elsewhere; a name that says the address itself stays, and its server stops."""
        if self.setting is None:
            self.server.stop()
        else:
            monkeypatch.setenv(self.setting, endpoint)


def sums(files: Mapping[str, bytes]) -> bytes:
    """Return what `sha256sum *` writes for these files."""
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())).encode()


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """Yield an address on loopback that refuses connections."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets it, and it answers nobody
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
