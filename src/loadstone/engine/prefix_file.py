"""What the KV cache remembers, as a file: read back at the next start, a long system prompt need not be read again.

A safetensors file with the tree's blocks, those used last first and parents before children. Its metadata say of which
decoder they are; keys and values of another one would be noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loadstone.errors import GenerationError
from loadstone.model import KVCache
from loadstone.quantization.kernels.words import KV_BLOCK

from .prefix_cache import NOWHERE, PrefixCache

FORMAT = "loadstone-prefixes-1"
PARTS = ("tokens", "parents", "keys", "values")
NOTHING = -1  # in place of a token, or of a parent
WRITE_ANEW = "Write it anew with save_prefix_cache."


def write_prefixes(file: Path, prefixes: PrefixCache, cache: KVCache, identity: str) -> int:
    """Write what is remembered; return how many tokens that are. The file is there whole, or as it was before."""
    nodes = [*prefixes.nodes()]
    numbers = {id(node): number for number, node in enumerate(nodes)}
    tokens = torch.full((len(nodes), KV_BLOCK), NOTHING, dtype=torch.int64)
    for number, node in enumerate(nodes):
        tokens[number, : len(node.tokens)] = torch.tensor(node.tokens)
    blocks = torch.tensor([node.block for node in nodes], dtype=torch.int64)
    tensors = {
        "tokens": tokens,
        "parents": torch.tensor([numbers.get(id(node.parent), NOTHING) for node in nodes], dtype=torch.int64),
        "keys": _blocks_of(cache.keys).index_select(2, blocks.to(cache.keys.device)).cpu().contiguous(),
        "values": _blocks_of(cache.values).index_select(2, blocks.to(cache.values.device)).cpu().contiguous(),
    }
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, beside, {"format": FORMAT, "decoder": identity})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return sum(len(node.tokens) for node in nodes)


def read_prefixes(file: Path, prefixes: PrefixCache, cache: KVCache, identity: str) -> int:
    """Remember what a file says, as much as there is room for; return how many tokens that are.

    Raises GenerationError where it is of another model, or no such file at all.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise _refused(file, "it has another format", WRITE_ANEW)
            if about.get("decoder") != identity:
                raise _refused(file, "it is of another model, quantization or device", "Each model needs its own file.")
            parts = [opened.get_slice(name) for name in PARTS]
            shapes = [tuple(part.get_shape()) for part in parts]
            count = max(shapes[1], default=0)  # of what should have one dimension
            _check(file, shapes == _shapes(cache, count))
            count = min(count, cache.free_blocks)
            tokens, parents = (part[:count] for part in parts[:2])
            keys, values = (part[:, :, :count] for part in parts[2:])
    except (SafetensorError, KeyError) as error:
        raise _refused(file, f"it cannot be read ({error})", WRITE_ANEW) from error
    types = [one.dtype for one in (tokens, parents, keys, values)]
    _check(file, types == [torch.int64, torch.int64, cache.keys.dtype, cache.values.dtype])
    _check(file, bool(((parents >= NOTHING) & (parents < torch.arange(count))).all()))
    said = [tuple(token for token in row if token != NOTHING) for row in tokens.tolist()]
    read = 0
    for number, block in enumerate(prefixes.adopt(said, parents.tolist())):
        if block != NOWHERE:
            _blocks_of(cache.keys)[:, :, block] = keys[:, :, number]
            _blocks_of(cache.values)[:, :, block] = values[:, :, number]
            read += len(said[number])
    return read


def _blocks_of(kept: torch.Tensor) -> torch.Tensor:
    """Return keys or values as layers × kv_heads × blocks × KV_BLOCK × head_size."""
    return kept.view(*kept.shape[:2], -1, KV_BLOCK, kept.shape[3])


def _shapes(cache: KVCache, count: int) -> list[tuple[int, ...]]:
    """Return the shapes that the PARTS of `count` blocks have."""
    layers, heads, _, *block = _blocks_of(cache.keys).shape
    kept = (layers, heads, count, *block)
    return [(count, KV_BLOCK), (count,), kept, kept]


def _check(file: Path, is_sound: bool) -> None:
    if not is_sound:
        raise _refused(file, "its parts do not fit one another, or this cache", WRITE_ANEW)


def _refused(file: Path, reason: str, hint: str) -> GenerationError:
    return GenerationError(f"{file}: {reason}.", hint=hint)
