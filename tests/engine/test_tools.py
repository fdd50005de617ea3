"""Functions that are offered to a model, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from tool_templates import LLAMA, QWEN

from loadstone import ConfigurationError, ModelManager, ToolCall
from loadstone.checkpoint.template import ChatTemplate
from loadstone.config import Sampling
from loadstone.engine import Engine
from loadstone.engine.tools import offered, with_calls
from loadstone.loaded import LoadedModel

TEMPLATE = ChatTemplate(QWEN)


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str | None = Field(default=None, max_length=20)


def get_weather(
    place: Place, days: Annotated[int, Field(ge=1, le=9, description="how many")] = 1, unit: Literal["C", "F"] = "C"
) -> str:
    """Tell the weather.

    As it will be.
    """
    return f"{place} {days} {unit}"


def get_time(zone: Literal["UTC", "CET"]) -> None: ...


CLOCK = {"name": "clock", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def qwen(smollm2: ModelManager) -> Iterator[LoadedModel]:
    """The bundled model, told of functions and asked for calls in Qwen's way."""
    yield from _with_template(smollm2, QWEN)


@pytest.fixture(scope="module")
def llama(smollm2: ModelManager) -> Iterator[LoadedModel]:
    yield from _with_template(smollm2, LLAMA)


def _with_template(smollm2: ModelManager, source: str) -> Iterator[LoadedModel]:
    model = smollm2.load()
    engine = Engine(model.decoder, model.tokenizer, ChatTemplate(source), replace(model.plan, context=1024))
    yield replace(model, engine=engine)
    engine.close()


def _told(*tools: Any) -> list[dict[str, Any]]:
    found = offered(tools, "auto", TEMPLATE)
    assert found is not None
    return [one["function"] for one in found.definitions]


# -- what is told of functions ----------------------------------------------------------------------------------------


def test_a_python_function_is_told_by_its_hints_and_its_docstring() -> None:
    (told,) = _told(get_weather)
    assert told["name"] == "get_weather"
    assert told["description"] == "Tell the weather.\n\nAs it will be."
    parameters = told["parameters"]
    assert parameters["required"] == ["place"]
    assert parameters["properties"]["days"] == {
        "default": 1, "type": "integer", "minimum": 1, "maximum": 9, "description": "how many",
    }  # fmt: skip
    assert parameters["properties"]["unit"] == {"default": "C", "type": "string", "enum": ["C", "F"]}
    assert parameters["$defs"]["Place"]["required"] == ["city"]


def test_schemas_come_bare_or_in_openais_form_and_parameters_may_be_missing() -> None:
    assert _told(CLOCK) == _told({"type": "function", "function": CLOCK}) == [CLOCK]
    assert _told({"name": "now"}) == [{"parameters": {"type": "object", "properties": {}}, "name": "now"}]
    assert _told(Place)[0]["name"] == "Place"


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        (get_time, "tools is a list"),
        ("get_time", "tools is a list"),
        (CLOCK, "tools is a list"),
        ([5], r"tools\[0\].*it is 5"),
        ([CLOCK, {"function": 5}], r"tools\[1\].*its function is 5"),
        ([{"name": "a b"}], "its name is 'a b'"),
        ([{"parameters": {}}], "its name is nothing"),
        ([{"name": "a", "parameters": [1]}], "its parameters are"),
        ([{"name": "a", "parameters": {"x": {1}}}], "not JSON"),
        ([lambda x: x], "its name is '<lambda>'"),
        ([print], "no schema can be made"),
        ([lambda *many: many], "no names to be given by|no schema"),
        ([CLOCK, CLOCK], "'clock'"),
        ([{"name": "required"}], "'required'"),
    ],
)
def test_what_is_no_function_is_refused_by_its_place(tools: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        offered(tools, "auto", TEMPLATE)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'clocks', and the functions are clock"):
        offered([CLOCK], "clocks", TEMPLATE)
    with pytest.raises(ConfigurationError, match="there are no tools"):
        offered([], "required", TEMPLATE)
    assert offered([CLOCK], "none", TEMPLATE) is None
    assert offered([], "auto", None) is None


@pytest.mark.parametrize("template", [None, ChatTemplate("{{ messages[0].content }}")])
def test_a_model_that_is_not_told_of_functions_is_not_offered_any(template: ChatTemplate | None) -> None:
    with pytest.raises(ConfigurationError, match="does not tell it of functions"):
        offered([CLOCK], "auto", template)


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        ToolCall("f", {"a": 1}, "raw", "c1"),
    ],
)
def test_calls_in_messages_come_in_any_form(call: Any) -> None:
    message = with_calls({"role": "assistant", "content": None, "tool_calls": [call]})
    told = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [told]}


@pytest.mark.parametrize("calls", [None, [], ()])
def test_a_message_without_calls_says_nothing_of_them(calls: Any) -> None:
    assert with_calls({"role": "assistant", "content": "x", "tool_calls": calls}) == {
        "role": "assistant",
        "content": "x",
    }


@pytest.mark.parametrize(
    "calls", [5, "f", [5], [{"function": {}}], [{"name": "f", "arguments": "{"}], [{"name": "f", "arguments": 1}]]
)
def test_what_is_no_call_in_a_message_is_refused(calls: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"tool_calls|call"):
        with_calls({"role": "assistant", "content": "", "tool_calls": calls})


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["qwen", "llama"])
@pytest.mark.parametrize("choice", ["required", "get_time", "get_weather"])
@pytest.mark.parametrize("manner", [{}, {"temperature": 1.5, "seed": 1}], ids=["greedy", "sampled"])
def test_a_call_that_must_be_made_is_made(
    request: pytest.FixtureRequest, way: str, choice: str, manner: dict[str, Any]
) -> None:
    """And its arguments are what the function takes."""
    model: LoadedModel = request.getfixturevalue(way)
    tools = [get_weather, get_time]
    result = model.generate("Hi", tools=tools, tool_choice=choice, max_new_tokens=90, **manner)
    assert result.tool_calls
    call = result.tool_calls[0]
    assert choice in ("required", call.name)
    if call.name == "get_time":
        assert call.arguments["zone"] in ("UTC", "CET")
    else:
        Place.model_validate(call.arguments["place"])
        get_weather(**call.arguments)
    if result.finish_reason == "stop":
        assert (result.text, result.tool_errors) == ("", ())
        assert len(result.tool_calls) == 1 or choice == "required"


def test_chunks_show_no_part_of_a_call(qwen: LoadedModel) -> None:
    with qwen.stream("Hi", tools=[get_time], tool_choice="get_time", max_new_tokens=100) as stream:
        chunks = [chunk.text for chunk in stream]
    assert "".join(chunks) == stream.result.text == ""
    assert stream.result.tool_calls[0].name == "get_time"


def test_a_conversation_goes_on_after_a_call(qwen: LoadedModel) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the time?"}]
    result = qwen.generate(messages, tools=[get_time], tool_choice="get_time", max_new_tokens=60)
    messages += [result.message, {"role": "tool", "content": "It is noon."}]
    tools = qwen.engine.offer([get_time], "auto", Sampling())
    read = qwen.tokenizer.decode(qwen.engine.encode(messages, tools=tools), skip_special_tokens=False)
    assert f"{result.tool_calls[0].raw}<|im_end|>" in read
    assert "<tool_response>\nIt is noon.\n</tool_response>" in read
    assert '"name": "get_time"' in read
    assert qwen.generate(messages, tools=[get_time], max_new_tokens=4).usage.completion_tokens > 0


def test_who_need_not_call_answers_as_without_a_grammar(qwen: LoadedModel) -> None:
    """Only the prompt is another: the same tokens give the same answer."""
    tools = qwen.engine.offer([get_time], "auto", Sampling())
    text = qwen.tokenizer.decode(qwen.engine.encode("Hi", tools=tools), skip_special_tokens=False)
    told = qwen.generate("Hi", tools=[get_time], max_new_tokens=12)
    assert told.tokens == qwen.generate(text, raw=True, max_new_tokens=12).tokens


def test_functions_that_must_not_be_called_are_not_told_of(qwen: LoadedModel) -> None:
    asked = qwen.generate("Hi", tools=[get_time], tool_choice="none", max_new_tokens=8)
    plain = qwen.generate("Hi", max_new_tokens=8)
    assert (asked.text, asked.usage.prompt_tokens) == (plain.text, plain.usage.prompt_tokens)


def test_a_batch_calls_each_for_itself(qwen: LoadedModel) -> None:
    results = qwen.generate_batch(["UTC", "CET"], tools=[get_time], tool_choice="get_time", max_new_tokens=60)
    assert [result.tool_calls[0].name for result in results] == ["get_time"] * 2


def test_parameters_that_no_grammar_can_be_made_of_are_refused_with_the_place(qwen: LoadedModel) -> None:
    """Where the model decides they are only told, and nothing is refused."""
    wrong = {"name": "wrong", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(ConfigurationError, match=r"^tools\[1\]\.parameters at /properties/a/not: not supported"):
        qwen.generate("Hi", tools=[CLOCK, wrong], tool_choice="required")
    assert qwen.generate("Hi", tools=[CLOCK, wrong], max_new_tokens=2).usage.completion_tokens == 2
    assert qwen.generate("Hi", tools=[CLOCK, wrong], tool_choice="clock", max_new_tokens=60).tool_calls


@pytest.mark.parametrize("settings", [{"json_schema": {}}, {"regex": "a"}, {"choices": ["a"]}])
def test_an_answer_calls_or_follows(qwen: LoadedModel, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"follows {next(iter(settings))}"):
        qwen.generate("Hi", tools=[CLOCK], **settings)
    assert qwen.generate("Hi", tools=[CLOCK], tool_choice="none", max_new_tokens=2, **settings).text


def test_raw_text_tells_of_no_functions(qwen: LoadedModel) -> None:
    with pytest.raises(ConfigurationError, match="raw=True"):
        qwen.generate("Hi", raw=True, tools=[CLOCK])


def test_references_in_parameters_are_theirs(llama: LoadedModel) -> None:
    """Two functions may name different things alike."""
    tools = [
        {"name": name, "parameters": {
            "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
            "additionalProperties": False, "$defs": {"a": {"const": name}},
        }}
        for name in ("one", "two")
    ]  # fmt: skip
    for name in ("one", "two"):
        (call,) = llama.generate("Hi", tools=tools, tool_choice=name, max_new_tokens=60).tool_calls
        assert (call.name, json.dumps(call.arguments)) == (name, json.dumps({"a": name}))
