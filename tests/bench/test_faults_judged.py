"""What a fault campaign demands of its blows and its figures: proofs, and bounds on the time until a stream goes on."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from edge_llm.bench.fault_figures import Outcome, Plan, Tally, broken, figures
from edge_llm.bench.fault_kinds import KINDS
from edge_llm.bench.fault_scene import Blow, Hit, Scene
from edge_llm.bench.followed import Followed, Verdict
from edge_llm.bench.proxy import Exchange, FaultProxy
from edge_llm.bench.run import Run

PIDS = {"prefill-1": 1, "decode-1": 2, "decode-2": 3}


async def never(_: Callable[[], bool]) -> None:
    raise TimeoutError


async def at_once() -> None: ...


def a_scene(*streams: Followed) -> Scene:
    return Scene(
        FaultProxy(0), list(streams), 300, 1000, PIDS, set(), {}, random.Random(0), never, at_once, lambda: None
    )


def exchange(worker: str, request_id: str, started_s: float, *, is_whole: bool = False) -> Exchange:
    route = worker.split("-")[0]
    return Exchange(worker, route, started_s, head=f'"request_id":"{request_id}"'.encode(), is_whole=is_whole)


def found_with(kind: str, resumed_s: list[float], computed_again: int = 0) -> list[str]:
    """What is said of a campaign of one kind whose streams went on after these times, some of them behind KV that was
    computed again."""
    plan = Plan((KINDS[kind],), len(resumed_s), (), (), (), 480, 64, 300, allowance_s=4.0)
    run, tally = Run("faults", [], {}), Tally(attempts={kind: len(resumed_s)})
    for number, one_s in enumerate(resumed_s):
        run.add(f"{kind}: resumed_s", one_s)
        again = "d1: worker_failed after 8 of 480 tokens" if number < computed_again else ""
        tally.outcomes.append(Outcome(kind, "met", (Verdict(is_lost=False),), one_s, (), computed_again=again))
    return broken(figures(tally, plan, run))


@pytest.mark.parametrize(("kind", "good_s", "late_s"), [("stop_decode", 6.1, 60.0), ("kill_decode_middle", 0.2, 6.0)])
def test_a_kind_whose_streams_go_on_late_is_a_broken_promise(kind: str, good_s: float, late_s: float) -> None:
    assert not found_with(kind, [good_s] * 3)
    (line,) = found_with(kind, [late_s] * 3)
    assert line.startswith(f"{kind}: the disturbed stream went on after {late_s:.1f} s")


def test_one_hiccup_of_the_machine_breaks_no_promise() -> None:
    assert not found_with("stop_decode", [6.1, 60.0, 6.1])


def test_kv_of_drained_workers_that_is_mostly_computed_again_is_a_broken_promise() -> None:
    assert not found_with("drain_decode", [0.3] * 4, computed_again=2)
    (line,) = found_with("drain_decode", [0.3] * 4, computed_again=3)
    assert line == "drain_decode: KV that was to be moved was computed again in 3 of 4 trials"


def test_every_kind_is_bounded_by_the_detection_of_its_fault() -> None:
    mute = {name for name, kind in KINDS.items() if kind.detection_s == 6.0}
    assert mute == {name for name in KINDS if name.startswith(("stop_", "hole_"))}
    assert all(kind.detection_s <= 1.5 for name, kind in KINDS.items() if name not in mute)


@pytest.mark.parametrize(("woken_s", "is_proven"), [(None, False), (8.0, True), (11.5, False), (13.0, False)])
def test_a_stop_counts_only_when_the_worker_woke_while_its_stream_lived(woken_s: float | None, is_proven: bool) -> None:
    scene = a_scene(Followed("r", sent_s=0.5, ended_s=12.0))
    scene.proxy.exchanges += [exchange("decode-1", "r", 0.5), exchange("decode-2", "r", 7.0)]
    blow = Blow("decode-1", 1.0, woken_s=woken_s)
    assert bool(KINDS["stop_decode"].proof(scene, blow)) == is_proven


def test_a_worker_that_never_hears_of_its_end_must_have_spoken_late() -> None:
    scene = a_scene(Followed("r", sent_s=0.5, ended_s=12.0))
    scene.proxy.exchanges += [exchange("decode-1", "r", 0.5), exchange("decode-2", "r", 7.0)]
    blow = Blow("decode-1", 1.0, woken_s=8.0)
    assert not KINDS["stop_decode_untold"].proof(scene, blow)
    blow.stale_tokens = 3
    assert "3 late tokens" in KINDS["stop_decode_untold"].proof(scene, blow)


def test_a_rolling_restart_counts_only_when_every_worker_had_a_stream() -> None:
    stream = Followed("r", sent_s=0.5)
    blow = Blow("decode-1", 1.0, hits=[Hit(name, 1.0, (stream,)) for name in ("decode-1", "prefill-1")])
    proof = KINDS["rolling_restart"].proof
    assert not proof(a_scene(stream), blow)
    blow.hits.append(Hit("decode-2", 2.0, ()))
    assert not proof(a_scene(stream), blow)
    blow.hits[-1] = Hit("decode-2", 2.0, (stream,))
    assert proof(a_scene(stream), blow)


def test_of_several_disturbed_streams_the_one_that_waited_longest_counts() -> None:
    quick, slow = (Followed(name, sent_s=1.0, arrivals_s=[2.0, at_s]) for name, at_s in (("a", 2.5), ("b", 5.0)))
    blow = Blow("decode-1", 2.2, hits=[Hit("decode-1", 2.2, (quick,)), Hit("decode-2", 2.3, (slow,))])
    assert blow.resumed_s(quick) == pytest.approx(2.7)


def test_a_stream_is_in_the_worker_that_got_it_last_and_has_not_finished_it() -> None:
    waits, runs, over = Followed("w", sent_s=1.0), Followed("r", sent_s=1.0, arrivals_s=[2.0]), Followed("o")
    over.ended_s = 3.0
    scene = a_scene(waits, runs, over)
    scene.proxy.exchanges += [
        *(exchange("decode-1", stream.request_id, 1.0) for stream in scene.streams),
        exchange("decode-2", "r", 2.0),
        exchange("prefill-1", "w", 1.1),
        exchange("prefill-1", "r", 1.1),
        exchange("prefill-1", "o", 1.1, is_whole=True),
    ]
    assert {name: scene.streams_in(name) for name in PIDS} == {
        "prefill-1": [waits],
        "decode-1": [waits],
        "decode-2": [runs],
    }
