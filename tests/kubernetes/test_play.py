"""What comes of a scenario: it passes, it fails with its reason, or there was no time for it, which is no failure."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_llm.bench.run import Run
from tests.kubernetes.ledger import Ledger
from tests.kubernetes.play import OUT_OF_TIME, Ends, play
from tests.kubernetes.shell import Broken
from tests.kubernetes.stage import NotHere, Scenario, Stage


class Outcomes:
    """A ledger that keeps what became of each scenario."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def say(self, line: str) -> None: ...

    def passes(self, name: str, detail: str, _took_s: float) -> None:
        self.of[name] = f"passed: {detail}"

    def fails(self, name: str, why: str, _took_s: float) -> None:
        self.of[name] = f"failed: {why}"

    def leaves_out(self, name: str, why: str) -> None:
        self.of[name] = f"not tested: {why}"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _played(
    first: list[Scenario], rest: list[Scenario], limit_s: float | None = None, *, is_tried_again: bool = False
) -> tuple[dict[str, str], Any]:
    outcomes = Outcomes()
    cluster = SimpleNamespace(ends=threading.Event())
    edge = SimpleNamespace(keep_logs=lambda _folder: None)
    stage = SimpleNamespace(ledger=outcomes, cluster=cluster, edge=edge, say=outcomes.say)
    ends = Ends(time.monotonic(), limit_s)
    asyncio.run(play(cast(Stage, stage), first, rest, ends, lambda: None, is_tried_again=is_tried_again))
    return outcomes.of, cluster


async def _well(_stage: Stage) -> str:
    return "well"


async def _broken(_stage: Stage) -> str:
    raise Broken("it broke")


async def _elsewhere(_stage: Stage) -> str:
    raise NotHere("no such machine")


async def _for_ever(_stage: Stage) -> str:
    await asyncio.Event().wait()
    return "never"


async def _breaks_when_stopped(_stage: Stage) -> str:
    try:
        await asyncio.Event().wait()
    finally:
        raise Broken("it could not clean up")


def test_each_scenario_is_passed_failed_or_said_not_to_be_for_this_machine() -> None:
    rest = [Scenario("b", _broken, settles=False), Scenario("c", _elsewhere, settles=False)]
    outcomes, cluster = _played([Scenario("a", _well, settles=False)], rest)
    assert outcomes == {"a": "passed: well", "b": "failed: it broke", "c": "not tested: no such machine"}
    assert cluster.ends.is_set()


def test_nothing_is_tried_after_a_failure_of_what_everything_needs() -> None:
    outcomes, _ = _played([Scenario("a", _broken, settles=False)], [Scenario("b", _well, settles=False)])
    assert outcomes == {"a": "failed: it broke"}


@pytest.mark.parametrize(("is_tried_again", "outcome"), [(False, "failed: it broke"), (True, "passed: well")])
def test_what_failed_once_is_tried_again_where_that_is_asked_for(is_tried_again: bool, outcome: str) -> None:
    tries = iter((_broken, _well))

    async def at_the_second_time(stage: Stage) -> str:
        return await next(tries)(stage)

    rest = [Scenario("b", at_the_second_time, settles=False), Scenario("c", _broken, settles=False)]
    outcomes, _ = _played([Scenario("a", _well, settles=False)], rest, is_tried_again=is_tried_again)
    assert outcomes == {"a": "passed: well", "b": outcome, "c": "failed: it broke"}


def test_a_scenario_counts_once_however_often_it_was_tried() -> None:
    run = Run("test-cluster", [], {})
    ledger = Ledger(run, "1.0")
    for name in ("a", "b", "c"):
        ledger.fails(name, "it broke", 1.0)
    ledger.passes("a", "well", 1.0)
    ledger.fails("b", "it broke again", 1.0)
    ledger.leaves_out("c", OUT_OF_TIME)
    assert (ledger.passed, ledger.failed, ledger.untested) == (["a"], ["b", "c"], {})
    assert [failure.why for failure in run.failures] == ["it broke", "it broke", "it broke", "it broke again"]


@pytest.mark.parametrize("scenario", [_for_ever, _breaks_when_stopped])
def test_when_the_time_is_up_what_runs_is_stopped_and_the_rest_left_out(scenario: Any) -> None:
    rest = [Scenario("b", scenario, settles=False), Scenario("c", _well, settles=False)]
    outcomes, cluster = _played([Scenario("a", _well, settles=False)], rest, limit_s=0.3)
    out_of_time = f"not tested: {OUT_OF_TIME}"
    assert outcomes == {"a": "passed: well", "b": out_of_time, "c": out_of_time}
    assert cluster.ends.is_set()
