"""The real model in real processes over real sockets: what a stranger gets after `make up`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.streams import prompt_ids
from edge_llm.bench.theorem import WAYS, prove
from edge_llm.commands.local_cluster import local_cluster
from edge_llm.config import DEFAULT_MODEL

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("model_path"), pytest.mark.timeout(900)]
VOCAB_SIZE = 49_152
SMALL = ("--n-ctx", "2304", "--slots", "8")


@asynccontextmanager
async def cluster(
    prefill: int = 0, decode: int = 0, mixed: int = 0
) -> AsyncIterator[tuple[Started, aiohttp.ClientSession]]:
    layout = Layout("test", prefill, decode, mixed, SMALL)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with (
        local_cluster(layout, DEFAULT_MODEL) as started,
        aiohttp.ClientSession(started.url, timeout=timeout) as s,
    ):
        yield started, s


async def ask(session: aiohttp.ClientSession, ids: list[int], mode: str, **more: Any) -> dict[str, Any]:
    """A whole answer; the `edge_llm` part of its timings."""
    vendor = {"mode": mode, "return_token_ids": True}
    body = {
        "prompt": ids,
        "max_tokens": 24,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
        "cache_prompt": False,
        "edge_llm": vendor,
        **more,
    }
    async with session.post("/v1/completions", json=body) as reply:
        data = await reply.json()
        assert reply.status == 200, data
    return dict(data["timings"]["edge_llm"])


async def test_split_equals_whole_alone_and_among_others() -> None:
    """`edge-llm bench theorem` in small; it asserts itself that eight rows and two prompts met."""
    async with cluster(prefill=1, decode=1) as (started, _):
        proof = await prove(started.url, 32, seed=3)
    assert proof.differences == []
    assert proof.unproven == []
    assert proof.comparisons == (WAYS - 1) * 32
    assert (min(proof.prompt_tokens), max(proof.prompt_tokens)) == (1, 2100)


async def kill_prefill_midway(started: Started, session: aiohttp.ClientSession, ids: list[int]) -> dict[str, Any]:
    """Stream a split answer; SIGKILL its prefill worker once some of the prompt, but not all of it, is computed."""
    pids = {process.name: process.pid for process in started.processes}
    vendor = {"mode": "split", "return_token_ids": True}
    body = {
        "prompt": ids,
        "max_tokens": 24,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
        "cache_prompt": False,
        "edge_llm": vendor,
    }
    is_killed = False
    last: dict[str, Any] = {}
    async with session.post("/v1/completions", json=body | {"stream": True, "return_progress": True}) as reply:
        assert reply.status == 200
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            data = json.loads(line.removeprefix(b"data: "))
            assert "error" not in data, data
            if not is_killed and data.get("prompt_progress", {}).get("processed", 0) >= 256:
                os.kill(pids["prefill-1"], signal.SIGKILL)
                is_killed = True
            last = data if "timings" in data else last
    assert is_killed
    return dict(last["timings"]["edge_llm"])


async def test_a_prefill_worker_killed_between_its_first_and_last_chunk_changes_no_token() -> None:
    ids = prompt_ids(1100, VOCAB_SIZE, seed=11)
    async with cluster(prefill=1, decode=1) as (started, session):
        undisturbed = await ask(session, ids, "local")
        killed = await kill_prefill_midway(started, session, ids)
        bytes_per_token = 2 * 3 * 64 * 2 * 30
        whole = (len(ids) - 1) * bytes_per_token
        assert 0 < killed["handoff_bytes"] < whole, "the kill did not fall between the first and the last chunk"
        assert killed["token_ids"] == undisturbed["token_ids"]
        assert "prefill-1" in killed["fallback"]
        # started again by then, or not: the next request is answered, with the same tokens
        again = await ask(session, ids, "auto")
        assert again["token_ids"] == undisturbed["token_ids"]


async def test_a_decode_worker_killed_while_it_streams_changes_no_token() -> None:
    ids = prompt_ids(300, VOCAB_SIZE, seed=12)
    async with cluster(prefill=1, decode=2) as (started, session):
        pids = {process.name: process.pid for process in started.processes}
        undisturbed = await ask(session, ids, "split", max_tokens=80)
        vendor = {"mode": "split", "return_token_ids": True}
        body = {
            "prompt": ids,
            "max_tokens": 80,
            "temperature": 0.8,
            "top_p": 0.9,
            "seed": 5,
            "cache_prompt": False,
            "edge_llm": vendor,
        }
        texts, is_killed = 0, False
        last: dict[str, Any] = {}
        async with session.post("/v1/completions", json=body | {"stream": True}) as reply:
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                data = json.loads(line.removeprefix(b"data: "))
                assert "error" not in data, data
                texts += 1
                if texts == 8 and not is_killed:
                    async with session.get("/cluster") as view:
                        nodes = (await view.json())["nodes"]
                    busy = [node["worker"] for node in nodes if node["load"]["sequences_running"]]
                    victim = busy[0] if busy else "decode-1"
                    os.kill(pids[victim], signal.SIGKILL)
                    is_killed = True
                last = data if "timings" in data else last
    found = last["timings"]["edge_llm"]
    assert found["token_ids"] == undisturbed["token_ids"]
    assert found["replanned"] == 1


def test_the_model_that_is_tested_is_the_one_the_catalogue_names(model_path: Path) -> None:
    assert model_path.stat().st_size == 98_362_432
