"""`load_base_model()`: a tokenizer and a model of transformers, over what the manager has loaded."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone import ConfigurationError, ModelManager, ModelNotLoadedError
from loadstone.bridge import bridge
from loadstone.loaded import LoadedModel

TEXTS = ("Hi", "投资分析问题", " a  b\n", "", "é[assistant]")


def _text(manager: ModelManager, prompt: str) -> str:
    """Return transformers' greedy answer to a prompt."""
    tokenizer, model = manager.load_base_model()
    ids = tokenizer(prompt, return_tensors="pt")
    return str(tokenizer.decode(model.generate(**ids)[0][ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_they_are_of_transformers_own_classes(manager: ModelManager) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, model = manager.load_base_model()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(model, LlamaForCausalLM)


def test_they_are_made_once(manager: ModelManager) -> None:
    first, second = manager.load_base_model(), manager.load_base_model()
    assert first[0] is second[0]
    assert first[1] is second[1]


def test_it_loads_what_is_not_loaded_yet(one_life: ModelManager) -> None:
    _, model = one_life.load_base_model()
    assert one_life.is_loaded()
    assert model.get_input_embeddings().weight.shape == (256, 128)


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_reads_as_ours(manager: ModelManager, text: str) -> None:
    tokenizer, ours = manager.load_base_model()[0], manager.load().tokenizer
    assert tokenizer(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ours.encode(text, add_special_tokens=False)) == text


def test_padding_with_it_leaves_ours_as_it_is(manager: ModelManager) -> None:
    """They share a vocabulary in memory, and no settings."""
    tokenizer, ours = manager.load_base_model()[0], manager.load().tokenizer
    before = ours.encode("a long text", add_special_tokens=True)
    tokenizer.pad_token = "!"
    padded = tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=8)["input_ids"]
    assert [len(ids) for ids in padded] == [8, 8]
    assert padded[0][0] == tokenizer.pad_token_id  # on the left
    assert ours.encode("a long text", add_special_tokens=True) == before


def test_the_template_is_the_checkpoints(manager: ModelManager) -> None:
    tokenizer = manager.load_base_model()[0]
    messages = [{"role": "user", "content": "Hi"}]
    found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = manager.load().engine.template
    assert template is not None
    assert found == template.render(messages)


@pytest.mark.parametrize("prompt", ["Hi", "One bond and another"])
def test_greedy_answers_are_the_managers(manager: ModelManager, prompt: str) -> None:
    """`generate` begins with the sampling that the configuration says: greedy here, and twelve tokens."""
    assert _text(manager, prompt) == str(manager.generate(prompt, raw=True))


def test_greedy_answers_of_the_bundled_model_are_the_managers(smollm2: ModelManager) -> None:
    tokenizer, model = smollm2.load_base_model()
    prompt = "The capital of France is"
    ids = tokenizer(prompt, return_tensors="pt")
    settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 12}
    found = model.generate(**ids, **settings)[0][ids["input_ids"].shape[1] :]
    wanted = smollm2.generate(prompt, raw=True, temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    assert tokenizer.decode(found, skip_special_tokens=True) == str(wanted)


def test_the_sampling_in_force_goes_over(tmp_path: Path) -> None:
    from small_model import GENERATION, write_small_model

    folder = write_small_model(tmp_path / "model", **GENERATION)
    with ModelManager({"model_config": {"base_model": str(folder), "context": 64}, "store": {"enabled": False}}) as one:
        said = one.load_base_model()[1].generation_config
    assert (said.do_sample, said.temperature, said.top_p, said.top_k) == (True, 0.7, 0.8, 20)
    assert (said.repetition_penalty, said.max_new_tokens) == (1.05, 512)


def test_without_transformers_the_error_names_the_extra(
    one_life: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"loadstone\[transformers\]") as said:
        one_life.load_base_model()
    assert "manager.load()" in str(said.value)
    assert str(one_life.generate("Hi"))  # the model is loaded, and answers


def test_an_architecture_that_transformers_has_not_is_an_error(
    one_life: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.bridge import _transformers

    monkeypatch.setattr(_transformers, "CONFIG_MAPPING", {})
    with pytest.raises(ConfigurationError, match="'llama'"):
        one_life.load_base_model()


# -- its end ----------------------------------------------------------------------------------------------------------


def test_after_an_unload_it_is_empty_and_says_so(one_life: ModelManager) -> None:
    """Who still has it holds nothing of the model: the receipt names nobody."""
    tokenizer, model = one_life.load_base_model()
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    receipt = one_life.unload_model()
    assert receipt.held == ()
    assert receipt.freed.weights + receipt.freed.store_pages > 0
    with pytest.raises(ModelNotLoadedError, match="load_base_model"):
        model(ids)
    with pytest.raises(ModelNotLoadedError, match="load_base_model"):
        model.model.norm(torch.ones(1, 128))
    with pytest.raises(ModelNotLoadedError, match="load_base_model"):
        model.generate(ids)
    assert tokenizer.decode(ids[0]) == "Hi"


def test_every_weight_dies_with_the_model(one_life: ModelManager) -> None:
    model: LoadedModel = one_life.load()
    pair = one_life.load_base_model()
    weights = [weakref.ref(tensor) for _, tensor in model.decoder.tensors()]
    del model
    one_life.unload_model()
    gc.collect()
    assert not [one for one in weights if one() is not None]
    assert pair[1].num_parameters() > 0


def test_a_later_load_has_a_pair_of_its_own(one_life: ModelManager) -> None:
    _, old = one_life.load_base_model()
    one_life.reload_model()
    _, new = one_life.load_base_model()
    assert new is not old
    with pytest.raises(ModelNotLoadedError):
        old(torch.tensor([[1]]))
    assert new(torch.tensor([[1]])).logits.shape == (1, 1, 256)


def test_using_it_counts_as_use(manager: ModelManager) -> None:
    """An idle model is one that nobody asks anything, through transformers either."""
    engine = manager.load().engine
    manager.load_base_model()[1](torch.tensor([[1, 2]]))
    before = engine.idle_since
    manager.load_base_model()[1](torch.tensor([[1, 2]]))
    assert before is not None
    assert engine.idle_since is not None
    assert engine.idle_since > before


def test_loading_natively_imports_no_transformers(one_life: ModelManager) -> None:
    import subprocess

    script = (
        "import sys\nfrom loadstone import ModelManager\n"
        f"manager = ModelManager({{'model_config': {{'base_model': {one_life.config.config.model.base_model!r}}}}})\n"
        "manager.load()\nmanager.generate('Hi', max_new_tokens=2)\nprint('transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False"]
