"""The store: what is kept is what was made, is found again by content, and is made by one process only."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import loads
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from loadstone.checkpoint.disk import PAGE, FileReader
from loadstone.hardware import resident_bytes
from loadstone.store import Attached, DamagedError, Entry, Store
from loadstone.store.entry import MANIFEST, WEIGHTS
from loadstone.telemetry import Event

KEPT = ("4bit", "8bit")
each_kept = pytest.mark.parametrize("strategy", KEPT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that was written a while ago."""
    return settled(tiny.write(tmp_path / "model", "qwen2", torch.bfloat16))


def settled(folder: Path) -> Path:
    """Wait until a change of the files just written would show."""
    time.sleep(0.15)
    return folder


def names(events: list[Event]) -> list[str]:
    """What happened in the store, without how far something is, and what is still to come."""
    told = [event.name for event in events if event.name.startswith("store.")]
    return [name for name in told if name not in ("store.progress", "store.keeping", "store.writing")]


def only(store: Store) -> Entry:
    (entry,) = store.entries()
    return entry


def flip(file: Path, offset: int) -> None:
    """Change one bit of a file where it is."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


# -- what is kept -----------------------------------------------------------------------------------------------------


@each_kept
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_decoder_from_the_store_answers_as_one_that_was_never_kept(
    strategy: str, model_type: str, tmp_path: Path, store: Store, events: list[Event]
) -> None:
    folder = settled(tiny.write(tmp_path / "model", model_type, torch.bfloat16))
    plain = loads.answer(loads.load(folder, None, strategy))
    assert names(events) == []
    assert loads.answer(loads.load(folder, store, strategy)) == plain
    assert loads.answer(loads.load(folder, store, strategy)) == plain
    assert names(events) == ["store.made", "store.hit"]


def test_what_is_not_quantised_is_not_kept(folder: Path, store: Store) -> None:
    loads.load(folder, store, "none")
    assert not store.folder.exists()


@each_kept
def test_the_same_weights_make_the_same_bytes(strategy: str, folder: Path, tmp_path: Path) -> None:
    files = []
    for place in ("one", "two"):
        loads.load(folder, Store(tmp_path / place), strategy)
        files.append(only(Store(tmp_path / place)).weights.read_bytes())
    assert files[0] == files[1]


def test_an_entry_is_a_safetensors_file_of_aligned_tensors(folder: Path, store: Store) -> None:
    decoder = loads.load(folder, store)
    entry = only(store)
    found = load_file(entry.weights)  # by the format's own library
    for name, tensor in decoder.layers[1].down.weight.tensors().items():
        assert torch.equal(found[f"layers.1.down:{name}"], tensor)
    assert torch.equal(found["norm"], decoder.norm)
    assert {tensor.offset % 64 for tensor in entry.header().values()} == {0}


def test_a_manifest_says_where_an_entry_is_from(folder: Path, store: Store) -> None:
    loads.load(folder, store)
    manifest = only(store).manifest
    assert (manifest.name, manifest.strategy, manifest.revision) == ("model", "4bit", None)
    assert manifest.origin == f"folder: {folder}"
    assert manifest.weights_bytes == only(store).weights.stat().st_size
    assert manifest.made == pytest.approx(time.time(), abs=60)
    assert set(manifest.source) == set(load_file(folder / "model.safetensors"))


def test_weights_that_are_no_numbers_are_warned_of_at_every_load(
    tmp_path: Path, store: Store, events: list[Event]
) -> None:
    folder = tiny.write(tmp_path / "model", "llama")
    change(folder, "model.layers.1.mlp.down_proj.weight", float("nan"))
    settled(folder)
    for _ in range(2):
        events.clear()
        loads.load(folder, store)
        (warning,) = (event for event in events if event.name == "load.warning")
        assert warning.fields["tensors"] == ["model.layers.1.mlp.down_proj.weight"]


def change(folder: Path, name: str, value: float) -> None:
    """Write a checkpoint again with one number changed: the file is another, of the same size and header."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(file.with_suffix(".new"), file)


# -- finding it again -------------------------------------------------------------------------------------------------


def test_an_unchanged_checkpoint_is_found_without_reading_it(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    loads.load(folder, store)
    monkeypatch.setattr(FileReader, "read", lambda *_: pytest.fail("weights were read"))
    loads.load(folder, store)
    assert names(events)[-1] == "store.hit"


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("copy")))


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("renamed"))


def linked(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


def touched(folder: Path) -> Path:
    os.utime(folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """The same tensors in two files."""
    other = folder.with_name("sharded")
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors, places = load_file(folder / "model.safetensors"), {}
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, other / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return other


@pytest.mark.parametrize("move", [copied, renamed, linked, touched, sharded])
def test_the_same_model_elsewhere_is_the_same_entry(
    move: Callable[[Path], Path], folder: Path, store: Store, events: list[Event]
) -> None:
    loads.load(folder, store)
    made = only(store)
    elsewhere = settled(move(folder))
    loads.load(elsewhere, store)
    loads.load(elsewhere, store)
    assert names(events) == ["store.made", "store.hit", "store.hit"]
    assert only(store).folder == made.folder


def test_a_weight_changed_in_place_is_another_entry(folder: Path, store: Store, events: list[Event]) -> None:
    """One bit of a source shard, with the time of modification set back."""
    before = loads.answer(loads.load(folder, store))
    file = folder / "model.safetensors"
    stamp = file.stat()
    flip(file, stamp.st_size - 999)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    found = loads.answer(loads.load(folder, store))
    assert names(events) == ["store.made", "store.made"]
    assert found == loads.answer(loads.load(folder, None))
    assert found != before


def test_a_shard_replaced_by_another_of_the_same_size_and_header_is_another_entry(
    folder: Path, store: Store, events: list[Event]
) -> None:
    before = loads.answer(loads.load(folder, store))
    size = (folder / "model.safetensors").stat().st_size
    change(folder, "model.layers.0.mlp.up_proj.weight", 3.0)
    assert (folder / "model.safetensors").stat().st_size == size
    assert loads.answer(loads.load(folder, store)) == loads.answer(loads.load(folder, None)) != before
    assert names(events) == ["store.made", "store.made"]


def test_two_models_trained_from_one_have_two_entries(folder: Path, store: Store, events: list[Event]) -> None:
    other = copied(folder)
    change(other, "model.layers.2.self_attn.q_proj.weight", 1.0)
    answers = [loads.answer(loads.load(settled(one), store)) for one in (folder, other, folder, other)]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
    assert names(events) == ["store.made", "store.made", "store.hit", "store.hit"]


def test_a_file_changed_while_it_may_not_show_is_not_remembered(
    tmp_path: Path, store: Store, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry is found all the same: its content is looked at again."""
    monkeypatch.setattr("loadstone.store.known.TICK_NS", 10**12)
    folder = tiny.write(tmp_path / "model", "llama")
    loads.load(folder, store)
    assert not list((store.folder / "known").glob("*"))
    loads.load(folder, store)
    assert names(events) == ["store.made", "store.hit"]


@pytest.mark.parametrize("change_of", ["strategy", "layout", "dtype", "format"])
def test_what_changes_the_bytes_changes_the_entry(
    change_of: str, folder: Path, store: Store, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads.load(folder, store)
    if change_of == "layout":
        monkeypatch.setattr("loadstone.quantization.nf4.Nf4.layout", lambda *_: "another")
    elif change_of == "dtype":
        monkeypatch.setattr(loads, "SETTINGS", loads.MemorySettings("bfloat16", "bfloat16", 512, 0))
    elif change_of == "format":
        monkeypatch.setattr("loadstone.store.entry.FORMAT", 99)
    loads.load(folder, store, "8bit" if change_of == "strategy" else "4bit")
    assert names(events) == ["store.made", "store.made"]
    assert len(list((store.folder / "entries").iterdir())) == 2


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_by_verify_and_made_again(folder: Path, store: Store, events: list[Event]) -> None:
    before = loads.answer(loads.load(folder, store))
    entry = only(store)
    assert store.verify(entry) is None
    name = next(name for name in entry.header() if name.startswith("layers.1.gate_up:"))
    tensor = entry.header()[name]
    flip(entry.weights, tensor.offset + 77)
    assert name in str(store.verify(entry))
    assert store.entries() == []
    assert len(store.damaged()) == 1
    assert loads.answer(loads.load(folder, store)) == before
    assert names(events) == ["store.made", "store.warning", "store.made"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry.weights, entry.weights.stat().st_size - 1),
        lambda entry: os.truncate(entry.weights, 0),
        lambda entry: entry.weights.write_bytes(entry.weights.read_bytes() + b"\0"),
        lambda entry: flip(entry.weights, 3),
        lambda entry: entry.weights.unlink(),
        lambda entry: (entry.folder / MANIFEST).write_text("{}"),
        lambda entry: (entry.folder / MANIFEST).write_text("half of"),
        lambda entry: (entry.folder / MANIFEST).write_text('{"key": 7}'),
        lambda entry: (entry.folder / MANIFEST).unlink(),
    ],
    ids=["cut", "empty", "longer", "header", "no weights", "no manifest", "half", "strange", "gone"],
)
def test_what_can_be_seen_at_once_is_seen_at_every_load(
    damage: Callable[[Entry], None], folder: Path, store: Store
) -> None:
    before = loads.answer(loads.load(folder, store))
    damage(only(store))
    assert loads.answer(loads.load(folder, store)) == before
    assert loads.answer(loads.load(folder, store)) == before
    assert store.verify(only(store)) is None


def test_after_a_restart_of_the_system_an_entry_is_read_once(
    folder: Path, store: Store, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may say that it has written what it has not."""
    before = loads.answer(loads.load(folder, store))
    for place in ("store.restart", "model.keeping"):
        monkeypatch.setattr(f"loadstone.{place}.boot_id", lambda: "another")
    loads.load(folder, store)
    loads.load(folder, store)
    assert names(events) == ["store.made", "store.verify", "store.hit", "store.hit"]
    entry = only(store)
    (entry.folder / "checked").unlink()
    flip(entry.weights, entry.weights.stat().st_size - 5)
    assert loads.answer(loads.load(folder, store)) == before
    assert names(events)[4:] == ["store.verify", "store.warning", "store.made"]


# -- keeping house ----------------------------------------------------------------------------------------------------


def entries_of(tmp_path: Path, store: Store, count: int) -> list[Entry]:
    """Make entries of some models, the first used longest ago."""
    made = []
    for number in range(count):
        folder = tiny.write(tmp_path / f"model-{number}", "llama")
        change(folder, "model.norm.weight", float(number))
        loads.load(settled(folder), store).release()
        entry = next(one for one in store.entries() if one.manifest.name == folder.name)
        os.utime(entry.folder / "used", (time.time() - 3600 * (count - number),) * 2)
        made.append(entry)
    return made


def test_pruning_removes_what_was_used_longest_ago(tmp_path: Path, store: Store) -> None:
    first, second, third = entries_of(tmp_path, store, 3)
    removed = store.prune(max_size=second.nbytes + third.nbytes)
    assert [entry.manifest.name for entry in removed] == ["model-0"]
    assert {entry.manifest.name for entry in store.entries()} == {"model-1", "model-2"}
    assert not first.folder.exists()
    assert not list((store.folder / "drafts").iterdir())


def test_pruning_by_age(tmp_path: Path, store: Store) -> None:
    entries_of(tmp_path, store, 3)
    removed = store.prune(older_than=2.5 * 3600)
    assert [entry.manifest.name for entry in removed] == ["model-0"]


def test_using_an_entry_makes_it_the_last_used(tmp_path: Path, store: Store) -> None:
    entries_of(tmp_path, store, 2)
    loads.load(tmp_path / "model-0", store).release()
    assert [entry.manifest.name for entry in store.entries()] == ["model-0", "model-1"]


def test_an_entry_in_use_is_never_removed(tmp_path: Path, store: Store) -> None:
    first, _ = entries_of(tmp_path, store, 2)
    used = Attached(first)
    assert [entry.manifest.name for entry in store.prune(max_size=0)] == ["model-1"]
    assert not store.remove(first)
    used.close()
    assert store.remove(first)
    assert store.entries() == []


def test_pages_of_rows_that_were_looked_up_go_before_they_are_too_many(tmp_path: Path, store: Store) -> None:
    """And what is looked up stays what it is."""
    loads.load(tiny.write(tmp_path / "model", "llama", vocab_size=20_000), store).release()
    attached = Attached(only(store))
    (name,) = attached.entry.manifest.parts["embedding"]["tensors"][:1]
    embedding = attached.tensors[name]
    whole = [(embedding.data_ptr(), embedding.nbytes)]
    before = embedding.clone()
    attached.bring_in(rarely_used=[name], at_most=3 << 20)  # three rows, if each brings a megabyte with it
    for thread in attached._fetching._threads:
        thread.join()
    for row in (0, 19_999, 7_000):
        attached.note_lookups(1)
        assert torch.equal(embedding[row], before[row])
    assert (resident_bytes(whole) or 0) > 0
    attached.note_lookups(1)
    assert resident_bytes(whole) in (0, PAGE, 2 * PAGE)  # pages that it shares with its neighbours stay
    assert torch.equal(embedding, before)
    attached.close()


def test_a_limit_is_kept_without_being_asked(tmp_path: Path, store: Store) -> None:
    (first,) = entries_of(tmp_path, store, 1)
    limited = Store(store.folder, max_size=first.nbytes * 3 // 2)
    folder = tiny.write(tmp_path / "other", "llama")
    loads.load(folder, limited).release()
    assert [entry.manifest.name for entry in store.entries()] == ["other"]


def test_what_is_larger_than_the_limit_is_not_kept(folder: Path, store: Store, events: list[Event]) -> None:
    decoder = loads.load(folder, Store(store.folder, max_size=1000))
    assert loads.answer(decoder) == loads.answer(loads.load(folder, None))
    (warning,) = (event for event in events if event.name == "store.warning")
    assert "max_size" in warning.fields["reason"]
    assert store.entries() == []


def test_an_entry_that_is_used_can_be_removed_when_its_decoder_goes(folder: Path, store: Store) -> None:
    loads.load(folder, store)
    decoder = loads.load(folder, store)
    assert not store.remove(only(store))
    del decoder
    assert store.remove(only(store))


def test_an_entry_that_changed_its_manifest_is_not_attached(folder: Path, store: Store) -> None:
    loads.load(folder, store)
    entry = only(store)
    text = (entry.folder / MANIFEST).read_text()
    (entry.folder / MANIFEST).write_text(text.replace('"name": "model"', '"name": "other"'))
    with pytest.raises(DamagedError, match="changed"):
        Attached(entry)


def test_a_write_by_mistake_never_reaches_the_store(folder: Path, store: Store) -> None:
    loads.load(folder, store)
    decoder = loads.load(folder, store)
    decoder.norm.zero_()
    assert store.verify(only(store)) is None
    assert (only(store).folder / WEIGHTS).is_file()


def test_an_entry_is_loaded_to_a_device_by_copying(folder: Path, store: Store) -> None:
    """The way to a GPU, on the processor."""
    loads.load(folder, store)
    entry = only(store)
    copied_to, mapped = entry.load(torch.device("cpu")), Attached(entry).tensors
    assert copied_to.keys() == mapped.keys()
    assert all(torch.equal(copied_to[name], tensor) for name, tensor in mapped.items())


def test_the_form_of_gpus_comes_back_from_the_store(
    folder: Path, store: Store, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' own form, packed, kept and restored on the processor."""
    from loadstone.quantization._bitsandbytes import BitsandbytesNf4, BitsandbytesPacking
    from loadstone.quantization.nf4 import Nf4

    packing = Nf4.packing

    def on_gpu(self, part, rows, columns, *, source, device, dtype):  # type: ignore[no-untyped-def]
        if part != "linear":
            return packing(self, part, rows, columns, source=source, device=device, dtype=dtype)
        return BitsandbytesPacking(rows, columns, device, dtype)

    monkeypatch.setattr(Nf4, "packing", on_gpu)
    plain = loads.load(folder, None)
    assert isinstance(plain.layers[0].down.weight, BitsandbytesNf4)
    for _ in range(2):
        decoder = loads.load(folder, store)
        assert isinstance(decoder.layers[0].down.weight, BitsandbytesNf4)
        assert loads.answer(decoder) == loads.answer(plain)
    assert names(events) == ["store.made", "store.hit"]
