"""The peer OpenVINO GenAI, opened for `benchmarks.decode` in an environment of its own, which has no Loadstone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Answer


def open_model(settings: Mapping[str, Any]) -> OpenVinoModel:
    """Load the exported folder `model` on the processor, with as many `threads`."""
    import openvino_genai

    return OpenVinoModel(
        openvino_genai.LLMPipeline(settings["model"], "CPU", INFERENCE_NUM_THREADS=settings["threads"])
    )  # fmt: skip


class OpenVinoModel:
    """A pipeline with the settings that it has by default; times are those that it tells itself."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._tokenizer = pipeline.get_tokenizer()

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        import openvino_genai

        wish = openvino_genai.GenerationConfig()
        wish.max_new_tokens = wish.min_new_tokens = tokens
        wish.ignore_eos, wish.do_sample, wish.repetition_penalty = True, False, 1.0
        found = self._pipeline.generate(self._tokenizer.encode(text), wish).perf_metrics
        first = found.get_ttft().mean / 1000
        made = found.get_num_generated_tokens()
        last = first + (made - 1) * found.get_tpot().mean / 1000 if made > 1 else first
        return Answer(found.get_num_input_tokens(), made, first, last)

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Refuse: it is measured with one stream."""
        raise NotImplementedError

    def read_per_token(self) -> None:
        """Return None: the file says it."""
