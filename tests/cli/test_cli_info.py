"""`loadstone info`, from headers alone."""

from __future__ import annotations

import json

import pytest
from tests.quantized_checkpoints import FORMATS, quantize_folder

from loadstone.cli.info import count
from loadstone.quantization import find_strategy


def test_info_tells_the_model_the_plan_and_where_sampling_comes_from(cli, here, monkeypatch):
    """Each value in force has its origin; the plan has its bytes and reasons; no weight is read."""
    (here / "loadstone.yaml").write_text("generation:\n  temperature: 0.5\n")
    monkeypatch.setattr("loadstone.checkpoint.weights.open_weights", lambda *_: pytest.fail("weights were opened"))
    ended = cli("info", "smollm2", "--top-k", "5", "--context", "1k", "--json")
    assert ended.code == 0
    about = json.loads(ended.out)
    assert about["parameters"]["total"] == 134_515_008
    assert sum(size for part, size in about["parameters"].items() if part != "total") == 134_515_008
    assert about["architecture"]["name"] == "llama"
    assert (about["max_context"], about["plan"]["context"]) == (8192, 1024)
    assert about["template"]
    assert about["sampling"]["temperature"] == {"value": 0.5, "from": "loadstone.yaml:2"}
    assert about["sampling"]["top_k"] == {"value": 5, "from": "argument"}
    assert about["sampling"]["seed"]["from"] == "default"
    assert about["plan"]["strategy"] == "4bit"
    assert about["plan"]["strategy_summary"] == find_strategy("4bit").summary
    assert all(": " in reason for reason in about["plan"]["device_passed_over"])
    assert about["plan"]["bytes"]["weights"]["linear"] > 50_000_000
    assert any("quantization 4bit" in reason for reason in about["plan"]["reasons"])
    assert about["refusal"] is None


def test_a_refusal_is_told_with_what_would_help(cli):
    """That it does not fit is an answer, not a failure: exit 0, no plan, and the bytes needed and allowed."""
    ended = cli("info", "smollm2", "--max-memory", "100MB", "--json")
    about = json.loads(ended.out)
    assert ended.code == 0
    assert about["plan"] is None
    assert about["refusal"]["needed_bytes"] > about["refusal"]["allowed_bytes"] == 100_000_000
    assert "max_memory" in about["refusal"]["hint"]


def test_a_setting_that_cannot_be_meant_is_wrong_use(cli):
    """A device that does not exist is a mistake, not an answer; which of the two exits with 0 is in the help."""
    ended = cli("info", "smollm2", "--device", "toaster", "--json")
    assert (ended.code, ended.out) == (2, "")
    assert "toaster" in ended.err
    assert "exits with 0" in " ".join(cli("info", "--help").out.split())


def test_text_is_for_people_and_a_missing_model_is_a_failure(cli):
    """The same facts as rows; a model that is not there ends with 3."""
    ended = cli("info", "smollm2")
    assert ended.code == 0
    assert ended.err == ""
    for text in (
        "135 M",
        "llama: 30 layers",
        "sampling in force",
        "temperature",
        "(default)",
        "4bit: NF4",
        "is allowed",
    ):
        assert text in ended.out
    assert cli("info", "./nowhere").code == 3


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12"), (35_136, "35.1 k"), (134_515_008, "135 M"), (7_615_616_512, "7.62 B")]
)
def test_numbers_of_parameters_are_rounded(number, text):
    """Three digits are as many as anybody reads."""
    assert count(number) == text


@pytest.mark.parametrize("command", ["info", "plan"])
def test_a_checkpoint_that_is_quantised_already_is_told_as_what_it_is(cli, small_model, command):
    """How it was quantised, and why it is kept as it is kept."""
    quantize_folder(small_model, small_model, FORMATS["FP8, blocks of 128 × 128"]())
    about = json.loads(cli(command, str(small_model), "--json").out)
    assert about["quantized"]["summary"] == "FP8 (E4M3), 8 bits, one scale a block of 128 × 128"
    assert about["plan"]["strategy"] == "8bit"
    shown = cli(command, str(small_model)).out
    assert "already: FP8 (E4M3), 8 bits" in shown
    assert "the form of the checkpoint" in " ".join(shown.split())


def test_a_plain_checkpoint_is_not_told_as_quantised(cli, small_model):
    assert json.loads(cli("info", str(small_model), "--json").out)["quantized"] is None
