"""`quantization` written as a mapping: the words of transformers' BitsAndBytesConfig, and what they mean here.

Knows which strategy is meant and what of the rest each kind of device can do; keeps and multiplies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .wish import Wish, show


class BitsAndBytes(Wish):
    """How weights are kept, field by field as in transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = Field(default=False, examples=["true"])
    """Whether the layers' matrices are kept in 4 bits."""

    load_in_8bit: bool = Field(default=False, examples=["true"])
    """Whether they are kept in 8 bits. Without either nothing is quantised."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", examples=['"nf4"'])
    """The 4-bit code. NF4 by default, where transformers takes FP4: it is as large and errs less."""

    bnb_4bit_use_double_quant: bool = Field(default=True, examples=["true"])
    """Whether the blocks' scales are quantised too."""

    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, examples=["bfloat16"]
    )
    """The type that products are made in. None by default: what the device is best at."""

    bnb_4bit_quant_storage: str = Field(default="uint8", examples=['"uint8"'])
    """The type of the tensors that hold the codes; it changes no number."""

    llm_int8_threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False, examples=["6.0"])
    """From which size on an activation counts as an outlier of LLM.int8()."""

    llm_int8_skip_modules: tuple[str, ...] = Field(default=(), examples=['["lm_head"]'])
    """The modules that stay unquantised, under 4 bits too, by the whole of their name or the end or beginning of it:
    `lm_head`, `down_proj`, `model.layers.0`."""

    llm_int8_enable_fp32_cpu_offload: bool = Field(default=False, examples=["false"])
    """Whether what does not fit on a GPU may stay on the processor."""

    llm_int8_has_fp16_weight: bool = Field(default=False, examples=["false"])
    """Whether 8-bit weights keep a copy in 16 bits, for training."""

    @field_validator("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return None if value is None else str(value).removeprefix("torch.")

    @field_validator("llm_int8_skip_modules", mode="before")
    @classmethod
    def _skip_modules(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"{show(value)} is one name; write a list of names, [{value}]")
        return () if value is None else tuple(value) if isinstance(value, (list, set)) else value

    @model_validator(mode="after")
    def _one_of_both(self) -> BitsAndBytes:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of them")
        return self

    @property
    def strategy(self) -> str:
        """The strategy that is meant."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else "none"

    def differences(self, device_kind: str) -> tuple[str, ...]:
        """Return what is done otherwise than asked on a kind of device, each with what is done instead."""
        return tuple(self._differences(device_kind))

    def _differences(self, kind: str) -> Iterator[str]:
        if self.load_in_4bit:
            if self.bnb_4bit_quant_type == "fp4":
                yield "bnb_4bit_quant_type fp4 was asked for: NF4 is kept, which is as large and errs less"
            if kind == "cuda" and not self.bnb_4bit_use_double_quant:
                yield "bnb_4bit_use_double_quant is off: scales are quantised to 8 bits all the same"
            if kind != "cuda" and self.bnb_4bit_use_double_quant:
                yield f"bnb_4bit_use_double_quant is on: on {kind} scales have 16 bits, which is nearer to the weights"
        if self.load_in_8bit and self.llm_int8_threshold:
            how = "keep 15 bits" if kind == "cpu" else "are rounded with their row"
            yield f"llm_int8_threshold is {self.llm_int8_threshold:g}: outliers go as the others, activations {how}"
        if kind == "cpu" and self.bnb_4bit_compute_dtype not in (None, "float32"):
            yield f"bnb_4bit_compute_dtype {self.bnb_4bit_compute_dtype} was asked for: on cpu products are float32"
        if self.bnb_4bit_quant_storage != "uint8":
            yield f"bnb_4bit_quant_storage {self.bnb_4bit_quant_storage} was asked for: codes are bytes"
        if self.llm_int8_enable_fp32_cpu_offload:
            yield "llm_int8_enable_fp32_cpu_offload is on: a model is on one device; choose one that it fits on"
        if self.llm_int8_has_fp16_weight:
            yield "llm_int8_has_fp16_weight is on: weights are kept in 8 bits alone"


def bits_and_bytes(value: object) -> BitsAndBytes:
    """Return what a mapping, or an object like transformers' BitsAndBytesConfig, says.

    Raises ValueError for what is neither, and ConfigurationError for a field that is not known or cannot be meant.
    """
    to_dict = getattr(value, "to_dict", None)
    said = value if isinstance(value, Mapping) else to_dict() if callable(to_dict) else None
    if not isinstance(said, Mapping):
        raise ValueError(f"{show(value)} is not the name of a strategy; write none, 8bit, 4bit, int4 or auto")
    fields = {str(key): one for key, one in said.items() if not str(key).startswith("_")}
    method = fields.pop("quant_method", "bitsandbytes")
    if getattr(method, "value", method) != "bitsandbytes":
        raise ValueError(f"quant_method {show(method)}: only bitsandbytes is configured like this")
    return BitsAndBytes(**fields)
