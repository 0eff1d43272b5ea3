"""The theorem's bench against a cluster that is a few lines long and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.run import Run
from edge_llm.bench.theorem import TOGETHER, WAYS, Proof, cases, measure

pytestmark = pytest.mark.anyio
VOCAB_SIZE, N_CTX = 320, 2304
PROMPTS = 10
COMPARED = WAYS - 1
Wrong = Callable[[str, list[int]], list[int]]


def right(_mode: str, ids: list[int]) -> list[int]:
    return ids


class Cluster:
    """A gateway with one prefill and one decode worker. `widest` and `met`: what its workers count since their start,
    before anything was asked and once something was; `wide`: decode calls of eight rows."""

    def __init__(
        self,
        wide: tuple[int, int] = (0, 3),
        met: tuple[int, int] = (0, 5),
        answers: int = 10**6,
        wrong: Wrong = right,
        split_mode: str = "split",
        whole_mode: str = "local",
        is_restarted: bool = False,
        fallback: str | None = None,
    ) -> None:
        self._wide, self._met, self._answers, self._wrong = wide, met, answers, wrong
        self._split_mode, self._whole_mode, self._is_restarted = split_mode, whole_mode, is_restarted
        self._fallback = fallback
        self.prompts: list[Any] = []

    @asynccontextmanager
    async def launch(self, _layout: Layout) -> AsyncIterator[Started]:
        app = web.Application()
        app.router.add_get("/cluster", self._cluster)
        app.router.add_get("/v1/models", self._models)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._answer)
        async with TestServer(app) as server:
            yield Started(str(server.make_url("")), ())

    async def _models(self, _request: web.Request) -> web.Response:
        meta = {"vocab_size": VOCAB_SIZE, "n_ctx": N_CTX, "sha256": "a" * 64, "quantization": "Q4_0"}
        meta |= {"architecture": "llama", "kv_bytes_per_token": 64}
        return web.json_response({"data": [{"id": "m", "meta": meta}]})

    async def _cluster(self, _request: web.Request) -> web.Response:
        then = bool(self.prompts)
        load = {"wide_decode_calls": self._wide[then], "prompts_met": self._met[then], "widest_decode_rows": 7}
        about = {"model": "m", "chunk_tokens": 8, "pid": 1, "seen_ago_s": 0.0}
        about["started_at"] = 1.0 + (then and self._is_restarted)
        nodes = [about | {"worker": role, "role": role, "load": load} for role in ("prefill", "decode")]
        return web.json_response({"nodes": nodes})

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body.get("prompt", body.get("messages"))
        self.prompts.append(prompt)
        if len(self.prompts) > self._answers:
            return web.json_response({"error": "out of order"}, status=500)
        mode = body["edge_llm"]["mode"]
        digest = hashlib.sha256(json.dumps([prompt, body.get("seed")]).encode()).digest()
        own = {
            "token_ids": self._wrong(mode, list(digest[:12])),
            "mode": self._split_mode if mode == "split" else self._whole_mode,
            "prefill_node": "prefill",
            "decode_node": "decode",
            "fallback": self._fallback if mode == "split" else None,
        }
        usage = {"prompt_tokens": len(prompt)}
        choices = [{"finish_reason": "length"}]
        return web.json_response({"choices": choices, "usage": usage, "timings": {"edge_llm": own}})


async def proven(cluster: Cluster) -> tuple[Proof, Run]:
    proof, run = Proof(), Run("theorem", ["test"], {})
    found = await measure(cluster.launch, PROMPTS, 0, proof, run, lambda _done, _total: None)
    assert found == proof.as_json()
    return proof, run


async def test_equal_answers_that_met_prove_it_and_leave_what_they_were(tmp_path: Path) -> None:
    proof, run = await proven(Cluster())
    assert proof.missed() == []
    assert proof.holds
    assert (proof.prompts, proof.comparisons, proof.tokens) == (PROMPTS, COMPARED * PROMPTS, COMPARED * PROMPTS * 12)
    record = run.record(proof.as_json(), is_complete=True)
    assert record.figures.keys() == {
        "holds",
        "prompts",
        "comparisons",
        "tokens_compared",
        "shortest_prompt_tokens",
        "longest_prompt_tokens",
        "differences",
        "unproven",
    }
    assert record.samples == {"tokens_compared": [12.0] * (COMPARED * PROMPTS)}
    assert [model.name for model in record.models] == ["m"]


async def test_prompts_fit_the_vocabulary_of_the_cluster() -> None:
    cluster = Cluster()
    await proven(cluster)
    ids = [token for prompt in cluster.prompts if isinstance(prompt, list) for token in prompt if type(token) is int]
    assert len(ids) > 100
    assert 0 < min(ids) <= max(ids) < VOCAB_SIZE


async def test_one_other_token_in_one_split_answer_is_named() -> None:
    seen: list[str] = []

    def wrong(mode: str, ids: list[int]) -> list[int]:
        seen.append(mode)
        return [*ids[:5], -1, *ids[6:]] if seen.count("split") == 3 and mode == "split" else ids

    proof, _ = await proven(Cluster(wrong=wrong))
    assert not proof.holds
    name = cases(PROMPTS, 8, VOCAB_SIZE, N_CTX)[2].name
    assert proof.missed() == [f"different: {name}, split: first difference at token 5"]


async def test_one_other_token_in_one_unsplit_answer_among_others_is_named() -> None:
    seen: list[str] = []

    def wrong(mode: str, ids: list[int]) -> list[int]:
        seen.append(mode)
        return [-1, *ids[1:]] if seen.count("local") == PROMPTS + 1 and mode == "local" else ids

    proof, _ = await proven(Cluster(wrong=wrong))
    (line,) = proof.missed()
    assert line.endswith("unsplit among others: first difference at token 0")


@pytest.mark.parametrize("count", [24, 32, 200])
def test_both_ways_of_drawing_tokens_and_every_length_are_there(count: int) -> None:
    every = cases(count, 128, 49_152, 4096)[:-TOGETHER]
    lengths = [len(case.body["prompt"]) for case in every if isinstance(case.body.get("prompt"), list)]
    assert {127, 128, 129, 1, 2} <= set(lengths) or count == 24
    assert max(lengths) > 2000
    greedy = [case for case in every if case.body.get("temperature") == 0]
    assert 0.4 * len(every) <= len(greedy) <= 0.6 * len(every)
    if count == 200:
        drawn = {(len(case.body["prompt"]), case in greedy) for case in every[::4]}
        assert len(drawn) == 2 * len({length for length, _ in drawn}), "every exact length comes greedy and sampled"


def test_no_prompt_is_longer_than_a_small_context() -> None:
    for case in cases(100, 32, 320, 1024):
        given: Any = case.body.get("prompt", case.body.get("messages"))
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        tokens = len(given) if "ids" in case.name else len(text.encode())  # a vocabulary may have a token for each byte
        assert tokens + case.body["max_tokens"] <= 1024


async def test_answers_that_got_a_part_of_their_kv_only_prove_nothing() -> None:
    proof, _ = await proven(Cluster(fallback="prefill: protocol_error after 8 of 99 tokens"))
    assert not proof.holds
    assert len(proof.unproven) == 2 * sum(tokens > 1 for tokens in proof.prompt_tokens)
    assert "only in part, prefill: protocol_error" in proof.unproven[0]


async def test_answers_that_did_not_split_and_empty_answers_prove_nothing() -> None:
    whole, _ = await proven(Cluster(split_mode="local"))
    assert any("ran local on decode" in line for line in whole.unproven)
    empty, _ = await proven(Cluster(wrong=lambda _mode, _ids: []))
    assert empty.differences == []
    assert sum("no tokens" in line for line in empty.unproven) == COMPARED * PROMPTS
    other, _ = await proven(Cluster(whole_mode="split"))
    assert any("unsplit among others: ran split" in line for line in other.unproven)


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        (
            Cluster(wide=(0, 0)),
            "no decode call of this run had 8 rows (widest since the workers started: 7): "
            "give the decode worker 8 slots",
        ),
        (Cluster(met=(5, 5)), "no two prompts met on one prefill worker"),
    ],
)
async def test_what_did_not_happen_in_this_run_is_unproven(cluster: Cluster, line: str) -> None:
    proof, _ = await proven(cluster)
    assert proof.missed() == [f"unproven: {line}"]


async def test_a_wide_decode_call_of_an_earlier_run_proves_nothing_for_this_one() -> None:
    proof, _ = await proven(Cluster(wide=(3, 3)))
    (line,) = proof.missed()
    assert "no decode call of this run" in line
    again, _ = await proven(Cluster(wide=(3, 4)))
    assert again.holds, "the same workers can prove it twice"
    anew, _ = await proven(Cluster(wide=(3, 3), is_restarted=True))
    assert anew.holds, "a worker that was started in between counted from zero"


async def test_what_was_compared_before_the_cluster_broke_is_kept() -> None:
    proof, run = await proven(Cluster(answers=PROMPTS + 4))
    assert proof.comparisons == 4
    assert len(run.samples["tokens_compared"]) == 4
    assert [failure.what for failure in run.failures] == ["theorem"]
    assert "out of order" in run.failures[0].why


async def test_without_a_comparison_nothing_holds() -> None:
    proof, _ = await proven(Cluster(answers=0))
    assert not proof.holds
    assert proof.missed() == ["nothing was compared"]
