"""`loadstone cache`: what is listed, found damaged, removed and spared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadstone.cli.entries import named
from loadstone.config import StoreConfig
from loadstone.errors import ConfigurationError
from loadstone.store import Attached, Entry, Store, open_store
from loadstone.store.entry import MANIFEST, USED, WEIGHTS

DAY = 86_400


@pytest.fixture
def store(store_folder: Path) -> Store:
    found = open_store(StoreConfig(folder=str(store_folder)))
    assert found is not None
    return found


@pytest.fixture
def entry(store: Store, small_model: Path, cli) -> Entry:
    """The entry of a small model, called small-model, in 4bit."""
    assert cli("pull", str(small_model)).code == 0
    (made,) = store.entries()
    return made


def copied(entry: Entry, key: str, **facts: object) -> Entry:
    """Put a copy of an entry beside it, under another key and with other facts."""
    folder = entry.folder.with_name(key)
    shutil.copytree(entry.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "key": key, **facts}))
    return Entry.at(folder)


def used(entry: Entry, seconds_ago: float) -> None:
    when = time.time() - seconds_ago
    os.utime(entry.folder / USED, (when, when))


def flip(file: Path, place: int = -1) -> None:
    """Change one byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def key(letter: str, start: str = "") -> str:
    return start + letter * (32 - len(start))


# -- ls


def test_ls_lists_each_entry_and_the_total(cli, store, entry):
    """Name, strategy, size, origin, last use and the first digits of the key; then the folder and all bytes."""
    other = copied(entry, key("b"), name="org/other", strategy="8bit", origin="Hub: org/other", revision="c0ffee0" * 6)
    used(entry, 3 * DAY + 5)
    ended = cli("cache", "ls")
    assert (ended.code, ended.err) == (0, "")
    first, second, third = ended.out.splitlines()[:3]
    assert first.split() == ["model", "strategy", "size", "last", "use", "key", "origin"]
    assert second.split()[:2] == ["org/other", "8bit"]
    assert second.endswith("bbbbbbbb  Hub: org/other@c0ffee0c")
    assert third.startswith("small-model  4bit")
    assert f"3 days ago  {entry.manifest.key[:8]}  folder: " in third
    assert str(store.folder) in ended.out
    assert "2 entries" in ended.out
    cli("cache", "rm", other.manifest.key)
    assert "1 entry," in cli("cache", "ls").out


def test_ls_json_has_bytes_and_seconds_since_the_epoch(cli, store, entry, monkeypatch):
    """A script gets the numbers as they are."""
    monkeypatch.setenv("LOADSTONE_STORE__MAX_SIZE", "5GB")
    used(entry, 60)
    ended = cli("cache", "ls", "--json")
    assert ended.out.count("\n") == 1
    said = json.loads(ended.out)
    (one,) = said.pop("entries")
    size = sum(file.stat().st_size for file in entry.folder.iterdir())
    folder = str(store.folder)
    assert said == {"folder": folder, "total_bytes": size, "max_size_bytes": 5 * 10**9, "damaged": []}
    assert (one["name"], one["strategy"], one["bytes"], one["key"]) == ("small-model", "4bit", size, entry.manifest.key)
    assert (one["revision"], one["in_use"], one["folder"]) == (None, False, str(entry.folder))
    assert one["origin"].startswith("folder: ")
    assert one["last_used"] == pytest.approx(time.time() - 60, abs=30)
    assert one["made"] == pytest.approx(time.time(), abs=60)


def test_ls_tells_what_is_in_use(cli, entry):
    """As long as somebody has it attached, and no longer."""
    attached = Attached(entry)
    assert "in use now" in cli("cache", "ls").out
    attached.close()
    assert "in use now" not in cli("cache", "ls").out


def test_ls_lists_what_is_damaged_as_such(cli, store, entry):
    """What was set aside, and what stands among the entries and cannot be read; neither counts as an entry."""
    store.set_aside(copied(entry, key("a"), name="org/spoilt").folder, "because")
    (copied(entry, key("b")).folder / MANIFEST).write_text("{")
    said = json.loads(cli("cache", "ls", "--json").out)
    assert [one["name"] for one in said["damaged"]] == ["org/spoilt", None]
    assert all(one["bytes"] > 0 for one in said["damaged"])
    assert len(said["entries"]) == 1
    text = cli("cache", "ls").out
    assert "damaged" in text
    assert "org/spoilt" in text


@pytest.mark.parametrize("command", ["ls", "verify", "prune", "rm"])
def test_a_store_that_is_not_there_is_empty(cli, store, command):
    """It is no error, and nothing is made."""
    ended = cli("cache", command, "--json", *(["--all"] if command == "rm" else []))
    assert ended.code == 0
    assert isinstance(json.loads(ended.out), dict)
    assert not store.folder.exists()


@pytest.mark.parametrize("command", ["ls", "verify", "prune", "rm"])
def test_a_store_that_is_switched_off_is_wrong_use(cli, here, command):
    """Where it was switched off is said."""
    (here / "loadstone.yaml").write_text("store:\n  enabled: false\n")
    ended = cli("cache", command, *(["--all"] if command == "rm" else []))
    assert (ended.code, ended.out) == (2, "")
    assert "loadstone.yaml:2" in ended.err


def test_the_store_is_that_of_the_file_that_config_names(cli, here, entry, monkeypatch):
    """`--config` works as everywhere."""
    monkeypatch.delenv("LOADSTONE_STORE__FOLDER")
    (here / "other.yaml").write_text(f"store:\n  folder: {entry.folder.parents[1]}\n")
    assert json.loads(cli("cache", "ls", "--json").out)["folder"] != str(entry.folder.parents[1])
    assert len(json.loads(cli("cache", "ls", "--config", "other.yaml", "--json").out)["entries"]) == 1


def test_ls_and_rm_import_nothing_heavy(entry):
    """They answer in a blink: no torch, no numpy, no tokenizers."""
    for arguments in (["ls"], ["rm", "small-model"]):
        script = (
            "import sys\nfrom loadstone.cli import main\n"
            f"try:\n    main(['cache', *{arguments}])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "print(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
        assert not loaded & {"torch", "numpy", "tokenizers", "huggingface_hub", "llvmlite", "rich", "gguf"}


def test_cache_alone_is_wrong_use_with_the_help(cli):
    """As `loadstone` alone is."""
    ended = cli("cache")
    assert (ended.code, ended.out) == (2, "")
    assert "verify" in ended.err


# -- verify


def test_verify_finds_every_entry_whole(cli, entry):
    """Nothing is changed by looking."""
    ended = cli("cache", "verify")
    assert ended.code == 0
    assert f"small-model in 4bit ({entry.manifest.key[:8]})  ok, " in ended.out
    assert entry.folder.exists()


@pytest.mark.parametrize("place", [-1, 100_000, 20], ids=["last byte", "in the middle", "in the header"])
def test_verify_finds_a_flipped_byte_sets_the_entry_aside_and_it_is_made_again(cli, store, entry, small_model, place):
    """Exit code 3 and what is wrong; the next load quantises again, and then all is well."""
    flip(entry.weights, place)
    ended = cli("cache", "verify")
    assert ended.code == 3
    assert "damaged, and set aside: " in ended.out
    assert store.entries() == []
    assert len(store.damaged()) == 1
    assert json.loads(cli("pull", str(small_model), "--json").out)["made"] is True
    assert cli("cache", "verify").code == 0


def test_verify_reads_the_named_entries_alone(cli, entry):
    """A damaged one beside them is not seen."""
    flip(copied(entry, key("d"), name="org/spoilt").weights)
    ended = cli("cache", "verify", "small-model", "--json")
    assert ended.code == 0
    assert [one["key"] for one in json.loads(ended.out)["entries"]] == [entry.manifest.key]
    ended = cli("cache", "verify", "spoilt", "--json")
    said = json.loads(ended.out.splitlines()[-1])
    assert (ended.code, said["ok"]) == (3, False)
    assert "have changed" in said["entries"][0]["problem"]


def test_verify_finds_an_entry_without_a_manifest(cli, store, entry):
    """It would keep a new one from its place."""
    (entry.folder / MANIFEST).unlink()
    ended = cli("cache", "verify")
    assert ended.code == 3
    assert "its manifest is missing" in ended.out
    assert not entry.folder.exists()


def test_a_load_makes_an_entry_again_that_lost_its_manifest(cli, store, entry, small_model):
    """What is left of the old one does not stand in the way of the new one."""
    (entry.folder / MANIFEST).unlink()
    assert json.loads(cli("pull", str(small_model), "--json").out)["made"] is True
    assert [one.folder for one in store.entries()] == [entry.folder]


def test_verify_goes_on_where_an_entry_cannot_be_read(cli, store, entry, monkeypatch):
    """A disk that fails says nothing of whether the entry is whole: it stays, and the exit code is 3."""
    from loadstone.errors import CheckpointError

    def fail(_: Entry) -> None:
        raise CheckpointError("it cannot be read: Input/output error")

    monkeypatch.setattr(Entry, "verify", fail)
    ended = cli("cache", "verify")
    assert ended.code == 3
    assert "not known to be whole: it cannot be read" in ended.out
    assert entry.folder.exists()


def test_verify_tells_how_far_it_is(entry):
    """By events that only grow and end with all bytes."""
    from loadstone.cli.listening import heard

    with heard("store.progress") as events:
        entry.verify()
    done = [event.fields["done"] for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1].fields["total"]
    assert {(event.fields["phase"], event.fields["model"]) for event in events} == {("verify", "small-model")}


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal as POSIX has it")
def test_verify_has_a_bar_at_a_terminal_only(entry, start):
    """Standard output is the table alone."""
    mine, theirs = os.openpty()
    try:
        process = start("cache", "verify", stderr=theirs, env={**os.environ, "TERM": "xterm"})
        out, _ = process.communicate(timeout=60)
        shown = os.read(mine, 1 << 16).decode("utf-8", "replace")
    finally:
        os.close(mine)
        os.close(theirs)
    assert process.returncode == 0
    assert "Checking" in shown
    assert b"\x1b" not in out


# -- prune


def test_prune_removes_what_was_not_used_for_long(cli, store, entry):
    """An age counts from the last use."""
    old = copied(entry, key("b"), name="org/old")
    used(old, 31 * DAY)
    used(entry, 29 * DAY)
    size = old.nbytes
    said = json.loads(cli("cache", "prune", "--older-than", "30d", "--json").out)
    assert [one["name"] for one in said["removed"]] == ["org/old"]
    assert (said["freed_bytes"], said["in_use"]) == (size, [])
    assert [one.folder for one in store.entries()] == [entry.folder]


def test_prune_removes_what_was_used_longest_ago_until_the_rest_fits(cli, store, entry):
    """What was removed, and how much that freed, is said."""
    middle, oldest = copied(entry, key("b"), name="org/middle"), copied(entry, key("c"), name="org/oldest")
    used(middle, DAY)
    used(oldest, 2 * DAY)
    ended = cli("cache", "prune", "--max-size", f"{entry.nbytes + middle.nbytes}B")
    assert ended.code == 0
    assert "removed  org/oldest in 4bit (cccccccc)" in ended.out
    assert ended.out.splitlines()[-1].startswith("freed")
    assert {one.folder for one in store.entries()} == {entry.folder, middle.folder}


def test_prune_without_options_keeps_to_the_configured_limit(cli, store, entry, monkeypatch):
    """`store.max_size`, as a load does."""
    oldest = copied(entry, key("c"))
    used(oldest, DAY)
    monkeypatch.setenv("LOADSTONE_STORE__MAX_SIZE", f"{entry.nbytes + 10}B")
    assert cli("cache", "prune").code == 0
    assert [one.folder for one in store.entries()] == [entry.folder]


def test_prune_without_any_limit_says_so_and_removes_what_is_of_no_use(cli, store, entry):
    """What is damaged goes in any case, entries stay."""
    store.set_aside(copied(entry, key("a")).folder, "because")
    (copied(entry, key("b")).folder / MANIFEST).write_text("{")
    ended = cli("cache", "prune")
    assert ended.code == 0
    assert "No limit is configured (store.max_size)" in ended.err
    assert "left over" in ended.out
    assert (len(store.entries()), store.damaged(), store.unreadable()) == (1, [], {})


def test_prune_spares_and_names_what_is_in_use(cli, store, entry):
    """It stays, whatever its age, and is no failure."""
    used(entry, 90 * DAY)
    attached = Attached(entry)
    ended = cli("cache", "prune", "--older-than", "2w")
    attached.close()
    assert ended.code == 0
    assert f"stays  small-model in 4bit ({entry.manifest.key[:8]}): in use now" in ended.out
    assert len(store.entries()) == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--max-size", "50", "like 20GB"), ("--older-than", "6m", "'m' is not a unit"), ("--older-than", "0d", "above")],
)
def test_sizes_and_ages_that_cannot_be_meant_are_wrong_use(cli, option, value, said):
    """With the option's name."""
    ended = cli("cache", "prune", option, value)
    assert ended.code == 2
    assert option in ended.err
    assert said in ended.err


# -- rm


@pytest.mark.parametrize("name", ["org/name", "name"])
def test_rm_by_a_models_name_removes_all_its_entries(cli, store, entry, name):
    """In whole or its last part; both strategies go, another model stays."""
    for letter, strategy in (("b", "4bit"), ("c", "8bit")):
        copied(entry, key(letter), name="org/name", strategy=strategy)
    said = json.loads(cli("cache", "rm", name, "--json").out)
    assert sorted(one["strategy"] for one in said["removed"]) == ["4bit", "8bit"]
    assert said["freed_bytes"] > 2 * entry.manifest.weights_bytes
    assert [one.folder for one in store.entries()] == [entry.folder]


@pytest.mark.parametrize("digits", [4, 8, 32])
def test_rm_by_a_key_removes_one_entry(cli, store, entry, digits):
    """Four digits are enough where they are the start of one key only."""
    copied(entry, key("b"))
    assert cli("cache", "rm", "b" * digits).code == 0
    assert [one.folder for one in store.entries()] == [entry.folder]


def test_rm_refuses_the_start_of_several_keys(cli, store, entry):
    """The whole keys are told, and nothing is removed."""
    keys = [key("1", "abcd"), key("2", "abcd")]
    for one in keys:
        copied(entry, one)
    ended = cli("cache", "rm", "abcd")
    assert ended.code == 2
    assert "the start of 2 keys" in ended.err
    assert all(one in ended.err for one in keys)
    assert len(store.entries()) == 3
    assert cli("cache", "rm", "abcd1").code == 0
    assert len(store.entries()) == 2


@pytest.mark.parametrize(
    ("name", "said"), [("smal-model", "Did you mean small-model?"), ("zzz", "There is small-model"), ("b", "There is")]
)
def test_rm_refuses_what_it_does_not_know_with_the_nearest_name(cli, store, entry, name, said):
    """Also a key of fewer than four digits; the other names on the line are not removed either."""
    ended = cli("cache", "rm", "small-model", name)
    assert (ended.code, ended.out) == (2, "")
    assert f"called '{name}'" in ended.err
    assert said in ended.err
    assert len(store.entries()) == 1


def test_a_whole_key_or_name_goes_before_the_start_of_a_key(store, entry):
    """A model that is called as a key begins is meant by its name; in an empty store nothing is meant."""
    beef = copied(entry, key("a"), name="beef")
    copied(entry, key("0", "beef"))
    assert [one.folder for one in named(store, ["beef", key("A")])] == [beef.folder]
    shutil.rmtree(store.folder)
    with pytest.raises(ConfigurationError, match="The store is empty"):
        named(store, ["beef"])


def test_rm_removes_nothing_when_one_of_several_is_in_use(cli, store, entry):
    """Exit code 5; afterwards all can be removed."""
    copied(entry, key("b"), name="small-model", strategy="8bit")
    attached = Attached(entry)
    ended = cli("cache", "rm", "small-model")
    attached.close()
    assert (ended.code, ended.out) == (5, "")
    assert "in use now" in ended.err
    assert "8bit" not in ended.err
    assert len(store.entries()) == 2
    assert cli("cache", "rm", "small-model").code == 0
    assert store.entries() == []


def test_what_another_process_has_loaded_is_in_use(cli, start, store, entry, small_model):
    """A chat holds its model until it ends."""
    process = start("chat", str(small_model))
    process.stdin.write(b"/system\n")
    process.stdin.flush()
    assert b"no system message" in process.stderr.readline()
    assert json.loads(cli("cache", "ls", "--json").out)["entries"][0]["in_use"] is True
    assert cli("cache", "rm", "small-model").code == 5
    process.communicate(timeout=60)
    assert cli("cache", "rm", "small-model").code == 0


def test_rm_all_leaves_what_is_in_use_and_nothing_else(cli, store, entry):
    """Damaged entries and drafts that nobody writes go too; what stays is named, and that is no failure."""
    copied(entry, key("b"))
    store.set_aside(copied(entry, key("a")).folder, "because")
    (copied(entry, key("c")).folder / MANIFEST).write_text("{")
    draft = store.folder / "drafts" / "0123-left"
    draft.mkdir(parents=True)
    (draft / WEIGHTS).write_bytes(bytes(1000))
    attached = Attached(entry)
    ended = cli("cache", "rm", "--all", "--json")
    attached.close()
    said = json.loads(ended.out)
    assert ended.code == 0
    assert [one["key"] for one in said["removed"]] == [key("b")]
    assert [one["key"] for one in said["in_use"]] == [entry.manifest.key]
    assert said["left_over_bytes"] > 2 * entry.manifest.weights_bytes + 1000
    assert [one.folder for one in store.entries()] == [entry.folder]
    assert (store.damaged(), store.unreadable(), list((store.folder / "drafts").iterdir())) == ([], {}, [])


@pytest.mark.parametrize("arguments", [(), ("--all", "small-model")])
def test_rm_wants_names_or_all(cli, arguments):
    """One of the two."""
    ended = cli("cache", "rm", *arguments)
    assert ended.code == 2
    assert "--all" in ended.err
