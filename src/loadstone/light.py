"""Models without their original weights: found by name when only their quantised weights were kept, and made so.

Only what was fetched is removed: files in a folder of the user's are not ours.
"""

from __future__ import annotations

from pathlib import Path

from .checkpoint import ModelSpec
from .config import LoadConfig
from .errors import ConfigurationError
from .quantization import AUTO, find_strategy
from .sources import COMPANIONS, ModelFiles, fetched_weights
from .store import Entry, Store

OWN_FORM = "own"  # in place of a strategy: what was quantised already, and nobody wanted otherwise


def light_files(wish: LoadConfig, store: Store | None) -> ModelFiles | None:
    """Return the files of the wished model, without weights, when these are in the store for the wished strategy."""
    if store is None or wish.strategy == AUTO:
        return None
    strategy = _name_of(wish)
    names = (strategy,) if wish.says("quantization") else (OWN_FORM, strategy)
    found = next((one for name in names if (one := store.find_light(wish.base_model, wish.revision, name))), None)
    return None if found is None else ModelFiles(found.name, Path(found.folder), (), found.origin, found.revision)


def _name_of(wish: LoadConfig) -> str:
    """Return a name for how a model is to be kept, which another wish for the same has too."""
    alone = f" but {', '.join(sorted(wish.left_alone))}" if wish.left_alone else ""
    return f"{find_strategy(wish.strategy).name}{alone}"


def lighten(wish: LoadConfig, store: Store | None, files: ModelFiles, spec: ModelSpec, entry: Entry | None) -> int:
    """Remove a model's original weights, having seen to it that it is found without them; return the bytes freed.

    Raises ConfigurationError for a model whose weights are not to be removed.
    """
    if not files.weights:
        return 0  # they are gone already
    weights = None if files.format == "gguf" else fetched_weights(files)
    if store is None or entry is None or weights is None:
        raise ConfigurationError(
            f"the original weights of {wish.base_model} stay: what is removed is safetensors that were fetched, when "
            "their quantised form is kept",
            hint="Leave out --quantize-only.",
        )
    beside = [files.folder / name for name in COMPANIONS if (files.folder / name).is_file()]
    is_own = spec.quantized is not None and not wish.says("quantization")
    strategy = OWN_FORM if is_own else _name_of(wish)
    store.light.keep(
        (wish.base_model, wish.revision, strategy), spec, beside, entry.manifest.key, entry.manifest.source
    )
    return weights.remove()
