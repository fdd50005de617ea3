"""Guessing what comes next changes when tokens come, never which."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched import watched_engine

from loadstone import ModelManager
from loadstone.config import EngineConfig, Sampling
from loadstone.engine.speculation import COUNTS, MOST, Costs, Drafter
from loadstone.loaded import LoadedModel

FREE = Costs()  # each more token costs a tenth of a step, as long as nothing is measured


@pytest.fixture(scope="session")
def model(smollm2: ModelManager) -> LoadedModel:
    return smollm2.load()


def _drafter(*tokens: int, right: int = 0, wrong: int = 0) -> Drafter:
    drafter = Drafter(tokens)
    for _ in range(wrong):
        drafter.learn(1, 0)
    for _ in range(right):
        drafter.learn(1, 1)
    return drafter


# -- guesses ----------------------------------------------------------------------------------------------------------


def test_what_followed_before_is_guessed() -> None:
    """After 1 2 3 came 4 5 6 …, and it is 1 2 3 again."""
    drafter = _drafter(1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, right=30)
    assert drafter.guess(5, FREE, 1) == [4, 5, 6, 7, 8]


def test_the_longer_match_counts_more() -> None:
    """2 3 was followed by 9 lately, but 1 2 3 by 4."""
    drafter = _drafter(1, 2, 3, 4, 0, 2, 3, 9, 1, 2, 3, right=30)
    assert drafter.guess(1, FREE, 1) == [4]


def test_what_repeats_itself_goes_on_repeating() -> None:
    drafter = _drafter(*[7, 8] * 3, right=30)
    assert drafter.guess(5, FREE, 1) == [7, 8, 7, 8, 7]


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5, 6)])
def test_nothing_is_guessed_of_what_never_came(tokens: tuple[int, ...]) -> None:
    assert _drafter(*tokens, right=30).guess(5, FREE, 1) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))
def test_a_guess_is_what_followed_and_no_longer_than_allowed(
    tokens: list[int], most: int, right: int, wrong: int
) -> None:
    """Whatever the text: the guess goes on as the text did after some earlier place that reads the same."""
    guess = _drafter(*tokens, right=right, wrong=wrong).guess(most, FREE, 1)
    assert len(guess) <= min(most, MOST)
    assert len(guess) in (0, *COUNTS)
    if guess:
        ends = [place for place in range(2, len(tokens)) if tokens[place - 2 : place] == tokens[-2:]]
        assert any((tokens[place:] * MOST)[: len(guess)] == guess for place in ends)


@given(st.lists(st.integers(0, 4), max_size=400), st.lists(st.integers(0, 4), max_size=400))
def test_the_last_place_that_reads_the_same_is_found(prompt: list[int], answer: list[int]) -> None:
    """Of three tokens if there is one, else of two, however long the text has become."""
    drafter = Drafter(prompt)
    for token in answer:
        drafter.push(token)
    text = [*prompt, *answer]
    places = [
        max((end for end in range(length, len(text)) if text[end - length : end] == text[-length:]), default=None)
        for length in (3, 2)
    ]
    assert drafter._found() == (places[0] if places[0] is not None else places[1])


def test_what_is_remembered_of_a_text_is_small() -> None:
    """Fewer than 40 bytes a token."""
    text = [*range(10_000)]
    tracemalloc.start()
    drafter = Drafter(text)
    for token in range(5_000):
        drafter.push(token)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 15_000 * 40


# -- whether it pays --------------------------------------------------------------------------------------------------


def test_more_is_guessed_the_more_often_it_was_right() -> None:
    text = (1, 2, 3, *range(10, 40), 1, 2, 3)
    lengths = [len(_drafter(*text, right=right, wrong=4).guess(MOST, FREE, 1)) for right in (0, 2, 8, 40)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == MOST


def test_nothing_is_guessed_where_tokens_cost_as_much_together_as_alone() -> None:
    """Ten tokens in one step that takes ten times as long win nothing."""
    costs = Costs()
    for rows in [*range(1, MOST + 2)] * 2:  # the first time does not count
        costs.note(rows, 0.01 * rows)
    assert _drafter(1, 2, 3, 4, 1, 2, 3, right=3).guess(MOST, costs, 1) == []


def test_what_was_always_wrong_is_left_and_tried_again_now_and_then() -> None:
    """After many wrong guesses most steps have none, and still some do: the text may begin to quote."""
    drafter = _drafter(*[1, 2, 3, 4] * 3, wrong=40)
    tried = 0
    for _ in range(200):
        if guess := drafter.guess(MOST, FREE, 1):
            tried += 1
            drafter.learn(len(guess), 0)
    assert 0 < tried < 50


def test_a_cost_between_two_that_are_known_lies_between_them() -> None:
    costs = Costs()
    for rows, seconds in ((1, 9.0), (5, 9.0), (1, 1.0), (5, 3.0)):  # the first time does not count
        costs.note(rows, seconds)
    assert costs.of(3) == 2.0
    assert costs.of(5) < costs.of(8)


def test_a_step_that_was_disturbed_once_does_not_end_all_guessing() -> None:
    """Other work held the first step with guesses up for a second; some time later guesses are tried again, and pay."""
    costs, drafter = Costs(), _drafter(*[1, 2, 3, 4] * 3, right=30)
    costs.note(1, 0.01)
    costs.note(MOST + 1, 1.0)
    guessed = 0
    for _ in range(400):
        guess = drafter.guess(MOST, costs, 1)
        costs.note(1 + len(guess), 0.01 + 0.001 * len(guess))
        drafter.learn(len(guess), len(guess))
        guessed += len(guess) > 0
    assert guessed > 200


# -- answers ----------------------------------------------------------------------------------------------------------

QUOTE = "The quick brown fox jumps over the lazy dog, and the slow grey tortoise looks up at the old stone wall."
PROMPT = f"Repeat this text word by word, three times: {QUOTE}"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=80),
        Sampling(max_new_tokens=80, temperature=0.7, top_p=0.9, seed=3),
        Sampling(max_new_tokens=80, temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.2, seed=5),
        Sampling(max_new_tokens=80, stop=("tortoise looks",)),
    ],
)
def test_answers_are_the_same_with_and_without(model: LoadedModel, sampling: Sampling) -> None:
    """Greedy, and sampled with a seed: the same text, by the same rules, in no more steps."""
    results, steps = [], []
    for is_on in (False, True):
        with watched_engine(model, EngineConfig(prefix_reuse=False, speculation=is_on)) as (engine, watched):
            results.append(engine.generate(PROMPT, sampling))
            steps.append(len(watched.passes))
    off, on = results
    assert on.text == off.text
    assert on.finish_reason == off.finish_reason
    assert on.usage.completion_tokens == off.usage.completion_tokens
    assert steps[1] <= steps[0]
    assert on.usage.accepted_tokens <= on.usage.drafted_tokens


def test_quoting_takes_fewer_steps(model: LoadedModel) -> None:
    """What the model repeats comes several tokens a step."""
    with watched_engine(model, EngineConfig(prefix_reuse=False)) as (engine, watched):
        watched.say(*model.tokenizer.encode(" one two three four five six seven" * 8, add_special_tokens=False))
        result = engine.generate("one two three four five six seven", Sampling(max_new_tokens=56), raw=True)
        assert result.usage.accepted_tokens > 28
        assert len(watched.passes) < 28


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=8), Sampling(stop=("four five",))])
def test_guesses_of_the_last_step_count_too(
    model: LoadedModel, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is the tokens that steps chose by themselves, and the guesses that were right."""
    monkeypatch.setattr(Costs, "note", lambda *_: None)  # the same guesses, however busy this machine is
    words = " one two three four five six seven"
    with watched_engine(model, EngineConfig(prefix_reuse=False)) as (engine, watched):
        watched.say(*model.tokenizer.encode(words, add_special_tokens=False))
        result = engine.generate(words * 8, sampling, raw=True)
    ends_with_a_guess = sampling.stop != ()  # else with what comes after it
    assert result.usage.accepted_tokens > 1
    assert result.usage.completion_tokens == len(watched.passes) - ends_with_a_guess + result.usage.accepted_tokens


def test_company_does_not_change_what_is_guessed_into_what_is_said(model: LoadedModel) -> None:
    """Several answers guess in the same steps, each as it would alone."""
    prompts = [PROMPT, "Count from one to nine, then again: one two three four", "Hi", "你好，你好，你好，"]
    sampling = Sampling(max_new_tokens=40)
    with watched_engine(model, EngineConfig(prefix_reuse=False, speculation=False)) as (engine, _):
        alone = [engine.generate(prompt, sampling).text for prompt in prompts]
    with watched_engine(model, EngineConfig(prefix_reuse=False), streams=4) as (engine, _):
        assert [result.text for result in engine.generate_batch(prompts, sampling)] == alone
