"""What an answer must follow: in which forms it is said, and what is refused before any model is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from loadstone.config import ConfigManager, GenerationConfig, generation_from_checkpoint, resolve_generation
from loadstone.config.constraint import DEEPEST_SCHEMA, LARGEST_SCHEMA
from loadstone.config.json_schema import KEYWORDS, MOST_PROPERTIES, pointer, problem
from loadstone.errors import ConfigurationError


class Inner(BaseModel):
    text: str


class Outer(BaseModel):
    inner: Inner
    others: list[Inner] = []


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    text: str


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def _shared(levels: int) -> dict[str, Any]:
    """Return a schema that is small in memory, and would be huge when written."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"anyOf": [schema, schema]}
    return schema


IN_ITSELF: dict[str, Any] = {}
IN_ITSELF["items"] = IN_ITSELF


def test_a_schema_may_be_a_mapping_or_its_text() -> None:
    """The order of properties is kept: answers have them in it."""
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    for said in (schema, json.dumps(schema), json.dumps(schema, indent=4)):
        assert GenerationConfig(json_schema=said).json_schema == json.dumps(schema)  # type: ignore[arg-type]


def test_a_pydantic_model_is_a_schema_without_properties_that_it_would_drop() -> None:
    text = GenerationConfig(json_schema=Outer).json_schema  # type: ignore[arg-type]
    assert text is not None
    schema = json.loads(text)
    assert schema["additionalProperties"] is schema["$defs"]["Inner"]["additionalProperties"] is False
    kept = GenerationConfig(json_schema=Open).json_schema  # type: ignore[arg-type]
    assert kept is not None
    assert json.loads(kept)["additionalProperties"] is True


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (5, "it must be a JSON schema"),
        ("[1]", "it must be a JSON schema"),
        (int, "it must be a JSON schema"),
        ('{"a":\n ?}', "line 2 column 2"),
        ("[" * 100_000, "nested deeper"),
        (_nested(DEEPEST_SCHEMA + 1), "below /items/items"),
        (_shared(40), "values"),
        (IN_ITSELF, "nested deeper"),
        ({"enum": ["x" * LARGEST_SCHEMA]}, "characters"),
        (" " * 10 * LARGEST_SCHEMA, "characters"),
        ({"maximum": float("inf")}, "not JSON"),
        ({"enum": {1, 2}}, "not JSON"),
        ({"const": "\ud800"}, "surrogate"),
        ({"items": {"propertys": {}}}, "at /items/propertys: 'propertys' is no keyword; did you mean 'properties'?"),
        ({"properties": {"a": {"max_length": 3}}}, "at /properties/a/max_length: .*'maxLength'"),
        ({"properties": {str(n): {} for n in range(MOST_PROPERTIES + 1)}}, "at /properties: an object of 1001"),
    ],
    ids=range(16),
)
def test_what_is_no_schema_is_refused(schema: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        GenerationConfig(json_schema=schema)
    assert caught.value.key == "json_schema"
    assert len(str(caught.value)) < 500


def test_a_schema_may_be_nested_as_deep_as_is_said() -> None:
    GenerationConfig(json_schema=_nested(DEEPEST_SCHEMA))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "schema",
    [
        {"x-guidance": {}, "$comment": "", "title": "T", "discriminator": {}, "nullable": True, "example": 1},
        {"properties": {"typ": {}, "propertys": {}}},  # names, not keywords
        {"enum": [{"typ": 1}], "default": {"typ": 1}},
        {"whatever anybody notes": 1},
    ],
)
def test_notes_and_names_are_no_misspelled_keywords(schema: dict[str, Any]) -> None:
    assert problem(schema) is None


@given(st.sampled_from(sorted(KEYWORDS)), st.lists(st.sampled_from(["properties", "$defs", "items"]), max_size=4))
def test_keywords_are_right_wherever_they_are(word: str, way: list[str]) -> None:
    schema: dict[str, Any] = {word: True}
    for step in way:
        schema = {step: schema if step == "items" else {"a": schema}}
    assert problem(schema) is None


@given(st.lists(st.text(max_size=5), max_size=4))
def test_a_pointer_leads_back(path: list[str]) -> None:
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer(tuple(path)).split("/")[1:]]
    assert steps == path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("regex", ""), ("regex", 5), ("regex", "a" * (LARGEST_SCHEMA + 1)), ("choices", []), ("choices", "yes"),
        ("choices", ["a", ""]), ("choices", [1]), ("choices", ["\ud800"]),
    ],
)  # fmt: skip
def test_what_is_no_expression_and_no_choice_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        GenerationConfig(**{name: value})
    assert caught.value.key == name


def test_an_answer_follows_one_thing() -> None:
    with pytest.raises(ConfigurationError, match="regex: there is a json_schema beside it"):
        GenerationConfig(json_schema={}, regex="a")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="choices: there is a regex beside it"):
        GenerationConfig(regex="a", choices=["a"])  # type: ignore[arg-type]


def test_what_a_call_wants_to_be_followed_takes_the_place_of_what_the_configuration_wants() -> None:
    configured = GenerationConfig(json_schema={"type": "object"}, seed=1)  # type: ignore[arg-type]
    sampling, origins = resolve_generation([("file", configured), ("argument", GenerationConfig(regex="a"))])
    assert (sampling.json_schema, sampling.regex, sampling.seed) == (None, "a", 1)
    assert (origins["json_schema"], origins["regex"]) == ("default", "argument")


def test_a_checkpoint_has_no_say_in_what_is_followed() -> None:
    said = generation_from_checkpoint({"regex": "a", "choices": ["b"], "json_schema": {}, "top_k": 3})
    assert said == GenerationConfig(top_k=3)


def test_files_and_variables_say_it_too(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("generation:\n  json_schema:\n    type: array\n    items: {type: integer}\n")
    assert ConfigManager(file).config.generation.json_schema == '{"type": "array", "items": {"type": "integer"}}'
    monkeypatch.setenv("LOADSTONE_GENERATION__CHOICES", '["yes", "no"]')
    assert ConfigManager({}).config.generation.choices == ("yes", "no")
    monkeypatch.delenv("LOADSTONE_GENERATION__CHOICES")
    monkeypatch.setenv("LOADSTONE_GENERATION__JSON_SCHEMA", '{"type": "null"}')
    assert ConfigManager({}).config.generation.json_schema == '{"type": "null"}'
