"""Models on a Hub that are looked at and not fetched: kilobytes of headers, whole files left where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_hub import TOKEN, FakeHub

import loadstone
from loadstone import ConfigurationError, Event
from loadstone.checkpoint import inspect
from loadstone.config import RetryConfig
from loadstone.errors import CheckpointError, SourceError, TransientSourceError
from loadstone.sources import Headers, resolve, resolve_headers
from loadstone.sources.base import RemoteFile
from loadstone.sources.remote import FIRST, RemoteWeights

MODEL = FakeHub.repository
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
SHARDS = 4


def shapes_of_qwen_7b() -> dict[str, list[int]]:
    hidden, inner, vocabulary, heads, kept = 3584, 18944, 152064, 3584, 512
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(28):
        block = f"model.layers.{layer}."
        for name, rows in (("q", heads), ("k", kept), ("v", kept)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = [rows, hidden]
            shapes[f"{block}self_attn.{name}_proj.bias"] = [rows]
        shapes |= {f"{block}self_attn.o_proj.weight": [hidden, heads], f"{block}mlp.down_proj.weight": [hidden, inner]}
        shapes |= {f"{block}mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        shapes |= {f"{block}{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, "lm_head.weight": [vocabulary, hidden]}


def shard(shapes: dict[str, list[int]]) -> tuple[bytes, int]:
    """Return the header of a shard of these tensors in bfloat16, and the size of the whole file."""
    place, entries = 0, {}
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header, 8 + len(header) + place


def qwen_7b() -> tuple[dict[str, bytes], dict[str, int]]:
    """Return the files of Qwen2.5-7B with its 339 tensors in four shards, and the sizes that the Hub lists."""
    shapes = list(shapes_of_qwen_7b().items())
    files: dict[str, bytes] = {"config.json": json.dumps(QWEN_7B).encode(), "generation_config.json": b"{}"}
    sizes, places = {}, {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        mine = dict(shapes[number::SHARDS])
        files[name], sizes[name] = shard(mine)
        files[name] += bytes(2 * FIRST)  # some of the tensors, so that reads beyond the header are answered
        places |= dict.fromkeys(mine, name)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    return files, sizes


@pytest.fixture
def large(hub: FakeHub) -> FakeHub:
    """A Hub that lists Qwen2.5-7B at its real size, 15.2 GB, though it has only the beginnings of its weights."""
    hub.files, hub.claimed_sizes = qwen_7b()
    return hub


def small_model(**changes: Any) -> dict[str, bytes]:
    """Return the files of a model with one tensor of each kind, small enough to be fetched."""
    config = QWEN_7B | {
        "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 64, "tie_word_embeddings": True, "model_type": "llama",
    }  # fmt: skip
    block = "model.layers.0."
    names = [f"{block}self_attn.{one}_proj.weight" for one in "qkvo"]
    names += [f"{block}mlp.{one}_proj.weight" for one in ("gate", "up", "down")]
    shapes = {name: [128, 128] for name in names} | {"model.embed_tokens.weight": [64, 128]}
    shapes |= {f"{name}.weight": [128] for name in ("model.norm", f"{block}input_layernorm")}
    shapes |= {f"{block}post_attention_layernorm.weight": [128]}
    header, size = shard(shapes)
    weights = header + bytes(size - len(header))
    return {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "model.safetensors": weights} | changes


def weights_asked(hub: FakeHub) -> list[str]:
    return [one.path.rpartition("/")[2] for one in hub.asked if ".safetensors" in one.path and "index" not in one.path]


# What is read


def test_a_7b_model_is_known_after_less_than_a_megabyte(large: FakeHub) -> None:
    headers = resolve_headers(MODEL)
    spec = inspect(headers.files, headers.remote)
    assert spec.parameters == 7_615_616_512
    assert headers.file_bytes == sum(large.claimed_sizes.values()) > 15e9
    assert large.sent < 1_000_000
    assert spec.revision == large.commit


def test_the_bytes_that_a_load_would_fetch_are_told(large: FakeHub) -> None:
    headers = resolve_headers(MODEL)
    assert headers.missing_bytes == headers.file_bytes


def test_a_whole_plan_takes_no_more(large: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For another machine, on which it fits in 4 bits and not unquantised."""
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path))
    found = loadstone.plan(MODEL, machine="cpus=4,ram=16GB,bandwidth=40GB/s")
    assert (found.verdict, found.missing_bytes) == ("fits", sum(large.claimed_sizes.values()))
    fits = {row.strategy: row.fits for row in found.rows}
    assert (fits["none"], fits["4bit"]) == (False, True)
    assert not any(row.in_store for row in found.rows)
    assert large.sent < 1_000_000


def test_each_shard_is_asked_for_once_and_only_for_its_beginning(large: FakeHub) -> None:
    headers = resolve_headers(MODEL)
    inspect(headers.files, headers.remote)
    assert sorted(weights_asked(large)) == sorted(large.claimed_sizes)
    assert all(one.start == 0 for one in large.asked_for("model-0"))


def test_a_header_longer_than_the_first_part_is_read_on(hub: FakeHub) -> None:
    files = small_model()
    header = json.loads(files["model.safetensors"][8 : 8 + int.from_bytes(files["model.safetensors"][:8], "little")])
    header["__metadata__"] = {"padding": "x" * 3 * FIRST}
    long = json.dumps(header).encode()
    size = max(one["data_offsets"][1] for name, one in header.items() if name != "__metadata__")
    files["model.safetensors"] = len(long).to_bytes(8, "little") + long + bytes(size)
    hub.files = files
    headers = resolve_headers(MODEL)
    assert len(inspect(headers.files, headers.remote).tensors) == 11
    assert [one.start for one in hub.asked_for("model.safetensors")] == [0, FIRST]


def test_nothing_in_the_cache_looks_like_a_whole_model_after_it(large: FakeHub, cache: Path) -> None:
    """The small files are kept where a later load finds them, and no branch leads to them."""
    resolve_headers(MODEL)
    folder = cache / "models--org--model"
    assert {path.name for path in (folder / "snapshots" / large.commit).iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert not (folder / "refs").exists()
    with pytest.raises(SourceError, match="no copy is in the cache"):
        resolve(MODEL, offline=True)
    large.stop()
    with pytest.raises(SourceError, match="no route"):
        resolve(MODEL, retry=RetryConfig(max_attempts=1))


def test_a_load_after_it_fetches_the_weights_and_not_the_small_files_again(hub: FakeHub) -> None:
    hub.files = small_model()
    resolve_headers(MODEL)
    hub.asked.clear()
    files = resolve(MODEL)
    assert not hub.asked_for("config.json")
    assert files.weights[0].read_bytes() == hub.files["model.safetensors"]


# What is here already


def test_files_in_the_cache_are_used(hub: FakeHub) -> None:
    hub.files = small_model()
    whole = resolve(MODEL)
    hub.asked.clear()
    headers = resolve_headers(MODEL)
    assert headers == Headers(whole, {}, len(hub.files["model.safetensors"]), 0)
    assert [one.path for one in hub.asked] == [f"/api/models/{MODEL}"]


def test_offline_asks_nobody(hub: FakeHub) -> None:
    hub.files = small_model()
    with pytest.raises(SourceError, match="offline"):
        resolve_headers(MODEL, offline=True)
    resolve(MODEL)
    hub.asked.clear()
    assert not resolve_headers(MODEL, offline=True).remote
    assert not hub.asked


def test_local_files_are_all_here(small_model: Path) -> None:
    headers = resolve_headers(str(small_model))
    assert (headers.remote, headers.missing_bytes) == ({}, 0)
    assert headers.file_bytes == (small_model / "model.safetensors").stat().st_size


# GGUF


def gguf_bytes(folder: Path, *, texts: int, factors: bool = False) -> bytes:
    """Return a llama in GGUF with a vocabulary of so many texts, and perhaps divisors of its frequencies."""
    writer = gguf.GGUFWriter(folder / "made.gguf", "llama")
    for add, value in (
        (writer.add_embedding_length, 128), (writer.add_block_count, 1), (writer.add_head_count, 2),
        (writer.add_feed_forward_length, 128), (writer.add_context_length, 512),
    ):  # fmt: skip
        add(value)
    writer.add_token_list([f"token {number} of a long vocabulary" for number in range(texts)])
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {f"blk.0.{name}.weight": (128, 128) for name in names}
    tensors["token_embd.weight"] = (16_384 if factors else 64, 128)
    tensors |= {f"blk.0.{name}.weight": (128,) for name in ("attn_norm", "ffn_norm")} | {"output_norm.weight": (128,)}
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    if factors:
        writer.add_tensor("rope_freqs.weight", np.full(32, 2.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "made.gguf").read_bytes()


def test_a_gguf_file_is_read_as_far_as_its_header_goes(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf_bytes(tmp_path, texts=60_000)
    hub.files = {"model.gguf": content + bytes(8 * 2**20)}
    headers = resolve_headers(MODEL)
    spec = inspect(headers.files, headers.remote)
    assert (spec.format, spec.vocab_size, spec.layers) == ("gguf", 64, 1)
    assert 2**21 < hub.sent < 6 * 2**20
    assert not (tmp_path / "hub" / "models--org--model" / "snapshots").exists()


def test_what_stands_far_behind_a_gguf_header_is_read_by_itself(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.gguf": gguf_bytes(tmp_path, texts=100, factors=True)}
    headers = resolve_headers(MODEL)
    spec = inspect(headers.files, headers.remote)
    assert spec.rope["factors"] == (2.0,) * 32
    assert hub.sent < len(hub.files["model.gguf"]) / 2


# What goes wrong


def test_a_server_that_ignores_ranges_is_not_listened_to_beyond_the_header(hub: FakeHub) -> None:
    """It sends all 64 MB; what is taken of that is what was asked for, and what was on its way already."""
    files = small_model()
    hub.files = files | {"model.safetensors": files["model.safetensors"] + bytes(64 * 2**20)}
    hub.fault("model.safetensors", times=9, ignores_range=True)
    headers = resolve_headers(MODEL)
    remote = next(iter(headers.remote.values()))
    assert remote.arrived == FIRST
    with pytest.raises(CheckpointError, match="belong to no tensor"):
        inspect(headers.files, headers.remote)


def test_nothing_is_read_up_to_a_far_place_of_a_server_that_ignores_ranges(hub: FakeHub) -> None:
    hub.files = small_model()
    hub.claimed_sizes = {"model.safetensors": 2**40}
    headers = resolve_headers(MODEL)
    hub.fault("model.safetensors", times=9, ignores_range=True)
    with pytest.raises(SourceError, match="no parts of files"):
        next(iter(headers.remote.values())).read(2**39, 8)


def test_what_fails_for_a_passing_reason_is_tried_again(large: FakeHub, events: list[Event]) -> None:
    large.fault("model-00002", status=503)
    large.fault("model-00003", reset_after=100)
    headers = resolve_headers(MODEL)
    assert inspect(headers.files, headers.remote).layers == 28
    assert [event.fields["phase"] for event in events if event.name == "source.retry"] == ["resolve"] * 2


def test_what_fails_for_good_is_not_and_no_token_is_told(large: FakeHub, events: list[Event]) -> None:
    large.fault("model-00002", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(SourceError, match="gated") as caught:
        resolve_headers(MODEL)
    assert not isinstance(caught.value, TransientSourceError)
    assert TOKEN not in f"{caught.value} {events}"
    assert all(one.authorization == f"Bearer {TOKEN}" for one in large.asked)


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/evil.safetensors", "a\\b.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(hub: FakeHub, name: str) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index, "a.safetensors": b""}
    with pytest.raises(CheckpointError, match="must lie in the folder"):
        resolve_headers(MODEL)


def test_a_header_that_claims_to_be_huge_is_not_fetched(hub: FakeHub) -> None:
    hub.files = small_model() | {"model.safetensors": (90_000_000).to_bytes(8, "little") + b"{" + bytes(2**20)}
    hub.claimed_sizes = {"model.safetensors": 2**40}
    headers = resolve_headers(MODEL)
    with pytest.raises(CheckpointError, match="not believed"):
        inspect(headers.files, headers.remote)
    assert hub.sent < 2**20


def test_a_header_that_is_longer_than_the_file_is_damaged(hub: FakeHub) -> None:
    hub.files = small_model() | {"model.safetensors": (10_000).to_bytes(8, "little") + b"{}"}
    headers = resolve_headers(MODEL)
    with pytest.raises(CheckpointError, match="claims 10000 bytes"):
        inspect(headers.files, headers.remote)


def test_a_wrong_name_is_told_before_anything_is_asked() -> None:
    with pytest.raises(ConfigurationError):
        resolve_headers("")


def test_stretches_come_from_what_was_read_before() -> None:
    data = bytes(range(256)) * 1000
    asked: list[tuple[int, int]] = []

    def fetch(start: int, length: int) -> bytes:
        asked.append((start, length))
        return data[start : start + length]

    weights = RemoteWeights(RemoteFile("a", len(data), "0" * 40), fetch)
    for start, length in ((0, 8), (8, 100), (0, FIRST), (FIRST - 1, 2), (200_000, 10), (len(data) - 3, 10)):
        assert weights.read(start, length) == data[start : start + length]
    assert asked == [(0, FIRST), (FIRST, 1), (200_000, 10), (len(data) - 3, 3)]
