"""Models of which only the quantised weights are kept: everything else of them, by the name they are asked for.

    light/ID/       config.json, tokenizer and the rest, tensors.json in place of the weights, light.json

The quantised weights are an entry of the store like any other; when that is gone, so is the use of this.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from loadstone._blake3 import digest_of_facts
from loadstone.checkpoint.listing import write_listing
from loadstone.checkpoint.spec import ModelSpec

ABOUT = "light.json"


@dataclass(frozen=True)
class LightModel:
    """A model without its original weights: where its other files are, and which entry has its quantised ones."""

    model: str
    wished_revision: str | None
    strategy: str
    name: str
    origin: str
    revision: str | None
    key: str
    folder: str


class LightModels:
    """The light models in a store's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, model: str, revision: str | None, strategy: str) -> LightModel | None:
        """Return the light model that was kept for this name, revision and strategy."""
        folder = self._place(model, revision, strategy)
        try:
            return LightModel(**json.loads((folder / ABOUT).read_bytes()), folder=str(folder))
        except (OSError, ValueError, TypeError):  # none, or half of one: the model is fetched again
            return None

    def keep(
        self, wish: tuple[str, str | None, str], spec: ModelSpec, files: Iterable[Path], key: str,
        digests: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Keep `files` (all but the weights) and the list of tensors for `wish`: name, revision, strategy.

        Raises OSError when they cannot be written; nothing remains then.
        """
        place = self._place(*wish)
        beside = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
        beside.mkdir(parents=True)
        try:
            for file in files:
                shutil.copyfile(file, beside / file.name)
            write_listing(spec, digests, beside)
            about = asdict(LightModel(*wish, spec.name, spec.origin, spec.revision, key, ""))
            del about["folder"]
            (beside / ABOUT).write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            os.rename(beside, place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def forget_without(self, keys: Iterable[str]) -> None:
        """Remove the models whose entry is not among `keys`."""
        kept = set(keys)
        for about in self.folder.glob(f"*/{ABOUT}"):
            try:
                key = json.loads(about.read_bytes()).get("key")
            except (OSError, ValueError, AttributeError):
                key = None
            if key not in kept:
                shutil.rmtree(about.parent, ignore_errors=True)

    def _place(self, model: str, revision: str | None, strategy: str) -> Path:
        return self.folder / digest_of_facts([model, revision, strategy])[:32]
