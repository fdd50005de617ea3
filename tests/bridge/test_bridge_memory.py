"""There is no second copy of a model: what a process takes grows by little when transformers sees it too."""

from __future__ import annotations

import subprocess
import sys

import pytest

MOST = 0.03  # of the weights' bytes

_SCRIPT = """
import torch
from loadstone import ModelManager
from loadstone.hardware import process_rss
from loadstone.memory import give_back

manager = ModelManager({'model_config': {'base_model': 'smollm2', 'quantization': '4bit', 'context': 256}})
model = manager.load()
model.decoder.settle()
manager.generate('Hi', max_new_tokens=2)  # every page of every weight is here
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

def taken():
    give_back()
    return process_rss()

before = taken()
tokenizer, seen = manager.load_base_model()
made = taken()
with torch.inference_mode():
    logits = seen(torch.tensor([[1, 2, 3]])).logits.shape
del logits
print(sum(model.decoder.weight_bytes().values()), before, made, taken())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere allocators return memory when they like")
def test_a_transformers_model_over_a_loaded_one_takes_next_to_no_memory() -> None:
    """With the bundled model in a process of its own, once libraries and weights are there; also when it is used."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    weights, before, made, used = map(int, done.stdout.split())
    assert made - before < MOST * weights
    assert used - before < MOST * weights + 5_000_000  # a step's own tensors, and what torch keeps for the next
