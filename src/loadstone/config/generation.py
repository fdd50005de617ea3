"""How answers are made: what was said about it, layer by layer, and what is in force in the end.

Knows numbers and their ranges, nothing of logits or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from loadstone.errors import ConfigurationError

from .constraint import check_size, schema_text
from .wish import Wish, show

# Dividing float32 logits by less overflows, and the choice is the greedy one long before that.
_COLDEST = 1e-6
CONSTRAINTS = ("json_schema", "regex", "choices")  # what an answer must follow: one of them


class GenerationConfig(Wish):
    """What somebody said about how answers are made; None is "not said", and leaves it to the layer below."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=2**31, examples=["512"])
    """The most tokens that an answer may have; 512 where nobody says."""

    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False, examples=["0.7"])
    """What logits are divided by before sampling: 0, where nobody says, is greedy (always the likeliest
    token), 1 the model as it is."""

    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False, examples=["0.9"])
    """Sample only from the likeliest tokens that together have this probability; 1, where nobody says, is
    all."""

    top_k: int | None = Field(default=None, ge=0, le=2**31, examples=["40"])
    """Sample only from this many of the likeliest tokens; 0, where nobody says, is all."""

    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, examples=["0.05"])
    """Drop tokens less likely than this share of the likeliest one's probability; 0, where nobody says,
    drops none."""

    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=["1.1"])
    """What the logits of tokens already seen, prompt included, are divided by (multiplied, where negative);
    1, where nobody says, is no penalty."""

    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False, examples=["0.5"])
    """What is taken from the logit of each token that the answer already has; 0 where nobody says."""

    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False, examples=["0.5"])
    """What is taken from a token's logit for each time that the answer already has it; 0 where nobody
    says."""

    stop: tuple[str, ...] | None = Field(default=None, examples=['["User:"]'])
    """Strings that end the answer and are not part of it, as one text or a list; none where nobody says."""

    seed: int | None = Field(default=None, ge=0, le=2**63 - 1, examples=["42"])
    """What sampling starts from, so that an answer can be had again; a fresh one each time where nobody
    says."""

    logprobs: int | None = Field(default=None, ge=0, le=100, examples=["5"])
    """Whether each token of the answer comes with the logarithm of its probability (`result.logprobs`), and
    with how many of the likeliest others; none come where nobody says."""

    json_schema: str | None = Field(default=None, examples=['{"type": "object"}'])
    """A JSON schema that the answer follows, as a mapping, JSON text, or a pydantic model (from Python); any answer
    where nobody says. `result.parsed` has the value."""

    regex: str | None = Field(default=None, min_length=1, examples=['"[0-9]{4}-[0-9]{2}"'])
    """A regular expression (Rust's syntax) that the whole answer matches; any answer where nobody says."""

    choices: tuple[str, ...] | None = Field(default=None, examples=['["yes", "no"]'])
    """The texts that the answer may be; any answer where nobody says."""

    @field_validator("json_schema", mode="before")
    @classmethod
    def _json_schema(cls, value: Any) -> Any:
        return None if value is None else schema_text(value)

    @field_validator("regex", "choices", mode="after")
    @classmethod
    def _alone(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            check_size(value if isinstance(value, str) else "".join(value))
            other = next((name for name in CONSTRAINTS if info.data.get(name) is not None), None)
            if other is not None:
                raise ValueError(f"there is a {other} beside it, and an answer follows one of them")
        return value

    @field_validator("choices", mode="before")
    @classmethod
    def _choices(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) and one for one in value):
            raise ValueError(f"it must be a list of texts (in quotes) that are not empty, not {show(value)}")
        return tuple(dict.fromkeys(value))

    @field_validator("temperature", mode="after")
    @classmethod
    def _temperature(cls, value: float | None) -> float | None:
        return 0.0 if value is not None and value < _COLDEST else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        if value is None:
            return None
        strings = (value,) if isinstance(value, str) else value
        if not isinstance(strings, (list, tuple)) or not all(isinstance(one, str) for one in strings):
            raise ValueError(f"it must be text or a list of texts (in quotes), not {show(value)}")
        if not all(strings):
            raise ValueError("an empty stop string would end every answer at once")
        return tuple(strings)


@dataclass(frozen=True)
class Sampling:
    """How an answer is made: every value decided. The default is greedy: the same prompt, the same answer."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """True when always the likeliest token is taken."""
        return self.temperature == 0


def resolve_generation(
    layers: Sequence[tuple[str, GenerationConfig]],
) -> tuple[Sampling, Mapping[str, str]]:
    """Return what is in force, and the origin of each value.

    `layers` are (origin, what was said there), later ones win field by field, and what an answer must follow takes the
    place of anything else that it must have followed. The origin is "default" where nobody said anything.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(GenerationConfig.model_fields, "default")
    for origin, said in layers:
        for name in GenerationConfig.model_fields:
            value = getattr(said, name)
            if value is None:
                continue
            for other in CONSTRAINTS if name in CONSTRAINTS else ():
                values.pop(other, None)
                origins[other] = "default"
            values[name] = value
            origins[name] = origin
    return Sampling(**values), MappingProxyType(origins)


def tell_generation(sampling: Sampling, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return each value in force and where it comes from, as plain values."""
    return {name: {"value": value, "from": origins[name]} for name, value in asdict(sampling).items()}


def generation_from_checkpoint(mapping: Mapping[str, Any]) -> GenerationConfig:
    """Return what a checkpoint's generation_config.json says, ignoring what is unknown or cannot be meant.

    `do_sample: false` is greedy whatever the temperature beside it; `stop_strings` are the stop strings.
    Nothing here raises: the file is the model maker's, and its user cannot mend it.
    """
    if not isinstance(mapping, Mapping):
        return GenerationConfig()
    known = GenerationConfig.model_fields.keys() - CONSTRAINTS  # which only users can mean
    said = {name: mapping[name] for name in known if name in mapping}
    if "stop_strings" in mapping:
        said["stop"] = mapping["stop_strings"]
    if mapping.get("do_sample") is False:
        said["temperature"] = 0
    elif mapping.get("do_sample") is True:
        said.setdefault("temperature", 1.0)  # what the file's format has where it says no temperature
    return GenerationConfig(**{name: value for name, value in said.items() if _can_be_meant(name, value)})


def _can_be_meant(name: str, value: Any) -> bool:
    try:
        GenerationConfig(**{name: value})
    except ConfigurationError:
        return False
    return value is not None
