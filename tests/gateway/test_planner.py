"""What the planner remembers between requests, with a clock of the test's own and no cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from edge_llm.cluster.cost import TYPICAL_ANSWER_TOKENS
from edge_llm.cluster.slo import Slo, Verdict
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded
from edge_llm.gateway.decision import Decision
from edge_llm.gateway.planner import DECISIONS_KEPT, Planner
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Event, Session
from edge_llm.gateway.situation import Mode
from edge_llm.gateway.ways import APART_S
from edge_llm.request import FinishReason, SamplingParams, TokenEvent
from edge_llm.worker.messages import PromptReport, Rates, Role
from tests.nodes import load_of, node_of

RATES = Rates(run_s=0.04, row_s=0.01, token_s=0.010, prompt_steps=1.5)
KEEPS = 64 << 20


def node(worker: str, role: Role, **changes: Any) -> Node:
    load = load_of(**{"rates": RATES, "prefix_limit_bytes": KEEPS, **changes.pop("load", {})})
    return node_of(worker, role, **{"load": load, "n_ctx": 4096, **changes})


class Scene:
    """A planner, the workers it sees, and requests that go through them as the test says."""

    def __init__(self, *nodes: Node) -> None:
        self.now_s = 100.0
        self.outcomes: list[Decision] = []
        self.planner = Planner(clock=lambda: self.now_s, on_outcome=self.outcomes.append)
        self.requests = 0
        self.see(*nodes)

    def see(self, *nodes: Node) -> None:
        """All workers answered just now."""
        self.view = ClusterView(tuple(replace(node, seen_s=self.now_s) for node in nodes))
        self.planner.on_view(self.view)

    def request(
        self, ids: Sequence[int] = range(100), mode: Mode = "auto", tenant: str = "", cache_prompt: bool = True
    ) -> Running:
        self.requests += 1
        name = f"r{self.requests}"
        job = Job(name, "m", tuple(ids), 20, SamplingParams(), (), (), mode, cache_prompt, tenant=tenant)
        return Running(job, Session(name), self.now_s, self.now_s)

    def plan(self, running: Running) -> Plan:
        running.plan = self.planner.plan(running, self.view)
        running.session.on(Event.PLANNED)
        return running.plan

    def prompt(
        self,
        running: Running,
        after_s: float = 1.0,
        *,
        cached: int = 0,
        prefill_cached: int = 0,
        troubled: Sequence[str] = (),
    ) -> None:
        """Its prompt is whole."""
        assert running.plan is not None
        self.now_s += after_s
        total = len(running.job.prompt_ids) - 1
        running.report = PromptReport(
            mode=running.plan.mode,
            prefill_worker=running.plan.reader.worker,
            wait_ms=0.0,
            prefill_ms=1e3 * after_s,
            handoff_ms=0.0,
            adopt_ms=0.0,
            handoff_bytes=0,
            overlapped_bytes=0,
            restored_tokens=cached,
            computed_tokens=total - cached,
            is_same_class=True,
            cached_tokens=cached,
            prefill_cached_tokens=prefill_cached,
            trouble="timeout" if troubled else "",
            troubled=list(troubled),
        )
        running.session.on(Event.PROMPTED)
        self.planner.prompted(running)

    def answer(
        self,
        running: Running,
        tokens: int,
        token_s: float = 0.05,
        *,
        is_whole: bool = True,
        reason: FinishReason = "stop",
    ) -> None:
        for at in range(tokens):
            self.now_s += token_s
            running.first_token_s = running.first_token_s or self.now_s
            running.last_token_s = self.now_s
            ends = reason if is_whole and at + 1 == tokens else None
            index = len(running.session.delivered)
            running.session.deliver(TokenEvent(running.job.request_id, running.session.epoch, index, 7, "", ends))
            running.made_by = running.plan.decode if running.plan else None
        if is_whole:
            self.planner.over(running)

    def served(self, running: Running, tokens: int = 10, reason: FinishReason = "stop", **prompt: Any) -> Plan:
        """A whole life."""
        plan = self.plan(running)
        self.prompt(running, **prompt)
        self.answer(running, tokens, reason=reason)
        return plan

    def fail(self, running: Running) -> None:
        running.session.on(Event.WORKER_LOST)
        self.planner.failed(running)

    @property
    def last(self) -> dict[str, Any]:
        return self.planner.decisions()[0]


P1, P2 = node("p1", "prefill"), node("p2", "prefill")
D1, D2 = node("d1", "decode"), node("d2", "decode")


# -- work


def test_what_was_planned_counts_before_any_status_shows_it() -> None:
    scene = Scene(P1, P2, D1, D2)
    plans = [scene.plan(scene.request(mode="split")) for _ in range(2)]
    assert {plan.decode.worker for plan in plans} == {"d1", "d2"}
    assert {plan.reader.worker for plan in plans} == {"p1", "p2"}
    booked = scene.planner.booked(scene.view)
    assert {worker: work.sequences for worker, work in booked.items()} == {"d1": 1, "d2": 1, "p1": 0, "p2": 0}


def test_limits_of_latency_are_booked_with_what_came_of_them_so_far() -> None:
    scene = Scene(P1, D1)
    running = scene.request(mode="split")
    running.job = replace(running.job, slo=Slo(ttft_s=3.0, tpot_s=0.2))
    plan = scene.plan(running)
    assert plan.prediction is not None
    works = scene.planner.works(scene.view)
    assert works["p1"].prompts[0].due_s == 3.0
    (stream,) = works["d1"].streams
    assert stream.begins_s == pytest.approx(plan.prediction.ttft_s)
    assert (stream.tpot_s, stream.tokens) == (0.2, 0)
    scene.prompt(running)
    scene.answer(running, 4, token_s=0.5, is_whole=False)
    (stream,) = scene.planner.works(scene.view)["d1"].streams
    assert (stream.begins_s, stream.tokens) == (0.0, 4)
    assert stream.age_s == pytest.approx(2.0)


def test_a_limit_of_ttft_counts_from_the_clients_sending_whoever_lost_the_request_meanwhile() -> None:
    """It was tokenized for half a second; its worker is lost 2 s later, before the first token."""
    scene = Scene(D1, D2)
    running = scene.request()
    running.job = replace(running.job, slo=Slo(ttft_s=5.0))
    scene.now_s += 0.5
    running.waits_since_s = scene.now_s
    worker = scene.plan(running).decode.worker
    (prompt,) = scene.planner.works(scene.view)[worker].prompts
    assert prompt.due_s == 4.5
    scene.now_s += 2.0
    scene.fail(running)
    running.waits_since_s = scene.now_s
    worker = scene.plan(running).decode.worker
    (prompt,) = scene.planner.works(scene.view)[worker].prompts
    assert prompt.due_s == 2.5


def test_a_request_that_lost_its_worker_is_judged_by_all_the_time_since_it_came() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    running.job = replace(running.job, slo=Slo(ttft_s=2.0))
    assert scene.plan(running).verdict == Verdict(0, 0)
    scene.now_s += 1.5
    scene.fail(running)
    running.waits_since_s = scene.now_s
    assert scene.plan(running).verdict == Verdict(1, 0), "it needs another second"


def test_the_pace_of_an_answer_that_goes_on_elsewhere_counts_from_its_first_token() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    running.job = replace(running.job, slo=Slo(tpot_s=0.2))
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 4, token_s=0.5, is_whole=False)
    scene.fail(running)
    again = scene.plan(running)
    assert again.prediction is not None
    (stream,) = scene.planner.works(scene.view)[again.decode.worker].streams
    assert stream.tokens == 4
    assert stream.begins_s == pytest.approx(again.prediction.ttft_s)
    assert stream.age_s == pytest.approx(1.5 + again.prediction.ttft_s), "its client waits for the next one"
    scene.prompt(running)
    (stream,) = scene.planner.works(scene.view)[again.decode.worker].streams
    assert stream.tokens == 4
    assert stream.age_s == pytest.approx(2.5)


def test_an_answer_that_goes_on_elsewhere_has_its_first_token_behind_it() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    running.job = replace(running.job, slo=Slo(ttft_s=3.0, tpot_s=0.2))
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 2, is_whole=False)
    scene.fail(running)
    again = scene.plan(running)
    (prompt,) = scene.planner.works(scene.view)[again.decode.worker].prompts
    assert prompt.due_s is None


def test_a_request_that_is_over_leaves_its_room_to_others() -> None:
    scene = Scene(node("d1", "decode", slots=1))
    first = scene.request()
    scene.plan(first)
    with pytest.raises(Overloaded):
        scene.plan(scene.request())
    scene.planner.over(first)
    scene.plan(scene.request())


def test_prompt_work_shrinks_as_it_is_done() -> None:
    scene = Scene(P1, D1)
    running = scene.request(mode="split")
    scene.plan(running)
    scene.planner.progressed(running, 60)
    assert scene.planner.works(scene.view)["p1"].pending_tokens == 39
    scene.prompt(running)
    assert scene.planner.works(scene.view)["p1"].pending_tokens == 0


def test_the_length_of_answers_is_learnt() -> None:
    scene = Scene(D1)
    scene.plan(scene.request())
    assert scene.last["predicted"]["answer_tokens"] == 20, "no longer than it may be"
    for _ in range(100):
        scene.served(scene.request(), tokens=4)
    scene.plan(scene.request())
    assert scene.last["predicted"]["answer_tokens"] == pytest.approx(4.0, rel=0.1)


def test_a_request_that_is_refused_again_and_again_is_one_prompt() -> None:
    scene = Scene(node("m1", "mixed"), node("m2", "mixed"))
    for _ in range(20):
        scene.served(scene.request(range(100)))
    again = scene.request(range(2000))
    for _ in range(20):
        scene.plan(again)
        again.session.on(Event.WORKER_LOST)
        scene.planner.left(again)
    assert (scene.planner._demand.prompt_tokens("m") or 0.0) < 250


def test_the_first_answer_is_not_typical_of_all_others() -> None:
    scene = Scene(D1)
    scene.served(scene.request(), tokens=4)
    assert scene.planner.typical_answer("m") == pytest.approx(TYPICAL_ANSWER_TOKENS + (4 - TYPICAL_ANSWER_TOKENS) / 5)
    scene.served(scene.request(), tokens=4)
    assert scene.planner.typical_answer("m") == pytest.approx((4 * TYPICAL_ANSWER_TOKENS + 2 * 4) / 6)


def test_answers_that_their_own_limit_cut_say_nothing_unless_they_are_longer_than_others() -> None:
    """A health check of one token makes no answer of one token typical."""
    scene = Scene(D1)
    for _ in range(50):
        scene.served(scene.request(), tokens=1, reason="length")
    assert scene.planner.typical_answer("m") == TYPICAL_ANSWER_TOKENS
    scene.served(scene.request(), tokens=TYPICAL_ANSWER_TOKENS + 50, reason="length")
    assert scene.planner.typical_answer("m") == pytest.approx(TYPICAL_ANSWER_TOKENS + 10)


# -- prefixes


def test_a_next_turn_goes_to_the_worker_that_holds_the_conversation() -> None:
    scene = Scene(D1, D2)
    first = scene.request()
    busy = scene.request(range(500, 540))
    scene.plan(busy)
    scene.prompt(busy)
    assert scene.served(first).decode.worker == "d2", "d1 is busy"
    scene.planner.over(busy)
    plan = scene.plan(scene.request([*first.job.prompt_ids, *first.session.delivered, 1, 2, 3]))
    assert plan.decode.worker == "d2"
    assert scene.last["held_tokens"] == (100 + 10 - 1) // 8 * 8


def test_a_system_prompt_is_credited_to_the_prefill_worker_that_read_it() -> None:
    scene = Scene(P1, P2, D1)
    assert scene.served(scene.request(mode="split")).reader.worker == "p1"
    occupied = scene.request(range(900, 910), mode="split")
    scene.plan(occupied)
    assert occupied.plan is not None
    assert scene.plan(scene.request([*range(96), 1, 2, 3, 4], mode="split")).reader.worker == "p1"
    assert scene.last["held_tokens"] == 96


def test_other_tenants_and_who_wants_nothing_kept_get_no_credit() -> None:
    scene = Scene(D1)
    scene.served(scene.request(tenant="a"))
    scene.plan(scene.request(tenant="b"))
    assert scene.last["held_tokens"] == 0
    scene.plan(scene.request(tenant="a", cache_prompt=False))
    assert scene.last["held_tokens"] == 0
    scene.served(scene.request(range(500, 600), cache_prompt=False))
    scene.plan(scene.request(range(500, 600)))
    assert scene.last["held_tokens"] == 0, "it was not kept"


def test_below_level_exact_only_prompts_are_kept() -> None:
    scene = Scene(node("d1", "decode", level="same-plan"))
    first = scene.request()
    scene.served(first)
    scene.plan(scene.request([*first.job.prompt_ids, *first.session.delivered, 1]))
    assert scene.last["held_tokens"] == 96


def test_a_worker_that_did_not_hold_what_was_believed_is_not_credited_again() -> None:
    scene = Scene(D1)
    scene.served(scene.request())
    second = scene.request()
    scene.plan(second)
    assert scene.last["held_tokens"] == 96
    scene.prompt(second, cached=0)
    third = scene.request()
    scene.plan(third)
    assert scene.last["held_tokens"] == 0


def test_a_worker_that_was_started_again_is_not_credited() -> None:
    scene = Scene(D1)
    scene.served(scene.request())
    scene.see(node("d1", "decode", pid=2))
    scene.plan(scene.request())
    assert scene.last["held_tokens"] == 0


# -- failures


def test_a_failed_worker_is_avoided_until_it_was_seen_well_again() -> None:
    scene = Scene(D1)
    running = scene.request()
    scene.plan(running)
    scene.fail(running)
    with pytest.raises(Overloaded, match="have failed and no other is left"):
        scene.plan(running)
    scene.now_s += 1.0
    scene.see(D1)
    assert scene.plan(running).decode.worker == "d1"


def test_a_worker_that_never_failed_it_is_preferred_to_one_that_came_back() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    assert scene.plan(running).decode.worker == "d1"
    scene.fail(running)
    others = [scene.request(range(at * 200, at * 200 + 100)) for at in range(3)]
    for other in others:
        other_plan = scene.plan(other)
        assert other_plan is not None
    scene.now_s += 1.0
    scene.see(D1, D2)
    assert scene.plan(running).decode.worker == "d2", "though d2 is busier"


def test_a_new_life_is_another_worker() -> None:
    scene = Scene(D1)
    running = scene.request()
    scene.plan(running)
    scene.fail(running)
    reborn = node("d1", "decode", started_at=5.0)
    scene.view = ClusterView((replace(reborn, seen_s=0.0),))
    assert scene.plan(running).decode.worker == "d1", "nothing but its name has failed"


def test_what_was_delivered_belongs_to_the_prompt_of_the_next_plan() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 5, is_whole=False)
    scene.fail(running)
    scene.plan(running)
    assert scene.last["prompt_tokens"] == 105
    assert scene.planner.booked(scene.view)["d2"].reserved_cells == 120


# -- decisions


def test_a_decision_is_judged_by_its_first_token() -> None:
    scene = Scene(D1)
    scene.served(scene.request(), after_s=1.98)
    assert scene.last["predicted"]["ttft_s"] == pytest.approx(0.99 + 0.05)
    assert scene.last["measured"]["ttft_s"] == pytest.approx(1.98 + 0.05)
    assert scene.last["ttft_error_ratio"] == pytest.approx(2.03 / 1.04, abs=1e-3)
    (outcome,) = scene.outcomes
    assert outcome.ttft_error_ratio == pytest.approx(2.03 / 1.04)


def test_a_decision_is_judged_by_its_pace_however_long_the_answer_became() -> None:
    scene = Scene(D1)
    running = scene.request()
    scene.plan(running)  # a step of one row takes 0.05 s
    scene.prompt(running)
    scene.answer(running, 10, token_s=0.1)
    (outcome,) = scene.outcomes
    assert outcome.tpot_error_ratio == pytest.approx(2.0)
    assert scene.last["tpot_error_ratio"] == pytest.approx(2.0)
    one_token = scene.request()
    scene.served(one_token, tokens=1)
    assert scene.outcomes[-1].tpot_error_ratio is None


def test_a_request_without_a_token_is_no_measurement() -> None:
    scene = Scene(D1)
    running = scene.request()
    scene.plan(running)
    running.session.on(Event.CLIENT_GONE)
    scene.planner.over(running)
    assert scene.outcomes == []
    assert scene.last["measured"] == {"ttft_s": None, "completion_s": None}


def test_a_plan_after_the_first_token_is_not_judged_by_it() -> None:
    scene = Scene(D1, D2)
    running = scene.request()
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 5, is_whole=False)
    scene.now_s += 1.0
    scene.fail(running)
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 2)
    assert scene.outcomes == []


def test_the_last_decisions_are_kept_newest_first_and_can_be_sent() -> None:
    scene = Scene(D1)
    for _ in range(DECISIONS_KEPT + 5):
        scene.served(scene.request(), tokens=1)
    decisions = scene.planner.decisions()
    assert len(decisions) == DECISIONS_KEPT
    assert decisions[0]["request_id"] == f"r{DECISIONS_KEPT + 5}"
    assert decisions[0]["ago_s"] < decisions[-1]["ago_s"]
    assert msgspec.json.decode(msgspec.json.encode(decisions)) == decisions


def test_help_from_the_other_pool_is_an_event() -> None:
    scene = Scene(node("p1", "prefill", slots=2), node("d1", "decode", slots=1))
    scene.plan(scene.request())
    assert scene.plan(scene.request()).decode.worker == "p1"
    (event,) = scene.planner.pool_events
    assert (event.kind, event.worker, event.to) == ("spill", "p1", "token")
    assert scene.last["spills"] == ["p1"]
    assert scene.planner.pool_of(P1) == "prompt"


def test_an_answer_goes_on_in_the_class_that_made_its_tokens_not_in_that_of_a_worker_that_made_none() -> None:
    first, other = (
        node("d-first", "decode", exactness_class="x" * 64),
        node("d-other", "decode", exactness_class="y" * 64),
    )
    scene = Scene(first)
    running = scene.request()
    scene.plan(running)
    scene.prompt(running)
    scene.answer(running, 5, is_whole=False)
    for left in (other, None):
        scene.planner.failed(running)
        running.session.on(Event.WORKER_LOST)
        if left is not None:
            scene.see(left)
            assert scene.plan(running).decode.worker == "d-other", "nobody else is there"
    same = node("d-first-2", "decode", exactness_class="x" * 64)
    another = node("a-other-2", "decode", exactness_class="y" * 64)
    scene.see(another, same)
    assert scene.plan(running).decode.worker == "d-first-2"


# -- what is written down


def test_every_decision_is_logged_once_whatever_becomes_of_it() -> None:
    scene = Scene(P1, D1, D2)
    sent, replanned, refused = (scene.request(range(start, start + 100)) for start in (0, 100, 200))
    with capture_logs() as logs:
        for running in (sent, replanned, refused):
            scene.plan(running)
        assert not logs, "workers wait for plans, not for the log"
        scene.planner.write_down(sent.job.request_id)
        scene.planner.write_down(sent.job.request_id)
        scene.fail(replanned)
        scene.plan(replanned)
        for running in (sent, replanned, refused):
            scene.planner.over(running)
    told = [entry for entry in logs if entry["event"] == "planned"]
    expected = [one.job.request_id for one in (sent, replanned, replanned, refused)]
    assert [entry["request_id"] for entry in told] == expected
    assert all(entry["predicted"]["ttft_s"] > 0 and entry["mode"] in ("split", "local") for entry in told)


# -- ways


def test_a_prefill_worker_that_a_decode_worker_heard_nothing_from_is_not_planned_with_for_it() -> None:
    slow = node("d1", "decode", load={"rates": Rates(run_s=0.04, row_s=0.01, token_s=0.1)})
    scene = Scene(P1, P2, slow)
    assert scene.served(scene.request(), troubled=["p1"]).reader.worker == "p1"
    assert scene.plan(scene.request(range(500, 600))).reader.worker == "p2"
    scene.now_s += APART_S
    assert scene.plan(scene.request(range(700, 800))).reader.worker == "p1", "p2 is busy, and it may work again"
