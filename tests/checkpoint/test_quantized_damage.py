"""Quantised checkpoints that are damaged or hostile are refused, by headers where these tell, and never crash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantized_checkpoints import FORMATS, write_checkpoint
from tiny_models import Folder, random_tensors, tiny_config

from loadstone.checkpoint import inspect, open_weights
from loadstone.errors import CheckpointError

MODULE = "model.layers.0.self_attn.q_proj"  # 256 × 256
STATE = "weight.quant_state.bitsandbytes__nf4"
Change = Callable[[dict[str, torch.Tensor]], Any]


def as_state(**changes: Any) -> torch.Tensor:
    said = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [256, 256], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.04, **changes,
    }  # fmt: skip
    return as_bytes(json.dumps(said).encode())


def as_bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def changed(suffix: str, value: torch.Tensor | None) -> Change:
    """Return what puts another tensor in a tensor's place, or leaves it out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{MODULE}.{suffix}")
        if value is not None:
            tensors[f"{MODULE}.{suffix}"] = value

    return change


def at(suffix: str, place: int, value: int) -> Change:
    """Return what changes one number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.{suffix}"][place] = value

    return change


NF4, INT8, AWQ, GPTQ = "bitsandbytes NF4", "bitsandbytes 8 bits", "AWQ", "GPTQ, groups of 32, act-order"
PACKED, FP8 = "compressed-tensors W4A16, groups of 32, not symmetric", "FP8, blocks of 128 × 128"
INT32 = torch.int32

TOLD_BY_HEADERS = [
    (NF4, changed("weight.absmax", None), "'weight.absmax' is missing beside"),
    (NF4, changed("weight.quant_map", None), "'weight.quant_map' is missing"),
    (NF4, changed("weight.nested_quant_map", None), "'weight.nested_quant_map' is missing"),
    (NF4, changed("weight", torch.zeros(32767, 1, dtype=torch.uint8)), "'weight' has 32767 bytes"),
    (NF4, changed("weight", torch.zeros(256, 256, dtype=torch.float64)), "'weight' is of type F64"),
    (NF4, changed("weight.absmax", torch.zeros(1023, dtype=torch.uint8)), "has 1023 numbers, which fit 65536"),
    (NF4, changed("weight.quant_map", torch.zeros(15)), "'weight.quant_map' has shape [15]; it must be [16]"),
    (NF4, changed("weight.nested_absmax", torch.zeros(0)), "'weight.nested_absmax' has 0 numbers for 1024 blocks"),
    (NF4, changed(STATE, torch.zeros(1 << 20, dtype=torch.uint8)), "its quant_state claims 1048576 bytes"),
    (INT8, changed("SCB", torch.zeros(255)), "'SCB' has shape [255]; it must be [256]"),
    (INT8, changed("weight", torch.zeros(256, 255, dtype=torch.int8)), "'weight' has shape [256, 255]"),
    (AWQ, changed("scales", None), "'scales' is missing beside bias, qweight, qzeros"),
    (AWQ, changed("qweight", torch.zeros(256, 31, dtype=INT32)), "'qweight' has shape [256, 31]; it must be [256, 32]"),
    (AWQ, changed("scales", torch.zeros(3, 256).half()), "'scales' has shape [3, 256]; it must be [2, 256]"),
    (AWQ, changed("qzeros", torch.zeros(2, 32, dtype=torch.int64)), "'qzeros' is of type I64; it must be I32"),
    (GPTQ, changed("g_idx", None), "'g_idx' is missing"),
    (GPTQ, changed("qweight", torch.zeros(32, 255, dtype=INT32)), "'qweight' has shape [32, 255]"),
    (PACKED, changed("weight_scale", None), "'weight_scale' is missing"),
    (PACKED, changed("weight_shape", None), "'weight_shape' is missing"),
    (PACKED, changed("weight_packed", torch.zeros(256, 33, dtype=INT32)), "'weight_packed' has shape [256, 33]"),
    (PACKED, changed("weight_scale", torch.zeros(256, 7)), "has shape [256, 7], which makes no groups"),
    (PACKED, changed("weight_scale", torch.zeros(256, 0)), "has shape [256, 0], which makes no groups"),
    (PACKED, changed("weight_zero_point", torch.zeros(31, 8, dtype=INT32)), "'weight_zero_point' has shape [31, 8]"),
    (FP8, changed("weight_scale_inv", None), "'weight_scale' is missing beside bias, weight"),
    (FP8, changed("weight_scale_inv", torch.zeros(2, 3)), "'weight_scale_inv' has shape [2, 3]"),
    (FP8, changed("weight", torch.zeros(256, 256, dtype=torch.float8_e5m2)), "is of type F8_E5M2; read are"),
]  # fmt: skip

TOLD_BY_BYTES = [
    (NF4, changed(STATE, as_bytes(b"{")), "its quant_state is not valid JSON"),
    (NF4, changed(STATE, as_bytes(b"[" * 4000)), "its quant_state is not valid JSON"),
    (NF4, changed(STATE, as_bytes(b"\xff\xfe")), "its quant_state is not valid JSON"),
    (NF4, changed(STATE, as_bytes(b"[1]")), "its quant_state is not a JSON object"),
    (NF4, changed(STATE, as_state(shape=[1 << 30, 1 << 30])), "says shape [1073741824, 1073741824]"),
    (NF4, changed(STATE, as_state(blocksize=0)), "says blocks of 0"),
    (NF4, changed(STATE, as_state(blocksize=-64)), "says blocks of -64"),
    (NF4, changed(STATE, as_state(quant_type="fp4")), "says quant_type 'fp4'"),
    (NF4, changed(STATE, as_state(nested_blocksize=0)), "says nested_blocksize 0"),
    (NF4, changed(STATE, as_state(nested_blocksize=2)), "has 4 numbers, too few for blocks of 2"),
    (NF4, changed(STATE, as_state(nested_offset="much")), "says nested_offset 'much'"),
    (NF4, changed(STATE, as_state(nested_offset=float("nan"))), "says nested_offset nan"),
    (NF4, changed(STATE, as_state(nested_offset=10**400)), "says nested_offset 1000"),
    (GPTQ, at("g_idx", 3, 8), "its g_idx names groups from 0 to 8; there are 8"),
    (GPTQ, at("g_idx", 0, -1), "its g_idx names groups from -1 to 7"),
    (GPTQ, at("g_idx", 0, 7), "its g_idx has not 32 columns in each of 8 groups"),
    (PACKED, changed("weight_zero_point", torch.full((256, 8), 100).to(torch.int8)), "outside the 16 codes"),
    (PACKED, at("weight_shape", 1, 1 << 40), "its weight_shape says [256, 1099511627776]"),
    (PACKED, at("weight_shape", 0, -256), "its weight_shape says [-256, 256]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    config = tiny_config("qwen2", num_hidden_layers=1)
    tensors = random_tensors(config, torch.bfloat16)

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("damage") / "model"
            made[name] = write_checkpoint(folder, config, tensors, FORMATS[name]()).folder
        return made[name]

    return make


def damaged(folder: Path, into: Path, change: Change) -> Folder:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    into.mkdir()
    save_file(tensors, into / "model.safetensors")
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    return Folder(into)


@pytest.mark.parametrize(("name", "change", "says"), TOLD_BY_HEADERS, ids=[one[2] for one in TOLD_BY_HEADERS])
def test_what_headers_tell_is_refused_before_anything_is_read(
    name: str, change: Change, says: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = damaged(folder_of(name), tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        inspect(folder.files())
    assert "self_attn.q_proj" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("name", "change", "says"), TOLD_BY_BYTES, ids=[one[2] for one in TOLD_BY_BYTES])
def test_what_only_the_bytes_tell_is_refused_when_they_are_read(
    name: str, change: Change, says: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = damaged(folder_of(name), tmp_path / "model", change)
    with open_weights(inspect(folder.files())) as weights:
        with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
            weights.tensor(f"{MODULE}.weight")
    assert "q_proj" in str(caught.value)
    assert caught.value.hint


def test_a_table_that_is_not_that_of_nf4_is_taken_as_it_is(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:  # fmt: skip
    """The sixteen values are in the file, and what it says they are counts."""
    table = torch.linspace(-1, 1, 16)
    folder = damaged(folder_of(NF4), tmp_path / "model", changed("weight.quant_map", table))
    with open_weights(inspect(folder.files())) as weights:
        found = weights.tensor(f"{MODULE}.weight").view(-1, 64)
    codes = load_file(folder.path / "model.safetensors")[f"{MODULE}.weight"].flatten()
    shares = found / found.abs().amax(1, keepdim=True)
    torch.testing.assert_close(shares.flatten()[0::2], table[(codes >> 4).long()], atol=1e-5, rtol=0)
