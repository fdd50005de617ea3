"""Checkpoints that are quantised already: every matrix is what its format's library or specification makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.quantized_checkpoints import (
    FORMATS,
    Checkpoint,
    across_words,
    awq_words,
    down_words,
    nf4,
    write_checkpoint,
)  # fmt: skip
from tiny_models import Folder, random_tensors, tiny_config

from loadstone.checkpoint import ModelSpec, inspect, open_weights
from loadstone.checkpoint.quantized import awq, base
from loadstone.checkpoint.quantized.unpacking import unpack_across, unpack_down

each_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are one piece and one strip; what is made of several must be the same."""
    if request.param == "in pieces":
        monkeypatch.setattr(base, "PIECE_NUMBERS", 24 * 256)
        monkeypatch.setattr(base, "STRIP_NUMBERS", 5 * 256)


def spec_of(made: Checkpoint) -> ModelSpec:
    return inspect(Folder(made.folder).files())


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Checkpoint] = {}
    config = tiny_config("qwen2", num_hidden_layers=1)
    tensors = random_tensors(config, torch.bfloat16)

    def make(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized") / "model"
            made[name] = write_checkpoint(folder, config, tensors, FORMATS[name]())
        return made[name]

    return make


@each_format
@pytest.mark.usefixtures("pieces")
def test_every_matrix_is_its_reference(name: str, made_of) -> None:
    made = made_of(name)
    assert len(made.numbers) == 7
    with open_weights(spec_of(made)) as weights:
        for matrix, wanted in made.numbers.items():
            torch.testing.assert_close(weights.tensor(matrix), wanted, rtol=1e-6, atol=1e-9)


@each_format
def test_headers_tell_shapes_and_all_bytes_of_the_files(name: str, made_of) -> None:
    made = made_of(name)
    spec = spec_of(made)
    assert spec.quantized is not None
    assert {one for one, tensor in spec.tensors.items() if tensor.coding is not None} == made.numbers.keys()
    for matrix, numbers in made.numbers.items():
        assert spec.tensors[matrix].shape == numbers.shape
    file = made.folder / "model.safetensors"
    unused = 7 if name == "bitsandbytes 8 bits" else 0  # weight_format, a byte each
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(tensor.nbytes for tensor in spec.tensors.values()) == file.stat().st_size - header - unused


def test_blocks_may_go_on_from_row_to_row(tmp_path: Path) -> None:
    """bitsandbytes codes a matrix as one row: where columns are no multiple of a block, blocks straddle rows."""
    config = tiny_config("llama", hidden_size=88, head_dim=22, intermediate_size=104, num_hidden_layers=1)
    made = write_checkpoint(tmp_path / "model", config, random_tensors(config), nf4())
    with open_weights(spec_of(made)) as weights:
        for matrix, wanted in made.numbers.items():
            torch.testing.assert_close(weights.tensor(matrix), wanted, rtol=1e-6, atol=1e-9)


def test_what_was_not_converted_stays_as_it_is(tmp_path: Path) -> None:
    config = tiny_config("qwen2", num_hidden_layers=1)
    tensors = random_tensors(config, torch.bfloat16)
    made = write_checkpoint(tmp_path / "model", config, tensors, nf4(), left_out=("down_proj",))
    name = "model.layers.0.mlp.down_proj.weight"
    spec = spec_of(made)
    assert spec.tensors[name].coding is None
    with open_weights(spec) as weights:
        assert torch.equal(weights.tensor(name), tensors[name])


def test_the_parts_of_a_matrix_may_be_in_different_files(tmp_path: Path) -> None:
    config = tiny_config("qwen2", num_hidden_layers=1)
    made = write_checkpoint(tmp_path / "model", config, random_tensors(config), nf4())
    file = made.folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    for number, some in enumerate((sorted(tensors)[0::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in some}, made.folder / f"model-0000{number + 1}-of-00002.safetensors")
    spec = spec_of(made)
    assert any(len(tensor.files) == 2 for tensor in spec.tensors.values())
    with open_weights(spec) as weights:
        for matrix, wanted in made.numbers.items():
            torch.testing.assert_close(weights.tensor(matrix), wanted, rtol=1e-6, atol=1e-9)


# --- any codes


def matrices(bits: int, *, of: int) -> st.SearchStrategy[torch.Tensor]:
    """Codes of matrices whose rows and columns are multiples of `of`."""
    sides = st.integers(1, 5).map(lambda count: count * of)

    def some(drawn: tuple[int, int, int]) -> torch.Tensor:
        return torch.randint(0, 2**bits, drawn[:2], generator=torch.Generator().manual_seed(drawn[2]))

    return st.tuples(sides, sides, st.integers(0, 2**32)).map(some)


@given(matrices(4, of=8))
def test_words_of_awq_hold_what_was_put_in(codes: torch.Tensor) -> None:
    assert torch.equal(awq.rows_of_words(awq_words(codes)), codes)


@given(st.sampled_from([4, 8]).flatmap(lambda bits: st.tuples(st.just(bits), matrices(bits, of=32 // bits))))
def test_words_of_gptq_hold_what_was_put_in(drawn: tuple[int, torch.Tensor]) -> None:
    bits, codes = drawn
    assert torch.equal(unpack_down(down_words(codes, bits), bits).T, codes)
    assert torch.equal(unpack_across(across_words(codes, bits), bits).T, codes)


@given(st.sampled_from([4, 8]).flatmap(lambda bits: st.tuples(st.just(bits), matrices(bits, of=1))))
def test_words_of_compressed_tensors_hold_what_was_put_in(drawn: tuple[int, torch.Tensor]) -> None:
    """Whatever does not fill a word is followed by nothing that matters."""
    bits, codes = drawn
    half = 2 ** (bits - 1)
    signed = (codes - half).to(torch.int8)
    assert torch.equal(unpack_across(pack_to_int32(signed, bits), bits)[:, : codes.shape[1]], codes)
    assert torch.equal(unpack_down(pack_to_int32(signed, bits, packed_dim=0), bits)[: codes.shape[0]], codes)
