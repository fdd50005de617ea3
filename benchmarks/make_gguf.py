"""Makes llama.cpp's files from a checkpoint of `benchmarks.checkpoints`: GGUF in bfloat16, then quantised by llama.cpp.

    python -m benchmarks.make_gguf CHECKPOINT FOLDER --name NAME [--kinds Q4_K_M,Q4_0] [--threads 2]

Writes FOLDER/NAME-KIND.gguf for each kind, and FOLDER/NAME.json with the seconds of each step: what llama.cpp's users
spend, once, before their first load. A file that is there is kept. Tensors are streamed, and the bfloat16 file, as
large as the checkpoint, is gone at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import numpy as np

    from loadstone.checkpoint.spec import ModelSpec, TensorInfo

KINDS = ("Q4_K_M", "Q4_0")
ARCHITECTURE = "qwen2"  # what benchmarks.checkpoints writes


def gguf_file(folder: Path, name: str, kind: str) -> Path:
    """Return where the file of one kind is."""
    return folder / f"{name}-{kind}.gguf"


def make(checkpoint: Path, folder: Path, name: str, kinds: tuple[str, ...] = KINDS, threads: int = 2) -> dict[str, Any]:
    """Make the files that are missing; return the seconds of each step, also of those done earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / f"{name}.json"
    seconds: dict[str, Any] = json.loads(notes.read_text()) if notes.is_file() else {}
    missing = [kind for kind in kinds if not gguf_file(folder, name, kind).is_file()]
    if not missing:
        return seconds
    plain = folder / f"{name}-BF16.gguf"
    try:
        seconds["convert"] = _timed(convert, checkpoint, plain)
        for kind in missing:
            seconds[kind] = _timed(quantize, plain, gguf_file(folder, name, kind), kind, threads)
            notes.write_text(json.dumps(seconds) + "\n")
    finally:
        plain.unlink(missing_ok=True)
    return seconds


def convert(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as GGUF of the same bfloat16 numbers; norms and biases in float32, as llama.cpp has."""
    import gguf

    from loadstone.checkpoint import inspect
    from loadstone.sources import resolve

    spec = inspect(resolve(str(checkpoint)))
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    _add_sizes(writer, spec)
    _add_tokenizer(writer, spec)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, spec.layers)
    for name, tensor in spec.tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _add_tensor(writer, stored, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in spec.tensors.values():
        writer.write_tensor_data(_numbers(tensor))
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    import gguf

    writer.add_name(spec.name)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_freq_base(spec.rope["rope_theta"])
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokenizer(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """Add tokenizer.json's tokens and merges; numbers without a token, at the end of the vocabulary, are padding."""
    import gguf

    content = json.loads((spec.folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{number}]" for number in range(spec.vocab_size)]
    types = [gguf.TokenType.UNUSED] * spec.vocab_size
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if spec.bos_token_id is not None:
        writer.add_bos_token_id(spec.bos_token_id)
    writer.add_eos_token_id(spec.eos_token_ids[0])


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: TensorInfo) -> None:
    import gguf
    import numpy as np

    if len(tensor.shape) == 1:
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), 4 * tensor.elements)
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.uint16), tensor.nbytes, raw_dtype=kind)


def _numbers(tensor: TensorInfo) -> np.ndarray[Any, Any]:
    """Return a bfloat16 tensor as GGUF keeps it: matrices as they are, still on the disk, the rest as float32."""
    import numpy as np

    stored = np.memmap(tensor.file, np.uint16, "r", tensor.offset, tensor.shape)
    if len(tensor.shape) > 1:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def quantize(plain: Path, out: Path, kind: str, threads: int) -> None:
    """Write a GGUF file in another kind with llama.cpp's own quantiser; raise OSError when it refuses."""
    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.nthread, wanted.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    beside = out.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(beside).encode(), ctypes.byref(wanted))
    if code != 0:
        beside.unlink(missing_ok=True)
        raise OSError(f"llama.cpp cannot make {out.name}: {code}")
    os.replace(beside, out)


def _timed(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> int:
    """Make what the command line names, print the seconds of each step as JSON, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="how the files' names begin")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"default {','.join(KINDS)}")
    parser.add_argument("--threads", type=int, default=2, help="of the quantiser; default 2")
    said = parser.parse_args(arguments)
    print(json.dumps(make(said.checkpoint, said.folder, said.name, tuple(said.kinds.split(",")), said.threads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
