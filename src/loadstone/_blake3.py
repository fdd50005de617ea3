"""The one place that calls blake3: digests that say whether bytes are the same.

BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) cannot be made to collide on purpose, as checksums can, and reads
two to three times as fast as SHA-256: it keeps up with a disk beside everything else that a load does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from blake3 import blake3


class Digest:
    """The digest of bytes that come in stretches."""

    def __init__(self) -> None:
        self._hasher = blake3()

    def update(self, data: Any) -> None:
        """Take more bytes: `data` is bytes or any buffer."""
        self._hasher.update(data)

    def hex(self) -> str:
        """Return the digest of what came so far, as 64 hex digits."""
        return str(self._hasher.hexdigest())


def digest(data: Any) -> str:
    """Return the digest of `data` (bytes, or any buffer) as 64 hex digits."""
    return str(blake3(data).hexdigest())


def digest_of_all(digests: Iterable[str]) -> str:
    """Return one digest for several, in their order."""
    return digest("\n".join(digests).encode())


def digest_of_facts(facts: Any) -> str:
    """Return the digest of plain values (what JSON can hold), whatever the order of keys."""
    return digest(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode())
