"""What the blocks of the KV cache say, so that a text that was read once is not read again.

A tree of blocks: what a block says is its tokens after those of the blocks above it, so equal beginnings share blocks,
of sequences under way and of those that ended. Blocks that no sequence under way holds stay until their room is
needed; those used longest ago go first. A sequence is promised all the blocks that it may come to, and takes them as
it grows, so what is remembered goes only for tokens that are really there. Knows tokens and blocks, nothing of answers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch

from loadstone.model import KVCache, block_table_of, blocks_for
from loadstone.quantization.kernels.words import KV_BLOCK

Tokens = tuple[int, ...]
NOWHERE = -1  # in place of a block
_TOKENS = attrgetter("tokens")


@dataclass(eq=False)
class Node:
    """A block and the tokens that it has after its parent's: KV_BLOCK of them, or fewer where a sequence ended."""

    tokens: Tokens
    block: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)  # in the order of their tokens
    references: int = 0  # sequences under way that begin with it; they hold its parents too

    def place_of(self, tokens: Sequence[int]) -> int:
        """Return where among the children these tokens are, or would be."""
        return bisect_left(self.children, tuple(tokens), key=_TOKENS)

    def child(self, tokens: Tokens) -> Node | None:
        """Return the child that has exactly these tokens."""
        near = self.children[(place := self.place_of(tokens)) : place + 1]
        return near[0] if near and near[0].tokens == tokens else None


@dataclass(eq=False)
class Places:
    """What a sequence under way holds of the cache.

    `block_table` is the blocks that it has so far in order, as the decoder reads them: a view of `whole`, which has
    room for all that it may come to. `known` tokens at its beginning need not be read.
    """

    whole: torch.Tensor
    known: int
    path: list[Node]  # the tree's nodes that it begins with
    own: dict[int, int] = field(default_factory=dict)  # blocks that nobody else holds, by their place in the table

    def __post_init__(self) -> None:
        self.block_table = self.whole[: self.taken]

    @property
    def taken(self) -> int:
        """How many blocks it has."""
        return len(self.path) + len(self.own)

    @property
    def promised(self) -> int:
        """How many blocks it may still come to."""
        return len(self.whole) - self.taken


class PrefixCache:
    """Gives sequences their places in one cache, and remembers what they leave there when `is_on`.

    Blocks that are free or only remembered are never fewer than those that are promised.
    """

    def __init__(self, cache: KVCache, *, is_on: bool = True) -> None:
        self.cache = cache
        self._is_on = is_on
        self._root = Node((), NOWHERE, None)
        self._promised = 0
        # Blocks that no sequence holds, used longest ago first. Who holds a node holds its parents, so parents are
        # always behind their children here, and the first one has none.
        self._idle: OrderedDict[Node, None] = OrderedDict()

    @property
    def free_blocks(self) -> int:
        """How many blocks no sequence under way holds."""
        return self.cache.free_blocks + len(self._idle)

    @property
    def promised_blocks(self) -> int:
        """How many blocks sequences under way may still come to."""
        return self._promised

    def nodes(self) -> Iterator[Node]:
        """Go through the blocks that no sequence holds, used last first, and so parents before their children."""
        return reversed(self._idle)

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are in blocks that it could share."""
        return len(self._path(prompt)) * KV_BLOCK

    def begin(self, prompt: Sequence[int], room: int) -> Places | None:
        """Return places for a sequence that begins with `prompt`, or None when too few can be promised now.

        It has places for the prompt, and `reach` gives it more, up to `room` tokens. At least the prompt's last token
        is left to be read, because what follows it is to be known.
        """
        path = self._path(prompt)
        needed = blocks_for(room) - len(path)
        if needed > self.free_blocks - self._promised - sum(node in self._idle for node in path):
            return None
        done = len(path) * KV_BLOCK
        rest = prompt[done : min(done + KV_BLOCK, len(prompt) - 1)]
        source, shared = self._likest(path[-1] if path else self._root, rest)
        whole = torch.full((blocks_for(room),), NOWHERE, dtype=torch.int64)
        whole[: len(path)] = block_table_of([node.block for node in path])
        for node in path:
            self._hold(node)
        if source is not None and source in self._idle:
            self._idle.move_to_end(source)  # it goes only when nothing else would do, and then has no block
        places = Places(whole, done, path)
        self._promised += needed
        self.reach(places, len(prompt))
        if source is not None and source.block != NOWHERE:
            self.cache.copy(source.block, places.own[len(path)], shared)
            places.known += shared
        return places

    def reach(self, places: Places, length: int) -> None:
        """Give a sequence the blocks for its first `length` tokens, which were promised to it."""
        start, count = places.taken, blocks_for(length) - places.taken
        if count <= 0:
            return
        if count > places.promised:
            raise ValueError(f"{length} tokens are more than the {len(places.whole)} blocks that were promised take")
        self._make_room(count)
        blocks = self.cache.take(count)
        self._promised -= count
        places.own.update(enumerate(blocks, start))
        places.whole[start : start + count] = block_table_of(blocks)
        places.block_table = places.whole[: start + count]

    def share(self, places: Places, tokens: Sequence[int]) -> None:
        """Let others begin with the whole blocks of `tokens`, which a sequence under way has in its places."""
        if not self._is_on:
            return
        for index in range(len(places.path), len(tokens) // KV_BLOCK):
            said = tuple(tokens[index * KV_BLOCK : (index + 1) * KV_BLOCK])
            parent = places.path[-1] if places.path else self._root
            block = places.own.pop(index)
            node = parent.child(said)
            if node is None:
                node = self._grow(parent, said, block)
            else:  # another sequence has said the same meanwhile
                places.whole[index] = node.block
                self.cache.give_back([block])
            self._hold(node)
            places.path.append(node)

    def end(self, places: Places, tokens: Sequence[int]) -> None:
        """Take a sequence's places back; `tokens` are those that are in them and may be remembered."""
        self.share(places, tokens)
        self._promised -= places.promised
        index = len(places.path)
        said = tuple(tokens[index * KV_BLOCK :])
        parent = places.path[-1] if places.path else self._root
        if self._is_on and said:
            following = parent.children[(place := parent.place_of(said)) : place + 1]
            if not following or following[0].tokens[: len(said)] != said:
                self._idle[self._grow(parent, said, places.own.pop(index))] = None
        for node in reversed(places.path):
            node.references -= 1
            if node.references == 0:
                self._idle[node] = None
        self.cache.give_back([*places.own.values()])

    def adopt(self, said: Sequence[Tokens], parents: Sequence[int]) -> list[int]:
        """Remember texts from elsewhere: the tokens of each block, and which one comes before it, or -1.

        Returns the block that each must be written to, NOWHERE where it is remembered already or cannot be. Those used
        last come first, and parents before their children; there must be free blocks enough, and no sequence under way.
        """
        nodes: list[Node | None] = []
        blocks: list[int] = []
        for tokens, number in zip(said, parents, strict=True):
            parent = self._root if number < 0 else nodes[number]
            node, block = None, NOWHERE
            if parent is not None and tokens and (parent is self._root or len(parent.tokens) == KV_BLOCK):
                node = parent.child(tokens)
                if node is None:
                    block = self.cache.take(1)[0]
                    node = self._grow(parent, tokens, block)
            nodes.append(node)
            blocks.append(block)
        for node in reversed(nodes):
            if node is not None:
                self._idle[node] = None
                self._idle.move_to_end(node)
        return blocks

    def forget(self) -> int:
        """Forget what no sequence under way holds; return how many tokens that were."""
        count = sum(len(node.tokens) for node in self._idle)
        self._make_room(self.free_blocks)
        return count

    def _path(self, prompt: Sequence[int]) -> list[Node]:
        """Return the nodes whose tokens the prompt begins with; the last token is not among them."""
        path: list[Node] = []
        node = self._root
        for start in range(0, len(prompt) - KV_BLOCK, KV_BLOCK):
            following = node.child(tuple(prompt[start : start + KV_BLOCK]))
            if following is None:
                break
            path.append(node := following)
        return path

    @staticmethod
    def _likest(parent: Node, wanted: Sequence[int]) -> tuple[Node | None, int]:
        """Return the child that begins most as `wanted` does, and how many tokens that are."""
        place = parent.place_of(wanted)
        best, most = None, 0
        for node in parent.children[max(0, place - 1) : place + 1]:  # in order, the likest are beside it
            if (count := common(node.tokens, wanted)) > most:
                best, most = node, count
        return best, most

    def _grow(self, parent: Node, said: Tokens, block: int) -> Node:
        node = Node(said, block, parent)
        parent.children.insert(parent.place_of(said), node)
        return node

    def _hold(self, node: Node) -> None:
        node.references += 1
        self._idle.pop(node, None)

    def _make_room(self, count: int) -> None:
        """Forget blocks that no sequence holds, longest unused and outermost first, until `count` are free."""
        while self.cache.free_blocks < count:
            node, _ = self._idle.popitem(last=False)
            assert node.parent is not None  # the root is held by nobody, and is not idle
            del node.parent.children[node.parent.place_of(node.tokens)]
            self.cache.give_back([node.block])
            node.block = NOWHERE


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
