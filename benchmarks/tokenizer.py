"""Makes a byte-level BPE tokenizer as large as Qwen2.5's, without a corpus, for checkpoints of random weights.

The 256 bytes, every pair of bytes, and triples of letters: as many tokens and merges as Qwen's, so that reading
tokenizer.json costs what it costs there. Any text can be encoded; a token is two or three bytes of it.
"""

from __future__ import annotations

import json
import string
from itertools import islice, product
from pathlib import Path

ORDINARY_TOKENS = 151_643
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # 151643, 151644 and 151645, as Qwen has them
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = _vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32_768,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _vocabulary(alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return every token's number, and the merges in their order; each merge makes the next token."""
    letters = [letter for letter in ("Ġ", *string.ascii_letters) if letter in alphabet]  # Ġ is how a blank is spelled
    pairs = list(product(alphabet, repeat=2))
    triples = ((first + second, third) for first, second, third in product(letters, repeat=3))
    merges = [*pairs, *islice(triples, ORDINARY_TOKENS - len(alphabet) - len(pairs))]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges
