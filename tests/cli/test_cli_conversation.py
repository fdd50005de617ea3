"""A conversation's messages, and which of them still fit."""

from __future__ import annotations

import json

import pytest

from loadstone.cli.conversation import Conversation


def words(messages):
    return sum(len(message["content"].split()) for message in messages)


@pytest.fixture
def said():
    """Three questions of two words, the first two with answers of three, after a system message of one."""
    conversation = Conversation("brief")
    for number in range(3):
        conversation.ask(f"question {number}")
        if number < 2:
            conversation.answer(f"the answer {number}")
    return conversation


def test_all_is_sent_while_it_fits(said):
    """Nothing is left out at exactly the limit."""
    assert said.fit(words, words(said.sent)) == 0
    assert len(said.sent) == 6


def test_the_oldest_question_goes_with_its_answer(said):
    """What is sent always begins with a question, after the system message."""
    assert said.fit(words, words(said.sent) - 1) == 2
    assert [message["content"] for message in said.sent[:2]] == ["brief", "question 1"]


def test_the_last_question_is_never_left_out(said):
    """When even that is too long, the engine refuses it and says why."""
    assert said.fit(words, 0) == 4
    assert [message["content"] for message in said.sent] == ["brief", "question 2"]


def test_what_is_left_out_stays_left_out_and_is_still_saved(said, tmp_path):
    """Leaving out is about what the model reads; the user's record is whole."""
    said.fit(words, 3)
    said.answer("the answer 2")
    assert said.fit(words, 100) == 0
    assert len(said.sent) == 3
    said.save(tmp_path / "it.json", model="m", may_replace=False)
    saved = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))
    assert saved["model"] == "m"
    assert len(saved["messages"]) == 7


def test_a_file_is_not_replaced_unasked(said, tmp_path):
    """Another file of the same name is somebody's."""
    (tmp_path / "it.json").write_text("mine")
    with pytest.raises(FileExistsError):
        said.save(tmp_path / "it.json", model="m", may_replace=False)
    assert (tmp_path / "it.json").read_text() == "mine"


def test_a_question_without_an_answer_is_taken_back(said):
    """After a failure the conversation is as before the question, even when all before it was left out."""
    said.fit(words, 0)
    said.take_back()
    said.ask("again please")
    assert [message["content"] for message in said.sent] == ["brief", "again please"]


def test_reset_forgets_the_messages_and_keeps_the_system_message(said):
    """`/reset` begins anew, under the same instructions."""
    said.reset()
    assert said.sent == [{"role": "system", "content": "brief"}]
