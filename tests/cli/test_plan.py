"""`loadstone plan`, and `loadstone.plan`: models that fit, those that do not, and other machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import loadstone
from loadstone import ConfigurationError, ResourceError
from loadstone.cli.bar import BLOCKS, PLAIN, draw
from loadstone.folders import cache_folder
from loadstone.hardware import get_device_manager
from loadstone.hardware.speeds import Figure, Speeds
from loadstone.planner.accuracy import LoadRecord, add_record, kind_of

SPEEDS = Speeds(Figure(30e9, "measured here just now"), Figure(200e9, "measured here just now"))
GB = 10**9


@pytest.fixture(autouse=True)
def speeds(monkeypatch):
    """Speeds as if they had been measured."""
    monkeypatch.setattr("loadstone.forecast.machine_speeds", lambda *_: SPEEDS)


def told(cli, *arguments):
    ended = cli("plan", *arguments, "--json")
    return ended.code, json.loads(ended.out)


# -- what is told -----------------------------------------------------------------------------------------------------


def test_a_model_that_fits_is_told_with_every_strategy(cli, monkeypatch):
    """One row a strategy, the chosen one marked; no weight is read."""
    monkeypatch.setattr("loadstone.checkpoint.weights.open_weights", lambda *_: pytest.fail("weights were opened"))
    code, about = told(cli, "smollm2", "--context", "1k", "--device", "cpu")
    assert (code, about["verdict"]) == (0, "fits")
    assert (about["plan"]["strategy"], about["plan"]["context"]) == ("4bit", 1024)
    rows = {row["strategy"]: row for row in about["strategies"]}
    assert {"none", "8bit", "4bit"} <= rows.keys()
    assert [name for name, row in rows.items() if row["is_chosen"]] == ["4bit"]
    assert all(row["fits"] and row["context"] == 1024 for row in rows.values())
    weights = [sum(rows[name]["bytes"]["weights"].values()) for name in ("none", "8bit", "4bit")]
    assert weights == sorted(weights, reverse=True)
    assert rows["4bit"]["bytes"] == about["plan"]["bytes"]
    assert about["parameters"]["total"] == 134_515_008
    assert about["missing_bytes"] == 0


def test_the_plan_is_the_one_that_a_load_makes(cli):
    """Runtime apart: a load has torch in its process already, where a plan allows for it."""
    _, about = told(cli, "smollm2", "--context", "1k", "--device", "cpu")
    from loadstone import ModelManager

    decision = ModelManager({"model_config": {"base_model": "smollm2", "context": 1024, "device": "cpu"}}).plan()
    assert about["plan"]["bytes"]["weights"] == dict(decision.weight_bytes)
    assert about["plan"]["bytes"]["kv_cache"] == decision.kv_bytes
    assert about["plan"]["context"] == decision.context


def test_what_does_not_fit_ends_with_4_and_says_what_would(cli):
    """The refusal of a load, word for word, and what each strategy would take."""
    code, about = told(cli, "smollm2", "--max-memory", "100MB", "--device", "cpu")
    assert (code, about["verdict"], about["plan"]) == (4, "does not fit", None)
    assert "max_memory" in about["refusal"]["hint"]
    assert about["refusal"]["allowed_bytes"] == about["machine"]["allowed_bytes"] == 100_000_000
    assert not any(row["fits"] for row in about["strategies"])
    assert all(row["bytes"]["steady"] > 100_000_000 for row in about["strategies"])


def test_what_fits_only_with_less_context_is_told_so(cli):
    """A context that was asked for is not shortened: a load would be refused, though less of it would fit."""
    code, about = told(cli, "smollm2", "--context", "8k", "--streams", "64", "--max-memory", "2GB", "--device", "cpu")
    assert (code, about["verdict"]) == (4, "fits with less")
    assert any("with context" in one for one in about["would_fit"])


def test_a_context_that_was_not_asked_for_is_shortened_and_goes_ahead(cli):
    """It exits with 0, because a load would go ahead."""
    code, about = told(cli, "smollm2", "--streams", "16", "--max-memory", "1.9GB", "--device", "cpu")
    assert (code, about["verdict"]) == (0, "fits with less")
    assert 512 <= about["plan"]["context"] < 4096


def test_what_is_forced_goes_ahead_and_does_not_fit(cli):
    """The verdict is of the arithmetic, the exit code of what a load would do."""
    code, about = told(cli, "smollm2", "--max-memory", "100MB", "--force", "--device", "cpu")
    assert (code, about["verdict"], about["plan"]["forced"]) == (0, "does not fit", True)


def test_speeds_are_told_with_where_they_are_from(cli):
    """What is not known is null, with the reason."""
    _, about = told(cli, "smollm2", "--device", "cpu")
    assert about["machine"]["memory"] == {"per_second": 30e9, "is_measured": True, "from": "measured here just now"}
    assert about["machine"]["disk"] is None
    row = next(one for one in about["strategies"] if one["is_chosen"])
    assert row["first_load_s"] is None
    assert any("disk" in reason for reason in row["unknown"])
    assert row["decode_at_most_tok_s"] == pytest.approx(30e9 / row["token_bytes"], rel=0.01)


def test_what_the_store_has_already_is_told(cli, store_folder):
    """Each strategy by itself; a machine that one does not have has no store."""

    def stored():
        return [row["strategy"] for row in told(cli, "smollm2", "--device", "cpu")[1]["strategies"] if row["in_store"]]

    assert stored() == []
    assert cli("pull", "smollm2").code == 0
    assert stored() == ["4bit"]
    _, about = told(cli, "smollm2", "--as", "laptop-16gb")
    assert not any(row["in_store"] for row in about["strategies"])


def test_a_plan_for_people_has_a_bar_a_table_and_the_reasons(cli):
    """Nothing goes to standard error."""
    ended = cli("plan", "smollm2", "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    for text in (
        "smollm2: fits here in 4bit", "weights", "free", "load peak", "4bit *", "because", "GB/s (measured here",
        "prompt of 512 tokens",
    ):  # fmt: skip
        assert text in ended.out


def test_a_refusal_for_people_has_both_numbers_and_the_way_out(cli):
    """The bar is then of what takes least, with a line where what is allowed ends."""
    ended = cli("plan", "smollm2", "--max-memory", "200MB", "--device", "cpu")
    assert ended.code == 4
    for text in ("does not fit here so", "Raise max_memory", "allowed 200 MB", "instead"):
        assert text in ended.out


def test_info_tells_the_same_plan(cli):
    """One code makes both."""
    _, about = told(cli, "smollm2", "--device", "cpu")
    other = json.loads(cli("info", "smollm2", "--device", "cpu", "--json").out)
    assert about["plan"].keys() == other["plan"].keys()
    assert about["plan"]["bytes"]["weights"] == other["plan"]["bytes"]["weights"]


# -- other machines ---------------------------------------------------------------------------------------------------


def test_a_plan_for_a_gpu_that_one_does_not_have(cli):
    """Its memory decides, its figures have a source, and what is assumed is said."""
    code, about = told(cli, "smollm2", "--as", "rtx-3060-12gb")
    machine = about["machine"]
    assert (code, machine["is_this_one"], machine["device"]) == (0, False, "cuda:0")
    assert machine["memory"]["per_second"] == 360e9
    assert machine["source"].startswith("https://")
    assert machine["assumed"]
    row = next(one for one in about["strategies"] if one["is_chosen"])
    assert (row["decode_tok_s"], row["in_store"]) == (None, False)
    assert row["decode_at_most_tok_s"] > 1000


def test_a_described_machine_that_is_too_small(cli):
    """The same exit code as for this machine."""
    code, about = told(cli, "smollm2", "--as", "cpus=2,ram=2GB,bandwidth=10GB/s")
    assert (code, about["verdict"]) == (4, "does not fit")


def test_a_described_processor_has_expectations(cli):
    """Kernels are known by what the processor can do."""
    _, about = told(cli, "smollm2", "--as", "cpus=4,ram=16GB,bandwidth=40GB/s,tflops=0.3,disk=2GB/s")
    row = next(one for one in about["strategies"] if one["is_chosen"])
    assert 100 < row["decode_tok_s"] <= row["decode_at_most_tok_s"]
    assert row["first_token_s"] > 0


@pytest.mark.parametrize(("machine", "says"), [("rtx-3060", "rtx-3060-12gb"), ("cpus=4", "ram=16GB")])
def test_a_machine_that_is_not_known_is_wrong_use(cli, machine, says):
    """With near names, and the name of the option."""
    ended = cli("plan", "smollm2", "--as", machine)
    assert (ended.code, ended.out) == (2, "")
    assert "--as" in ended.err
    assert says in ended.err


def test_a_device_that_the_machine_does_not_have_is_wrong_use(cli):
    """One of the two was not meant."""
    ended = cli("plan", "smollm2", "--as", "m2-16gb", "--device", "cuda")
    assert ended.code == 2
    assert "m2-16gb" in ended.err


def test_streams_must_be_a_number_that_can_be_meant(cli):
    """The option is named, not the key."""
    ended = cli("plan", "smollm2", "--streams", "0")
    assert ended.code == 2
    assert "--streams" in ended.err


# -- from Python ------------------------------------------------------------------------------------------------------


def test_plan_takes_a_model_or_a_configuration(here):
    """And settings over either."""
    (here / "mine.yaml").write_text("model_config:\n  base_model: smollm2\n  context: 2048\n")
    by_name = loadstone.plan("smollm2", device="cpu", context=2048)
    by_file = loadstone.plan(here / "mine.yaml", device="cpu")
    by_mapping = loadstone.plan({"model_config": {"base_model": "smollm2", "context": 2048, "device": "cpu"}})
    assert by_name.plan is not None
    assert by_file.plan is not None
    assert by_mapping.plan is not None
    assert by_name.plan.context == by_file.plan.context == by_mapping.plan.context == 2048
    assert by_name.chosen is not None
    assert by_name.chosen.strategy == "4bit"


def test_that_a_model_does_not_fit_is_told_not_raised():
    """The error that a load would raise is there to look at."""
    found = loadstone.plan("smollm2", device="cpu", max_memory="100MB")
    assert found.plan is None
    assert isinstance(found.refusal, ResourceError)
    assert found.chosen is None


def test_a_setting_that_does_not_exist_is_an_error():
    """As everywhere."""
    with pytest.raises(ConfigurationError, match="contxt"):
        loadstone.plan("smollm2", contxt=5)


def test_a_plan_for_the_processor_needs_no_torch(home):
    """Nor transformers, nor llvmlite: it is arithmetic."""
    code = (
        "import sys; from loadstone.cli import main\n"
        "try: main(['plan', 'smollm2', '--device', 'cpu', '--json'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'llvmlite', 'transformers', 'bitsandbytes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# -- the bar ----------------------------------------------------------------------------------------------------------


def test_a_bar_is_as_wide_as_asked_and_every_part_is_seen():
    """Also one that is a thousandth of the rest."""
    bar = draw([("weights", 40 * GB), ("KV cache", GB // 20), ("activations", 1), ("runtime", 0)], 100 * GB, width=50)
    assert len(bar.line) == 50
    assert [bar.line.count(one) for one in BLOCKS] == [20, 1, 1, 0, 28]
    assert "█ weights 40 GB" in bar.legend
    assert "· free" in bar.legend


def test_a_bar_of_too_much_shows_where_the_allowed_ends():
    """Nothing is free then."""
    bar = draw([("weights", 80 * GB), ("KV cache", 20 * GB)], 50 * GB, width=40, characters=PLAIN)
    assert bar.line == "#" * 20 + "|" + "#" * 11 + "=" * 8
    assert bar.legend.endswith("| allowed 50 GB")


@pytest.mark.parametrize(("locale", "is_plain"), [("C.UTF-8", False), ("POSIX", True)])
def test_blocks_are_drawn_where_the_locale_has_them(locale, is_plain, home):
    """Otherwise plain characters."""
    environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "loadstone", "plan", "smollm2", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert ("█" not in done.stdout) is is_plain
    assert ("= KV cache" in done.stdout) is is_plain


# -- what earlier loads took ------------------------------------------------------------------------------------------


def test_what_loads_took_is_told_beside_what_was_planned(cli, smollm2, small_model):
    from loadstone import ModelManager

    with ModelManager({"model_config": {"base_model": str(small_model), "context": 64}}) as manager:
        manager.load()
    ended = cli("plan", "--accuracy", "--json")
    assert ended.code == 0
    last = json.loads(ended.out)["loads"][-1]
    assert (last["model"], last["strategy"], last["context"]) == ("small-model", "4bit", 64)
    assert last["beside"] >= last["idle"] > 100_000_000
    assert last["too_high_by"]
    assert "small-model" in cli("plan", "--accuracy").out


def test_a_plan_says_between_what_it_will_be_and_from_how_many_loads(cli, home, monkeypatch, tmp_path):
    """Before there are enough loads of its kind it says what it plans for."""
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path))
    arguments = ("plan", "smollm2", "--context", "1k", "--device", "cpu")
    likely = json.loads(cli(*arguments, "--json").out)["plan"]["likely"]
    assert (likely["low"], likely["high"], likely["loads"]) == (None, None, 0)
    device = get_device_manager().resolve("cpu")
    kind = kind_of(device, get_device_manager().optimize_memory_settings(device))
    for number in range(4):
        sizes = {"planned_load_peak": 600, "planned_model": 200, "planned_runtime": 400, "planned_activations": 50}
        seen = {"beside": 380 + 10 * number, "idle": 370}
        sizes = {name: size * 10**6 for name, size in {**sizes, **seen, "allowance": 50, "process_peak": 500}.items()}
        more = {"context": 512, "streams": 1, "from_store": True, "seconds": 1.0}
        record = LoadRecord(str(number), 1.0, "m", "4bit", kind, **more, **sizes)
        add_record(cache_folder(), record)
    about = json.loads(cli(*arguments, "--json").out)["plan"]
    assert about["likely"]["loads"] == 4
    assert about["likely"]["low"] < about["likely"]["high"] < max(about["bytes"]["load_peak"], about["bytes"]["steady"])
    assert re.search(r"likely +[0-9.]+ ± [0-9.]+ [MG]B, from 4 loads", cli(*arguments).out)


def test_a_model_is_needed_for_a_plan(cli):
    assert cli("plan").code == 2
