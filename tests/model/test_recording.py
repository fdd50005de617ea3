"""Steps that are recorded and replayed: on a CUDA device where there is one, and the bookkeeping everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pairs import Pair

from loadstone import Event
from loadstone.config import LoadConfig
from loadstone.hardware import MemorySettings, get_device_manager
from loadstone.model import Decoder, build
from loadstone.model.recording import Recorder
from loadstone.planner import plan
from loadstone.quantization.kernels import cpu
from loadstone.sources import resolve

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TEXT = tiny.prompt(80)


class Replayed:
    """Stands for a recording on the processor: runs the function again, as a graph would."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.run, self.replays = run, 0

    def __call__(self) -> torch.Tensor:
        self.replays += 1
        return self.run()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, pair_of: Callable[[str], Pair]) -> Decoder:
    """A decoder as it is without kernels of our own, whose device claims to record."""
    folder = pair_of("llama").folder
    monkeypatch.setattr(cpu, "_found", [None])
    monkeypatch.setattr(Recorder, "_warm_up", lambda recorder, run: run())
    start = Recorder.__init__

    def willing(recorder: Recorder, device: torch.device) -> None:
        start(recorder, device)
        recorder.can_record = True

    monkeypatch.setattr(Recorder, "__init__", willing)
    return tiny.load(folder)[0]


def decoded(sequences: tiny.Sequences) -> torch.Tensor:
    """Return the logits of a text that is read token by token, after a beginning."""
    sequences.feed(TEXT[:20])
    return torch.cat([sequences.feed([TEXT[at]], at) for at in range(20, len(TEXT))])


def test_a_step_is_recorded_once_for_each_shape_and_replayed(
    plain: Decoder, pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Replayed] = []

    def recorded(recorder: Recorder, run: Callable[[], torch.Tensor]) -> Any:
        made.append(Replayed(run))
        return made[-1]

    monkeypatch.setattr(Recorder, "_recorded", recorded)
    found = decoded(tiny.Sequences.of(plain))
    assert [one.replays for one in made] == [12, 32, 16]  # tokens that see 2, up to 4 and up to 8 blocks
    assert tiny.difference(found, pair_of("llama").wanted(TEXT)[20:]) < 1e-4


def test_where_nothing_can_be_recorded_steps_run_as_they_are_and_it_is_told_once(
    plain: Decoder, pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    def waits(recorder: Recorder, run: Callable[[], torch.Tensor]) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture failed")  # as the end of a recording does then

    monkeypatch.setattr(Recorder, "_recorded", waits)
    found = decoded(tiny.Sequences.of(plain))
    assert tiny.difference(found, pair_of("llama").wanted(TEXT)[20:]) < 1e-4
    told = [event.fields["reason"] for event in events if event.name == "graphs.warning"]
    assert told == ["operation not permitted when stream is capturing"]


# -- on a CUDA device -------------------------------------------------------------------------------------------------


def on_cuda(folder: Path, strategy: str, dtype: str) -> Decoder:
    files = resolve(str(folder))
    spec = tiny.inspect(files)
    wish = LoadConfig(base_model=files.name, quantization=strategy, context=256, device="cuda")
    device = get_device_manager().resolve("cuda")
    return build(
        plan(wish, spec, device, MemorySettings(dtype, dtype, 512, 0), runtime_bytes=0, resident_bytes=0), spec
    )


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_replays_have_the_logits_of_transformers(
    variant: str, pair_of: Callable[[str], Pair], events: list[Event]
) -> None:
    """One sequence token by token, through several shapes; nothing is said of graphs that fail."""
    pair = pair_of(variant)
    decoder = on_cuda(pair.folder, "none", "float32")
    sequences = tiny.Sequences.of(decoder)
    found = decoded(sequences)
    assert tiny.difference(found.cpu(), pair.wanted(TEXT)[20:]) < 1e-3
    steps = decoder.steps[sequences.cache]._static._made
    assert len(steps) == 3
    assert all(step._recording is not None for step in steps.values())
    assert not [event for event in events if event.name == "graphs.warning"]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
def test_replays_have_the_numbers_of_the_same_calls_made_one_by_one(
    strategy: str, pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    """Several sequences, several tokens of each, in turn with single ones, in every strategy."""

    def logits(decoder: Decoder) -> torch.Tensor:
        sequences = tiny.Sequences.of(decoder, 3)
        found = []
        for at in range(0, 60, 6):
            found.append(sequences.together([TEXT[at : at + 6], TEXT[at : at + 5], TEXT[at : at + 1]], [at] * 3))
            found.append(sequences.together([[3], [4], [5]], [at + 6, at + 5, at + 1]))
        return torch.cat(found).cpu()

    folder = pair_of("qwen2").folder
    replayed = logits(on_cuda(folder, strategy, "bfloat16"))
    monkeypatch.setattr(Recorder, "record", lambda recorder, run: None)
    assert tiny.difference(replayed, logits(on_cuda(folder, strategy, "bfloat16"))) < 1e-2
    assert not [event for event in events if event.name == "graphs.warning"]


@pytest.mark.gpu
@needs_cuda
def test_a_released_decoder_gives_back_what_its_graphs_held(pair_of: Callable[[str], Pair]) -> None:
    before = torch.cuda.memory_allocated()
    decoder = on_cuda(pair_of("llama").folder, "none", "float32")
    sequences = tiny.Sequences.of(decoder)
    decoded(sequences)
    decoder.release()
    del sequences, decoder
    assert torch.cuda.memory_allocated() == before
