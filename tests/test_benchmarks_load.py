"""The parts of `benchmarks.load`: cold is cold, both GGUF and store are what is read, and nothing measured is lost."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import load
from benchmarks.checkpoints import SHAPES, write_checkpoint
from benchmarks.job import Job, is_whole
from benchmarks.load_figures import ShapeResults, figures_of, is_as_asked, measure_case
from benchmarks.load_report import COLUMNS, notes_of, table_of
from benchmarks.load_sides import CASES, Case, LlamaCpp, Loadstone, Side, Transformers, sides_of
from benchmarks.make_gguf import convert, gguf_file
from benchmarks.plot import bars_svg
from benchmarks.processes import ModuleFailed, Run
from benchmarks.results import medians
from rich.console import Console

from loadstone.checkpoint import inspect, load_tokenizer
from loadstone.sources import resolve
from test_benchmarks import TINY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page cache is looked at on Linux")

FIRST_COLD, LATER_COLD, LATER_WARM, FIRST_WARM = CASES
FIGURES = {key: 1.0 for key, *_ in COLUMNS} | {
    "phases_s": {"build": 2.0}, "resident_share_before": 0.0, "disk_bytes_per_s": 2.0, "disk_share": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "tiny"
    write_checkpoint(TINY, folder)
    return folder


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> Job:
    return Job("tiny", checkpoint, tmp_path, "What moves the price of a share?", 1)


# -- sides ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_with_all_its_tensors_and_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    assert is_whole(checkpoint, TINY)
    assert not is_whole(checkpoint, SHAPES["qwen2.5-0.5b"])
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes()[: -1000 if name.startswith("model") else None])
    assert not is_whole(tmp_path, TINY)
    assert not is_whole(tmp_path / "nowhere", TINY)


def test_loadstone_starts_a_first_load_without_a_store_and_keeps_it_for_later_ones(job: Job) -> None:
    side = Loadstone(job)
    side.begin(FIRST_COLD)
    home = Path(side.environment()["LOADSTONE_HOME"])
    weights, more = home / "cache" / "store" / "one" / "w.safetensors", home / "cache" / "store" / "one" / "facts.json"
    weights.parent.mkdir(parents=True)
    for file in (weights, more, home / "cache" / "kernels" / "k.o"):
        file.write_bytes(b"12")
    side.begin(LATER_COLD)
    assert side.weights(FIRST_WARM) == job.weights()
    assert side.weights(LATER_COLD) == side.watched(LATER_COLD) == [weights]
    assert {*side.reads(LATER_COLD)} == {*job.files(), weights, more}
    assert not {*side.reads(LATER_WARM)} & {*job.weights()}
    side.begin(FIRST_WARM)
    renewed = Path(side.environment()["LOADSTONE_HOME"])
    assert not home.exists()
    assert [file.name for file in (renewed / "cache").rglob("*")] == ["kernels"]
    assert (renewed / "cache" / "kernels" / "k.o").is_file()
    side.close()
    assert sorted(file.name for file in job.folder.iterdir()) == ["kernels"]


def test_without_a_store_a_later_load_reads_the_checkpoint(job: Job) -> None:
    side = Loadstone(job)
    side.begin(LATER_COLD)
    assert side.weights(LATER_COLD) == job.weights()
    assert side.watched(LATER_COLD) == []


def test_other_settings_of_loadstone_do_not_reach_the_measured_process(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("LOADSTONE_MODEL_CONFIG__QUANTIZATION", "8bit")
    side = Loadstone(job)
    side.begin(FIRST_COLD)
    names = [name for name in side.environment() if name.startswith("LOADSTONE_")]
    side.close()
    assert names == ["LOADSTONE_HOME"]


def test_llamacpp_reads_its_own_file_only(job: Job) -> None:
    side = LlamaCpp(job, "Q4_0")
    file = job.folder / "gguf" / "tiny-Q4_0.gguf"
    assert side.reads(LATER_COLD) == side.weights(LATER_COLD) == side.watched(LATER_COLD) == [file]
    assert side.watched(LATER_WARM) == []


def test_a_gguf_file_has_the_same_weights_and_tokens(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    convert(checkpoint, file)
    before, after = inspect(resolve(str(checkpoint))), inspect(resolve(str(file)))
    assert {name: one.shape for name, one in before.tensors.items()} == {
        name: one.shape for name, one in after.tensors.items()
    }
    assert (after.rope["rope_theta"], after.heads, after.kv_heads) == (before.rope["rope_theta"], 4, 2)
    for tensor in (one for one in before.tensors.values() if len(one.shape) == 2):
        same = after.tensors[tensor.name]
        assert _bytes(tensor) == _bytes(same)
    tokens = [load_tokenizer(spec).encode("Shares 股票", add_special_tokens=False) for spec in (before, after)]
    assert tokens[0] == tokens[1]


def _bytes(tensor: Any) -> bytes:
    with tensor.file.open("rb") as content:
        content.seek(tensor.offset)
        return bytes(content.read(tensor.nbytes))


def test_llamacpp_quantises_and_answers(job: Job) -> None:
    pytest.importorskip("llama_cpp")
    side = LlamaCpp(job, "Q4_K_M")
    assert set(side.prepare()) == {"convert", "quantize"}
    assert sorted(file.name for file in (job.folder / "gguf").glob("*.gguf")) == ["tiny-Q4_0.gguf", "tiny-Q4_K_M.gguf"]
    figures = measure_case(side, LATER_WARM)
    assert figures["read_bytes"] == gguf_file(job.folder / "gguf", "tiny", "Q4_K_M").stat().st_size
    assert figures["prompt_tokens"] > 0


def test_a_load_is_measured_in_a_fresh_process(job: Job) -> None:
    side = Loadstone(job)
    figures = measure_case(side, FIRST_COLD)
    side.close()
    assert 0 < figures["imports_s"] < figures["ready_s"] < figures["first_token_s"] < figures["process_s"]
    assert figures["ready_s"] == pytest.approx(figures["imports_s"] + figures["load_s"])
    assert sum(figures["phases_s"].values()) <= figures["load_s"]
    assert (
        0 < figures["anonymous_bytes"] <= figures["private_bytes"] <= figures["rss_bytes"] <= figures["peak_rss_bytes"]
    )
    assert figures["strategy"] == "4bit"


# -- figures and report -----------------------------------------------------------------------------------------------


def test_bytes_count_as_read_when_they_are_all_in_memory() -> None:
    at = {"imported": 11.0, "loaded": 12.0, "answered": 14.0, "resident": 15.0}
    told = {"at": at, "anonymous_bytes": 7}
    figures = figures_of(Run(told, 10.0, 16.0, 5), 1000)
    assert figures == {
        "imports_s": 1.0, "load_s": 1.0, "ready_s": 2.0, "first_token_s": 4.0, "resident_s": 4.0, "process_s": 6.0,
        "read_bytes_per_s": 250.0, "anonymous_bytes": 7, "peak_anonymous_bytes": 7,
    }  # fmt: skip
    unwatched = figures_of(Run({**told, "at": {**at, "resident": None}}, 10.0, 16.0, None), 1000)
    assert unwatched["read_bytes_per_s"] == 1000.0


def test_medians_reach_into_phases_and_leave_out_what_a_run_has_not() -> None:
    runs: list[dict[str, Any]] = [
        {"a": 1, "b": 3, "c": {"d": 1}, "e": "4bit"},
        {"a": 3, "b": None, "c": {"d": 3}, "e": "4bit"},
    ]
    assert medians(runs) == {"a": 2, "b": None, "c": {"d": 2}, "e": "4bit"}


@pytest.mark.parametrize(
    ("is_cold", "share", "is_so"), [(True, 0.0, True), (True, 0.02, False), (False, 1.0, True), (False, 0.98, False)]
)
def test_a_page_cache_that_is_not_as_asked_is_known_and_told(is_cold: bool, share: float, is_so: bool) -> None:
    case = Case("later", is_cold)
    figures = {**FIGURES, "resident_share_before": share}
    results = ShapeResults("tiny", 1, runs={("Loadstone", case): [figures]})
    assert is_as_asked(case, figures) is is_so
    assert any("as asked" in note for note in notes_of(results)) is not is_so


def test_the_table_has_a_row_for_every_side_and_case() -> None:
    results = ShapeResults("tiny", 1)
    results.add("one", FIRST_COLD, FIGURES)
    results.add("two", LATER_WARM, {**FIGURES, "resident_s": None, "disk_share": None})
    screen = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(table_of(results))
    text = screen.export_text()
    assert [text.count(word) for word in ("one", "two", "first load, cold", "later load, warm", "50%")] == [1] * 5


def test_bars_are_as_long_as_their_values_and_names_are_escaped() -> None:
    picture = ElementTree.fromstring(bars_svg({"A & B": [("ours", 1.0), ("peer <2>", 4.0)]}, highlight="ours"))
    bars = [one for one in picture.iter("{http://www.w3.org/2000/svg}rect") if one.get("fill") != "white"]
    assert float(bars[1].get("width", 0)) == pytest.approx(4 * float(bars[0].get("width", 0)))
    assert bars[0].get("fill") != bars[1].get("fill")


# -- the whole run ----------------------------------------------------------------------------------------------------


class Recorded:
    """Stands in for `measure_case`: notes what is asked, and fails where it is told to."""

    def __init__(self, failing: dict[str, BaseException]) -> None:
        self.order: list[tuple[str, str]] = []
        self._failing = failing

    def __call__(self, side: Side, case: Case) -> dict[str, Any]:
        if side.label in self._failing:
            raise self._failing[side.label]
        self.order.append((side.label, case.name))
        return dict(FIGURES)


def run_load(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, peers: str, failing: dict[str, BaseException], *more: str
) -> tuple[int, Recorded]:  # fmt: skip
    recorded = Recorded(failing)
    monkeypatch.setattr(load, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(load, "measure_case", recorded)
    monkeypatch.setattr(load, "run_module", lambda _: {"cores": 1})
    for side in (Loadstone, Transformers, LlamaCpp):
        monkeypatch.setattr(side, "prepare", lambda _: {})
    arguments = ["--shapes", "tiny", "--folder", str(checkpoint.parent), "--peers", peers, "--repetitions", "2"]
    return load.main([*arguments, *more]), recorded


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_sides_take_turns_case_by_case(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    plot = tmp_path / "load.svg"
    code, recorded = run_load(monkeypatch, checkpoint, "transformers,llamacpp", {}, "--plot", str(plot))
    ours, peer, first, second = "Loadstone 4bit", "transformers NF4", "llama.cpp Q4_K_M", "llama.cpp Q4_0"
    alone = [(ours, case.name) for case in CASES]
    assert code == 0
    assert recorded.order == [
        (ours, "first load, cold"), (peer, "first load, cold"),
        (ours, "later load, cold"), (first, "later load, cold"), (second, "later load, cold"),
        (ours, "later load, warm"), (first, "later load, warm"), (second, "later load, warm"),
        (ours, "first load, warm"), (peer, "first load, warm"),
        *alone,
    ]  # fmt: skip
    (shape,) = told(capsys)["shapes"]
    assert len(shape["cases"]) == 10
    assert [len(case["runs"]) for case in shape["cases"] if case["side"] == ours] == [2] * 4
    assert "Loadstone 4bit, first load, cold" in plot.read_text()


def test_a_peer_that_fails_is_left_out_and_the_others_go_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    code, _ = run_load(monkeypatch, checkpoint, "transformers", {"transformers NF4": ModuleFailed("a\nno room")})
    (shape,) = told(capsys)["shapes"]
    assert code == 0
    assert shape["left_out"] == {"transformers NF4": "no room"}
    assert {case["side"] for case in shape["cases"]} == {"Loadstone 4bit"}


def test_interrupting_tells_what_was_measured(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    code, _ = run_load(monkeypatch, checkpoint, "transformers", {"transformers NF4": KeyboardInterrupt()})
    (shape,) = told(capsys)["shapes"]
    assert code == 130
    assert [case["case"] for case in shape["cases"]] == ["first load, cold"]


@pytest.mark.parametrize("arguments", [["--shapes", "q9"], ["--peers", "vllm"], ["--repetitions", "0"]])
def test_what_cannot_be_measured_is_refused(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load.parse(arguments)
    assert ended.value.code == 2


def test_only_the_wanted_peers_are_sides(job: Job) -> None:
    assert [side.label for side in sides_of(job, [])] == ["Loadstone 4bit"]
    assert [type(side) for side in sides_of(job, ["llamacpp"])] == [Loadstone, LlamaCpp, LlamaCpp]
