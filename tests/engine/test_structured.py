"""Answers that follow a schema, an expression or choices are whole, and leave those beside them as they are."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from watched import watched_engine

from loadstone import ConfigurationError, GenerationError, ModelManager
from loadstone.config import EngineConfig, GenerationConfig, Sampling
from loadstone.engine import Engine
from loadstone.engine._llguidance import MOST_KEPT
from loadstone.engine.answer import _value
from loadstone.loaded import LoadedModel

Short = Field(max_length=12)


class Colour(Enum):
    red = "red"
    green = "green"
    blue = "blue"


class Person(BaseModel):
    name: str = Short
    age: int = Field(ge=0, le=120)
    colour: Colour


class Order(BaseModel):
    number: int = Field(ge=0, le=9999)
    customer: Person
    items: list[Literal["tea", "coffee", "cake"]] = Field(min_length=1, max_length=3)
    note: str | None = Short
    is_paid: bool


class Tree(BaseModel):
    value: str = Short
    left: Tree | None
    right: Tree | None


WORDS = Enum("Words", {f"w{number}": f"word {number * 7919 % 1000}" for number in range(300)})


class Many(BaseModel):
    word: WORDS  # type: ignore[valid-type]
    others: tuple[WORDS, WORDS]  # type: ignore[valid-type]


@pytest.fixture(scope="module")
def model(smollm2: ModelManager) -> LoadedModel:
    return smollm2.load()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """A small random model of bytes, whose answers have no end of their own."""
    from small_model import write_small_model

    folder = write_small_model(tmp_path_factory.mktemp("structured") / "model")
    config = {"model_config": {"base_model": str(folder), "quantization": "none", "context": 512}}
    with ModelManager(config) as manager:
        yield manager.load()


def _sampling(**settings: Any) -> Sampling:
    from loadstone.config import resolve_generation

    return resolve_generation([("test", GenerationConfig(**settings))])[0]


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Person, Order, Many])
@pytest.mark.parametrize("manner", [{}, {"temperature": 1.5, "seed": 5}], ids=["greedy", "sampled"])
def test_an_answer_follows_its_schema(model: LoadedModel, kind: type[BaseModel], manner: dict[str, Any]) -> None:
    result = model.generate("Make something up, as JSON.", json_schema=kind, max_new_tokens=200, **manner)
    assert result.finish_reason == "stop"
    assert result.parsed == json.loads(result.text)
    assert kind.model_validate_json(result.text).model_dump(mode="json") == result.parsed


def test_an_answer_follows_a_schema_that_is_in_itself(small: LoadedModel) -> None:
    """A tree may grow without end, so that only what is whole is told as a value."""
    results = [small.generate("x", json_schema=Tree, max_new_tokens=400, temperature=2, seed=seed) for seed in range(8)]
    for result in results:
        assert (result.parsed is None) == (result.finish_reason == "length")
    whole = [Tree.model_validate(result.parsed) for result in results if result.parsed is not None]
    assert any(tree.left or tree.right for tree in whole)


@pytest.mark.parametrize("schema", [{"type": "boolean"}, '{"enum": [[1, "a"]]}', Person])
def test_schemas_come_in_any_form(model: LoadedModel, schema: Any) -> None:
    result = model.generate("Hi", json_schema=schema, max_new_tokens=60)
    assert json.loads(result.text) == result.parsed


@pytest.mark.parametrize("manner", [{}, {"temperature": 2.0, "seed": 3}], ids=["greedy", "sampled"])
def test_an_answer_matches_its_expression(model: LoadedModel, manner: dict[str, Any]) -> None:
    pattern = r"[A-Z][a-z]{2,8} was born in (18|19)[0-9]{2}\."
    result = model.generate("Tell me of a painter.", regex=pattern, max_new_tokens=40, **manner)
    assert re.fullmatch(pattern, result.text)
    assert result.finish_reason == "stop"
    assert result.parsed is None


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_one_of_its_choices(model: LoadedModel, seed: int) -> None:
    """Also where one begins as another, and where a word is half a character's bytes."""
    choices = ["red", "reddish", "深红", "红", "a\u0301 la carte", "🟥"]
    result = model.generate("A colour?", choices=choices, temperature=3.0, seed=seed)
    assert result.text in choices
    assert result.finish_reason == "stop"


def test_what_is_cut_off_has_no_value(model: LoadedModel) -> None:
    result = model.generate("Make something up.", json_schema=Order, max_new_tokens=5)
    assert result.finish_reason == "length"
    assert result.parsed is None


def test_a_stop_string_cuts_an_answer_that_follows_a_schema(model: LoadedModel) -> None:
    result = model.generate("Make something up.", json_schema=Order, max_new_tokens=100, stop='"customer"')
    assert result.finish_reason == "stop"
    assert result.text.startswith('{"number": ')
    assert '"customer"' not in result.text
    assert result.parsed is None


def test_chunks_are_the_text(model: LoadedModel) -> None:
    with model.stream("Make something up.", json_schema=Person, max_new_tokens=100) as stream:
        text = "".join(str(chunk) for chunk in stream)
    assert stream.result.parsed == json.loads(text)


def test_logprobs_are_those_of_the_model_and_not_of_the_grammar(model: LoadedModel) -> None:
    """The likeliest token is told also where the grammar does not allow it."""
    result = model.generate("Hi", choices=["Zebra crossing"], logprobs=1)
    assert result.text == "Zebra crossing"
    assert len(result.logprobs) == len(result.tokens)
    first = result.logprobs[0]
    assert first.token == result.tokens[0] != first.top[0].token
    assert first.logprob < first.top[0].logprob


def test_penalties_go_with_a_schema(small: LoadedModel) -> None:
    settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
    result = small.generate("x", json_schema=Order, max_new_tokens=300, **settings)
    Order.model_validate(result.parsed)


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 5000 + "]" * 5000])
def test_what_python_cannot_have_is_no_value(text: str) -> None:
    assert _value(text) is None
    assert _value("[1]") == [1]


# -- beside others ----------------------------------------------------------------------------------------------------


def test_those_beside_say_what_they_say_alone(model: LoadedModel) -> None:
    """A batch of free answers and of others, each of which is what it is alone: greedy ones, and sampled by seed."""
    asked = [
        ("What is a bond?", {}),
        ("Make something up, as JSON.", {"json_schema": Person}),
        ("Name a river.", {"temperature": 0.9, "seed": 4}),
        ("Yes or no?", {"choices": ["yes", "no"]}),
        ("When was that?", {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}", "temperature": 1.0, "seed": 1}),
        ("Count to ten.", {"json_schema": Many, "temperature": 1.0, "seed": 9}),
    ]
    alone = [model.generate(prompt, max_new_tokens=24, **settings).text for prompt, settings in asked]
    streams = [model.stream(prompt, max_new_tokens=24, **settings) for prompt, settings in asked]
    results: list[str] = [""] * len(asked)

    def read(number: int) -> None:
        results[number] = "".join(str(chunk) for chunk in streams[number])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == alone


@pytest.mark.parametrize("manner", [{}, {"temperature": 1.2, "seed": 8}], ids=["greedy", "sampled"])
def test_guesses_change_when_tokens_come_and_never_which(model: LoadedModel, manner: dict[str, Any]) -> None:
    """What can be said in one way alone is computed in the same step, and is always right."""
    sampling = _sampling(json_schema=Order, max_new_tokens=200, **manner)
    with watched_engine(model) as (engine, watched):
        plain = engine.generate("Make something up.", sampling)
        steps = len(watched.passes)
    with watched_engine(model, EngineConfig(speculation=True)) as (engine, watched):
        guessed = engine.generate("Make something up.", sampling)
        assert len(watched.passes) < steps
    assert guessed.tokens == plain.tokens
    assert guessed.usage.accepted_tokens > 0
    assert plain.usage.drafted_tokens == 0


def test_a_known_prefix_changes_nothing(model: LoadedModel) -> None:
    prompt = "Tell me of somebody whose name is long, and do it in the form of JSON, please."
    first = model.generate(prompt, json_schema=Person, max_new_tokens=12)
    second = model.generate(prompt, json_schema=Person, max_new_tokens=12)
    assert second.usage.cached_tokens > 0
    assert second.text == first.text


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "/properties/a/type", "strin"),
        ({"items": {"anyOf": [{}, {"not": {}}]}}, "/items/anyOf/1/not", "not supported"),
        ({"prefixItems": [{}, {"uniqueItems": True, "type": "array"}]}, "/prefixItems/1/uniqueItems", "uniqueItems"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"pattern": "(a"}}}, "/$defs/a~1b/pattern", "unclosed group"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "/properties/a/$ref", "does not exist"),
        ({"properties": {"a": {"$ref": "https://x.y/z"}}}, "/properties/a/$ref", "https://x.y/z"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "/$defs/a/$ref", "no answer"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "/required", "'a'"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "/minLength", "greater"),
        ({"enum": []}, "/enum", "empty"),
        ({"format": "shoe-size", "type": "string"}, "/format", "shoe-size"),
        ({"properties": 5}, "/properties", "object"),
    ],
)
def test_a_schema_is_refused_with_the_place(small: LoadedModel, schema: Any, place: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^json_schema at {re.escape(place)}: .*{re.escape(reason)}"):
        small.stream("x", json_schema=schema)


def test_of_two_mistakes_that_are_alike_the_first_is_told(small: LoadedModel) -> None:
    schema = {"properties": {"a": {"items": {"type": "strin"}}, "b": {"type": "strin"}}}
    with pytest.raises(ConfigurationError, match="/properties/a/items/type"):
        small.stream("x", json_schema=schema)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("ab(c", "regex at character 3: unclosed group"),
        ("a(?=b)", "regex at character 2: look-around"),
        (r"a\b", "regex: lookarounds"),
        (r"(a)\1", "regex at character 4: backreferences"),
    ],
)
def test_an_expression_is_refused_with_the_place(small: LoadedModel, pattern: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        small.stream("x", regex=pattern)


def test_a_batch_is_refused_as_a_whole_before_anything_is_computed(small: LoadedModel) -> None:
    with watched_engine(small) as (engine, watched):
        with pytest.raises(ConfigurationError, match="/type"):
            engine.generate_batch(["a", "b"], _sampling(json_schema={"type": "x"}))
        assert watched.passes == []


def test_an_expression_that_explodes_ends_its_own_answer_alone(small: LoadedModel) -> None:
    """How many states it comes to shows when it is followed, and is bounded; who asks beside gets an answer."""
    with watched_engine(small) as (engine, _):
        beside = engine.stream("x", Sampling(max_new_tokens=40))
        exploding = engine.stream("x", _sampling(regex="(a?){500}a{500}", max_new_tokens=40))
        with pytest.raises(GenerationError, match="cannot follow its grammar any further"):
            list(exploding)
        list(beside)
        assert beside.result.usage.completion_tokens == 40


def test_no_more_grammars_are_kept_than_said(small: LoadedModel) -> None:
    for number in range(MOST_KEPT + 5):
        small.generate("x", choices=[f"{number}"])
    assert len(small.engine._grammars._made) == MOST_KEPT
    assert small.generate("x", choices=["0"]).text == "0"  # which is made again


def test_nothing_of_grammars_is_there_before_somebody_asks(model: LoadedModel) -> None:
    with watched_engine(model) as (engine, _):
        engine.generate("Hi", Sampling(max_new_tokens=2))
        assert engine._grammars._taken is None


def test_a_tokenizer_whose_spelling_is_not_known_is_refused(small: LoadedModel, tmp_path: Path) -> None:
    from dataclasses import replace

    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    engine = Engine(small.decoder, replace(small.tokenizer, backend=words), None, small.plan)
    with pytest.raises(GenerationError, match="spells tokens"):
        engine.generate("a", _sampling(choices=["a"]))
    engine.close()
