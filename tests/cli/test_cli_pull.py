"""`loadstone pull`: what is fetched, made, found, refused and told; and where other commands say weights came from."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.quantized_checkpoints import FORMATS, quantize_folder
from tests.sources.fake_hub import FakeHub

from loadstone import ModelManager
from loadstone.errors import ModelLoadError
from loadstone.store import Store
from loadstone.store.known import FileState
from small_model import GENERATION, write_small_model
from warm import command


@pytest.fixture
def blocked(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that cannot be written, whoever tries: its folder's place is taken by a file."""
    (here / "file").write_text("mine")
    monkeypatch.setenv("LOADSTONE_STORE__FOLDER", str(here / "file" / "store"))
    return here / "file" / "store"


@pytest.fixture
def old_model(small_model: Path) -> Path:
    """A small model that was written long enough ago for its digests to be remembered."""
    while not all(FileState.of(file).is_settled(time.time_ns()) for file in small_model.glob("*.safetensors")):
        time.sleep(0.02)
    return small_model


def pulled(cli, *arguments: str) -> dict[str, object]:
    ended = cli("pull", *arguments, "--json")
    assert (ended.code, ended.out.count("\n")) == (0, 1), ended.err
    return json.loads(ended.out)


def test_pull_makes_the_entry_once_and_a_load_takes_it(cli, store_folder, small_model):
    """First it is made, then it is there already, and `run` has its weights from the store."""
    first = pulled(cli, str(small_model))
    assert (first["made"], first["not_kept"], first["strategy"], first["fetched_bytes"]) == (True, None, "4bit", 0)
    (entry,) = Store(store_folder).entries()
    assert first["entry"] == {"key": entry.manifest.key, "bytes": entry.nbytes, "folder": str(entry.folder)}
    assert first["file_bytes"] == (small_model / "model.safetensors").stat().st_size
    second = pulled(cli, str(small_model))
    assert (second["made"], second["entry"]) == (False, first["entry"])
    assert "s, from the store" in cli("run", str(small_model), "hi", "--max-new-tokens", "1").err


def test_pull_tells_people_the_same(cli, store_folder, small_model):
    """Files, strategy, where the entry is and whether it was made, and seconds."""
    first, second = cli("pull", str(small_model)), cli("pull", str(small_model))
    assert (first.code, first.err, second.code) == (0, "", 0)
    assert f"{store_folder}" in first.out
    assert "quantised now" in first.out
    assert [line.split()[0] for line in first.out.splitlines()] == ["model", "files", "strategy", "store", "took"]
    assert "quantised now" not in second.out
    assert second.out.count("there already") == 2


def test_pull_of_the_bundled_model_in_8_bits(cli, store_folder):
    """Options are those of a load: another strategy is another entry."""
    said = pulled(cli, "smollm2", "--quantization", "8bit", "--context", "256")
    assert (said["model"], said["strategy"], said["made"]) == ("smollm2", "8bit", True)
    assert json.loads(cli("info", "smollm2", "--quantization", "8bit", "--json").out)["store"]["entry"] == said["entry"]
    assert json.loads(cli("info", "smollm2", "--json").out)["store"] == {"keeps": True, "entry": None}


def test_pull_fetches_from_a_hub_and_counts_the_bytes(store_folder, small_model, here):
    """What came over the line is told; the second time nothing comes, and the Hub need not be there."""
    files = {file.name: file.read_bytes() for file in small_model.iterdir()}
    with FakeHub(files) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(here / "hub")}
        first = command("pull", "org/model", "--json", folder=here, environment=environment)
        assert first.code == 0, first.err
    second = command("pull", "org/model", "--offline", "--json", folder=here, environment=environment)
    told, later = json.loads(first.out), json.loads(second.out)
    assert told["fetched_bytes"] == sum(map(len, files.values()))
    assert (told["model"], told["revision"], told["made"]) == ("org/model", hub.commit, True)
    assert (later["fetched_bytes"], later["made"], later["entry"]) == (0, False, told["entry"])


def test_pull_without_quantising_fetches_alone(cli, store_folder, small_model):
    """It says that nothing is quantised, and makes no store."""
    said = pulled(cli, str(small_model), "--quantization", "none")
    assert (said["entry"], said["made"]) == (None, False)
    assert "none" in str(said["not_kept"])
    assert not store_folder.exists()
    assert "nothing is quantised" in cli("pull", str(small_model), "--quantization", "none").out


def test_pull_with_the_store_switched_off_fetches_alone(cli, small_model, monkeypatch):
    """That is what was asked for; the setting is named."""
    monkeypatch.setenv("LOADSTONE_STORE__ENABLED", "false")
    assert "LOADSTONE_STORE__ENABLED" in str(pulled(cli, str(small_model))["not_kept"])


def test_pull_fails_where_the_weights_cannot_be_kept(cli, blocked, small_model):
    """It promised to keep them; the folder and the setting are named."""
    ended = cli("pull", str(small_model))
    assert (ended.code, ended.out) == (5, "")
    assert f"cannot be kept in {blocked}" in ended.err
    assert "store.folder" in ended.err


def test_pull_fails_where_the_limit_is_too_small(cli, store_folder, small_model, monkeypatch):
    """`store.max_size` is named with both sizes, and no draft is left."""
    monkeypatch.setenv("LOADSTONE_STORE__MAX_SIZE", "1KB")
    ended = cli("pull", str(small_model))
    assert ended.code == 5
    assert "max_size of 1 KB" in ended.err
    assert list((store_folder / "drafts").glob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("./nowhere",), 3, "nowhere does not exist"),
        (("smollm2", "--max-memory", "100MB"), 4, "does not fit"),
        (("smollm2", "--quantization", "3bit"), 2, "3bit"),
        ((), 2, "MODEL"),
    ],
)
def test_what_could_not_be_loaded_is_not_prepared(cli, store_folder, arguments, code, said):
    """The errors are those of a load, and come before any weight is read."""
    ended = cli("pull", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert not store_folder.exists()


def test_a_broken_tokenizer_fails_before_weights_are_read(cli, store_folder, small_model):
    """Or the long work were in vain."""
    (small_model / "tokenizer.json").write_text("{")
    assert cli("pull", str(small_model)).code == 3
    assert not store_folder.exists()


def test_a_prepared_model_is_not_loaded(store_folder, small_model):
    """The manager holds none, and nobody has the entry in use; loading it afterwards takes it from the store."""
    with ModelManager({"model_config": {"base_model": str(small_model)}}) as manager:
        prepared = manager.prepare_model()
        assert not manager.is_loaded()
        assert prepared.entry is not None
        assert not Store(store_folder).is_in_use(prepared.entry)
        assert set(prepared.phases) == {"resolve", "inspect", "plan", "keep"}
        model = manager.load()
        assert model.decoder.attached is not None
        assert model.decoder.attached.entry.folder == prepared.entry.folder


def test_preparing_needs_no_write_for_what_is_there(store_folder, old_model, cli, monkeypatch):
    """A store that others fill and this process may only read is good enough."""
    pulled(cli, str(old_model))

    def fail(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("loadstone.store.store.os.utime", fail)
    monkeypatch.setattr(Store, "making", fail)
    assert pulled(cli, str(old_model))["made"] is False


def test_preparing_says_why_it_cannot_keep(blocked, small_model):
    """A ModelLoadError with the reason as its cause."""
    with pytest.raises(ModelLoadError, match="cannot be kept") as caught:
        ModelManager({"model_config": {"base_model": str(small_model)}}).prepare_model()
    assert caught.value.__cause__ is not None


# -- where weights came from


def load_row(cli, *arguments: str) -> str:
    ended = cli("run", *arguments, "hi", "--max-new-tokens", "1")
    assert ended.code == 0, ended.err
    (row,) = [line for line in ended.err.splitlines() if line.startswith("load ")]
    return row


def test_the_load_row_says_where_the_weights_came_from(cli, store_folder, small_model):
    """Made at the first load, taken at the second; unquantised weights come from the files without a word."""
    assert load_row(cli, str(small_model)).endswith(" s, quantised, and kept for the next time")
    assert load_row(cli, str(small_model)).endswith(" s, from the store")
    assert load_row(cli, str(small_model), "--quantization", "none").endswith(" s")


def test_the_load_row_says_why_weights_are_not_kept(cli, blocked, small_model, monkeypatch):
    """A store that cannot be written, or none."""
    assert "quantised, not kept: the store cannot be written" in load_row(cli, str(small_model))
    monkeypatch.setenv("LOADSTONE_STORE__ENABLED", "false")
    assert "quantised, not kept: the store is switched off" in load_row(cli, str(small_model))


def test_info_says_where_a_load_would_take_the_weights_from(cli, store_folder, old_model):
    """It makes nothing itself."""
    assert "the quantised weights are kept then" in cli("info", str(old_model)).out
    assert not store_folder.exists()
    pulled(cli, str(old_model))
    assert "from the store, which has" in cli("info", str(old_model)).out
    assert cli("info", str(old_model), "--quantization", "none").out.splitlines()[-1].split() == [
        "load", "from", "the", "files",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal as POSIX has it")
def test_pull_shows_progress_at_a_terminal(start, store_folder):
    """Bars as `run` has them, and standard output without them."""
    mine, theirs = os.openpty()
    shown = b""
    try:
        process = start("pull", "smollm2", stderr=theirs, env={**os.environ, "TERM": "xterm"})
        while b"Loading" not in shown:
            shown += os.read(mine, 1 << 16)
        os.set_blocking(mine, False)
        out, _ = process.communicate(timeout=120)
    finally:
        os.close(mine)
        os.close(theirs)
    assert process.returncode == 0
    assert b"quantised now" in out
    assert b"\x1b" not in out


class AtHub:
    """Commands in processes of their own, with a Hub that has the small model and a store of their own."""

    def __init__(self, home: Path, hub: FakeHub, folder: Path) -> None:
        self.hub, self.store = hub, Store(folder / "store")
        self._folder, self._cache = folder, folder / "hub"
        ours = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(self._cache)}
        ours |= {"LOADSTONE_STORE__FOLDER": str(self.store.folder), "LOADSTONE_HOME": str(home), "HOME": str(home)}
        others = {name: value for name, value in os.environ.items() if not name.startswith(("LOADSTONE_", "HF_"))}
        self._environment = {**others, **ours}

    def run(self, *arguments: str) -> dict[str, Any]:
        ended = command(*arguments, "--json", folder=self._folder, environment=self._environment)
        assert ended.code == 0, ended.err
        said: dict[str, Any] = json.loads(ended.out.splitlines()[-1])
        return said

    def pull(self) -> dict[str, Any]:
        return self.run("pull", "org/model", "--quantize-only")

    def answer(self, *arguments: str) -> str:
        said = self.run("run", "org/model", "Hello", "--max-new-tokens", "6", "--temperature", "0", *arguments)
        return str(said["text"])

    def lose_all_weights(self) -> None:
        for entry in self.store.entries():
            assert self.store.remove(entry)
        for file in self._cache.rglob("*.safetensors"):
            file.resolve().unlink()
            file.unlink()

    @property
    def originals(self) -> int:
        """How many files of weights are in the Hub's cache."""
        return len([*self._cache.rglob("*.safetensors")])

    @property
    def fetches(self) -> int:
        """How often the Hub was asked for weights."""
        return len(self.hub.asked_for("model.safetensors"))


@dataclass(frozen=True)
class Journey:
    """What was seen of a model: quantised only, then in another quantization, then without any weights here."""

    weights: int
    commit: str
    wanted: str
    first: dict[str, Any]
    originals: int
    fetches: int
    answer: str
    info: dict[str, Any]
    fetches_later: int
    second: dict[str, Any]
    originals_with_another: int
    answer_without_entry: str
    originals_without_entry: int


@pytest.fixture(scope="module")
def journey(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    folder = tmp_path_factory.mktemp("journey")
    model = write_small_model(folder / "small-model", **GENERATION)
    with FakeHub({file.name: file.read_bytes() for file in model.iterdir()}) as hub:
        at_hub = AtHub(home, hub, folder)
        seen: dict[str, Any] = {"weights": (model / "model.safetensors").stat().st_size, "commit": hub.commit}
        seen |= {"wanted": at_hub.answer(), "first": at_hub.pull()}
        seen |= {"originals": at_hub.originals, "fetches": at_hub.fetches}
        seen |= {"answer": at_hub.answer(), "info": at_hub.run("info", "org/model"), "fetches_later": at_hub.fetches}
        seen["second"] = at_hub.pull()
        at_hub.answer("--quantization", "8bit")
        seen["originals_with_another"] = at_hub.originals
        at_hub.lose_all_weights()
        seen |= {"answer_without_entry": at_hub.answer(), "originals_without_entry": at_hub.originals}
        return Journey(**seen)


def test_quantize_only_keeps_no_original(journey):
    """The weights leave the Hub's cache; a second time there is nothing to free."""
    assert journey.first["freed_bytes"] == journey.weights
    assert journey.originals == 0
    assert journey.second["freed_bytes"] == 0


@pytest.fixture
def fp8_at_hub(home, small_model, here):
    """A model that is quantised already, in a form that has to be made into another one."""
    quantize_folder(small_model, small_model, FORMATS["FP8, blocks of 128 × 128"]())
    with FakeHub({file.name: file.read_bytes() for file in small_model.iterdir()}) as hub:
        yield AtHub(home, hub, here)


def test_quantize_only_keeps_a_checkpoint_that_was_quantised_already_in_its_own_form(fp8_at_hub):
    """Without the original weights it is still known as what it was."""
    assert fp8_at_hub.pull()["strategy"] == "8bit"
    assert fp8_at_hub.originals == 0
    assert fp8_at_hub.answer()
    assert fp8_at_hub.originals == 0
    about = fp8_at_hub.run("plan", "org/model")
    assert about["quantized"]["summary"].startswith("FP8")
    assert [row["strategy"] for row in about["strategies"] if row["in_store"]] == ["8bit"]


def test_a_quantised_only_model_answers_the_same(journey):
    """It is loaded under its name, and the network is not asked for its weights."""
    assert journey.answer == journey.wanted
    assert journey.info["revision"] == journey.commit
    assert journey.fetches_later == journey.fetches


def test_another_quantization_fetches_the_original_again(journey):
    assert journey.originals_with_another == 1


def test_a_quantised_only_model_whose_entry_is_gone_is_fetched_again(journey):
    assert journey.answer_without_entry == journey.wanted
    assert journey.originals_without_entry == 1


def test_quantize_only_removes_nothing_of_the_users_own(cli, store_folder, small_model):
    """A folder is not the Hub's cache: it stays, and so it is said."""
    ended = cli("pull", str(small_model), "--quantize-only")
    assert ended.code == 2
    assert "stay" in ended.err
    assert (small_model / "model.safetensors").is_file()
