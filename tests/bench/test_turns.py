"""A second turn computes only what is new; what broke on the way is said and the rest is kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.run import Run
from edge_llm.bench.turns import Plan, figures, measure, missed
from edge_llm.commands.local_cluster import local_cluster
from edge_llm.engine.simulated import VOCAB_SIZE
from edge_llm.errors import WorkerError

SIMULATED = BenchModel(Path("none.gguf"), ModelFacts("simulated", "none.gguf", "0" * 64, 0, "none", "simulated", 64))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_second_turn_on_real_processes_computes_only_what_is_new() -> None:
    plan = Plan(repetitions=2, vocab_size=VOCAB_SIZE, prompt_tokens=400, answer_tokens=20, new_tokens=10)
    run = Run("turns", ["test"], {})

    def simulated(layout: Layout) -> object:
        return local_cluster(replace(layout, options=(*layout.options, "--simulate")), "simulated")

    found = await measure(plan, SIMULATED, simulated, run, lambda what, done, total: None)  # type: ignore[arg-type]
    assert found["ids_equal"] is True
    assert found["cached_tokens"] == 400 + 20 - 1, "all but the token that was drawn last"
    assert len(run.samples["second_turn_ttft_share"]) == 2


class Answering:
    """A server that answers as ours does, at once; it hangs up on the request number `hangs_up_at`."""

    def __init__(self, hangs_up_at: int | None = None, level: str = "exact") -> None:
        self.bodies: list[dict[str, Any]] = []
        self.level = level
        self._hangs_up_at = hangs_up_at

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        if len(self.bodies) == self._hangs_up_at:
            assert request.transport is not None
            request.transport.abort()
            return reply
        own = {"token_ids": [7] * self.bodies[-1]["max_tokens"], "level": self.level}
        last = {"choices": [{"text": "word"}], "timings": {"cache_n": 3, "edge_llm": own}}
        await reply.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
        return reply

    @asynccontextmanager
    async def launch(self, _layout: Layout) -> AsyncIterator[Started]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.answer)
        async with TestServer(app) as server:
            yield Started(str(server.make_url("")), ())


SMALL = Plan(repetitions=2, vocab_size=1000, prompt_tokens=8, answer_tokens=4, new_tokens=2)


def say_nothing(_what: str, _done: int, _total: int) -> None:
    return


@pytest.mark.anyio
async def test_what_a_cold_cluster_costs_is_paid_before_the_first_conversation() -> None:
    server, run = Answering(), Run("turns", ["test"], {})
    await measure(SMALL, SIMULATED, server.launch, run, say_nothing)
    warm_up, *asked = [body["prompt"] for body in server.bodies]
    assert len(asked) == 3 * SMALL.repetitions
    assert len(run.samples["first_ttft_s"]) == SMALL.repetitions
    assert len(warm_up) == SMALL.prompt_tokens
    assert all(prompt[0] != warm_up[0] for prompt in asked), "nothing of a conversation is computed before it"


@pytest.mark.anyio
@pytest.mark.parametrize(("level", "said"), [("exact", 0), ("unverified", 1)])
async def test_why_little_of_an_earlier_turn_is_used_is_said_once(level: str, said: int) -> None:
    server, run = Answering(level=level), Run("turns", ["test"], {})
    await measure(SMALL, SIMULATED, server.launch, run, say_nothing)
    assert len([note for note in run.notes if "edge-llm verify" in note]) == said


@pytest.mark.anyio
async def test_what_was_measured_before_a_server_broke_stays() -> None:
    server, run = Answering(hangs_up_at=6), Run("turns", ["test"], {})
    found = await measure(SMALL, SIMULATED, server.launch, run, say_nothing)
    assert found["cached_tokens"] == 3
    assert len(run.samples["first_ttft_s"]) == 1
    assert [failure.what for failure in run.failures] == ["conversations"]
    assert run.failures[0].why


@pytest.mark.anyio
async def test_a_cluster_that_cannot_start_is_a_failure_of_the_run() -> None:
    def launch(_layout: Layout) -> AbstractAsyncContextManager[Started]:
        raise WorkerError("decode-1 could not start: no memory")

    run = Run("turns", ["test"], {})
    assert await measure(SMALL, SIMULATED, launch, run, say_nothing) == {}
    assert [failure.why for failure in run.failures] == ["decode-1 could not start: no memory"]


def test_bars_are_missed_by_slow_second_turns_and_by_other_tokens() -> None:
    run = Run("turns", ["test"], {})
    assert len(missed(figures(run))) == 2, "what was not measured is not met"
    run.add("second_turn_ttft_share", 0.1)
    run.add("ids_equal", 1.0)
    assert missed(figures(run)) == []
    run.add("ids_equal", 0.0)
    run.add("second_turn_ttft_share", 0.5)
    run.add("second_turn_ttft_share", 0.5)
    assert len(missed(figures(run))) == 2
