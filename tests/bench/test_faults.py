"""A small fault campaign, as `edge-llm bench faults` runs it: real processes, real sockets, blows from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.bench.fault_kinds import KINDS
from edge_llm.bench.followed import Followed, Verdict, judge
from edge_llm.bench.record import load

# the kinds whose detection takes seconds of silence are for the command: a few of them are as long as all of these. One
# is here, the hardest: who slept goes on speaking
QUICK = (
    "kill_decode_first",
    "kill_decode_middle",
    "kill_decode_last",
    "kill_prefill_computing",
    "kill_prefill_transfer",
    "reset_transfer",
    "close_transfer",
    "flip_transfer",
    "reset_events",
    "slow_transfer",
    "drain_decode",
    "drain_prefill",
    "restore_refused",
    "stop_decode_untold",
)


@pytest.mark.timeout(240)
def test_no_stream_is_lost_or_changed_by_any_quick_kind_of_fault(tmp_path: Path) -> None:
    kinds = [argument for kind in QUICK for argument in ("--kinds", kind)]
    command = [sys.executable, "-m", "edge_llm", "bench", "faults", "--per-kind", "1", *kinds, "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
        env={**os.environ, "EDGE_LLM_LOG": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["kinds"], found["faults"], found["hit_in_flight"]) == (len(QUICK),) * 3
    assert found["streams"] >= 3 * len(QUICK)
    assert [found[name] for name in ("streams_lost", "tokens_missing", "tokens_repeated", "streams_different")] == [
        0
    ] * 4
    assert found["per_kind"]["stop_decode_untold"]["stale_tokens"] > 0
    assert load(Path(found["record"])).is_complete


def test_there_are_at_least_twelve_kinds_of_fault() -> None:
    assert len(KINDS) >= 12
    assert set(QUICK) < KINDS.keys()


def followed(ids: list[int], text: str = "text", failure: str = "") -> Followed:
    return Followed("r", sent_s=1.0, ended_s=2.0, text=text, ids=tuple(ids), failure=failure)


@pytest.mark.parametrize(
    ("stream", "verdict"),
    [
        (followed([1, 2, 3, 4]), Verdict(is_lost=False)),
        (followed([1, 3, 4]), Verdict(is_lost=False, missing=1, is_different=True)),
        (followed([1, 2, 2, 3, 4]), Verdict(is_lost=False, repeated=1, is_different=True)),
        (followed([1, 2, 9, 4]), Verdict(is_lost=False, is_different=True)),
        (followed([1, 2, 3, 4], text="tex"), Verdict(is_lost=False, is_different=True)),
        (followed([1, 2], failure="the stream ended without [DONE]"), Verdict(is_lost=True)),
        (Followed("r", sent_s=1.0), Verdict(is_lost=True)),
    ],
)
def test_a_stream_is_judged_by_every_token_and_by_the_text_that_came(stream: Followed, verdict: Verdict) -> None:
    assert judge(stream, [1, 2, 3, 4], "text") == verdict
    assert verdict.is_good == (verdict == Verdict(is_lost=False))


def test_a_stream_resumes_at_the_end_of_the_longest_silence_after_the_blow() -> None:
    stream = Followed("r", sent_s=10.0, arrivals_s=[11.0, 11.1, 11.2, 14.0, 14.1])
    assert stream.resumed_after_s(11.15) == pytest.approx(2.85)
    assert stream.resumed_after_s(10.5) == pytest.approx(3.5)
    assert stream.resumed_after_s(15.0) is None
