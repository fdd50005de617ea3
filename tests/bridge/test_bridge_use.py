"""What people do with a transformers model: generate, pipelines, streamers, adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TextIteratorStreamer, pipeline

from loadstone import ConfigurationError, ModelManager, ModelNotLoadedError
from small_model import write_small_model

EVERY_PROJECTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_pipeline_answers_as_the_manager(manager: ModelManager) -> None:
    tokenizer, model = manager.load_base_model()
    answers = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = answers("Hi", do_sample=False, max_new_tokens=8, return_full_text=False)
    assert found["generated_text"] == str(manager.generate("Hi", raw=True, max_new_tokens=8))


def test_a_pipeline_takes_conversations(manager: ModelManager) -> None:
    tokenizer, model = manager.load_base_model()
    answers = pipeline("text-generation", model=model, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "Hi"}]
    (found,) = answers(messages, do_sample=False, max_new_tokens=8)
    assert found["generated_text"][-1]["content"] == str(manager.generate(messages, max_new_tokens=8))


def test_a_streamer_gives_the_answer_piece_by_piece(manager: ModelManager) -> None:
    tokenizer, model = manager.load_base_model()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    ids = tokenizer("Hi", return_tensors="pt")
    settings: dict[str, Any] = {**ids, "streamer": streamer, "do_sample": False, "max_new_tokens": 12}
    thread = threading.Thread(target=model.generate, kwargs=settings)
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == str(manager.generate("Hi", raw=True, max_new_tokens=12))


def test_both_answer_at_once(manager: ModelManager) -> None:
    """They share weights and nothing else."""
    tokenizer, model = manager.load_base_model()
    ids = tokenizer("Hi", return_tensors="pt")
    wanted = model.generate(**ids, do_sample=False, max_new_tokens=40)
    streams = [manager.stream("Hi", raw=True, max_new_tokens=40) for _ in range(3)]
    found = model.generate(**ids, do_sample=False, max_new_tokens=40)
    texts = {"".join(map(str, stream)) for stream in streams}
    assert torch.equal(found, wanted)
    assert texts == {tokenizer.decode(wanted[0][2:])}


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ModelManager]:
    """A manager of a model that the test may put adapters into."""
    config = {
        "model_config": {"base_model": str(write_small_model(tmp_path / "model")), "context": 128},
        "generation": {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 8},
        "store": {"enabled": False},
    }
    with ModelManager(config) as made:
        yield made


def _adapted(manager: ModelManager, targets: list[str] = EVERY_PROJECTION, **settings: Any) -> Any:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    return get_peft_model(manager.load_base_model()[1], adapter)


def _trained(model: Any, steps: int) -> list[float]:
    """Train the adapter to say one sentence; return the loss of each step."""
    ids = torch.tensor([[*b"A bond is a loan that is traded."]])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("quantization", ["4bit", "8bit", "none"])
def test_an_adapter_learns(own: ModelManager, quantization: str) -> None:
    own.reload_model(quantization=quantization)
    model = _adapted(own)
    losses = _trained(model, 8)
    assert losses[-1] < losses[0] / 2
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_learning_recomputes_what_it_did_not_keep(own: ModelManager) -> None:
    """With gradient checkpointing, as long models are trained."""
    model = _adapted(own, ["q_proj", "down_proj"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    losses = _trained(model, 4)
    assert losses[-1] < losses[0]


def test_an_adapter_on_embedding_and_head_learns(own: ModelManager) -> None:
    losses = _trained(_adapted(own, ["embed_tokens", "lm_head"]), 6)
    assert losses[-1] < losses[0]


def test_the_manager_answers_without_the_adapter(own: ModelManager) -> None:
    """The adapter is in transformers' modules; the weights that both share stay as they are."""
    own.load()
    before = str(own.generate("Hi"))
    model = _adapted(own)
    _trained(model, 3)
    ids = torch.tensor([[*b"Hi"]])
    assert str(own.generate("Hi")) == before
    with model.disable_adapter():
        plain = model(ids).logits
    assert not torch.allclose(model(ids).logits, plain)
    own.unload_model()
    with pytest.raises(ModelNotLoadedError):
        model(ids)


def test_an_adapter_is_saved_and_put_on_again(own: ModelManager, tmp_path: Path) -> None:
    ids = torch.tensor([[*b"Hi"]])
    model = _adapted(own)
    _trained(model, 3)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    own.reload_model()
    again = PeftModel.from_pretrained(own.load_base_model()[1], str(tmp_path / "adapter"))
    torch.testing.assert_close(again(ids).logits, wanted)


@pytest.mark.parametrize("is_safe", [False, True])
def test_merging_is_refused(own: ModelManager, is_safe: bool) -> None:
    model = _adapted(own)
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        model.merge_and_unload(safe_merge=is_safe)


def test_training_the_weights_themselves_is_refused(own: ModelManager) -> None:
    _, model = own.load_base_model()
    with pytest.raises(ConfigurationError, match="LoRA"):
        model.requires_grad_(True)


def test_training_biases_of_a_base_model_is_refused(seen: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="LoRA"):
        get_peft_model(seen("qwen2").model, LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
