"""Scores the peer in this fresh process: transformers, unquantised or with bitsandbytes NF4, doubly quantised.

Its embedding and head stay floats, as its users have them. Prints the windows' scores as one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return each window's score, and the bytes of weights that a token reads.

    `task` has the folder of a checkpoint, the windows' and the reference's files, threads, and the type of the
    products and of what stays unquantised.
    """
    import torch

    from .measure_transformers import load_nf4
    from .quality_scores import score

    model = load_nf4(task["folder"], "cpu", task["threads"], getattr(torch, task["dtype"]))
    read = _read_per_token(model)
    windows = json.loads(Path(task["windows"]).read_text(encoding="utf-8"))

    @torch.inference_mode()
    def forward(window: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([list(window)]), use_cache=False).logits[0]
        return logits

    found = score(windows, model.config.vocab_size, Path(task["reference"]), forward)
    return {"scores": [vars(one) for one in found], "bytes_read_per_token": read}


def _read_per_token(model: Any) -> int:
    """Return the bytes of all weights but the embedding, whose one row is nothing; the head is one of its own here."""
    embedding = model.get_input_embeddings().weight
    total = 0
    for weight in model.parameters():
        if weight is embedding:
            continue
        state = getattr(weight, "quant_state", None)
        kept: list[torch.Tensor] = [weight]
        if state is not None:
            kept += [state.absmax, state.state2.absmax]
        total += sum(tensor.nbytes for tensor in kept)
    return total


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
