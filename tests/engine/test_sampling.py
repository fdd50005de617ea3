"""Each rule of sampling by its definition, over the whole vocabulary."""

from __future__ import annotations

import math
import timeit
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loadstone.config import Sampling
from loadstone.engine.sampling import CANDIDATES, SPOILT, Sampler, largest_tokens
from loadstone.errors import GenerationError

VOCABULARY = 40
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2
PROMPT = [3, 5, 5, *LOGITS.argsort(descending=True)[[0, 1, 12, 25, 26]].tolist()]  # likely and unlikely ones
ANSWER = LOGITS.argsort(descending=True)[[0, 2, 2]].tolist()  # likely ones, or a penalty would not be seen
DRAWS = 3000

RULES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 2.0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "repetition_penalty": {"temperature": 1.0, "repetition_penalty": 1.5},
    "presence_penalty": {"temperature": 1.0, "presence_penalty": 1.2},
    "frequency_penalty": {"temperature": 1.0, "frequency_penalty": 0.7},
    "all": {
        "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2,
        "presence_penalty": -0.5, "frequency_penalty": 0.3,
    },
}  # fmt: skip


def _reference(logits: Sequence[float], rules: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """The probability of every token, by the definitions, in the order in which the rules apply."""
    values = list(logits)
    for token in {*prompt, *answer}:
        values[token] *= 1 / rules.repetition_penalty if values[token] > 0 else rules.repetition_penalty
    for token, count in Counter(answer).items():
        values[token] -= rules.presence_penalty + rules.frequency_penalty * count
    values = [value / rules.temperature for value in values]
    kept = sorted(range(len(values)), key=lambda token: -values[token])
    if rules.top_k:
        kept = kept[: rules.top_k]
    weight = {token: math.exp(values[token]) for token in kept}
    shares = {token: weight[token] / sum(weight.values()) for token in kept}
    reached, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        reached += shares[token]
        if reached >= rules.top_p and rules.top_p < 1:
            break
    nucleus = [token for token in nucleus if shares[token] >= rules.min_p * shares[kept[0]]]
    total = sum(shares[token] for token in nucleus)
    return [shares[token] / total if token in nucleus else 0.0 for token in range(len(values))]


def _spread(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    """What the sampler would draw from, as one probability for every token."""
    if sampler._penalties is not None:
        logits = sampler._penalties.apply(logits)
    probabilities, tokens, is_all = sampler.distribution(logits, CANDIDATES)
    if not is_all:
        probabilities, tokens, _ = sampler.distribution(logits, len(logits))
    return torch.zeros(len(logits)).index_add(0, tokens, probabilities)


def _after(sampling: Sampling, answer: list[int]) -> Sampler:
    """A sampler that has chosen `answer` already."""
    sampler = Sampler(sampling, PROMPT)
    for token in answer:
        sampler.choose(torch.zeros(VOCABULARY).index_fill(0, torch.tensor([token]), 1000.0))
    return sampler


def _limit(freedom: int, deviations: float = 4.0) -> float:
    """The chi-square that fair draws stay below but once in 30,000 times (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + deviations * math.sqrt(part)) ** 3


@cache
def _drawn(name: str) -> Counter[int]:
    """What a rule's sampler draws under many seeds, after an answer of three tokens."""
    counts: Counter[int] = Counter()
    sampler = _after(Sampling(**RULES[name]), ANSWER)
    penalties = sampler._penalties
    for seed in range(DRAWS):
        sampler._penalties = deepcopy(penalties)  # each draw is the first after the same answer
        sampler._generator.manual_seed(seed)
        counts[sampler.choose(LOGITS)] += 1
    return counts


def _is_fair(counts: Counter[int], wanted: Sequence[float]) -> bool:
    """Whether draws have these probabilities, by chi-square, and none has the probability 0."""
    if not all(wanted[token] > 0 for token in counts):
        return False
    # Rare tokens together: chi-square wants five of each kind.
    draws = counts.total()
    common = [token for token in range(len(wanted)) if wanted[token] * draws >= 5]
    cells = [(counts[token], wanted[token] * draws) for token in common]
    rare = 1 - sum(wanted[token] for token in common)
    if rare * draws >= 5:
        cells.append((draws - sum(counts[token] for token in common), rare * draws))
    assert len(cells) > 2
    return sum((found - expected) ** 2 / expected for found, expected in cells) < _limit(len(cells) - 1)


@pytest.mark.parametrize("name", RULES)
def test_draws_follow_the_definition(name: str) -> None:
    """Draws under many seeds have the frequencies of the plain definition, and nothing that a rule drops."""
    assert _is_fair(_drawn(name), _reference(LOGITS.tolist(), Sampling(**RULES[name]), PROMPT, ANSWER))


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("hot", "all")])
def test_draws_without_their_rule_would_be_noticed(name: str) -> None:
    """The same draws do not pass for those of a sampler that leaves the rule out: the test above can fail."""
    off = 1.0 if name in ("temperature", "top_p", "repetition_penalty") else 0
    without = Sampling(**{**RULES[name], name: off})
    assert not _is_fair(_drawn(name), _reference(LOGITS.tolist(), without, PROMPT, ANSWER))


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_draws_under_one_penalty_do_not_pass_for_the_other(name: str) -> None:
    """The first counts a token that was said twice once, the second twice."""
    other = {"presence_penalty": "frequency_penalty", "frequency_penalty": "presence_penalty"}[name]
    swapped = Sampling(temperature=1.0, **{other: RULES[name][name]})
    assert not _is_fair(_drawn(name), _reference(LOGITS.tolist(), swapped, PROMPT, ANSWER))


def test_draws_of_one_answer_follow_the_definition_each_whatever_came_before() -> None:
    """One seed and many tokens, as an answer is drawn: pairs of neighbours have the product of their probabilities."""
    logits = LOGITS[:6]
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [])
    drawn = [sampler.choose(logits) for _ in range(DRAWS)]
    alone = _reference(logits.tolist(), sampler.sampling, [], [])
    pairs = Counter(first * 6 + second for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    assert _is_fair(pairs, [first * second for first in alone for second in alone])


@pytest.mark.parametrize(("freedom", "critical"), [(2, 13.816), (5, 20.515), (10, 29.588), (20, 45.315), (40, 73.402)])
def test_the_limit_is_that_of_the_tables(freedom: int, critical: float) -> None:
    """Critical values at 0.001, which is 3.0902 deviations (NIST/SEMATECH e-Handbook, 1.3.6.7.4)."""
    assert _limit(freedom, 3.0902) == pytest.approx(critical, rel=0.03)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    answer=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.2, 3),
        top_k=st.integers(0, VOCABULARY + 3),
        top_p=st.floats(0.05, 1),
        min_p=st.floats(0, 0.9),
        repetition_penalty=st.floats(0.5, 2),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
    ),
)
def test_rules_together_are_their_definition(seed: int, answer: list[int], sampling: Sampling) -> None:
    """Whatever the rules, what is drawn from is what the definition says, to rounding."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    found = _spread(_after(sampling, answer), logits)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    wanted = [
        _reference(logits.tolist(), Sampling(**{**vars(sampling), "top_p": top_p, "min_p": min_p}), PROMPT, answer)
        # Rounding may put a token that lies on the border of top-p or min-p on either side.
        for top_p in {max(sampling.top_p - 1e-5, 1e-9), sampling.top_p, min(sampling.top_p + 1e-5, 1.0)}
        for min_p in {max(sampling.min_p - 1e-5, 0.0), sampling.min_p + 1e-5}
    ]
    assert any(torch.allclose(found, torch.tensor(one), atol=1e-4) for one in wanted)


def test_greedy_takes_the_largest() -> None:
    """At temperature 0 the seed is nothing and the largest logit is all."""
    assert {Sampler(Sampling(seed=seed), PROMPT).choose(LOGITS) for seed in range(5)} == {int(LOGITS.argmax())}


def test_greedy_obeys_penalties() -> None:
    """Penalties come before the choice: what was said once is not the largest any more."""
    sampler = Sampler(Sampling(presence_penalty=2.0), [])
    logits = torch.tensor([5.0, 4.0, 3.5])
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 2]


def test_choosing_leaves_the_logits_alone() -> None:
    """Penalties are not written into what the decoder made."""
    before = LOGITS.clone()
    sampler = Sampler(Sampling(**RULES["all"], seed=1), PROMPT)
    for _ in range(3):
        sampler.choose(LOGITS)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("name", RULES)
def test_same_seed_chooses_the_same_tokens(name: str) -> None:
    """Two samplers of one seed agree token by token, and one of another seed does not."""

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(**RULES[name], seed=seed), PROMPT)
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)


def test_no_seed_is_a_fresh_one() -> None:
    """Without a seed two answers differ."""
    samplers = [Sampler(Sampling(temperature=1.0), []) for _ in range(2)]
    first, second = ([one.choose(torch.zeros(1000)) for _ in range(20)] for one in samplers)
    assert first != second


class Waits(TorchDispatchMode):
    """Counts the calls that wait for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += call is torch.ops.aten._local_scalar_dense.default
        return call(*arguments, **(named or {}))


@pytest.mark.parametrize("name", RULES)
def test_a_token_is_waited_for_once(name: str) -> None:
    """The second number is the draw, which is the processor's own; nothing is copied from where the logits are."""
    sampler = _after(Sampling(**RULES[name]), ANSWER)
    with Waits() as waits:
        sampler.choose(LOGITS)
    assert waits.count == 2


@pytest.mark.parametrize("name", RULES)
def test_rules_are_followed_where_the_logits_are(name: str) -> None:
    """On a device whose tensors hold nothing, so that whatever looked at one would fail."""
    sampler = Sampler(Sampling(**RULES[name]), PROMPT)
    logits = torch.zeros(CANDIDATES * 2, device="meta")
    if sampler._penalties is not None:
        logits = sampler._penalties.apply(logits)
        sampler._penalties.note(5)
    assert {one.device.type for one in sampler.distribution(logits, CANDIDATES)} == {"meta"}


def test_the_largest_of_many_rows_are_those_of_each() -> None:
    """A row that holds NaN is told apart, and no other."""
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    rows[2, 9] = math.nan
    assert largest_tokens(rows) == [int(LOGITS.argmax()), VOCABULARY - 1 - int(LOGITS.argmax()), SPOILT]


@pytest.mark.parametrize("name", ["greedy", *RULES])
@pytest.mark.parametrize("place", [0, 17])
def test_nan_is_an_error(name: str, place: int) -> None:
    """One NaN among the logits is told, whatever the rules, and no token comes of it."""
    logits = LOGITS.clone()
    logits[place] = math.nan
    with pytest.raises(GenerationError, match="NaN"):
        Sampler(Sampling(**RULES.get(name, {})), PROMPT).choose(logits)


def test_flat_distribution_needs_more_than_the_candidates() -> None:
    """Where the likeliest thousand are a drop in the sea, top-p still keeps nine tenths of the mass."""
    size = 40_000
    spread = _spread(Sampler(Sampling(temperature=1.0, top_p=0.9), []), torch.zeros(size))
    kept = spread > 0
    assert int(kept.sum()) == pytest.approx(0.9 * size, abs=5)
    assert torch.allclose(spread[kept], torch.tensor(1 / (0.9 * size)), rtol=1e-3)


def test_what_lies_beyond_the_candidates_is_drawn_too() -> None:
    """Where the first look does not reach p, the draw is made again from all."""
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=4), [])
    assert len({sampler.choose(torch.zeros(4 * CANDIDATES)) for _ in range(2 * CANDIDATES)}) > CANDIDATES


def test_candidates_are_enough_where_they_reach_the_share() -> None:
    """Looking at the likeliest only changes nothing: the whole vocabulary gives the same nucleus."""
    logits = torch.randn(CANDIDATES * 4, generator=torch.Generator().manual_seed(1)) * 4
    spread = _spread(Sampler(Sampling(temperature=1.0, top_p=0.95), []), logits)
    wanted = torch.tensor(_reference(logits.tolist(), Sampling(temperature=1.0, top_p=0.95), [], []))
    assert 0 < int((spread > 0).sum()) < CANDIDATES
    assert torch.allclose(spread, wanted, atol=1e-5)


def test_rules_work_on_half_a_probability_each() -> None:
    """top_p keeps the token that reaches the share, and no other."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert (_spread(Sampler(Sampling(temperature=1.0, top_p=0.5001), []), logits) > 0).tolist() == [True, True, False]
    assert (_spread(Sampler(Sampling(temperature=1.0, top_p=0.4999), []), logits) > 0).tolist() == [True, False, False]
    assert (_spread(Sampler(Sampling(temperature=1.0, min_p=0.5), []), logits) > 0).tolist() == [True, True, False]


def test_a_long_prompt_costs_little_more_a_token_than_a_short_one() -> None:
    """Tokens of the prompt are counted out once, not for every token of the answer."""
    logits = torch.zeros(100_000)

    def quickest(length: int) -> float:
        sampler = Sampler(Sampling(repetition_penalty=1.1), range(length))
        return min(timeit.repeat(lambda: sampler.choose(logits), number=1, repeat=20))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or it would measure who else is busy here
    try:
        assert quickest(60_000) < 10 * quickest(10)
    finally:
        torch.set_num_threads(threads)
