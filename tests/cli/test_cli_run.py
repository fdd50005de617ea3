"""`loadstone run`, on the bundled model."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from loadstone.cli.loading import Ready
from loadstone.cli.run import _mention_template, read_prompt


def test_the_answer_goes_to_stdout_and_the_table_to_stderr(cli):
    """Standard output is the answer and a line break; what it took is told beside it."""
    ended = cli("run", "smollm2", "What is the capital of France?", "--max-new-tokens", "12", "--context", "256")
    assert ended.code == 0
    assert "Paris" in ended.out
    assert ended.out.endswith("\n")
    for name in ("device", "strategy", "weights", "KV cache", "load", "first token", "tok/s"):
        assert name in ended.err
        assert name not in ended.out
    assert "--max-new-tokens allows more" in ended.err


def test_json_is_one_line_and_all_of_stdout(cli):
    """`--json` writes one object with everything that a script needs, and nothing else."""
    ended = cli("run", "smollm2", "--json", "--max-new-tokens", "4", "--context", "256", stdin="Say hello.\n")
    assert ended.code == 0
    assert ended.out.count("\n") == 1
    said = json.loads(ended.out)
    assert list(said) == [
        "text", "parsed", "model", "device", "strategy", "finish_reason", "usage", "timing", "memory",
    ]  # fmt: skip
    assert (said["model"], said["strategy"], said["finish_reason"]) == ("smollm2", "4bit", "length")
    assert said["usage"]["completion_tokens"] == 4
    assert set(said["timing"]) == {"load_s", "first_token_s", "tokens_per_s"}
    assert said["memory"]["peak_rss_bytes"] > said["memory"]["weights_bytes"] > said["memory"]["kv_bytes"] > 0


@pytest.mark.parametrize(
    ("given", "prompt"),
    [(b"one\n", "one"), (b"one\r\n", "one"), (b"one\n\n", "one\n"), ("你好".encode(), "你好"), (b"caf\xe9", "caf�")],
)
def test_stdin_is_the_prompt_without_its_last_line_break(monkeypatch, given, prompt):
    """The line break that `echo` adds is not part of it; it is UTF-8, and a broken byte becomes U+FFFD."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    assert read_prompt(None) == prompt


def test_a_seed_gives_the_same_answer_again_and_options_reach_the_model(cli):
    """Sampling options are in force: hot answers with one seed agree, and differ from the greedy one."""
    options = ("--json", "--max-new-tokens", "12", "--context", "256", "--system", "Answer at length.")
    hot = ("--temperature", "1.5", "--seed", "7")
    texts = [json.loads(cli("run", "smollm2", "Tell me a story.", *options, *more).out)["text"] for more in (hot, hot)]
    greedy = json.loads(cli("run", "smollm2", "Tell me a story.", *options).out)["text"]
    assert texts[0] == texts[1] != greedy


def test_an_empty_prompt_is_wrong_use(cli):
    """Nothing on standard input is refused before a model is loaded."""
    ended = cli("run", "smollm2", stdin=" \n")
    assert (ended.code, ended.out) == (2, "")
    assert "The prompt is empty" in ended.err


@pytest.mark.parametrize(
    ("system", "said"),
    [(None, "the prompt is sent as it is"), ("Be brief.", "the system text and the prompt are sent")],
)
def test_without_a_template_is_told_what_is_sent(capsys, system, said):
    """The engine puts the system text in front of the prompt, and the warning does not say otherwise."""
    model = SimpleNamespace(engine=SimpleNamespace(template=None), spec=SimpleNamespace(name="plain"))
    _mention_template(Ready(model, 0.0, 0, 0), raw=False, system=system)
    err = capsys.readouterr().err
    assert said in err
    assert "not used" not in err


def test_raw_and_system_contradict_each_other(cli):
    """A raw prompt has no place for a system message, so both together are wrong use."""
    ended = cli("run", "smollm2", "hi", "--raw", "--system", "be brief")
    assert ended.code == 2
    assert "--system" in ended.err


def test_an_answer_follows_the_schema_in_a_file(cli, here):
    """`--json` has the value beside the text."""
    (here / "schema.json").write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    ended = cli("run", "smollm2", "Yes?", "--json-schema", "schema.json", "--json", "--context", "256")
    said = json.loads(ended.out)
    assert said["parsed"] == json.loads(said["text"])
    assert isinstance(said["parsed"], list)


def test_an_answer_is_one_of_the_choices(cli):
    """--choice is said once for each; only the answer is on standard output."""
    assert cli("run", "smollm2", "Yes?", "--choice", "ay", "--choice", "nay").out in ("ay\n", "nay\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--json-schema", "none.json"], "none.json cannot be read: No such file"),
        (["--json-schema", "bad.json"], "--json-schema: it is not JSON, line 2 column 1"),
        (["--regex", "a", "--choice", "b"], "--choice: there is a regex beside it"),
        (["--regex", "(a"], "regex at character 1: unclosed group"),
        (["--choice", ""], "--choice: it must be a list of texts"),
    ],
)
def test_what_cannot_be_followed_is_wrong_use(cli, here, options, told):
    """The option is named, and nothing is answered."""
    (here / "bad.json").write_text("{\n?}")
    ended = cli("run", "smollm2", "Hi", *options)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err
