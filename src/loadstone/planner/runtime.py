"""What a process takes beside a model, in bytes, measured on Linux."""

from __future__ import annotations

RUNTIME_ALLOWANCE = 250_000_000
"""torch's and LLVM's code, kernels and the tokenizer, once they work."""

PROCESS_BYTES = 350_000_000
"""Python with torch and this library, imported, before a load: for plans that are made without them."""
