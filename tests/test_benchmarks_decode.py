"""`benchmarks.decode` and `benchmarks.batch`: prompts are not known before, answers are whole, and figures add up."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import batch, decode, measure_batch
from benchmarks.answers import Answer, WrongAnswer, checked
from benchmarks.batch_report import Case as BatchCase
from benchmarks.batch_report import times_one_stream
from benchmarks.ceilings import read_ceiling
from benchmarks.checkpoints import SHAPES, write_checkpoint
from benchmarks.decode_cases import CASES, TEXT_CASES, asked_of
from benchmarks.decode_report import points_of, table_of, text_notes_of
from benchmarks.job import Job
from benchmarks.make_gguf import convert
from benchmarks.measure_decode import measure
from benchmarks.plot_roofline import Point, roofline_svg
from benchmarks.prompts import different_prompts, prompts_with_one_beginning
from benchmarks.results import Results
from benchmarks.stream_sides import ROOT, Loadstone, OpenVino, batch_sides, decode_sides
from benchmarks.weights import gguf_read_per_token, operations, read_per_token
from rich.console import Console
from tokenizers import Tokenizer

from loadstone.checkpoint import inspect
from loadstone.sources import resolve
from test_benchmarks import TINY

MACHINE = {"cores": 1, "gpu": None}
CEILINGS = {
    "device": "cpu", "read_bytes_per_s": 1e9, "bf16_operations_per_s": 1e11, "int8_operations_per_s": None,
}  # fmt: skip
FIGURES = {
    "prompt_tokens": 40, "first_token_s": 2.0, "prefill_tokens_per_s": 20.0, "decode_tokens_per_s": 5.0,
    "drafted_tokens": None, "accepted_tokens": None, "read_per_token_bytes": 1000, "texts": ["a"],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decode") / "tiny"
    write_checkpoint(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def encode(checkpoint: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> Job:
    return Job("tiny", checkpoint, tmp_path, "What moves the price of a share?", 1, shape=TINY)


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_different_prompts_differ_from_their_first_token_on(encode: Callable[[str], list[int]]) -> None:
    known = ["What moves the price?"]
    tokens = [encode(prompt) for prompt in different_prompts(96, 40, encode, but=known)]
    assert len({one[0] for one in tokens} | {encode(known[0])[0]}) == 97
    assert all(40 <= len(one) <= 44 for one in tokens)


def test_prompts_with_one_beginning_are_the_same_for_that_long_and_no_longer(
    encode: Callable[[str], list[int]],
) -> None:
    first, again = map(encode, prompts_with_one_beginning(2, 100, 30, encode, but=[]))
    same = next(place for place, (one, other) in enumerate(zip(first, again, strict=False)) if one != other)
    assert 98 <= same <= 104
    assert 28 <= len(first) - same <= 36


@pytest.mark.parametrize("name", CASES)
def test_a_cases_context_has_room_for_its_prompts_and_answers(
    name: str, checkpoint: Path, encode: Callable[[str], list[int]]
) -> None:  # fmt: skip
    case = CASES[name]
    asked = asked_of(case, checkpoint / "tokenizer.json", "What moves the price?")
    lengths = [len(encode(prompt)) for prompt in asked.prompts]
    assert case.prompt_tokens <= min(lengths) <= max(lengths) <= case.prompt_tokens + 8
    assert max(lengths) + case.tokens <= asked.context
    assert len(json.dumps(asked.prompts)) < 100_000  # an argument of a process has 128 KiB at most


# -- what is measured -------------------------------------------------------------------------------------------------


def test_an_answer_of_another_length_is_refused() -> None:
    answer = Answer(40, 7, 1.0, 2.0)
    assert checked(answer, 7) is answer
    with pytest.raises(WrongAnswer, match="32 tokens were asked for, and 7 came"):
        checked(answer, 32)


def test_decoding_begins_after_the_first_token() -> None:
    assert Answer(40, 33, first_token_s=2.0, last_token_s=10.0).tokens_per_s == 4.0
    assert Answer(40, 1, first_token_s=2.0, last_token_s=2.0).tokens_per_s is None
    assert Answer(40, 33, first_token_s=None, last_token_s=10.0).tokens_per_s is None


class Scripted:
    """A model that gives the answers it was made with, whatever is asked."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)

    def ask(self, text: str, tokens: int) -> Answer:
        return self._answers.pop(0)

    def read_per_token(self) -> int:
        return 1000


def measured(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[Answer], tokens: int, *, has_one_beginning: bool = False
) -> dict[str, Any]:  # fmt: skip
    model = Scripted(Answer(4, 4, 1.0, 1.0), *answers)
    monkeypatch.setattr("benchmarks.measure_decode.open_model", lambda *_: model)
    task = {"kind": "any", "settings": {}, "warm_up": "a", "prompts": ["b"] * len(answers), "tokens": tokens}
    return measure({**task, "has_one_beginning": has_one_beginning, "are_new": True})


def test_figures_are_the_medians_of_the_answers_and_the_sums_of_their_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Answer(40, 5, 2.0, 4.0, 0, 10, 4)
    figures = measured(monkeypatch, [one, replace(one, first_token_s=1.0, last_token_s=2.0), one], 5)
    assert (figures["asked"], figures["prompt_tokens"], figures["first_token_s"]) == (3, 40, 2.0)
    assert (figures["prefill_tokens_per_s"], figures["decode_tokens_per_s"]) == (20.0, 2.0)
    assert (figures["drafted_tokens"], figures["accepted_tokens"]) == (30, 12)
    assert figures["read_per_token_bytes"] == 1000


def test_a_prompt_that_was_known_before_is_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongAnswer, match="39 of 40 tokens were in the cache"):
        measured(monkeypatch, [Answer(40, 1, 0.1, 0.1, cached_tokens=39)], 1)


def test_a_known_beginning_is_measured_first_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Answer(1030, 1, 2.0, 2.0, 0), Answer(1031, 1, 0.2, 0.2, 1000)]
    figures = measured(monkeypatch, answers, 1, has_one_beginning=True)
    assert (figures["first_token_s"], figures["again_first_token_s"], figures["cached_tokens"]) == (2.0, 0.2, 1000)


def test_what_tokens_after_the_first_took_is_the_difference_of_two_rounds() -> None:
    answers = [Answer(40, 64, first, 10.0, None, 8, 4) for first in (1.0, 2.0, 3.0)]
    figures = measure_batch.figures_of(answers, prompts_s=1.0, whole_s=10.0)
    assert figures["decode_tokens_per_s"] == 3 * 63 / 9
    assert figures["answer_tokens_per_s"] == 3 * 64 / 10
    assert figures["all_tokens_per_s"] == 3 * (64 + 40) / 10
    assert (figures["first_token_s"], figures["worst_first_token_s"]) == (2.0, 3.0)
    assert (figures["drafted_tokens"], figures["accepted_tokens"]) == (24, 12)
    assert measure_batch.figures_of(answers, prompts_s=10.0, whole_s=10.0)["decode_tokens_per_s"] is None


def test_memory_is_read_at_some_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ceilings.READ_BYTES", 1 << 20)
    assert read_ceiling() > 0


# -- how much of a model a token needs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-0.5b", 0.494), ("qwen2.5-7b", 7.07)])
def test_a_token_takes_two_operations_for_each_weight_but_the_embeddings(name: str, billions: float) -> None:
    one, ten = operations(SHAPES[name], 1), operations(SHAPES[name], 10)
    assert one / 2e9 == pytest.approx(billions, abs=5e-3)
    assert ten < 10 * one  # only the last token of a prompt has logits


def test_a_tied_embedding_is_read_as_the_head() -> None:
    parts = {"linear": 100, "norm": 1, "embedding": 10, "lm_head": 20}
    assert read_per_token(parts) == 121
    assert read_per_token({**parts, "lm_head": 0}) == 111


def test_a_gguf_files_embedding_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    convert(checkpoint, file)
    stored = sum(tensor.nbytes for tensor in inspect(resolve(str(file))).tensors.values())
    assert gguf_read_per_token(file) == stored - 2 * TINY.vocab_size * TINY.hidden_size


# -- report -----------------------------------------------------------------------------------------------------------


def results_of(**more: Any) -> Results[Any]:
    results: Results[Any] = Results("tiny")
    results.add("Loadstone 4bit", CASES["40"], {**FIGURES, **more})
    results.add("peer", CASES["40"], FIGURES)
    results.add("peer", CASES["prefix"], {**FIGURES, "again_first_token_s": 0.25, "cached_tokens": 1000})
    return results


def test_the_table_has_a_row_for_each_side_and_columns_for_what_was_measured() -> None:
    screen = Console(width=200, record=True, quiet=True)
    table = table_of(results_of(drafted_tokens=10, accepted_tokens=4))
    headings = [str(column.header) for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    screen.print(table)
    assert headings == [
        "side", "runs", "prefill 40, tok/s", "decode at 40, tok/s", "guesses right", "first token of 1030",
        "again, 1000 known", "found in cache",
    ]  # fmt: skip
    assert cells == [
        ["Loadstone 4bit", "peer"], ["1", "1"], ["20", "20"], ["5.0", "5.0"], ["40%", ""], ["", "2.00 s"],
        ["", "0.250 s"], ["", "1000"],
    ]  # fmt: skip


def test_points_are_work_by_time_and_guessed_tokens_have_none() -> None:
    points = {point.label: point for point in points_of(results_of(drafted_tokens=10, accepted_tokens=4), TINY)}
    assert set(points) == {"Loadstone 4bit, prefill 40", "peer, prefill 40", "peer, decode at 40"}
    one, prompt = operations(TINY, 1), operations(TINY, 40)
    assert points["peer, decode at 40"] == Point("peer, decode at 40", one / 1000, one * 5)
    assert points["peer, prefill 40"] == Point("peer, prefill 40", prompt / 1000, prompt / 2)


def test_a_roofline_has_every_point_higher_where_it_is_faster() -> None:
    points = [Point("Loadstone <1>", 2.0, 1e9), Point("peer", 2.0, 1e10)]
    picture = ElementTree.fromstring(roofline_svg(CEILINGS, {"A & B": points}, highlight="Loadstone"))
    space = "{http://www.w3.org/2000/svg}"
    peer, ours = (circle for circle in picture.iter(f"{space}circle") if circle.get("class") == "point")
    assert float(ours.get("cy", 0)) > float(peer.get("cy", 0))
    assert ours.get("cx") == peer.get("cx")
    assert ours.get("fill") != peer.get("fill")
    assert len([line for line in picture.iter(f"{space}line") if line.get("class") == "roof"]) == 2  # no int8 here


def test_a_roofline_without_points_or_ceilings_is_an_empty_picture() -> None:
    assert "circle" not in roofline_svg({}, {"tiny": []}, highlight="Loadstone")
    assert "roof" not in roofline_svg({}, {"tiny": [Point("a", 1.0, 1.0)]}, highlight="a").partition("</style>")[2]


@pytest.mark.parametrize(("other", "words"), [("a", "the same answers"), ("b", "not the same")])
def test_it_is_told_whether_features_changed_an_answer(other: str, words: str) -> None:
    results: Results[Any] = Results("smollm2")
    for label, text in (("one", "a"), ("two", other)):
        results.add(label, TEXT_CASES["free"], {**FIGURES, "texts": [text]})
    assert words in next(text_notes_of(results))


def test_streams_are_compared_with_one_stream() -> None:
    results: Results[BatchCase] = Results("tiny")
    for streams, speed in ((1, 10.0), (4, 35.0)):
        results.add("one", BatchCase(streams), {"decode_tokens_per_s": speed})
    assert times_one_stream(results, "one", BatchCase(4)) == 3.5
    assert times_one_stream(results, "one", BatchCase(8)) is None


# -- sides ------------------------------------------------------------------------------------------------------------


def test_only_the_wanted_peers_are_sides(job: Job) -> None:
    ours = ["Loadstone 4bit", "Loadstone 4bit, plain"]
    assert [side.label for side in decode_sides(job, [], None)] == ours
    assert [side.label for side in decode_sides(job, ["openvino", "llamacpp"], "python3")] == [
        *ours, "OpenVINO int4", "llama.cpp Q4_K_M", "llama.cpp Q4_0",
    ]  # fmt: skip
    assert [side.label for side in batch_sides(job, ["transformers", "vllm"], None)] == [
        *ours, "transformers NF4", "vLLM bf16",
    ]  # fmt: skip


def test_features_are_switched_only_where_the_configuration_knows_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    plain = Loadstone(job, has_features=False)
    monkeypatch.setattr("benchmarks.stream_sides.known_features", list)
    assert set(plain.settings(256, 1)["config"]) == {"model_config"}
    monkeypatch.setattr("benchmarks.stream_sides.known_features", lambda: ["speculation"])
    assert plain.settings(256, 1)["config"]["engine"] == {"speculation": False}
    assert Loadstone(job).settings(256, 1)["config"]["engine"] == {"speculation": True}


def test_a_side_of_another_environment_finds_the_benchmarks_there(job: Job) -> None:
    environment = OpenVino(job, "python3").environment()
    assert environment is not None
    assert environment["PYTHONPATH"] == str(ROOT)


def test_what_runs_in_another_environment_needs_nothing_but_the_standard_library() -> None:
    modules = [f"benchmarks.{name}" for name in ("measure_decode", "measure_batch", "model_openvino", "model_vllm")]
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, timeout=60)


# -- the whole run ----------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def quick(monkeypatch: pytest.MonkeyPatch, benchmark: Any, here: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Measure the tiny model, with `here` in this process; the machine itself is not looked at."""
    run = benchmark.run_module
    known = {"benchmarks.machine": MACHINE, "benchmarks.ceilings": CEILINGS}

    def run_module(module: str, *arguments: str, **more: Any) -> Any:
        if module in known:
            return known[module]
        return here(json.loads(arguments[0])) if here is not None else run(module, *arguments, **more)

    monkeypatch.setattr(benchmark, "run_module", run_module)
    monkeypatch.setattr(benchmark, "SHAPES", {"tiny": TINY})


def test_one_stream_is_measured_in_a_fresh_process_and_who_is_missing_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    quick(monkeypatch, decode)
    monkeypatch.setattr(Loadstone, "prepare", lambda _: {})
    monkeypatch.setattr(decode, "decode_sides", lambda job, *_: [Loadstone(job), OpenVino(job, None)])
    plot = tmp_path / "roofline.svg"
    arguments = ["--shapes", "tiny", "--folder", str(checkpoint.parent), "--repetitions", "1"]
    code = decode.main([*arguments, "--cases", "40", "--plot", str(plot)])
    (shape,) = told(capsys)["shapes"]
    (case,) = shape["cases"]
    assert (code, case["case"]) == (0, "40 tokens")
    assert case["medians"]["tokens"] == 33
    assert case["medians"]["prefill_tokens_per_s"] > 0 < case["medians"]["decode_tokens_per_s"]
    assert set(shape["left_out"]) == {"OpenVINO int4"}
    assert "--openvino" in shape["left_out"]["OpenVINO int4"]
    assert "Loadstone 4bit, prefill 40" in plot.read_text()


def test_a_known_beginning_and_real_text_are_asked_of_loadstone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    quick(monkeypatch, decode, measure)
    for name in ("decode_sides", "loadstone_sides"):
        monkeypatch.setattr(decode, name, lambda job, *_: [Loadstone(job)])
    monkeypatch.setattr(Loadstone, "prepare", lambda _: {})
    arguments = ["--shapes", "tiny", "--folder", str(checkpoint.parent), "--text-model", str(checkpoint)]
    assert decode.main([*arguments, "--repetitions", "1", "--cases", "prefix,free"]) == 0
    line = told(capsys)
    (prefix,), (free,) = line["shapes"][0]["cases"], line["text"][0]["cases"]
    assert prefix["medians"]["first_token_s"] > 0 < prefix["medians"]["again_first_token_s"]
    assert (free["case"], free["medians"]["tokens"]) == ("free text", 65)


def test_many_streams_are_asked_together_of_loadstone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    quick(monkeypatch, batch, measure_batch.measure)
    monkeypatch.setattr(Loadstone, "prepare", lambda _: {})
    monkeypatch.setattr(batch, "batch_sides", lambda job, *_: [Loadstone(job)])
    arguments = ["--shapes", "tiny", "--folder", str(checkpoint.parent), "--repetitions", "1"]
    code = batch.main([*arguments, "--streams", "3", "--tokens", "8"])
    (case,) = told(capsys)["shapes"][0]["cases"]
    assert (code, case["case"]) == (0, "3 streams")
    assert (case["medians"]["streams"], case["medians"]["tokens"]) == (3, 24)
    assert 0 < case["medians"]["first_token_s"] <= case["medians"]["worst_first_token_s"]


@pytest.mark.parametrize("arguments", [["--shapes", "q9"], ["--cases", "41"], ["--peers", "vllm"], ["--device", "tpu"]])
def test_one_stream_of_what_cannot_be_measured_is_refused(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        decode.parse(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("arguments", [["--streams", "0"], ["--streams", "a"], ["--tokens", "1"], ["--peers", "ov"]])
def test_streams_that_cannot_be_measured_are_refused(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        batch.parse(arguments)
    assert ended.value.code == 2
