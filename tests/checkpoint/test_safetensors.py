"""The safetensors header is believed only as far as the file bears it out, and tensors come as views."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import Folder, random_tensors, tiny_config

from loadstone.checkpoint import inspect, open_weights
from loadstone.checkpoint.safetensors import read_header
from loadstone.errors import CheckpointError, ModelLoadError


def write_raw(file: Path, header: Any, data: bytes = b"", *, pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_infos_place_each_tensor_where_the_reference_library_reads_it(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.tensor(4, dtype=torch.int64),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    infos = read_header(file)
    assert set(infos) == set(load_file(file))
    data = file.read_bytes()
    for name, tensor in tensors.items():
        info = infos[name]
        assert info.shape == tuple(tensor.shape)
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert data[info.offset : info.offset + info.nbytes] == raw


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", "claims 1152921504606846976 bytes, but only 2 follow"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes, but only 2 follow"),
        (struct.pack("<Q", 0) + b"{}", "too few"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not UTF-8"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "a JSON list, not an object"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_file_says_why(tmp_path, content, says):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert caught.value.hint


def test_a_header_above_the_formats_limit_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "big.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # sparse: takes no space on the disk
    with pytest.raises(CheckpointError, match="above the format's limit"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b'{"a":1,"a":2}', b"", "'a' appears twice"),
        ({"a": 3}, b"", "not an object"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "lacks data_offsets"),
        ({"a": entry(0, 4, [1], "Q9")}, b"1234", "type 'Q9' is not known"),
        ({"a": entry(0, 4, [-1])}, b"1234", "shape [-1]"),
        ({"a": entry(0, 4, [True])}, b"1234", "shape [True]"),
        ({"a": entry(-4, 0, [1])}, b"1234", "data_offsets [-4, 0]"),
        ({"a": entry(4, 0, [1])}, b"1234", "data_offsets [4, 0]"),
        ({"a": entry(0, 8, [1])}, b"12345678", "needs 4 bytes, its offsets span 8"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", "overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, b"123456", "overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12, "4 bytes before tensor 'b'"),
        ({"a": entry(4, 8, [1])}, b"1" * 8, "4 bytes before tensor 'a'"),
        ({"a": entry(0, 4, [1])}, b"1" * 7, "3 bytes after the last tensor"),
        ({"a": entry(0, 4, [1])}, b"1", "3 are missing"),
        ({"a": entry(0, 2**62, [2**60])}, b"", "are missing"),
        ({"a": entry(0, 4, [2**62, 2**62, 2**62])}, b"1234", "its offsets span 4"),
    ],
)
def test_an_entry_that_contradicts_the_file_says_how(tmp_path, header, data, says):
    file = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        read_header(file)


def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    os.truncate(file, file.stat().st_size - 123)
    with pytest.raises(CheckpointError, match="123 are missing"):
        read_header(file)


def test_a_file_that_is_not_there_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


_VALID = json.dumps(
    {"__metadata__": {"format": "pt"}, "a": entry(0, 24, [2, 3]), "b": entry(24, 40, [8], "BF16")}
).encode()


def consistent_or_refused(file: Path) -> None:
    try:
        infos = read_header(file)
    except CheckpointError:
        return
    size = file.stat().st_size
    end = 0
    for info in sorted(infos.values(), key=lambda one: (one.offset, one.nbytes)):
        assert end <= info.offset
        end = info.offset + info.nbytes
        assert end <= size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(_VALID) + 7), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_changed_bytes_are_either_consistent_or_refused(tmp_path, edits):
    raw = bytearray(struct.pack("<Q", len(_VALID)) + _VALID + bytes(40))
    for place, value in edits:
        raw[place] = value
    file = tmp_path / "changed.safetensors"
    file.write_bytes(raw)
    consistent_or_refused(file)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.text(max_size=4),
        _json
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F4", "U8"]) | _json,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | _json,
                "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | _json,
            }
        ),
        max_size=3,
    ),
    length=st.integers(0, 40),
)
def test_any_json_header_is_either_consistent_or_refused(tmp_path, header, length):
    consistent_or_refused(write_raw(tmp_path / "any.safetensors", header, bytes(length)))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_gives_each_types_exact_numbers(folder, dtype):
    config = tiny_config()
    tensors = random_tensors(config, dtype)
    spec = inspect(folder.write(config, tensors).files())
    with open_weights(spec) as weights:
        assert set(weights.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert weights.tensor(name).dtype == dtype
            assert torch.equal(weights.tensor(name), tensor)


def test_a_tensor_outlives_the_weights_it_came_from(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    weights = open_weights(inspect(folder.write(config, tensors).files()))
    whole = weights.tensor("model.norm.weight")
    weights.close()
    assert torch.equal(whole, tensors["model.norm.weight"])
    with pytest.raises(ModelLoadError, match="closed"):
        weights.tensor("model.norm.weight")


def test_numbers_at_an_odd_place_in_the_file_are_read_too(folder):
    spec = inspect(folder.write(tiny_config()).files())
    file = spec.tensors["model.norm.weight"].file
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    file.write_bytes(struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :])
    moved = inspect(folder.files())
    assert moved.tensors["model.norm.weight"].offset % 4
    with open_weights(moved) as weights:
        assert torch.equal(weights.tensor("model.norm.weight"), load_file(file)["model.norm.weight"])


def test_a_file_shortened_after_inspection_is_refused_when_opened(folder):
    spec = inspect(folder.write(tiny_config()).files())
    file = spec.tensors["model.norm.weight"].file
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="10 are missing"):
        open_weights(spec)


def test_a_file_shortened_after_it_was_opened_is_refused_when_read(folder):
    spec = inspect(folder.write(tiny_config()).files())
    file = max(spec.tensors.values(), key=lambda tensor: tensor.offset)
    with open_weights(spec) as weights:
        os.truncate(file.file, file.offset + file.nbytes - 10)
        with pytest.raises(CheckpointError, match="truncated"):
            weights.tensor(file.name)
