"""A small Hub on loopback: real HTTP, scripted faults, and a record of what was asked.

It speaks the parts of the Hub's protocol that a model's files are fetched with: the listing with sizes and
hashes, and the files, whole or from a byte on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_thisMustNeverBeSeen"
SHARD = bytes(range(256)) * 1000
FILES = {
    "README.md": b"# not needed",
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 2048}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": SHARD,
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"not needed",
}
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Asked:
    """One request: its path, and the bytes from where on (None: all of them)."""

    path: str
    start: int | None
    authorization: str | None


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


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: a client that hangs up in mid-answer is what some tests are about."""


class FakeHub:
    """A Hub with one repository, `org/model`; use it as a context manager."""

    repository = "org/model"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.claimed_sizes: dict[str, int] = {}
        self.sent = 0
        """Bytes of all answers."""
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> FakeHub:
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
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def commit(self) -> str:
        """The commit: it changes when the files do."""
        content = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(content).hexdigest()

    def fault(self, part: str, **what: object) -> None:
        self.faults.append(Fault(part, **what))  # type: ignore[arg-type]

    def asked_for(self, part: str) -> list[Asked]:
        return [one for one in self.asked if part in one.path]

    def listing(self) -> dict[str, object]:
        return {
            "id": self.repository,
            "sha": self.commit,
            "siblings": [*map(self._sibling, sorted(self.files))],
        }

    def _sibling(self, name: str) -> dict[str, object]:
        data = self.files[name]
        size = self.claimed_sizes.get(name, len(data))
        entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": git_blob(data)}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return entry

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else None
                end = int(asked[2]) + 1 if asked and asked[2] else None
                hub.asked.append(Asked(path, start, self.headers.get("Authorization")))
                fault = hub._next_fault(path)
                if fault and fault.status:
                    self._answer(fault.status, b"{}", fault.headers)
                elif re.fullmatch(rf"/api/models/{hub.repository}(/revision/(main|{hub.commit}|v1))?", path):
                    self._answer(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
                elif match := re.fullmatch(rf"/{hub.repository}/resolve/{hub.commit}/(.+)", path):
                    self._file(hub.files.get(match[1]), start, end, fault)
                else:
                    self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def _file(self, data: bytes | None, start: int | None, end: int | None, fault: Fault | None) -> None:
                if data is None:
                    self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
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
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                hub.sent += len(body)
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


def git_blob(data: bytes) -> str:
    """Return the name that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """Yield an address on loopback that refuses connections."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets it, and it answers nobody
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
