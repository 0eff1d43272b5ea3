"""Scores do not depend on what was asked before or beside them, and mean what llama-perplexity and lm-eval mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_llm.bench.processes import MeasureFailed, Measurer
from edge_llm.engine.load import LlamaSettings
from edge_llm.engine.random_model import make_model
from edge_llm.engine.score import Scorer, compared, load_scorer, log_likelihoods, split_pair
from edge_llm.errors import ConfigError, ContextTooLong, InvalidRequest

LoadScorer = Callable[..., Scorer]
TEXT = "Once a small machine read a long page, and a larger one waited for it. " * 8
CONTEXT = "Question: which of them was done first?\nAnswer:"
CHOICES = [" the small one", " the larger one", " neither of them", " the"]


def settings_of(path: Path) -> LlamaSettings:
    return LlamaSettings(path, path.stem, "", n_ctx=512, slots=4, serves_prompts=False, chunk_tokens=32)


@pytest.fixture(scope="module")
def load(models_dir: Path) -> LoadScorer:
    def load_random(shape: str = "dense", quantization: str = "Q4_0") -> Scorer:
        return load_scorer(settings_of(make_model(models_dir, shape, quantization)))

    return load_random


@pytest.fixture
def logits_file(tmp_path: Path) -> str:
    return str(tmp_path / "logits")


def words(text: str) -> list[int]:
    return [7, *(len(word) for word in text.split(" "))]


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    assert split_pair(words, "a bb ", "ccc") == split_pair(words, "a bb", " ccc")
    assert split_pair(words, "a bb", " ccc").ids == (7, 1, 2, 3)
    assert split_pair(words, "a bb", " ccc").start == 3


def test_a_continuation_that_merges_with_its_context_still_has_a_scored_token() -> None:
    merged = split_pair(words, "a bb", "ccc")  # one word now: [7, 1, 5]
    assert (merged.ids, merged.start) == ((7, 1, 5), 2)


def test_a_continuation_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="context"):
        split_pair(lambda text: [1], "", "x")


def test_choices_score_the_same_together_and_each_in_a_fresh_process(load: LoadScorer) -> None:
    together = load().score([[CONTEXT, choice] for choice in CHOICES])["scores"]
    alone = [load().score([[CONTEXT, choice]])["scores"][0] for choice in CHOICES]
    assert together == alone, "bit for bit"
    assert len({score["logprob"] for score in alone}) == len(CHOICES)


def test_a_context_is_computed_once_for_all_choices_and_kept_for_the_next_request(load: LoadScorer) -> None:
    scorer = load()
    request = {"op": "score", "pairs": [[CONTEXT, choice] for choice in CHOICES]}
    stem = len(CONTEXT) + 1  # one token a byte, and the first
    rows = sum(len(choice) - 1 for choice in CHOICES)  # the last token of a choice is only a target
    first = scorer.answer(request)
    assert first["computed_tokens"] == stem + rows
    again = scorer.answer(request)
    assert again["computed_tokens"] == 1 + rows
    assert again["scores"] == first["scores"]


def test_a_recurrent_model_scores_the_same_together_and_alone(load: LoadScorer) -> None:
    together = load("recurrent").score([[CONTEXT, choice] for choice in CHOICES[:2]])["scores"]
    alone = [load("recurrent").score([[CONTEXT, choice]])["scores"][0] for choice in CHOICES[:2]]
    assert together == alone


def test_what_greedy_decoding_says_is_greedy(load: LoadScorer) -> None:
    scorer = load()
    (answer,) = scorer.generate([CONTEXT], 6)["answers"]
    scores = scorer.score([[CONTEXT, answer["text"]], [CONTEXT, " no"]])["scores"]
    said_again = scorer.score([[CONTEXT, answer["text"]]])["scores"]
    assert scores[:1] == said_again
    assert not scores[1]["is_greedy"]


def test_contexts_that_differ_are_scored_with_their_own(load: LoadScorer) -> None:
    pairs = [["Ann saw Bob, so Ann", " ran away."], ["Ann saw Bob, so Bob", " ran away."]]
    together = load().score(pairs)["scores"]
    assert together == [load().score([pair])["scores"][0] for pair in pairs]
    assert together[0]["logprob"] != together[1]["logprob"]


def test_the_second_half_of_a_window_is_scored_as_by_a_reader_of_one_token_after_another(load: LoadScorer) -> None:
    scorer = load()
    assert scorer.text(TEXT)["tokens"] == len(TEXT) + 1
    found = scorer.window(1, 64)
    ids = load()._tokenize(TEXT)[64:128]
    ids[0] = 1  # each window begins as a text does
    context = load()._context
    losses = []
    for position, token in enumerate(ids[:-1]):
        row = np.array(context.decode([token], [position], [0]))
        if position >= 32:
            losses.append(-float(log_likelihoods(row, [ids[position + 1]])[0]))
    assert found["count"] == 31 == len(losses)
    assert found["nll"] == pytest.approx(sum(losses), rel=1e-9)
    assert found["nll_squares"] == pytest.approx(sum(loss**2 for loss in losses), rel=1e-9)


def test_a_model_does_not_diverge_from_itself_at_all(load: LoadScorer, logits_file: str) -> None:
    one, other = load(), load()
    saved, read = (scorer.text(TEXT) for scorer in (one, other))
    assert saved == read
    plain = one.window(0, 128, save=logits_file)
    found = other.window(0, 128, against=logits_file)
    assert found["kl_sum"] == 0.0
    assert set(found["kl"]) == {0.0}
    assert found["same_top"] == found["count"] == plain["count"] == 63
    assert found["nll"] == found["base_nll"] == plain["nll"]


def test_another_quantization_diverges(load: LoadScorer, logits_file: str) -> None:
    one, other = load(quantization="F16"), load(quantization="Q4_0")
    for scorer in (one, other):
        scorer.text(TEXT)
    base = one.window(0, 128, save=logits_file)
    found = other.window(0, 128, against=logits_file)
    assert found["kl_sum"] > 0.0
    assert min(found["kl"]) >= 0.0
    assert found["base_nll"] == pytest.approx(base["nll"], rel=1e-12)
    assert found["nll"] != base["nll"]


def test_divergence_is_the_sum_of_its_definition() -> None:
    base, own = np.array([[0.0, 1.0, 2.0]], np.float32), np.array([[1.0, 1.0, 0.0]], np.float32)
    p, q = (np.exp(row) / np.exp(row).sum() for row in (base[0].astype(float), own[0].astype(float)))
    base_loss, own_loss, kl = compared(base, own, [2])[:, 0]
    assert (base_loss, own_loss) == pytest.approx((-np.log(p[2]), -np.log(q[2])))
    assert kl == pytest.approx(float((p * np.log(p / q)).sum()))


def test_logits_of_another_window_are_refused(load: LoadScorer, logits_file: str) -> None:
    scorer = load()
    scorer.text(TEXT)
    scorer.window(0, 128, save=logits_file)
    with pytest.raises(InvalidRequest, match="another vocabulary or another window"):
        scorer.window(0, 64, against=logits_file)
    with pytest.raises(InvalidRequest, match="no window 99"):
        scorer.window(99, 64)


def test_answers_do_not_depend_on_who_else_is_answered(load: LoadScorer) -> None:
    prompts = [CONTEXT, "Count: one, two,", "A", TEXT[:100]]
    together = load().generate(prompts, 12, is_chat=True)["answers"]
    alone = [load().generate([prompt], 12, is_chat=True)["answers"][0] for prompt in prompts]
    assert together == alone
    assert all(answer["tokens"] == 12 or answer["stopped"] == "end" for answer in together)


def test_an_answer_ends_before_its_stop_string(load: LoadScorer) -> None:
    scorer = load()
    whole = scorer.generate([CONTEXT], 12)["answers"][0]["text"]
    stop = whole[4:6]
    (cut,) = scorer.generate([CONTEXT], 12, stop=[stop])["answers"]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["stopped"] == "stop"


def test_what_does_not_fit_is_refused_with_both_numbers(load: LoadScorer, models_dir: Path) -> None:
    with pytest.raises(ContextTooLong, match="512"):
        load().score([["x" * 600, " y"]])
    with pytest.raises(ContextTooLong, match="512"):
        load().generate(["x" * 500], 64)
    with pytest.raises(InvalidRequest, match="5 prompts at once"):
        load().generate(["x"] * 5, 4)
    settings = settings_of(make_model(models_dir))
    with pytest.raises(ConfigError, match="does not fit"):
        load_scorer(replace(settings, available_bytes=1 << 20))


def test_the_process_answers_lines_and_survives_what_it_cannot_do(models_dir: Path) -> None:
    path = make_model(models_dir)
    with Measurer("score", "edge_llm.engine.score", ["--model", str(path), "--n-ctx", "256"], []) as child:
        assert child.facts["vocab_size"] == 512
        assert json.dumps(child.facts["build"])
        with pytest.raises(MeasureFailed, match="unknown operation"):
            child.ask("dance")
        with pytest.raises(MeasureFailed, match="do not fit"):
            child.ask("score", pairs=[["x" * 300, " y"]])
        assert len(child.ask("score", pairs=[["a b", " c"]])["scores"]) == 1
