"""A gateway with several models: whose nodes change sides for whom, through the planner that the gateway runs."""

from __future__ import annotations

import msgspec

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.session import Session
from edge_llm.gateway.situation import Mode
from edge_llm.request import SamplingParams
from edge_llm.worker.messages import Rates, Role
from tests.nodes import load_of, node_of

RATES = Rates(run_s=0.04, row_s=0.01, token_s=0.010, prompt_steps=1.5)


def node(worker: str, role: Role, model: str) -> Node:
    slots = 0 if role == "prefill" else 8
    return node_of(worker, role, model=model, slots=slots, serves_prompts=True, n_ctx=4096, load=load_of(rates=RATES))


A_PREFILL = (node("a-p1", "prefill", "a"), node("a-p2", "prefill", "a"))
A_DECODE = (node("a-d1", "decode", "a"), node("a-d2", "decode", "a"))
B_PREFILL, B_DECODE = node("b-p1", "prefill", "b"), node("b-d1", "decode", "b")


class Scene:
    """A planner, its workers, and prompts that are being read."""

    def __init__(self, *nodes: Node) -> None:
        self.now_s = 100.0
        self.planner = Planner(clock=lambda: self.now_s)
        self.view = ClusterView(nodes)
        self.requests = 0

    def asks(self, model: str, mode: Mode = "split") -> Running:
        """Its prompt is planned and is read until the test says that it is over."""
        self.requests += 1
        name = f"r{self.requests}"
        ids = tuple(range(100 * self.requests, 100 * self.requests + 99))
        job = Job(name, model, ids, 20, SamplingParams(), (), (), mode, cache_prompt=False)
        running = Running(job, Session(name), self.now_s, self.now_s)
        running.plan = self.planner.plan(running, self.view)
        return running

    def streams(self, model: str, count: int) -> None:
        """So many answers of the model go on, spread over its decode workers."""
        for _ in range(count):
            self.planner.prompted(self.asks(model, "local"))

    def passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            self.planner.on_view(self.view)

    @property
    def moves(self) -> list[tuple[str, str, str]]:
        """In order."""
        events = [event for event in reversed(self.planner.pool_events) if event.kind != "spill"]
        return [(event.kind, event.worker, event.to) for event in events]


def saturated(*nodes: Node) -> Scene:
    """All of model a is in use: its prefill workers read a prompt each, its decode workers have a stream each."""
    scene = Scene(*nodes)
    mine = [one for one in nodes if one.status.model == "a"]
    scene.streams("a", sum(one.status.role == "decode" for one in mine))
    readers = [one.worker for one in mine if one.status.role == "prefill"]
    plans = [scene.asks("a").plan for _ in readers]
    assert sorted(plan.reader.worker for plan in plans if plan is not None) == readers
    return scene


def test_a_shortage_is_helped_by_a_node_of_its_own_model() -> None:
    scene = saturated(*A_PREFILL, *A_DECODE, B_DECODE)
    scene.passes(60)
    assert scene.moves == [("repurpose", "a-d1", "prompt")], "b's node is idler, and cannot help"
    assert scene.planner.pool_of(B_DECODE) == "token"


def test_the_only_decode_node_of_a_model_stays_though_another_models_prompts_wait() -> None:
    scene = saturated(*A_PREFILL, A_DECODE[0], B_DECODE)
    scene.passes(60)
    assert scene.moves == []
    running = scene.asks("b", "local")
    assert running.plan is not None
    assert running.plan.spills == (), "it is at home for its own model's answers"


def test_an_idle_prefill_worker_of_another_model_hides_no_shortage() -> None:
    scene = saturated(A_PREFILL[0], *A_DECODE, B_PREFILL, B_DECODE)
    scene.passes(60)
    assert scene.moves == [("repurpose", "a-d1", "prompt")]


def test_a_prompt_at_a_decode_worker_counts_while_the_prefill_workers_of_its_own_model_are_busy() -> None:
    scene = Scene(A_PREFILL[0], *A_DECODE, B_PREFILL, B_DECODE)
    for _ in range(20):
        # half of the time a prompt at the prefill worker, and one more that it has no room for
        readings = [scene.asks("a", "split"), scene.asks("a", "local")]
        scene.passes(1)
        for running in readings:
            scene.planner.over(running)
        scene.passes(1)
    ((kind, worker, to),) = scene.moves
    assert (kind, worker[0], to) == ("repurpose", "a", "prompt")


def test_a_lent_node_does_not_go_home_for_what_another_model_has_to_do() -> None:
    scene = saturated(*A_PREFILL, *A_DECODE, B_PREFILL, B_DECODE)
    scene.passes(60)
    lent = scene.moves
    scene.streams("b", 8)
    scene.passes(90)
    assert scene.moves == lent == [("repurpose", "a-d1", "prompt")], "b's slots are taken, a's are free"


def test_two_models_are_helped_in_the_same_second_and_told_in_one_list() -> None:
    scene = Scene(*A_PREFILL, *A_DECODE, B_PREFILL, B_DECODE, node("b-d2", "decode", "b"))
    for model in ("a", "a", "b"):
        scene.asks(model)
    scene.passes(60)
    assert scene.moves == [("repurpose", "a-d1", "prompt"), ("repurpose", "b-d1", "prompt")]
    told = msgspec.json.decode(msgspec.json.encode(scene.planner.pool_events))
    assert [event["model"] for event in told] == ["b", "a"], "the newest first, as in GET /cluster"
    assert told[0]["at_s"] == told[1]["at_s"]


def test_a_lent_node_that_was_given_another_model_stands_where_its_role_says() -> None:
    scene = saturated(*A_PREFILL, *A_DECODE, B_DECODE)
    scene.passes(60)
    (_, worker, _) = scene.moves[0]
    now_of_b = node(worker, "decode", "b")
    scene.view = scene.view.with_node(now_of_b)
    assert scene.planner.pool_of(now_of_b) == "token", "before anybody looks"
    scene.passes(1)
    assert scene.planner.pool_of(now_of_b) == "token"
