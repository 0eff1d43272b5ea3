"""What `cluster status` makes of one node's figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_llm.cluster.discovery import Heard
from edge_llm.cluster.view import Place
from edge_llm.commands.cluster_status import (
    _limits,
    _links,
    _unanswered,
    _unmeasured_pods,
    role_of,
    row_of,
    stacked,
    state_of,
)
from edge_llm.gateway.overview import found_by, overview
from edge_llm.worker.messages import Board, Link, Rates, Role
from tests.nodes import load_of, node_of


def shown(role: Role = "decode", pool: str | None = None, **changes: Any) -> dict[str, Any]:
    node = node_of("pi-b", role, **changes)
    found: dict[str, Any] = json.loads(overview("g", {}, [node], {}, 0.0, {"pi-b": pool} if pool else None))["nodes"][0]
    return found


def test_a_row_has_what_the_worker_says_and_a_dash_where_it_says_nothing() -> None:
    load = load_of(slots_free=1, kv_cells_free=512, rates=Rates(token_s=0.005, run_s=0.02, row_s=0.001))
    row = row_of(shown(load=load, version="0.1.0", build={"llama_cpp_python": "0.3.36"}))
    assert (row["slots"], row["KV"], row["prefill t/s"], row["step ms"]) == ("3/4", "75%", "200", "21.0")
    assert (row["build"], row["class"], row["temp"]) == ("0.1.0, llama-cpp 0.3.36", "bbbbbbbb", "-")
    bare = row_of(shown("prefill"))
    assert (bare["slots"], bare["KV"], bare["prefill t/s"], bare["CPU"]) == ("-", "-", "-", "-")


def test_a_narrow_terminal_gets_lines_that_fit_and_have_everything_that_is_known() -> None:
    load = load_of(slots_free=1, kv_cells_free=512, rates=Rates(token_s=0.005, run_s=0.02, row_s=0.001))
    long = "a-model-with-quite-a-long-name-instruct-q4_k_m"
    node = shown(load=load, version="0.1.0", build={"llama_cpp_python": "0.3.36"}, model=long)
    assert list(stacked(row_of(node), 80)) == [
        "pi-b  decode, ready, level exact",
        f"  model {long}, class bbbbbbbb,",
        "    build 0.1.0, llama-cpp 0.3.36",
        "  slots 3/4, KV 75%, prefill 200 t/s, step 21.0 ms",
    ]
    assert any(long in line for line in stacked(row_of(node), 20)), "a name is never cut"


def test_a_measured_pace_goes_before_an_estimated_one() -> None:
    load = load_of(prefill_tokens_per_s=90.0, decode_step_s=0.05, rates=Rates(token_s=0.005, run_s=0.02))
    row = row_of(shown(load=load))
    assert (row["prefill t/s"], row["step ms"]) == ("90", "50.0")


@pytest.mark.parametrize(
    ("role", "pool", "words"),
    [
        ("prefill", "prompt", "prefill"),
        ("prefill", "token", "prefill, helps token"),
        ("decode", "prompt", "decode, helps prompt"),
        ("mixed", "mixed", "mixed"),
        ("decode", None, "decode"),
    ],
)
def test_a_node_that_helps_out_says_where(role: Role, pool: str | None, words: str) -> None:
    assert role_of(shown(role, pool)) == words


def test_states_are_words_and_a_draining_one_says_what_is_left() -> None:
    leaving: dict[str, Any] = {"is_ready": False, "is_draining": True}
    assert state_of(shown()) == "ready"
    assert state_of(shown(**leaving, load=load_of(sequences_running=2))) == "draining, 2 left"
    assert state_of(shown(**leaving)) == "drained"
    assert state_of(shown(is_ready=False)) == "not ready"


def test_links_and_what_holds_a_board_back_have_lines_of_their_own() -> None:
    links = [Link(peer="pi-a", bytes_per_s=112e6, round_trip_s=4e-4, samples=3)]
    board = Board(cpu_share=0.5, ram_share=0.4, temperature_c=84.6, throttled={"soft_temperature_limit": True})
    node = shown(load=load_of(links=links), board=board, level="unverified", level_reason="run `edge-llm verify`")
    assert list(_links([node])) == ["KV to pi-b came from pi-a 112 MB/s, round trip 0.4 ms"]
    assert list(_limits([node])) == [
        "pi-b is held back: soft temperature limit",
        "pi-b has level unverified: run `edge-llm verify`",
    ]


def test_a_pod_without_a_level_is_told_what_works_for_a_pod() -> None:
    about: dict[str, Any] = {"level": "unverified", "level_reason": "run `edge-llm verify` on this node to measure it"}
    nodes = [{**shown(**about), "worker": name} for name in ("edge-llm-decode-0", "edge-llm-prefill-1", "pi-b")]
    (line,) = _unmeasured_pods(nodes)
    assert line.startswith("edge-llm-decode-0, edge-llm-prefill-1: level unverified")
    assert "`kubectl -n edge-llm logs edge-llm-decode-0 -c verify`" in line
    assert "`kubectl -n edge-llm delete pod edge-llm-decode-0`" in line
    assert list(_limits(nodes)) == ["pi-b has level unverified: run `edge-llm verify` on this node to measure it"]


def test_who_does_not_answer_is_named_with_the_reason_once() -> None:
    place = Place("pi-c", "10.0.0.3:9001")
    said = ((place, "worker pi-c at 10.0.0.3:9001: refused"), (Place("pi-d", "10.0.0.4:9001"), ""))
    assert list(_unanswered(found_by(2, Heard(problem="the API server is away"), said))) == [
        "where workers are is not known for sure: the API server is away",
        "pi-c at 10.0.0.3:9001 does not answer: refused",
        "pi-d at 10.0.0.4:9001 does not answer: not asked yet",
    ]
