"""What accelerate's `estimate-memory` counts of a model's weights: its own calls, on a folder."""

from __future__ import annotations

import json
import sys


def measure(checkpoint: str) -> dict[str, int]:
    """Return the bytes of all weights as float32, of which the command takes a half, a quarter or an eighth."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    return {"float32_bytes": int(total)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
