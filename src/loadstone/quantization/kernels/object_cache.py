"""Keeps compiled kernels on disk, so that a process after the first starts without compiling.

A file is a SHA-256 of the rest and then machine code; one that is damaged is made again. Where nothing can be
written, every process compiles for itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from loadstone.folders import cache_folder
from loadstone.telemetry import emit

_DIGEST = hashlib.sha256().digest_size


def cached_object(name: str, facts: Sequence[str], make: Callable[[], bytes]) -> bytes:
    """Return the machine code called `name`, kept or made now by `make`.

    `facts` are what it depends on besides the sources beside this file: the compiler's version, the processor.
    """
    file = cache_folder() / "kernels" / f"{name}-{_key(facts)}.o"
    code = _read(file)
    if code is None:
        code = make()
        _keep(file, code)
    return code


def _key(facts: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(facts).encode())
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), here.parent / "codes.py"]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _read(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == content[:_DIGEST] else None


def _keep(file: Path, code: bytes) -> None:
    beside = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(beside, file)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        emit("kernels.not_kept", file=str(file), reason=str(error))
