"""The peer: transformers + bitsandbytes NF4, as its users load 4-bit models, measured like Loadstone.

Double quantisation, bfloat16 products; the same checkpoint, prompts and greedy answers.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before anything is imported: imports are part of a load

import json  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import torch


class TokenTimes:
    """A transformers streamer that keeps the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Note the time; the first call brings the prompt."""
        if self._has_prompt:
            value.cpu()  # a GPU's work is done when its number is here
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: transformers calls it after the last token."""


def load_4bit(name: str, device: str, threads: int) -> tuple[Any, Any]:
    """Return the tokenizer and the model of a checkpoint, loaded in 4 bits as transformers' users do it."""
    import torch
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name), load_nf4(name, device, threads, torch.bfloat16)


def load_kept(name: str, device: str, threads: int, strategy: str) -> tuple[Any, Any]:
    """Return the tokenizer and the model of a checkpoint, kept as one of our strategies is called."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if strategy == "4bit":
        return load_4bit(name, device, threads)
    torch.set_num_threads(threads)
    kept = BitsAndBytesConfig(load_in_8bit=True) if strategy == "8bit" else None
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, device_map=device, quantization_config=kept
    )  # fmt: skip
    return AutoTokenizer.from_pretrained(name), model


def load_nf4(name: str, device: str, threads: int, dtype: torch.dtype) -> Any:
    """Return the model of a checkpoint in NF4, doubly quantised; its products and what stays unquantised in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    kept = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, quantization_config=kept)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return what loading and answering took; `task` has model, device, tokens and prompt sizes."""
    tokenizer, model = load_4bit(task["model"], task["device"], task["threads"])
    load_s = time.perf_counter() - STARTED

    import torch

    from loadstone.hardware import peak_rss, process_rss

    from .prompts import prompt_of

    def ask(prompt_tokens: int, tokens: int) -> tuple[int, list[float]]:
        """Return the prompt's tokens, and the seconds from asking to each token."""
        text = prompt_of(prompt_tokens, lambda text: len(tokenizer(text)["input_ids"]))
        asked = time.perf_counter()
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        clock = TokenTimes()
        with torch.inference_mode():
            model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock
            )  # fmt: skip
        return inputs["input_ids"].shape[1], [at - asked for at in clock.times]

    _, first = ask(task["short_prompt"], 2)
    short, answer = ask(task["short_prompt"], task["tokens"])
    long, read = ask(task["long_prompt"], 1)
    return {
        "load_s": load_s,
        "first_token_s": first[0],
        "decode_tokens_per_s": (len(answer) - 1) / (answer[-1] - answer[0]),
        "prefill_tokens_per_s": long / read[0],
        "peak_rss_bytes": peak_rss(),
        "steady_rss_bytes": process_rss(),
        "decoded_tokens": len(answer),
        "short_prompt_tokens": short,
        "long_prompt_tokens": long,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
