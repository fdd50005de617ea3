"""A decoder's parts in the store: found there, or packed into it, and put together again from what it has.

Knows which parts a strategy makes and how they are restored; `loadstone.store` knows entries, files and locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import TypeVar

import torch

from loadstone import __version__
from loadstone.checkpoint import open_weights
from loadstone.checkpoint.spec import ModelSpec
from loadstone.memory import give_back
from loadstone.planner import Plan
from loadstone.planner.estimate import RARELY_USED_BYTES
from loadstone.planner.own import kept_name, strategy_of
from loadstone.quantization import find_strategy
from loadstone.store import Attached, Draft, Entry, Kind, Look, Manifest, Store, StoreUnavailableError, boot_id
from loadstone.telemetry import Progress, emit

from .decoder import Decoder
from .pack import pack, warn_of_numbers
from .publishing import Publishing
from .recipe import VECTOR, Kept, Part, assemble, parts_of

TENSORS_A_PART = 8  # more than any form of a weight has
SLACK_A_PART = 4096  # bytes: what aligning its tensors may add

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Made:
    """What was packed: the files' state before, the digest of each tensor, and what is said of each part."""

    look: Look
    digests: dict[str, str]
    about: dict[str, dict[str, object]]


class Keeping:
    """One decoder's way into the store and out of it."""

    def __init__(self, plan: Plan, spec: ModelSpec, store: Store) -> None:
        self.plan, self.spec, self.store = plan, spec, store
        self.device = torch.device(plan.device.torch_name)
        self.strategy = find_strategy(plan.strategy)
        self.parts = parts_of(spec)
        self.numbers = {part.name: number for number, part in enumerate(self.parts)}
        self.kind = kind_of(plan, spec)

    def decoder(self, known: Entry | None = None) -> Decoder:
        """Return the decoder; raise StoreUnavailableError when what is not there yet cannot be kept.

        `known` is its entry, where somebody has it. What had to be made is written into the store after this returns:
        see `Decoder.publishing`.
        """
        if (attached := self._find(lambda *_: known, self.store.find)) is not None:
            return self._restored(attached)
        with self._making() as held:
            if (attached := self._find(self.store.find, self.store.find_by_content)) is not None:
                return self._restored(attached)
            draft = held.enter_context(self._draft())
            kept: dict[str, Kept] = {}
            made = self._pack(lambda part, one: kept.update({part.name: one}))
            decoder = assemble(self.plan, self.spec, kept)
            decoder.publishing = self._publish_later(draft, made, kept, held.pop_all())
        return decoder

    def entry(self) -> tuple[Entry, bool]:
        """Return the entry that a decoder would have its parts from, and whether it was made now; assemble none.

        Raises StoreUnavailableError when what is not there yet cannot be kept.
        """
        if (attached := self._find(self.store.find)) is None:
            with self._making() as held:
                if (attached := self._find(self.store.find, self.store.find_by_content)) is None:
                    draft = held.enter_context(self._draft())
                    made = self._pack(lambda part, one: self._put(draft, part, one))
                    return self._publish(draft, made), True
        attached.close()
        self._tell("store.hit", attached.entry)
        return attached.entry, False

    # -- finding --------------------------------------------------------------------------------------------------

    def _find(self, *ways: Callable[[Kind, ModelSpec], Entry | None]) -> Attached | None:
        for find in ways:
            entry = find(self.kind, self.spec)
            if entry is not None and (attached := self.store.attach(entry)) is not None:
                return attached
        return None

    def _restored(self, attached: Attached) -> Decoder:
        manifest, on_device = attached.entry.manifest, self._on_device(attached)
        kept = {part.name: self._restored_part(part, manifest, on_device) for part in self.parts}
        decoder = assemble(self.plan, self.spec, kept)
        decoder.attached = attached
        self._tell("store.hit", attached.entry)
        return decoder

    def _tell(self, event: str, entry: Entry) -> None:
        about = {"key": entry.manifest.key, "origin": entry.manifest.origin, "folder": str(entry.folder)}
        emit(event, model=self.spec.name, **about)

    # -- making ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _making(self) -> Iterator[ExitStack]:
        """Be the one that makes this kind of entry, as long as the yielded stack or whoever took its place is open."""
        with ExitStack() as held:
            held.enter_context(self.store.making(self.kind, about=f"another process that loads {self.spec.name}"))
            yield held

    def _draft(self) -> Draft:
        planned = sum(self.plan.weight_bytes.values()) + SLACK_A_PART * len(self.parts)
        return self.store.draft(self.kind, most_tensors=TENSORS_A_PART * len(self.parts), nbytes=planned)

    def _pack(self, take: Callable[[Part, Kept], None]) -> _Made:
        """Pack the checkpoint's weights, handing each part to `take`; return what an entry says of them."""
        about: dict[str, dict[str, object]] = {}

        def note(part: Part, one: Kept, is_finite: bool) -> None:
            named, facts = _taken_apart(part, one)
            about[part.name] = {"tensors": [*named], "facts": facts, "is_finite": is_finite}
            if not is_finite:
                warn_of_numbers(part)
            take(part, one)

        look = Look.at(self.spec)
        with open_weights(self.spec) as weights:
            digests = pack(self.plan, self.spec, self.parts, weights, note)
        give_back()  # what packing left behind in the allocator
        return _Made(look, digests, about)

    def _publish_later(self, draft: Draft, made: _Made, kept: dict[str, Kept], held: ExitStack) -> Publishing:
        """Write the parts into the draft and publish it in a thread, which closes `held` at its end."""

        total = sum(one.nbytes for one in kept.values())
        written = Progress("store.writing", total, len(kept), model=self.spec.name)

        def publish(check: Callable[[], None]) -> Entry:
            with held:
                for part in self.parts:
                    check()
                    self._put(draft, part, kept[part.name])
                    written.add(kept[part.name].nbytes, is_last_of_tensor=True)
                return self._publish(draft, made)

        emit("store.keeping", model=self.spec.name, folder=str(self.store.folder))
        return Publishing(publish, folder=str(self.store.folder))

    def _put(self, draft: Draft, part: Part, one: Kept) -> None:
        named, _ = _taken_apart(part, one)
        _writing(lambda: draft.put(self.numbers[part.name], named))

    def _publish(self, draft: Draft, made: _Made) -> Entry:
        manifest = self._manifest(made.digests, made.about)
        entry = _writing(lambda: draft.publish(self.store.free_place(manifest.key), manifest))
        self.store.remember(self.spec, made.look, made.digests)
        self.store.keep_within_limit(entry)
        self._tell("store.made", entry)
        return entry

    def _manifest(self, digests: Mapping[str, str], about: Mapping[str, Mapping[str, object]]) -> Manifest:
        spec = self.spec
        return Manifest(
            key=self.kind.key(digests), kind=self.kind.id, name=spec.name, origin=spec.origin, revision=spec.revision,
            strategy=kept_name(spec, self.plan.strategy), layout=str(self.kind.facts["layout"]), made=time.time(),
            source_bytes=sum(tensor.nbytes for tensor in spec.tensors.values()), weights_bytes=0,
            source=dict(digests), tensors={}, parts=dict(about), boot=boot_id(),
            versions={"loadstone": __version__, "torch": torch.__version__},
        )  # fmt: skip

    def _on_device(self, attached: Attached) -> Mapping[str, torch.Tensor]:
        if self.device.type == "cpu":
            rarely = () if self.spec.tied_embeddings else attached.entry.manifest.parts["embedding"]["tensors"]
            attached.bring_in(
                rarely_used=rarely, at_most=RARELY_USED_BYTES
            )  # a prompt of a hundred tokens looks up a hundred rows
            return attached.tensors
        return attached.entry.load(self.device)

    def _restored_part(self, part: Part, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Kept:
        about = manifest.parts[part.name]
        if not about["is_finite"]:
            warn_of_numbers(part)
        if part.kind == VECTOR:
            return tensors[part.name]
        own = {name.removeprefix(f"{part.name}:"): tensors[name] for name in about["tensors"]}
        keeper = strategy_of(self.spec, self.strategy, part.tensors[0])
        return keeper.restore(part.kind, own, about["facts"], getattr(torch, self.plan.settings.compute_dtype))


def kind_of(plan: Plan, spec: ModelSpec) -> Kind:
    """Return what an entry for this plan is, apart from the content of the weights.

    Names are not in it, nor which file a tensor is in; how rows are ordered in a format is.
    """
    order = (spec.format, spec.architecture.name, spec.heads, spec.kv_heads, spec.head_size)
    return Kind({
        "parts": [[part.name, part.kind, *part.tensors] for part in parts_of(spec)],
        "tensors": {name: [tensor.dtype, *tensor.shape] for name, tensor in spec.tensors.items()},
        **({"left_alone": sorted(spec.left_alone)} if spec.left_alone else {}),
        **({} if not spec.codings else {"codings": _codings(spec), "coded": _coded_layouts(plan, spec)}),
        "order": list(order),
        "strategy": plan.strategy,
        "layout": find_strategy(plan.strategy).layout(plan.device.kind),
        "dtype": plan.settings.compute_dtype,
    })  # fmt: skip


def _coded_layouts(plan: Plan, spec: ModelSpec) -> list[str]:
    """Return the names of forms that a strategy keeps the codes of others in, where these are not its own."""
    strategy, kind = find_strategy(plan.strategy), plan.device.kind
    kept = (strategy.coded_layout(coding, kind) for coding in spec.codings if strategy.keeps(coding))
    return sorted({layout for layout in kept if layout is not None})


def _codings(spec: ModelSpec) -> dict[str, list[object]]:
    """Return how each quantised weight is coded: the same bytes may mean other numbers."""
    return {name: [*astuple(tensor.coding)] for name, tensor in spec.tensors.items() if tensor.coding is not None}


def _taken_apart(part: Part, made: Kept) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the tensors of a part under the names that they have in the store, and its facts."""
    if isinstance(made, torch.Tensor):
        return {part.name: made}, {}
    return {f"{part.name}:{name}": tensor for name, tensor in made.tensors().items()}, dict(made.facts)


def _writing(action: Callable[[], Result]) -> Result:
    try:
        return action()
    except OSError as error:
        raise StoreUnavailableError(f"the store cannot be written: {error}") from error
