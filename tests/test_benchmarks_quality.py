"""The benchmark of quality: scores by their definitions, and the same numbers for both sides."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks import measure_quality, quality, quality_report
from benchmarks.checkpoints import Shape, write_checkpoint
from benchmarks.processes import ModuleFailed
from benchmarks.quality_report import BAR, DEFAULT, INTEGERS, PEERS, REFERENCE, Result, is_within_bar
from benchmarks.quality_scores import Score, mean, ratio, score
from benchmarks.untied import write_untied

from loadstone import ModelManager
from loadstone.checkpoint import ModelSpec, inspect, load_tokenizer, open_weights
from loadstone.model import build
from loadstone.quantization import registry
from loadstone.sources import resolve
from small_model import write_small_model

TIED = Shape(64, 2, 4, 2, 128, 300, tie_word_embeddings=True)
WINDOWS = [[0, 1, 2, 3], [3, 3, 0]]


def scored(folder: Path, *sides: torch.Tensor) -> list[list[Score]]:
    """Return the scores of sides that say the same logits after every token."""
    return [score(WINDOWS, 4, folder / "reference", lambda ids, row=row: row.expand(len(ids), 4)) for row in sides]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(tmp_path: Path) -> None:
    (alone,) = scored(tmp_path, torch.zeros(4))
    assert mean(alone)["perplexity"] == pytest.approx(4)


def test_every_token_but_a_windows_first_is_predicted_once(tmp_path: Path) -> None:
    (alone,) = scored(tmp_path, torch.zeros(4))
    assert [one.predictions for one in alone] == [3, 2]


def test_a_loss_is_that_of_the_token_that_followed(tmp_path: Path) -> None:
    (alone,) = scored(tmp_path, torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    assert alone[1].loss == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 2)


def test_the_reference_does_not_diverge_from_itself(tmp_path: Path) -> None:
    logits = torch.randn(4)
    for side in scored(tmp_path, logits, logits):
        assert mean(side)["divergence"] == 0
        assert mean(side)["agreement"] == 1


def test_divergence_is_of_the_first_side_from_the_second(tmp_path: Path) -> None:
    wanted, found = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.25] * 4)
    _, second = scored(tmp_path, wanted.log(), found.log())
    assert mean(second)["divergence"] == pytest.approx(float((wanted * (wanted / found).log()).sum()), rel=1e-5)


def test_agreement_is_the_share_of_equal_choices(tmp_path: Path) -> None:
    def forward(ids: list[int]) -> torch.Tensor:
        return torch.eye(4)[torch.tensor([1] * len(ids))]

    def forward_else(ids: list[int]) -> torch.Tensor:
        return torch.eye(4)[torch.tensor([1, *[2] * (len(ids) - 1)])]

    score(WINDOWS, 4, tmp_path / "reference", forward)
    assert mean(score(WINDOWS, 4, tmp_path / "reference", forward_else))["agreement"] == pytest.approx(2 / 5)


def test_a_ratio_has_the_error_of_the_windows_differences() -> None:
    ours = [Score(10, loss, 0, 1) for loss in (2.0, 3.0, 4.0)]
    theirs = [Score(10, loss, 0, 1) for loss in (1.9, 2.9, 4.2)]
    found, error = ratio(ours, theirs)
    assert found == pytest.approx(1.0)
    assert error == pytest.approx(0.1)  # 0.1, 0.1 and -0.2: deviation 0.1732, by the root of three


def test_a_single_window_has_no_error() -> None:
    one = [Score(10, 2.0, 0, 1)]
    assert ratio(one, one) == (1.0, None)


@pytest.mark.parametrize(("times", "verdict"), [(BAR - 1e-4, True), (BAR + 1e-4, False)])
def test_the_bar_is_held_against_the_better_peer(times: float, verdict: bool) -> None:
    def result(perplexity: float) -> Result:
        return Result(1, {"text": [Score(1, math.log(perplexity), 0, 1)]})

    results = {REFERENCE: result(9), DEFAULT: result(10 * times), PEERS[0]: result(11), PEERS[1]: result(10)}
    results[INTEGERS] = result(10)
    assert is_within_bar(results) is verdict
    assert is_within_bar(results, INTEGERS)


def test_a_peer_that_is_not_here_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(module: str, task: str) -> dict[str, object]:
        if module == quality_report.PEER:
            raise ModuleFailed("No module named 'transformers'")
        return {"scores": [vars(Score(1, 1.0, 0.0, 1.0))], "bytes_read_per_token": 1}

    monkeypatch.setattr(quality, "run_module", run)
    text = quality.Text("noise", [[3, 1]], "")
    results, left_out = quality.measure(tmp_path, [text], 1, tmp_path, quality.Console(quiet=True))
    assert set(left_out) == {peer.label for peer in PEERS}
    assert is_within_bar(results) is None


def test_windows_are_whole_and_follow_one_another(small_model: Path) -> None:
    """The tokenizer has a token for each byte."""
    tokenizer = load_tokenizer(inspect(resolve(str(small_model))))
    text = "abcdefghijk"
    windows = quality.windows_of(text, tokenizer, 4, most=10)
    assert [tokenizer.decode(window) for window in windows] == ["abcd", "efgh"]


def test_a_text_shorter_than_a_window_is_one(small_model: Path) -> None:
    tokenizer = load_tokenizer(inspect(resolve(str(small_model))))
    assert len(quality.windows_of("abc", tokenizer, 512, most=100)[0]) == 3


@pytest.mark.parametrize("files", quality.TEXTS.values(), ids=str)
def test_the_projects_own_texts_are_there(files: tuple[str, ...]) -> None:
    assert all((quality.ROOT / file).is_file() for file in files)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("tied")
    write_checkpoint(TIED, folder)
    return inspect(resolve(str(folder)))


@pytest.fixture(scope="module")
def untied(tied: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("untied")
    write_untied(tied, folder)
    return inspect(resolve(str(folder)))


def test_an_untied_checkpoint_has_the_same_numbers_and_the_embedding_as_its_head(
    tied: ModelSpec, untied: ModelSpec
) -> None:  # fmt: skip
    with open_weights(tied) as before, open_weights(untied) as after:
        assert set(after.names()) == {*before.names(), "lm_head.weight"}
        assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())
        assert torch.equal(after.tensor("lm_head.weight"), before.tensor("model.embed_tokens.weight"))


def test_an_untied_model_in_4_bits_has_the_logits_of_the_tied_one(tied: ModelSpec, untied: ModelSpec) -> None:
    ids = [5, 250, 17, 17]
    logits = []
    for spec in (tied, untied):
        wish = {"base_model": str(spec.folder), "device": "cpu", "quantization": "4bit", "context": 64}
        decoder = build(ModelManager({"model_config": wish}).plan(spec), spec)
        logits.append(decoder.logits(ids))
    assert torch.equal(*logits)


def test_transformers_gives_an_untied_checkpoint_the_logits_of_the_tied_one(tied: ModelSpec, untied: ModelSpec) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[5, 250, 17, 17]])
    with torch.inference_mode():
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32)(ids).logits
            for one in (tied, untied)
        )
    torch.testing.assert_close(after, before)


def test_a_head_in_4_bits_is_scored_beside_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where the benchmark starts one for each side."""
    monkeypatch.setattr(registry.STRATEGIES, "_things", {})
    monkeypatch.setattr(quality, "run_module", lambda _, task: measure_quality.measure(json.loads(task)))
    monkeypatch.setattr(quality, "SIDES", (REFERENCE, DEFAULT, quality_report.SIDES[-3]))
    folder = write_small_model(tmp_path / "model")
    text = quality.Text("noise", [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], "")
    quiet = quality.Console(quiet=True)
    results, left_out = quality.measure(folder, [text], torch.get_num_threads(), tmp_path, quiet)
    wanted, _, found = (mean(result.of("noise")) for result in results.values())
    assert not left_out
    assert wanted["divergence"] == 0
    assert 0 < found["divergence"] < 1
    assert json.dumps(quality_report.told(results))
