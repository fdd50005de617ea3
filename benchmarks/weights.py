"""How much of a model one token needs: bytes of weights that are read, and operations of their products.

An operation is one multiplication or one addition: two a weight. The embedding is looked up and not multiplied, unless
it is the head too. Attention, which has no weights, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from .checkpoints import Shape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_per_token(parts: Mapping[str, int]) -> int:
    """Return the bytes that one token needs, of Loadstone's by part: all but an embedding that is not the head too."""
    return parts["linear"] + parts["norm"] + (parts["lm_head"] or parts["embedding"])


def gguf_read_per_token(file: Path) -> int:
    """Return the bytes that one token needs of a GGUF file."""
    from loadstone.checkpoint import inspect
    from loadstone.sources import resolve

    tensors = inspect(resolve(str(file))).tensors
    unread = tensors[EMBEDDING].nbytes if HEAD in tensors else 0
    return sum(tensor.nbytes for tensor in tensors.values()) - unread


def openvino_read_per_token(folder: Path, shape: Shape) -> int:
    """Return the bytes that one token needs of an exported model, whose embedding has 8 bits a weight."""
    unread = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return (folder / "openvino_model.bin").stat().st_size - unread


def operations(shape: Shape, tokens: int) -> int:
    """Return the operations of the products when `tokens` tokens are read and the last one's logits are wanted."""
    sizes = {name: math.prod(size) for name, size in shape.tensors() if len(size) == 2}
    embedding = sizes.pop(EMBEDDING)
    head = sizes.pop(HEAD, embedding)
    return 2 * (sum(sizes.values()) * tokens + head)
