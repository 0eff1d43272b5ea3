"""`edge-llm bench net`: pairs of real workers hand KV over and are measured; two ends of a link measure each other."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_llm.bench import tcp_link
from edge_llm.bench.net import LinkPlan, Places, Plan, Tally, link_figures, measure, measure_link
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.run import Run
from edge_llm.bench.schemas import NetFigures
from edge_llm.bench.tcp_link import MAGIC, Link, Listener
from edge_llm.cli import cli
from edge_llm.commands.net import net
from edge_llm.commands.net_tables import show
from edge_llm.worker.client import Peer
from edge_llm.worker.tickets import KeyRing
from tests.loopback import KEYS, running_cluster
from tests.published import reads_back

PLAN = Plan(prompt_tokens=100, repetitions=2, timeout_s=20.0, connects=3)
CACHE = 1 << 20


def silent(_what: str, _done: int, _total: int) -> None:
    pass


async def measured(places: Places, plan: Plan = PLAN) -> tuple[dict[str, Any], Run]:
    run, tally = Run("net", [], {}), Tally()
    await measure(places, plan, run, tally, silent)
    figures = tally.figures(run)
    assert reads_back(figures, NetFigures)
    return figures, run


@pytest.mark.anyio
async def test_each_pair_that_can_hand_over_is_measured_both_ways() -> None:
    async with running_cluster() as cluster:
        nodes = [
            await cluster.start("prefill", "p", prefix_cache_bytes=CACHE),
            await cluster.start("decode", "d", prefix_cache_bytes=CACHE),
            await cluster.start("mixed", "m", prefix_cache_bytes=CACHE),
        ]
        found, run = await measured(Places(tuple(node.peer for node in nodes), KEYS, "bench-net-1"))
    assert run.failures == []
    assert [(pair["from"], pair["to"]) for pair in found["pairs"]] == [("p", "d"), ("p", "m"), ("m", "d")]
    for pair in found["pairs"]:
        assert pair["round_trip_ms"] > 0
        assert pair["handoff_rate_mb_per_s"] > 0, "the second prompt was kept and only had to be sent"
        assert pair["handoff_ms"] >= 0
        assert pair["handoff_bytes"] > 0
        assert pair["transfers"] == 4, "two prompts that were computed, two that were kept"
    assert found["nodes"]["d"]["connect_ms"] > 0
    assert found["nodes"]["p"]["role"] == "prefill"
    kinds = [case["case"] for case in run.cases if "computed" in case["case"] or "kept" in case["case"]]
    assert len(kinds) == 3 * 2 * 2
    kept = [case for case in run.cases if "kept" in case["case"]]
    assert all(case["prefill_cached_tokens"] >= 90 for case in kept)


@pytest.mark.anyio
async def test_a_worker_that_keeps_nothing_has_no_rate_of_its_own_computing() -> None:
    async with running_cluster() as cluster:
        nodes = [await cluster.start("prefill", "p"), await cluster.start("decode", "d")]
        found, run = await measured(Places(tuple(node.peer for node in nodes), KEYS, "bench-net-1"))
    (pair,) = found["pairs"]
    assert run.failures == []
    assert pair["handoff_rate_mb_per_s"] is None
    assert pair["handoff_ms"] is not None


@pytest.mark.anyio
async def test_a_worker_that_is_gone_is_named_and_leaves_the_others() -> None:
    async with running_cluster() as cluster:
        nodes = [await cluster.start("prefill", "p"), await cluster.start("decode", "d")]
        peers = (*(node.peer for node in nodes), Peer("gone", "127.0.0.1:9"))
        found, run = await measured(Places(peers, KEYS, "bench-net-1"))
    assert [failure.what for failure in run.failures] == ["gone"]
    assert len(found["pairs"]) == 1


@pytest.mark.anyio
async def test_a_worker_without_which_there_is_no_pair_is_named_with_its_address() -> None:
    async with running_cluster() as cluster:
        node = await cluster.start("prefill", "p")
        peers = (node.peer, Peer("gone", "127.0.0.1:9"))
        with pytest.raises(MeasureFailed, match=r"gone at 127\.0\.0\.1:9 does not answer"):
            await measured(Places(peers, KEYS, "bench-net-1"))


@pytest.mark.anyio
async def test_a_wrong_key_is_said_at_once() -> None:
    other = KeyRing.parse("test1:" + "5b" * 32, "another key")
    async with running_cluster() as cluster:
        nodes = [await cluster.start("prefill", "p"), await cluster.start("decode", "d")]
        with pytest.raises(MeasureFailed, match="not authentic"):
            await measured(Places(tuple(node.peer for node in nodes), other, "bench-net-1"))


@pytest.mark.anyio
async def test_workers_that_hand_nothing_over_are_an_error_that_says_what_to_do() -> None:
    async with running_cluster() as cluster:
        nodes = [await cluster.start("decode", "a"), await cluster.start("decode", "b")]
        with pytest.raises(MeasureFailed, match="--listen"):
            await measured(Places(tuple(node.peer for node in nodes), KEYS, "bench-net-1"))


# -- a bare link


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("127.0.0.1", 0)
    thread = threading.Thread(target=listener.serve, daemon=True)
    thread.start()
    yield listener
    listener.close()
    thread.join(5.0)
    assert not thread.is_alive()


@pytest.mark.parametrize("size", [1, 1_234_564, 16 << 20])
def test_a_burst_is_as_large_as_asked_for_to_the_byte(listener: Listener, size: int) -> None:
    assert len(Link("127.0.0.1", listener.port).bursts_s(size, 2)) == 2


def test_a_link_has_round_trips_both_directions_and_bursts(listener: Listener) -> None:
    plan = LinkPlan(seconds=0.1, pings=5, burst_bytes=1 << 20, bursts=2, kv_bytes_per_token=1 << 10)
    run = Run("net", [], {})
    found = measure_link(Link("127.0.0.1", listener.port), plan, run, silent)
    assert found == link_figures(plan, run)
    assert reads_back(found, NetFigures)
    assert len(run.samples["round_trip_ms"]) == 5
    assert found["round_trip_ms"]["min"] <= found["round_trip_ms"]["p50"] <= found["round_trip_ms"]["p99"]
    assert found["to_peer_mb_per_s"] > 0
    assert found["from_peer_mb_per_s"] > 0
    burst = found["handoff"]
    assert burst["tokens_per_s"] == pytest.approx(1e6 * burst["mb_per_s"] / (1 << 10), rel=0.01)
    assert [case["case"] for case in run.cases] == ["round trips", "to_peer", "from_peer", "bursts"]


def test_a_slow_link_has_the_time_for_each_of_its_bursts(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pi's Wi-Fi: each burst is within the bound, all of them together are not."""
    monkeypatch.setattr(tcp_link, "MAX_SECONDS", 0.2)
    link = Link("127.0.0.1", listener.port)
    with link._asked("burst", 1 << 10) as peer:
        for _ in range(4):
            time.sleep(0.1)
            tcp_link._one_burst(peer, 1 << 10)


def test_a_link_that_breaks_off_at_bursts_keeps_what_was_measured_before(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(tcp_link._ANSWERS, "burst", lambda _peer, _size: None)
    arguments = ["--to", f"127.0.0.1:{listener.port}", "--quick", "--seconds", "0.1", "--output", str(tmp_path)]
    done = CliRunner().invoke(net, [*arguments, "--json"])
    assert done.exit_code == 1
    assert "not measured: bursts: " in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["round_trip_ms"]["p50"] > 0
    assert found["from_peer_mb_per_s"] > 0
    assert "handoff" not in found
    assert Path(found["record"]).exists()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"x" * 1000, f"{MAGIC} rm 1\n".encode(), b"\xff\n"])
def test_a_listener_hangs_up_on_what_is_no_question_and_goes_on(listener: Listener, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5.0) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        assert _all_of(stranger) == b""
    assert len(Link("127.0.0.1", listener.port).round_trips_s(2)) == 2


def _all_of(peer: socket.socket) -> bytes:
    try:
        return peer.recv(100)
    except ConnectionResetError:
        return b""


def test_nobody_there_and_something_else_there_are_told_apart() -> None:
    with pytest.raises(MeasureFailed, match=r"--listen 127\.0\.0\.1:9"):
        Link("127.0.0.1", 9).round_trips_s(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def serve() -> None:
            peer, _ = other.accept()
            peer.recv(100)
            peer.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(MeasureFailed, match="broke off at echo"):
            Link("127.0.0.1", port).round_trips_s(1)


def test_the_command_measures_a_link_and_leaves_a_record(listener: Listener, tmp_path: Path) -> None:
    arguments = ["--to", f"127.0.0.1:{listener.port}", "--quick", "--seconds", "0.1", "--burst-bytes", "4096"]
    done = CliRunner().invoke(net, [*arguments, "--output", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["round_trip_ms"]["p50"] > 0
    assert Path(found["record"]).exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "8080", "--listen", "h:1"], "give one of"),
        (["--to", "h:1", "-o", "csv"], "-o is for pairs"),
        (["--workers-file", "w", "--key-file", "k", "-o", "csv", "--json"], "leave out -o"),
        (["--listen", "h:1", "--to", "h:1"], "give one of"),
        (["--workers-file", "w"], "--key-file"),
        (["--to", ":x"], "is not like"),
        (["--to", "h:70000"], "is not like"),
    ],
)
def test_a_wrong_use_is_said(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(net, arguments)
    assert done.exit_code == 2
    assert complaint in done.output


@pytest.mark.usefixtures("tmp_cache")
def test_without_a_cluster_here_all_other_ways_are_named() -> None:
    done = CliRunner().invoke(cli, ["bench", "net"])
    assert done.exit_code == 1
    for words in ("no cluster of `edge-llm up` runs", "--workers-file", "--listen"):
        assert words in done.stderr


# -- what is shown


def a_pair(source: str, target: str) -> dict[str, Any]:
    return {
        "from": source,
        "to": target,
        "round_trip_ms": 0.1234,
        "bandwidth_mb_per_s": 523.123,
        "transfers": 12,
        "handoff_rate_mb_per_s": 412.9,
        "handoff_tokens_per_s": 33602.4,
        "handoff_ms": 12.34,
        "adopt_ms": None,
        "overlapped_share": 0.913,
        "handoff_bytes": 12_582_912.0,
    }


FOUND = {
    "definitions": {"bandwidth": "MB/s"},
    "nodes": {
        name: {
            "address": "127.0.0.1:20000",
            "role": "prefill",
            "model": "a-model-with-quite-a-long-name-q4_k_m",
            "kv_bytes_per_token": 12288,
            "connect_ms": 0.1,
        }
        for name in ("prefill-1", "decode-1")
    },
    "pairs": [a_pair("prefill-1", "decode-1"), a_pair("prefill-1", "decode-2")],
    "notes": [],
}


def test_tables_for_people_fit_80_columns_and_break_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    show(FOUND, "md")
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in tables}) == 3, "three tables, each aligned"
    assert max(map(len, tables)) <= 80
    for words in ("prefill-1", "round trip ms", "33602", "0.913", "12.6", "| -"):
        assert words in printed


def test_pairs_are_rows_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    show(FOUND, "jsonl")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == FOUND["pairs"]
    show(FOUND, "json")
    assert json.loads(capsys.readouterr().out) == FOUND["pairs"]
    show(FOUND, "csv")
    head, first, _ = capsys.readouterr().out.splitlines()
    assert head.split(",")[:3] == ["from", "to", "round_trip_ms"]
    assert first.split(",")[:3] == ["prefill-1", "decode-1", "0.1234"]


def test_a_link_of_no_known_model_has_no_tokens_per_second(listener: Listener, tmp_path: Path) -> None:
    arguments = ["--to", f"127.0.0.1:{listener.port}", "--quick", "--seconds", "0.1", "--burst-bytes", "4096"]
    done = CliRunner().invoke(net, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "mb_per_s" in done.stdout
    assert "tokens_per_s" not in done.stdout
