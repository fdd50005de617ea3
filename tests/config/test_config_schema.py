"""Claims about single settings, and about wishes as objects."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from loadstone.config import GenerationConfig, LoadConfig, LoadstoneConfig, RetryConfig, generation, schema
from loadstone.errors import ConfigurationError


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15", "mps", "mps:0", "xpu:1", "npu"])
def test_devices_of_the_right_form_are_taken(device: str) -> None:
    assert LoadConfig(device=device).device == device
    assert LoadConfig(device=f" {device.upper()} ").device == device


@pytest.mark.parametrize(
    "device",
    ["", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda 1", "gpu0", "cpu:0", "auto:1", "mps:1", "cuda:99999"],
)
def test_other_devices_are_refused_with_what_to_write(device: str) -> None:
    with pytest.raises(ConfigurationError, match="write ") as caught:
        LoadConfig(device=device)
    assert caught.value.key == "device"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, "none"),
        ("none", "none"),
        (4, "4bit"),
        (8, "8bit"),
        ("4", "4bit"),
        ("NF4", "nf4"),
        ("my_own-2", "my_own-2"),
    ],
)
def test_quantization_is_a_lower_case_name(said: object, meant: str) -> None:
    assert LoadConfig(quantization=said).quantization == meant  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [True, 5, 0, -4, 4.0, "", "4 bit", "q4/k", ["4bit"]])
def test_other_quantizations_are_refused(said: object) -> None:
    with pytest.raises(ConfigurationError, match="quantization"):
        LoadConfig(quantization=said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "meant"),
    [(4096, 4096), ("4096", 4096), ("32k", 32_768), ("1M", 2**20), ("8 K", 8192), (None, None)],
)
def test_context_is_tokens_with_k_as_1024(said: object, meant: int | None) -> None:
    assert LoadConfig(context=said).context == meant  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [0, -1, True, 1.5, "0k", "k", "-1k", "32kb", "long", 2**40, "9" * 5000])
def test_other_contexts_are_refused(said: object) -> None:
    with pytest.raises(ConfigurationError, match="context"):
        LoadConfig(context=said)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [0, -1, True, 1.5, "", "20", "GB", "9" * 400 + "GB", 2**63, b"20GB"])
def test_sizes_that_cannot_be_meant_are_refused(said: object) -> None:
    with pytest.raises(ConfigurationError, match="max_memory"):
        LoadConfig(max_memory=said)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", ["", "  ", None, 3])
def test_a_model_must_be_named(said: object) -> None:
    with pytest.raises(ConfigurationError, match="base_model"):
        LoadConfig(base_model=said)  # type: ignore[arg-type]


def test_wishes_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LoadConfig().device = "cpu"  # type: ignore[misc]


def test_an_unknown_setting_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'temperature'"):
        GenerationConfig(temprature=1)  # type: ignore[call-arg]


def test_the_load_section_goes_by_both_its_names() -> None:
    by_file_name = LoadstoneConfig.model_validate({"model_config": {"device": "cpu"}})
    assert by_file_name == LoadstoneConfig(model=LoadConfig(device="cpu"))
    assert "model_config" in by_file_name.model_dump(by_alias=True)


def test_an_error_in_a_section_given_as_a_mapping_keeps_its_key() -> None:
    sections: dict[str, Any] = {"model_config": {"device": "nowhere!"}}
    with pytest.raises(ConfigurationError, match="'nowhere!' is not a device") as caught:
        LoadstoneConfig(**sections)
    assert caught.value.key == "model_config.device"


def test_an_error_from_pydantic_is_not_shown_as_its_cause() -> None:
    with pytest.raises(ConfigurationError) as caught:
        RetryConfig(max_attempts=0)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("module", [schema, generation])
def test_every_setting_has_a_docstring(module: object) -> None:
    """The text under each field is its documentation."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):  # type: ignore[arg-type]
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Wish" for base in node.bases):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                    assert isinstance(after.value, ast.Constant)


def test_configuration_is_read_without_heavy_libraries() -> None:
    code = (
        "import sys, loadstone.config as c; c.ConfigManager({});"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes', 'numpy', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
