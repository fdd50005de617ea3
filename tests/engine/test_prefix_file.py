"""What the KV cache remembers as a file: written and read in any order, and refused where it is not sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loadstone import GenerationError
from loadstone.engine.prefix_cache import PrefixCache
from loadstone.engine.prefix_file import FORMAT, read_prefixes, write_prefixes
from loadstone.model import KVCache
from loadstone.quantization.kernels.words import KV_BLOCK

ABOUT = {"format": FORMAT, "decoder": "one"}
LONG = [*range(1, 3 * KV_BLOCK + 1)]


class Memory:
    """A cache whose keys are its tokens, and what it remembers."""

    def __init__(self, *texts: list[int], blocks: int = 8) -> None:
        self.cache = KVCache(1, 1, blocks * KV_BLOCK, 1, torch.device("cpu"), torch.float32)
        self.prefixes = PrefixCache(self.cache)
        for text in texts:
            self.say(text)

    def say(self, text: list[int]) -> int:
        """Read a text to its end; return how much of it was known, and that rightly."""
        places = self.prefixes.begin(text, len(text))
        assert places is not None
        self.prefixes.reach(places, len(text))
        keys = self.cache.keys.view(-1, KV_BLOCK)
        assert keys[places.block_table].flatten().tolist()[: places.known] == text[: places.known]
        for start in range(0, len(text), KV_BLOCK):
            block = torch.tensor(text[start : start + KV_BLOCK])
            keys[int(places.block_table[start // KV_BLOCK]), : len(block)] = block.float()
        self.prefixes.end(places, text)
        return places.known

    def write(self, file: Path) -> int:
        return write_prefixes(file, self.prefixes, self.cache, "one")

    def read(self, file: Path) -> int:
        return read_prefixes(file, self.prefixes, self.cache, "one")


def test_a_text_whose_beginning_was_known_already_can_be_written_again(tmp_path: Path) -> None:
    """Of two files whose texts begin alike, what they have together is a file as good as they are."""
    first, second = tmp_path / "first", tmp_path / "second"
    Memory(LONG).write(first)
    both = Memory(LONG[:KV_BLOCK], [7, 8, 9])
    assert both.read(first) == 2 * KV_BLOCK
    assert both.write(second) == len(LONG) + 3
    memory = Memory()
    assert memory.read(second) == len(LONG) + 3
    assert memory.say([*LONG, 5]) == len(LONG)


def test_what_is_known_already_is_not_read_twice(tmp_path: Path) -> None:
    file = tmp_path / "file"
    memory = Memory(LONG)
    memory.write(file)
    free = memory.cache.free_blocks
    assert memory.read(file) == 0
    assert memory.cache.free_blocks == free
    assert memory.say([*LONG, 5]) == len(LONG)


def test_what_was_used_last_is_used_last_after_it_was_read(tmp_path: Path) -> None:
    """The order in which blocks would be forgotten survives, and what was remembered before goes first."""
    file = tmp_path / "file"
    memory = Memory([1] * 20, [2] * 20, [3] * 20)
    memory.say([1] * 20 + [5])
    memory.write(file)
    said = [node.tokens for node in memory.prefixes.nodes()]
    assert [tokens[0] for tokens in said] == [1, 1, 1, 3, 3, 2, 2]
    other = Memory([9])
    other.read(file)
    assert [node.tokens for node in other.prefixes.nodes()] == [*said, (9,)]


def test_a_cache_without_free_blocks_reads_nothing(tmp_path: Path) -> None:
    """Nothing that is remembered is forgotten for what a file says."""
    file = tmp_path / "file"
    Memory(LONG).write(file)
    full = Memory([9] * KV_BLOCK * 8)
    assert full.read(file) == 0
    assert len([*full.prefixes.nodes()]) == 8


PARENTS = torch.tensor([-1, 0, 1])


@pytest.mark.parametrize(
    "damage",
    [
        {"parents": torch.tensor(-1)},
        {"parents": torch.tensor([-1, 0])},
        {"parents": torch.tensor([-1, 1, 0])},
        {"parents": torch.tensor([-1, -2, 0])},
        {"parents": PARENTS[:, None]},
        {"parents": PARENTS.expand(3, 3).contiguous()},
        {"parents": PARENTS.float()},
        {"parents": torch.ones(3, dtype=torch.complex64)},
        {"tokens": torch.tensor(1)},
        {"tokens": torch.ones(3, KV_BLOCK - 1, dtype=torch.int64)},
        {"tokens": torch.ones(3, KV_BLOCK)},
        {"keys": torch.tensor(1.0)},
        {"keys": torch.zeros(1, 1, 2, KV_BLOCK, 1)},
        {"values": torch.zeros(1, 2, 3, KV_BLOCK, 1)},
        {"values": torch.zeros(1, 1, 3, KV_BLOCK, 1, dtype=torch.float64)},
    ],
)
def test_parts_that_do_not_fit_are_refused(damage: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With our error, and nothing of them is remembered."""
    whole, file = tmp_path / "whole", tmp_path / "file"
    Memory(LONG).write(whole)
    save_file({**load_file(whole), **damage}, file, ABOUT)
    memory = Memory()
    with pytest.raises(GenerationError, match="its parts do not fit one another"):
        memory.read(file)
    assert memory.cache.free_blocks == memory.cache.blocks


def test_a_part_that_is_not_there_is_told(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole", tmp_path / "file"
    Memory(LONG).write(whole)
    save_file({"keys": load_file(whole)["keys"]}, file, ABOUT)
    with pytest.raises(GenerationError, match="it cannot be read"):
        Memory().read(file)
