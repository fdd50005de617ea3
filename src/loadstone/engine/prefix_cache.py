"""What the blocks of the KV cache say, so that a text that was read once is not read again.

A tree of blocks: what a block says is its tokens after those of the blocks above it, so equal beginnings share blocks,
of sequences under way and of those that ended. Blocks that no sequence under way holds stay until their room is
needed; those used longest ago go first. Knows tokens and blocks, nothing of answers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from loadstone.model import KVCache, block_table_of, blocks_for
from loadstone.quantization.kernels.words import KV_BLOCK

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A block and the tokens that it has after its parent's: KV_BLOCK of them, or fewer where a sequence ended."""

    tokens: Tokens
    block: int
    parent: Node | None
    children: dict[Tokens, Node] = field(default_factory=dict)
    references: int = 0  # sequences under way that begin with it; they hold its parents too
    used: int = 0  # when a sequence last held it, counted in sequences; its parent was not used before


@dataclass(eq=False)
class Places:
    """What a sequence under way holds of the cache.

    `block_table` is its blocks in order, as the decoder reads them; `known` tokens at its beginning need not be read.
    """

    block_table: torch.Tensor
    known: int
    path: list[Node]  # the tree's nodes that it begins with
    own: dict[int, int]  # blocks that nobody else holds, by their place in the table


class PrefixCache:
    """Gives sequences their places in one cache, and remembers what they leave there when `is_on`."""

    def __init__(self, cache: KVCache, *, is_on: bool = True) -> None:
        self._cache = cache
        self._is_on = is_on
        self._root = Node((), -1, None)
        self._clock = 0

    @property
    def free_blocks(self) -> int:
        """How many blocks no sequence under way holds."""
        return self._cache.free_blocks + sum(node.references == 0 for node in self.nodes())

    def nodes(self) -> Iterator[Node]:
        """Go through all blocks that are remembered, parents before children."""
        left = [*self._root.children.values()]
        while left:
            node = left.pop()
            yield node
            left.extend(node.children.values())

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are in blocks that it could share."""
        return len(self._path(prompt)) * KV_BLOCK

    def begin(self, prompt: Sequence[int], room: int) -> Places | None:
        """Return places for at most `room` tokens that begin with `prompt`, or None when there are too few now.

        At least the prompt's last token is left to be read, because what follows it is to be known.
        """
        path = self._path(prompt)
        done = len(path) * KV_BLOCK
        source, shared = self._likest(path[-1] if path else self._root, prompt[done : len(prompt) - 1])
        for node in path:
            node.references += 1
        needed = blocks_for(room) - len(path)
        if not self._make_room(needed, keep=source):
            for node in path:
                node.references -= 1
            return None
        blocks = self._cache.take(needed)
        if source is not None and source.block >= 0:
            self._cache.copy(source.block, blocks[0], shared)
            done += shared
        table = block_table_of([node.block for node in path] + blocks)
        return Places(table, done, path, dict(enumerate(blocks, start=len(path))))

    def share(self, places: Places, tokens: Sequence[int]) -> None:
        """Let others begin with the whole blocks of `tokens`, which a sequence under way has in its places."""
        if not self._is_on:
            return
        for index in range(len(places.path), len(tokens) // KV_BLOCK):
            said = tuple(tokens[index * KV_BLOCK : (index + 1) * KV_BLOCK])
            parent = places.path[-1] if places.path else self._root
            block = places.own.pop(index)
            node = parent.children.get(said)
            if node is None:
                node = self._grow(parent, said, block)
            else:  # another sequence has said the same meanwhile
                places.block_table[index] = node.block
                self._cache.give_back([block])
            node.references += 1
            places.path.append(node)

    def end(self, places: Places, tokens: Sequence[int]) -> None:
        """Take a sequence's places back; `tokens` are those that are in them and may be remembered."""
        self.share(places, tokens)
        index = len(places.path)
        said = tuple(tokens[index * KV_BLOCK :])
        parent = places.path[-1] if places.path else self._root
        if self._is_on and said and all(one[: len(said)] != said for one in parent.children):
            self._grow(parent, said, places.own.pop(index))
        for node in places.path:
            node.references -= 1
            node.used = self._clock
        self._clock += 1
        self._cache.give_back([*places.own.values()])

    def adopt(self, said: Sequence[Tokens], parents: Sequence[int]) -> list[int | None]:
        """Remember texts from elsewhere: the tokens of each block, and which one comes before it, or -1.

        Returns the block that each must be written to, None where it is remembered already or cannot be. Parents come
        first; there must be free blocks enough.
        """
        nodes: list[Node | None] = []
        blocks: list[int | None] = []
        for tokens, number in zip(said, parents, strict=True):
            parent = self._root if number < 0 else nodes[number]
            node, block = None, None
            if parent is not None and tokens and (parent is self._root or len(parent.tokens) == KV_BLOCK):
                node = parent.children.get(tokens)
                if node is None:
                    block = self._cache.take(1)[0]
                    node = self._grow(parent, tokens, block)
                node.used = self._clock
            nodes.append(node)
            blocks.append(block)
        return blocks

    def clear(self) -> None:
        """Forget all that no sequence under way holds."""
        self._forget(self._cache.blocks)

    def _path(self, prompt: Sequence[int]) -> list[Node]:
        """Return the nodes whose tokens the prompt begins with; the last token is not among them."""
        path: list[Node] = []
        node = self._root
        for start in range(0, len(prompt) - KV_BLOCK, KV_BLOCK):
            following = node.children.get(tuple(prompt[start : start + KV_BLOCK]))
            if following is None:
                break
            path.append(node := following)
        return path

    @staticmethod
    def _likest(parent: Node, wanted: Sequence[int]) -> tuple[Node | None, int]:
        """Return the child that begins most as `wanted` does, and how many tokens that are."""
        best, most = None, 0
        for said, node in parent.children.items():
            if (count := common(said, wanted)) > most:
                best, most = node, count
        return best, most

    def _grow(self, parent: Node, said: Tokens, block: int) -> Node:
        node = parent.children[said] = Node(said, block, parent, used=self._clock)
        return node

    def _make_room(self, count: int, *, keep: Node | None) -> bool:
        """Forget until `count` blocks are free; `keep` goes only when nothing else would do, and then has no block."""
        missing = count - self._cache.free_blocks
        if missing <= 0:
            return True
        free = sum(node.references == 0 for node in self.nodes())
        if free < missing:
            return False
        if keep is not None and keep.references == 0 and free > missing:
            keep.references += 1
            self._forget(missing)
            keep.references -= 1
        else:
            self._forget(missing)
        return True

    def _forget(self, count: int) -> None:
        """Forget up to `count` blocks that no sequence under way holds, longest unused and outermost first."""
        leaves = [(node.used, id(node), node) for node in self.nodes() if not node.children and node.references == 0]
        heapq.heapify(leaves)
        while leaves and count > 0:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens]
            self._cache.give_back([node.block])
            node.block = -1
            count -= 1
            if parent is not self._root and not parent.children and parent.references == 0:
                heapq.heappush(leaves, (parent.used, id(parent), parent))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
