"""Attention over the KV cache: of new tokens of one sequence, and of single tokens of many."""

from __future__ import annotations

import torch


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return what the last T tokens of a sequence see: T × heads × head_size.

    `queries` is T × heads × head_size; `keys` and `values` are kv_heads × length × head_size and end with the T
    tokens themselves. A `window` lets a token see itself and the window-1 tokens before it.
    """
    if queries.shape[0] == 1:
        first = 0 if window is None else max(0, keys.shape[1] - window)
        return _one_token(queries, keys[:, first:], values[:, first:])
    return _chunk(queries, keys, values, window)


def attend_rows(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return what single tokens see, each in its own row: N × heads·head_size.

    `queries` is N × heads × head_size; `keys` and `values` are kv_heads × N × places × head_size; `hidden` (N × 1 ×
    places) is true where a token sees nothing, and what lies there is finite wherever the token itself is.
    """
    rows, heads, size = queries.shape
    groups = keys.shape[0]
    grouped = queries.view(rows, groups, heads // groups, size).transpose(0, 1)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).mul_(size**-0.5).masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).transpose(0, 1).reshape(rows, heads * size)


def _one_token(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    _, heads, size = queries.shape
    groups = keys.shape[0]
    scores = torch.bmm(queries.view(groups, heads // groups, size), keys.transpose(1, 2)).mul_(size**-0.5)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(1, heads, size)


def _chunk(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    count, length = queries.shape[0], keys.shape[1]
    is_whole = count == length and (window is None or length <= window)
    mask = None if is_whole else _visible(count, length, window, queries.device)
    seen = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None],
        attn_mask=mask, is_causal=is_whole, enable_gqa=True,
    )  # fmt: skip
    return seen[0].transpose(0, 1)


def _visible(count: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    rows = torch.arange(length - count, length, device=device)[:, None]
    columns = torch.arange(length, device=device)
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)
