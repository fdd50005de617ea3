"""The peer transformers + bitsandbytes NF4, opened for `benchmarks.decode` and `benchmarks.batch`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Answer
from .measure_transformers import TokenTimes, load_kept


def open_model(settings: Mapping[str, Any]) -> TransformersModel:
    """Load the checkpoint `model` on `device`, with as many `threads`; by `strategy`, in 4 bits unless that is told."""
    wish = settings["model"], settings["device"], settings["threads"], settings.get("strategy", "4bit")
    return TransformersModel(*load_kept(*wish))


class TransformersModel:
    """A tokenizer and a model; batches are padded at the left, as its users do it."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.padding_side = "left"
        self._model = model

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        return self.ask_together([text], tokens)[0]

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Return the answers of one batch: all have their tokens at the same time."""
        import torch

        inputs = self._tokenizer(list(texts), return_tensors="pt", padding=True).to(self._model.device)
        clock = TokenTimes()
        asked = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, repetition_penalty=1.0,
                streamer=clock,
            )  # fmt: skip
        first, last = clock.times[0] - asked, clock.times[-1] - asked
        return [
            Answer(int(mask.sum()), len(clock.times), first, last, text=None) for mask in inputs["attention_mask"]
        ]  # fmt: skip

    def read_per_token(self) -> int:
        """Return the bytes of weights that one token needs, with the scales of their blocks."""
        total = 0
        for name, weight in self._model.named_parameters():
            if "embed_tokens" in name and not self._model.config.tie_word_embeddings:
                continue
            state = getattr(weight, "quant_state", None)
            total += weight.nbytes + (state.absmax.nbytes if state is not None else 0)
        return total
