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

from .prefixes import Prefixes

FORMAT = "loadstone-prefixes-1"
NOTHING = -1  # in place of a token, or of a parent


def write_prefixes(file: Path, prefixes: Prefixes, cache: KVCache, identity: str) -> int:
    """Write what is remembered; return how many tokens that are. The file is there whole, or as it was before."""
    nodes = sorted(prefixes.nodes(), key=lambda node: (-node.used, node.depth))
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


def read_prefixes(file: Path, prefixes: Prefixes, cache: KVCache, identity: str) -> int:
    """Remember what a file says, as much as there is room for; return how many tokens that are.

    Raises GenerationError where it is of another model, or no such file at all.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise _refused(file, "it has another format", "Write it anew with save_prefix_cache.")
            if about.get("decoder") != identity:
                raise _refused(file, "it is of another model, quantization or device", "Each model needs its own file.")
            shape = _blocks_of(cache.keys).shape
            slices = {name: opened.get_slice(name) for name in ("keys", "values")}
            tokens, parents = opened.get_tensor("tokens"), opened.get_tensor("parents")
            _check(file, shape, tokens, parents, [tuple(one.get_shape()) for one in slices.values()])
            count = min(len(tokens), cache.free_blocks)
            read = {name: one[:, :, :count] for name, one in slices.items()}
    except (SafetensorError, KeyError) as error:
        raise _refused(file, f"it cannot be read ({error})", "Write it anew with save_prefix_cache.") from error
    said = [tuple(token for token in row if token != NOTHING) for row in tokens[:count].tolist()]
    blocks = prefixes.adopt(said, parents[:count].tolist())
    kept = [number for number, block in enumerate(blocks) if block is not None]
    places = torch.tensor([block for block in blocks if block is not None], dtype=torch.int64)
    for name, target in (("keys", cache.keys), ("values", cache.values)):
        _blocks_of(target)[:, :, places.to(target.device)] = read[name][:, :, kept].to(target.device, target.dtype)
    return sum(len(said[number]) for number in kept)


def _blocks_of(kept: torch.Tensor) -> torch.Tensor:
    """Return keys or values as layers × kv_heads × blocks × KV_BLOCK × head_size."""
    return kept.view(*kept.shape[:2], -1, KV_BLOCK, kept.shape[3])


def _check(
    file: Path, shape: torch.Size, tokens: torch.Tensor, parents: torch.Tensor, shapes: list[tuple[int, ...]]
) -> None:
    """Refuse a file whose parts do not fit one another, or this cache."""
    count = len(parents)
    wanted = (*shape[:2], count, *shape[3:])
    earlier = parents < torch.arange(count)
    is_sound = (
        tokens.shape == (count, KV_BLOCK)
        and tokens.dtype == parents.dtype == torch.int64
        and all(one == wanted for one in shapes)
        and bool((earlier & (parents >= NOTHING)).all())
    )
    if not is_sound:
        raise _refused(file, "its parts do not fit one another", "Write it anew with save_prefix_cache.")


def _refused(file: Path, reason: str, hint: str) -> GenerationError:
    return GenerationError(f"{file}: {reason}.", hint=hint)
