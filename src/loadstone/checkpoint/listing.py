"""A list of a checkpoint's tensors that stands for its weights, where these are not kept.

It says what the weights' headers said, and the digest of each tensor, so that their quantised form is found in the
store. Knows nothing of the store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadstone.errors import CheckpointError

from .coding import Coding
from .config_json import read_json
from .spec import ModelSpec, TensorInfo

LISTING = "tensors.json"


def write_listing(spec: ModelSpec, digests: Mapping[str, str], folder: Path) -> None:
    """Write into `folder` what the headers say of each tensor of `spec`, and its digest."""
    tensors = {
        name: {
            "shape": tensor.shape, "dtype": tensor.dtype, "nbytes": tensor.nbytes, "digest": digests[name],
            **({} if tensor.coding is None else {"coding": asdict(tensor.coding)}),
        }
        for name, tensor in spec.tensors.items()
    }  # fmt: skip
    (folder / LISTING).write_text(json.dumps({"tensors": tensors}), encoding="utf-8")


def read_listing(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the list in `folder` names; raise CheckpointError when it cannot be read."""
    file = folder / LISTING
    try:
        return {
            str(name): TensorInfo(
                str(name), tuple(int(one) for one in entry["shape"]), str(entry["dtype"]), file, 0,
                int(entry["nbytes"]), str(name), str(entry["digest"]), _coding(entry.get("coding")),
            )
            for name, entry in read_json(file)["tensors"].items()
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"it is not a list of tensors: {error}", file=file, hint="Pull the model again."
        ) from error


def _coding(said: dict[str, Any] | None) -> Coding | None:
    if said is None:
        return None
    rows, columns = said["block"]
    return Coding(**{**said, "block": (int(rows), int(columns))})
