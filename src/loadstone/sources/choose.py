"""Which of a model's files are needed: one rule for folders and for hubs.

Knows names, and the index of a sharded checkpoint. Does not know where the files lie or what is inside the
weights. Names come from strangers (an index, a hub's listing), so one that leaves its folder is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable

from loadstone.errors import CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    CONFIG,
    GENERATION,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files beside the weights that a model is made ready from, where they exist."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PREFERRED_GGUF = "Q4_K_M"
LARGEST_INDEX = 64 * 2**20
"""Bytes; the index of a model with a million tensors is smaller."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)")


def choose_weights(
    names: Collection[str],
    *,
    place: str,
    read_index: Callable[[], bytes],
    variant: str | None = None,
    prefers_q4_k_m: bool = False,
) -> tuple[str, ...]:
    """Return the names of the weights among `names`: all safetensors shards, or one GGUF file.

    `place` is where they lie, for errors. `read_index` returns the bytes of model.safetensors.index.json and
    is called only when that is what says the shards. `variant` picks a GGUF file by the end of its name
    ("Q4_K_M"). Raises CheckpointError when nothing can be chosen, or what is chosen is not all there.
    """
    beside = [name for name in names if "/" not in name]
    if variant is None:
        if SINGLE in beside:
            return (SINGLE,)
        if INDEX in beside:
            return _present(shards_of(read_index(), f"{place}/{INDEX}"), beside, place)
        loose = sorted(name for name in beside if name.endswith(".safetensors"))
        if loose:
            return _present(loose + _missing_numbers(loose), beside, place)
    return (_choose_gguf(beside, place, variant, prefers_q4_k_m),)


def shards_of(index: bytes, file: str) -> tuple[str, ...]:
    """Return the shard names that an index lists, sorted; raise CheckpointError when it is no index."""
    if len(index) > LARGEST_INDEX:
        raise CheckpointError(f"the index is larger than {LARGEST_INDEX} bytes", file=file)
    try:
        content = json.loads(index)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the index is not JSON: {error}", file=file) from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(one, str) for one in shards.values()):
        raise CheckpointError("the index has no `weight_map` from tensor names to file names", file=file)
    names = sorted(set(shards.values()))
    for name in names:
        check_plain_name(name, file)
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"the index points to {name!r}, which is not a .safetensors file"
                + (" but a pickle, and pickles are never opened" if name.endswith(PICKLES) else ""),
                file=file,
            )
    return tuple(names)


def check_plain_name(name: str, file: str, what: str = "the index points to") -> None:
    """Raise CheckpointError unless `name` names a file that lies right in the folder of `file`, which says it."""
    if not name or name in (".", "..") or re.search(r"[/\\:\x00-\x1f]", name):
        raise CheckpointError(
            f"{what} {name!r}; weights must lie in the folder itself",
            file=file,
            hint="Do not trust this checkpoint before you know why.",
        )


def refuse_pickles(names: Iterable[str], place: str) -> None:
    """Raise CheckpointError when pickled weights are among `names`; for callers that found nothing better."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"only pickled weights are there ({_few(pickles)}); a pickle is never opened, because opening one"
            " runs whatever code is in it",
            file=place,
            hint="Take a repository with .safetensors or .gguf files, or convert these where you trust them:"
            " load them with torch, then `safetensors.torch.save_file`.",
        )


def _choose_gguf(names: list[str], place: str, variant: str | None, prefers_q4_k_m: bool) -> str:
    # mmproj files are vision towers that lie beside a language model; alone they answer nothing.
    files = sorted(name for name in names if name.endswith(".gguf") and not name.lower().startswith("mmproj"))
    whole = [name for name in files if not _SHARD.fullmatch(name)]
    wished = variant or (PREFERRED_GGUF if prefers_q4_k_m and len(whole) > 1 else None)
    found = [name for name in whole if wished is None or _is_variant(name, wished)]
    if len(found) == 1:
        return found[0]
    if variant is None and not files:
        refuse_pickles(names, place)
        raise CheckpointError("no weights are there: neither .safetensors nor .gguf files", file=place)
    if not whole:
        raise CheckpointError(
            f"the GGUF weights are split over several files ({_few(files)}), which is not read" if files
            else f"no GGUF file is there to be {variant!r}",
            file=place,
            hint="Join them with llama.cpp's gguf-split --merge." if files else None,
        )  # fmt: skip
    raise CheckpointError(
        f"{'several' if found or variant is None else 'no'} GGUF files"
        f"{f' are {variant!r}' if variant else ' are there'}; the choice is: {', '.join(whole)}",
        file=place,
        hint="Name one of them: its path, or for a Hub id `org/name:Q4_K_M`.",
    )


def _is_variant(name: str, variant: str) -> bool:
    stem = name.removesuffix(".gguf").lower()
    wished = variant.lower().removesuffix(".gguf")
    return stem == wished or bool(re.search(rf"[-._]{re.escape(wished)}$", stem))


def _present(wanted: Iterable[str], names: Collection[str], place: str) -> tuple[str, ...]:
    wanted = sorted(set(wanted))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} shards missing: {_few(missing)}",
            file=place,
            hint="Fetch the missing files again; the others can stay.",
        )
    return tuple(wanted)


def _missing_numbers(names: list[str]) -> list[str]:
    """Return the shards that the numbers in `…-00001-of-00004.safetensors` promise and `names` lacks."""
    missing = []
    for match in filter(None, map(_SHARD.fullmatch, names)):
        stem, _, total, suffix = match.groups()
        # A made-up "of 99999" must not make a list of that length for each file of the folder.
        for number in range(1, min(int(total), 1000) + 1):
            name = f"{stem}-{number:05d}-of-{total}{suffix}"
            if name not in names and name not in missing:
                missing.append(name)
    return missing


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
