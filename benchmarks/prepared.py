"""What a side needs before it is measured: its package in memory, and files made from the checkpoint.

Each function returns the seconds of what the side's users pay once, and raises ModuleFailed for what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from .job import Job
from .processes import LAST_WORDS, ModuleFailed, check_imports, run_module

NO_GPU = "it was built without support of GPUs"
# The 4-bit form that OpenVINO's documents recommend for speed and size, with the same blocks as NF4.
EXPORT = ("--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64", "--ratio", "1.0")


def plain_environment(home: Path) -> dict[str, str]:
    """Return this process's variables with a home for Loadstone, and without other settings of it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LOADSTONE_")}
    return {**plain, "LOADSTONE_HOME": str(home)}


def prepare_transformers() -> Mapping[str, float]:
    """Import it once."""
    check_imports("import torch, accelerate, bitsandbytes; from transformers import AutoModelForCausalLM")
    return {}


def gguf_folder(job: Job) -> Path:
    """Return where llama.cpp's files are."""
    return job.folder / "gguf"


def prepare_llamacpp(job: Job, kind: str) -> Mapping[str, float]:
    """Make the GGUF files of all kinds, where they are not there; return the seconds of both steps for this one."""
    has_gpu = f"; assert llama_cpp.llama_supports_gpu_offload(), {NO_GPU!r}" if job.device != "cpu" else ""
    check_imports(f"import llama_cpp{has_gpu}")
    where = (str(job.checkpoint), str(gguf_folder(job)), "--name", job.name)
    seconds = run_module("benchmarks.make_gguf", *where, "--threads", str(job.threads))
    return {"convert": seconds["convert"], "quantize": seconds[kind]}


def openvino_folder(job: Job) -> Path:
    """Return where OpenVINO's files are."""
    return job.folder / "ov" / job.name


def prepare_openvino(job: Job, python: str | None) -> Mapping[str, float]:
    """Export the checkpoint in 4 bits with optimum-cli, unless it was; return the seconds of it."""
    if python is None:
        raise ModuleFailed("name the interpreter of an environment that has openvino-genai: --openvino PYTHON")
    if job.device != "cpu":
        raise ModuleFailed("it is measured on processors only")
    check_imports("import openvino_genai", python=python)
    folder = openvino_folder(job)
    notes = folder / "seconds.json"
    if not notes.is_file():
        started = time.perf_counter()
        beside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        command = [str(Path(python).with_name("optimum-cli")), "export", "openvino", "--model", str(job.checkpoint)]
        done = subprocess.run([*command, *EXPORT, str(beside)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ModuleFailed(f"optimum-cli failed ({done.returncode}):\n{done.stderr[-LAST_WORDS:]}")
        (beside / notes.name).write_text(json.dumps({"export": time.perf_counter() - started}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    seconds: Mapping[str, float] = json.loads(notes.read_text())
    return seconds


def prepare_vllm(python: str | None) -> Mapping[str, float]:
    """Import it once."""
    if python is None:
        raise ModuleFailed("name the interpreter of an environment that has vLLM: --vllm PYTHON")
    check_imports("import vllm", python=python)
    return {}
