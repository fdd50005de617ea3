"""`loadstone chat` through a pipe, on the bundled model."""

from __future__ import annotations

import json

OPTIONS = ("--max-new-tokens", "16", "--context", "256")


def test_history_is_kept_saved_and_reset(cli, here):
    """Answers are the only standard output; commands act on the conversation and say so beside it."""
    lines = ["My name is Bob.", "", "/save one.json", "/reset", "/system be brief", "Hello.", "/save two.json", "/quit"]
    ended = cli("chat", "smollm2", *OPTIONS, stdin="\n".join([*lines, "not read"]))
    assert ended.code == 0
    first, second = (json.loads((here / name).read_text("utf-8"))["messages"] for name in ("one.json", "two.json"))
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert [message["content"] for message in second[:2]] == ["be brief", "Hello."]
    answers = (first[-1]["content"], second[-1]["content"])
    assert ended.out == "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in answers)
    assert "Saved 2 messages" in ended.err


def test_a_full_context_is_told_and_the_conversation_goes_on(cli):
    """The oldest messages are left out, loudly; a message too long for the whole context ends a pipe with 5."""
    talk = ["Tell me about the sea. " * 3] * 4
    ended = cli("chat", "smollm2", "--max-new-tokens", "24", "--context", "160", stdin="\n".join(talk))
    assert ended.code == 0
    assert "the context of 160 tokens is full" in ended.err
    assert "/reset" in ended.err
    ended = cli("chat", "smollm2", "--context", "160", stdin="word " * 200 + "\nnext\n")
    assert (ended.code, ended.out) == (5, "")
    assert "the context has 160" in ended.err


def test_commands_answer_and_unknown_ones_are_not_sent_to_the_model(cli, here):
    """A mistyped command costs nothing; a file that is there already is left alone."""
    (here / "mine.txt").write_text("mine")
    lines = ["/help", "/sistem x", "/Reset2", "/XYZZY", "/System", "/save mine.txt", "/save", "/save no/such/folder"]
    broken = b"\n/system caf\xe9\n/system\n"
    ended = cli("chat", "smollm2", *OPTIONS, "--system", "be kind", stdin="\n".join(lines).encode() + broken)
    assert (ended.code, ended.out) == (0, "")
    for text in (
        "/reset",
        "/sistem is not a command: did you mean /system?",
        "did you mean /reset?",
        "/xyzzy is not a command; /help",
        "be kind",
        "choose another name",
        "cannot be written",
        "caf�",
    ):
        assert text in ended.err
    assert (here / "mine.txt").read_text() == "mine"
