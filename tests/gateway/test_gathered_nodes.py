"""Mixed nodes that come to an arrangement, through the planner that the gateway runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pytest
from msgspec import structs

from edge_llm.cluster.cost import Work
from edge_llm.cluster.slo import Slo
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.config import PolicyName
from edge_llm.errors import RemoteProtocolError
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.policies import policy_of
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Event, Session
from edge_llm.gateway.situation import Mode, Situation, Wish, standing_by
from edge_llm.request import SamplingParams
from edge_llm.worker.messages import Role, WorkerStatus, decode, encode
from tests.nodes import PACED, load_of, node_of

BY_MEMORY: Final = structs.replace(PACED, run_s=0.030, row_s=0.003, token_s=0.004)
CHAT: Final = Slo(3.0, 0.066)
KEEPS: Final = 4 << 30


def mixed(worker: str, role: Role = "mixed", **changes: Any) -> Node:
    load = load_of(rates=BY_MEMORY, prefix_limit_bytes=KEEPS)
    return node_of(worker, role, **{"load": load, "n_ctx": 4096, "slots": 8, "chunk_tokens": 128, **changes})


class Scene:
    """A planner and its workers, with traffic that asks for a pace."""

    def __init__(self, *nodes: Node, policy: PolicyName = "predicted") -> None:
        self.now_s, self.requests = 100.0, 0
        self.planner = Planner(policy_of(policy, 0), clock=lambda: self.now_s)
        self.see(*nodes)

    def see(self, *nodes: Node) -> None:
        self.view = ClusterView(nodes)
        self.planner.on_view(self.view)

    def asked(self, ids: Sequence[int] | None = None, mode: Mode = "auto", slo: Slo = CHAT) -> Running:
        self.requests += 1
        name = f"r{self.requests}"
        prompt = tuple(ids) if ids is not None else tuple(range(1000 * self.requests, 1000 * self.requests + 250))
        job = Job(name, "m", prompt, 60, SamplingParams(), (), (), mode, slo=slo)
        running = Running(job, Session(name), self.now_s, self.now_s)
        running.plan = self.planner.plan(running, self.view)
        running.session.on(Event.PLANNED)
        return running

    def streams(self, running: Running) -> Running:
        """Its prompt is read."""
        running.session.on(Event.PROMPTED)
        self.planner.prompted(running)
        return running

    def ends(self, running: Running) -> None:
        running.session.delivered.extend([7] * 60)
        running.first_token_s = running.last_token_s = self.now_s
        running.session.on(Event.FINISHED)
        running.session.finish_reason = "length"
        self.planner.over(running)

    def busy(self, seconds: int = 40, **asks: Any) -> None:
        """One request a second, each done in it."""
        for _ in range(seconds):
            self.ends(self.streams(self.asked(**asks)))
            self.now_s += 1.0
            self.planner.on_view(self.view)

    def pools(self) -> dict[str, str]:
        return {node.worker: self.planner.pool_of(node) for node in self.view.nodes}

    @property
    def moves(self) -> list[tuple[str, str]]:
        """In order."""
        return [(event.kind, event.worker) for event in reversed(self.planner.pool_events) if event.kind != "spill"]


def arranged(*nodes: Node) -> Scene:
    scene = Scene(*nodes)
    scene.busy()
    return scene


PAIR: Final = (mixed("a"), mixed("b"))


def plan_of(running: Running) -> Plan:
    assert running.plan is not None
    return running.plan


def test_under_requests_with_a_pace_streams_are_gathered_and_the_move_is_told() -> None:
    scene = arranged(*PAIR)
    assert scene.pools() == {"a": "mixed", "b": "prompt"}
    assert scene.moves == [("repurpose", "b")]
    event = scene.planner.pool_events[0]
    assert (event.born, event.to) == ("mixed", "prompt")
    assert "gathered on 1" in event.why
    plan = plan_of(scene.asked())
    assert plan.decode.worker == "a"


@pytest.mark.parametrize("asks", [{"slo": Slo()}, {"mode": "local"}], ids=["no limits", "never split"])
def test_other_requests_arrange_nothing(asks: dict[str, Any]) -> None:
    scene = Scene(*PAIR)
    scene.busy(**asks)
    assert scene.moves == []


def test_a_policy_that_predicts_nothing_is_not_helped() -> None:
    scene = Scene(*PAIR, policy="round_robin")
    scene.busy()
    assert scene.moves == []


def test_requests_that_never_split_go_to_all_nodes_all_the_same() -> None:
    scene = arranged(*PAIR)
    for _ in range(3):
        scene.streams(scene.asked())
    assert plan_of(scene.asked(mode="local")).decode.worker == "b"


def test_a_crowded_home_takes_no_more_while_others_have_room() -> None:
    scene = arranged(mixed("a", slots=16), mixed("b", slots=16))
    decodes = [plan_of(scene.streams(scene.asked())).decode.worker for _ in range(14)]
    assert decodes[0] == "a"
    assert "b" in decodes, "streams on a would lose their pace"


def test_a_conversation_goes_on_where_its_kv_is() -> None:
    scene = Scene(*(mixed(worker, kv_bytes_per_token=512 << 10) for worker in "ab"))
    for _ in range(2):
        first = scene.streams(scene.asked(range(2000), slo=Slo()))
        if plan_of(first).decode.worker == "b":
            break
    scene.ends(first)
    scene.busy()
    assert scene.pools()["b"] == "prompt"
    turn = scene.asked([*range(2000), *[7] * 60, *range(5000, 5050)])
    assert (plan_of(turn).decode.worker, plan_of(turn).mode) == ("b", "local"), "the beginning is there"


def test_a_home_that_dies_leaves_its_answers_to_everybody_at_once() -> None:
    scene = arranged(*PAIR, mixed("c"))
    homes = {worker for worker, pool in scene.pools().items() if pool == "mixed"}
    scene.see(*(node for node in scene.view.nodes if node.worker not in homes))
    assert set(scene.pools().values()) == {"mixed"}
    assert {kind for kind, _ in scene.moves} == {"repurpose", "return"}


@pytest.mark.parametrize(
    ("work", "is_home"),
    [
        (Work(), True),
        (Work(sequences=7, decoding=3), True),
        (Work(sequences=4, decoding=4), False),
        (Work(sequences=8), False),
    ],
    ids=["idle", "prompts wait for it", "as many streams as it has room for", "many were left by a node that died"],
)
def test_a_home_has_room_for_so_many(work: Work, is_home: bool) -> None:
    home, other = PAIR
    situation = Situation(
        works={"a": work}, pool_of=lambda node: "mixed" if node is home else "prompt", stream_room={"a": 3.9}
    )
    wish = Wish("m", prompt_tokens=100, max_tokens=10)
    assert standing_by([home, other], wish, situation) == ([home] if is_home else [home, other])


def test_groups_of_one_size_are_not_told_apart_by_who_answered_last() -> None:
    of_a, of_b = [mixed(f"a{at}", exactness_class="a" * 64) for at in (1, 2)], [mixed(f"b{at}") for at in (1, 2)]
    scene = Scene(*of_a, *of_b)
    scene.busy()
    moves = list(scene.moves)
    assert len(moves) == 1
    for node in [*of_a, *of_b] * 5:
        scene.view = scene.view.with_node(node)
        scene.busy(1)
    assert scene.moves == moves


def test_streams_that_never_split_are_not_taken_for_those_of_another_gateway() -> None:
    scene = Scene(*PAIR)
    for _ in range(6):
        scene.streams(scene.asked(mode="local", slo=Slo()))
    for _ in range(40):
        scene.ends(scene.streams(scene.asked()))
        scene.now_s += 4.0
        scene.planner.on_view(scene.view)
    assert scene.moves == [], "a request in four seconds is little"


def test_a_node_that_joins_while_streams_are_gathered_reads_prompts_and_it_is_told() -> None:
    scene = arranged(*PAIR)
    scene.now_s += 1.0
    scene.see(*PAIR, mixed("c"))
    assert scene.pools()["c"] == "prompt"
    assert scene.moves[-1] == ("repurpose", "c")


def test_an_operator_who_gives_out_roles_ends_it() -> None:
    scene = arranged(*PAIR)
    scene.now_s += 1.0
    scene.see(mixed("a", "prefill"), mixed("b", "decode"))
    assert scene.pools() == {"a": "prompt", "b": "token"}
    scene.now_s += 1.0
    scene.see(*PAIR)
    assert scene.pools() == {"a": "mixed", "b": "mixed"}


def test_nodes_of_another_class_are_left_out() -> None:
    scene = arranged(*PAIR, mixed("other", exactness_class="c" * 64))
    assert scene.pools()["other"] == "mixed"
    assert scene.moves == [("repurpose", "b")]


def test_a_model_s_nodes_are_arranged_for_its_own_requests() -> None:
    scene = Scene(*PAIR, mixed("x", model="other"), mixed("y", model="other"))
    scene.busy()
    assert scene.moves == [("repurpose", "b")]


def test_what_workers_cannot_be_is_refused_at_the_door() -> None:
    status = structs.replace(PAIR[0].status, chunk_tokens=0)
    with pytest.raises(RemoteProtocolError):
        decode(WorkerStatus, encode(status))
