"""What a model writes is told apart: calls of functions, and text, however it comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_templates import LLAMA, OTHERS, QWEN

from loadstone.engine.tool_formats import Llama, LlamaReader, Qwen, QwenReader, Reader, format_of

NAMES = frozenset({"get_weather", "get_time"})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
TIME = '<tool_call>{"name":"get_time","arguments":{}}</tool_call>'
PARIS = ("get_weather", {"city": "Paris", "days": 3})
BARE = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'

IN_QWENS_WAY: list[tuple[str, str, list[Any]]] = [
    (CALL, "", [PARIS]),
    ("It may rain.", "It may rain.", []),
    ("  two blanks, and at the end\n\n", "  two blanks, and at the end\n\n", []),
    (f"Let me look.\n\n{CALL}", "Let me look.", [PARIS]),
    (f"{CALL}\n{TIME}", "", [PARIS, ("get_time", {})]),
    (f"{CALL}{CALL}\n", "", [PARIS, PARIS]),
    (f"{CALL}\nThat is it.\n", "\nThat is it.", [PARIS]),
    (f"<think>\nWeather.\n</think>\n\n{CALL}", "<think>\nWeather.\n</think>", [PARIS]),
    (CALL.removesuffix("\n</tool_call>"), "", [PARIS]),  # the model ended before the end
    (
        '<tool_call>{"name": "get_time", "arguments": {"a": "</tool_call> \\" {"}}</tool_call>',
        "",
        [("get_time", {"a": '</tool_call> " {'})],
    ),
    ('<tool_call>{"name": "get_time", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("get_time", {"a": 1})]),
    ('<tool_call>{"name": "get_time", "parameters": {"a": 1}}</tool_call>', "", [("get_time", {"a": 1})]),
    ('<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", {})]),
    ("a < b, <tool, <tool_cal", "a < b, <tool, <tool_cal", []),
    ("</tool_call>", "</tool_call>", []),
]
IN_LLAMAS_WAY: list[tuple[str, str, list[Any]]] = [
    (BARE, "", [PARIS]),
    (f"\n {BARE}\n", "", [PARIS]),
    (f"<|python_tag|>{BARE}", "", [PARIS]),
    (f'{BARE}; {{"name": "get_time", "parameters": {{}}}}', "", [PARIS, ("get_time", {})]),
    ('{"type": "function", "name": "get_time", "parameters": {}}', "", [("get_time", {})]),
    ("It may rain.", "It may rain.", []),
    (f"So: {BARE}", f"So: {BARE}", []),
    ("<|python", "<|python", []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("", "", []),
    (" \n", " \n", []),
]
NO_CALLS = [
    ('{"name": "get_weather", "arguments": {"city": }}', "not JSON, character 47"),
    ("[]", "no JSON object with a name"),
    ('{"name": 5}', "no JSON object with a name"),
    ('{"name": "rm", "arguments": {}}', "no function was offered that is called 'rm'"),
    ('{"name": "get_time", "arguments": [1]}', "arguments are no JSON object"),
    ('{"name": "get_time", "arguments": "noon"}', "arguments are no JSON object"),
    ("", "not JSON"),
    ("[" * 100_000, "no JSON that Python could have"),
    ('{"name": "get_time", "arguments": {"a": ' + "1" * 5000 + "}}", "no JSON that Python could have"),
]


def _read(reader: Reader, *pieces: str) -> tuple[str, list[Any]]:
    text = "".join(reader.push(piece) for piece in pieces) + reader.flush()
    return text, [(call.name, call.arguments) for call in reader.calls]


@pytest.mark.parametrize(("said", "text", "calls"), IN_QWENS_WAY)
def test_calls_in_qwens_way(said: str, text: str, calls: list[Any]) -> None:
    reader = QwenReader(NAMES)
    assert _read(reader, said) == (text, calls)
    assert reader.errors == []


@pytest.mark.parametrize(("said", "text", "calls"), IN_LLAMAS_WAY)
def test_calls_in_llamas_way(said: str, text: str, calls: list[Any]) -> None:
    reader = LlamaReader(NAMES)
    assert _read(reader, said) == (text, calls)
    assert reader.errors == []


@pytest.mark.parametrize(("body", "why"), NO_CALLS, ids=range(len(NO_CALLS)))
def test_what_is_no_call_in_qwens_way_is_text_with_the_reason(body: str, why: str) -> None:
    said = f"Well.\n<tool_call>{body}</tool_call>\nAnd {CALL}"
    reader = QwenReader(NAMES)
    assert _read(reader, said) == (said.removesuffix(f" {CALL}"), [PARIS])
    (error,) = reader.errors
    assert why in error
    assert len(error) < 250


@pytest.mark.parametrize(("body", "why"), [one for one in NO_CALLS if one[0].startswith("{")])
def test_what_is_no_call_in_llamas_way_is_text_with_the_reason(body: str, why: str) -> None:
    """All of it: half of an answer would mean something else."""
    reader = LlamaReader(NAMES)
    assert _read(reader, f"{BARE}; {body}") == (f"{BARE}; {body}", [])
    (error,) = reader.errors
    assert why.partition(",")[0] in error


@pytest.mark.parametrize("size", range(12, len(CALL) - 14))
def test_a_call_that_is_cut_off_is_text(size: int) -> None:
    reader = QwenReader(NAMES)
    assert _read(reader, f"Well.\n{CALL[:size]}") == (f"Well.\n{CALL[:size]}", [])
    assert "it is not closed" in reader.errors[0]


@given(st.data())
def test_pieces_make_no_difference(data: st.DataObject) -> None:
    """Whatever is said, and wherever it is cut."""
    parts = st.sampled_from(
        ["<tool_call>", "</tool_call>", '{"name": "get_time"}', CALL, TIME, BARE, "<", " ", "\n", "x", '"']
    )
    said = "".join(data.draw(st.lists(parts, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=6)))
    pieces = [said[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    for kind in (QwenReader, LlamaReader):
        whole, cut = kind(NAMES), kind(NAMES)
        assert _read(cut, *pieces) == _read(whole, said)
        assert cut.errors == whole.errors


@given(st.text(st.sampled_from('<tol_ca/>{}"\\ \nab'), max_size=40))
def test_a_text_without_calls_stays_as_it_is(said: str) -> None:
    for kind in (QwenReader, LlamaReader):
        reader = kind(NAMES)
        assert _read(reader, *said) == (said, [])


def test_text_is_shown_as_soon_as_it_can_be_no_call() -> None:
    reader = QwenReader(NAMES)
    assert reader.push("It is < 3 <to") == "It is < 3"
    assert reader.push("ys>") == " <toys>"
    assert LlamaReader(NAMES).push("It") == "It"


def test_a_call_has_an_id_of_its_own_and_what_the_model_wrote() -> None:
    reader = QwenReader(NAMES)
    _read(reader, CALL, TIME)
    first, second = reader.calls
    assert first.raw == CALL
    assert first.id != second.id
    assert json.loads(json.dumps(first.message()))["function"]["arguments"] == {"city": "Paris", "days": 3}


def test_the_way_is_known_by_the_template() -> None:
    assert isinstance(format_of(QWEN), Qwen)
    assert isinstance(format_of(LLAMA), Llama)
    assert [format_of(other) for other in OTHERS] == [None] * len(OTHERS)
