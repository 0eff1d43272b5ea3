"""`bench cluster` against gateways over real sockets: what is asked, what is kept, what goes on after a failure."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from edge_llm.bench.accuracy.measure import Child
from edge_llm.bench.accuracy.measure import Plan as AccuracyPlan
from edge_llm.bench.accuracy.tasks import TASKS
from edge_llm.bench.cluster_runs import Children, Counted, Found, Placement, Plan, Subject, facts_of, measure, rates_of
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.layout import LocalProcess, Started
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import ModelFacts, Process, load, write
from edge_llm.bench.run import Run
from edge_llm.bench.serve.lengths import Lengths
from edge_llm.errors import WorkerError

PLAN = Plan(requests=3, prompt=Lengths("fixed", 20), answer=Lengths("fixed", 5), timeout_s=20.0)
HEAD = 'model_name="one",role="mixed",worker="w"'


@dataclass(slots=True)
class Gateway:
    """One gateway and a worker behind it, on one port. A request takes half a second of prompt, by its own account."""

    sha256: str = "sha-one"
    fails_after: int = 1 << 30
    interrupts_at: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: dict[str, list[str | None]] = field(default_factory=dict)
    url: str = ""

    @property
    def counted(self) -> list[dict[str, Any]]:
        """Without first looks and the warm-up."""
        return [body for body in self.bodies if body["max_tokens"] == 5][1:]

    def _heard(self, request: web.Request) -> None:
        self.keys.setdefault(request.path, []).append(request.headers.get("authorization"))

    async def models(self, request: web.Request) -> web.Response:
        self._heard(request)
        meta = {"n_ctx": 256, "vocab_size": 5000, "sha256": self.sha256}
        return web.json_response({"data": [{"id": "one", "meta": meta}]})

    async def metrics(self, request: web.Request) -> web.Response:
        self._heard(request)
        count = len(self.bodies)
        lines = [f"edge_llm_prompt_tokens_total{{{HEAD}}} {20 * count}"]
        lines += [f"edge_llm_prompt_seconds_total{{{HEAD}}} {0.5 * count}"]
        lines += [f"edge_llm_generation_tokens_total{{{HEAD}}} {5 * count}"]
        lines += [f"edge_llm_decode_seconds_total{{{HEAD}}} {0.25 * count}"]
        lines += ['edge_llm_node_cpu_usage_ratio{node="w"} 0.4', 'edge_llm_node_memory_usage_ratio{node="w"} 0.3']
        lines += ["edge_llm_node_memory_used_bytes 3000", "edge_llm_worker_anonymous_bytes 400"]
        lines += ["process_resident_memory_bytes 1000", 'edge_llm_node_temperature_celsius{node="w"} 61.5']
        return web.Response(text="\n".join(lines))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self._heard(request)
        body = await request.json()
        self.bodies.append(body)
        if self.counted and len(self.counted) == self.interrupts_at:
            os.kill(os.getpid(), signal.SIGINT)
        if len(self.counted) > self.fails_after:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for _ in range(body["max_tokens"]):
            await reply.write(b'data: {"choices": [{"text": "a"}]}\n\n')
            await asyncio.sleep(0.002)
        own = {"mode": body["edge_llm"]["mode"], "prefill_node": "w", "decode_node": "w", "queue_ms": 1.0}
        own |= {"wait_ms": 100.0, "prefill_ms": 400.0, "handoff_ms": 0.0, "first_decode_ms": 5.0}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        last = {"choices": [], "usage": usage, "timings": {"edge_llm": own}}
        await reply.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
        return reply

    @asynccontextmanager
    async def running(self, *workers: str) -> AsyncIterator[Started]:
        """With workers of these names, whose process is this one."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield Started(self.url, tuple(LocalProcess(name, os.getpid(), (), port, 1.5) for name in workers))
        finally:
            await runner.cleanup()


@asynccontextmanager
async def broken() -> AsyncIterator[Started]:
    raise WorkerError("decode-1 was not ready within 300 s")
    yield Started("", ())


class Scripted:
    """A child that draws in a millisecond, prefers first choices, and fails where `fails` is in what is asked."""

    def __init__(self, fails: str = "") -> None:
        self.facts: dict[str, Any] = {"vocab_size": 50, "build": {"llama_cpp_python": "0"}}
        self.asked: list[str] = []
        self.pid, self._fails = os.getpid(), fails

    def usage(self) -> Process | None:
        return Process("scripted", (), 1.0, 1.0, 0, 0, 0)

    def ask(self, operation: str, deadline_s: float = 600.0, **arguments: Any) -> dict[str, Any]:
        self.asked.append(operation)
        if self._fails and self._fails in str(arguments):
            raise MeasureFailed("it does not fit")
        if operation == "sampler":
            return {"greedy_s": 0.001, "full_s": 0.01}
        if operation == "text":
            return {"tokens": 600, "ids_sha256": "ids"}
        if operation == "window":
            return {"nll": 3.0, "nll_squares": 9.0, "count": 1}
        scores = [{"logprob": -1.0 - at, "tokens": 1, "is_greedy": True} for at in range(len(arguments["pairs"]))]
        return {"scores": scores}


class Starting:
    """Starts scripted children; a model named in `refuses` cannot be loaded."""

    def __init__(self, child: Scripted, *refuses: str) -> None:
        self.child, self.refuses = child, refuses
        self.started: list[str] = []

    @contextmanager
    def _running(self, name: str) -> Iterator[Child]:
        self.started.append(name)
        if name in self.refuses:
            raise MeasureFailed(f"engine {name} ended without an answer: no such tensor")
        yield self.child

    def __call__(self, wanted: BenchModel) -> AbstractContextManager[Child]:
        return self._running(wanted.facts.name)


def a_file(name: str = "one", sha256: str = "sha-one") -> BenchModel:
    return BenchModel(Path(f"{name}.gguf"), ModelFacts(name, f"{name}.gguf", sha256, 1 << 20, "Q4_0"))


def here(gateway: Gateway, name: str = "mixed", mode: str = "local", *workers: str) -> Placement:
    return Placement(name, mode, partial(gateway.running, *(workers or ("mixed-1", "gateway"))))


def go(
    *subjects: Subject,
    plan: Plan = PLAN,
    engine: Starting | None = None,
    scorer: Starting | None = None,
    folder: Path | None = None,
    progress: Any = lambda _what, _done, _total: None,
) -> Found:
    found = Found(Run("cluster", ["test"], {}, folder=folder, idle_s=0.0))
    children = Children(engine or Starting(Scripted()), scorer or Starting(Scripted()), Path("unused"))
    measure(plan, subjects, children, found, progress)
    return found


def test_every_placement_of_a_model_gets_the_same_requests_and_a_row() -> None:
    one, other = Gateway(), Gateway()
    placements = (here(one), here(other, "split", "split", "prefill-1", "decode-1", "gateway"))
    found = go(Subject("one", placements, a_file()))
    rows = found.figures().rows
    assert [(row.model, row.placement, row.completed, row.requests) for row in rows] == [
        ("one", "mixed", 3, 3),
        ("one", "split", 3, 3),
    ]
    assert [body["prompt"] for body in one.counted] == [body["prompt"] for body in other.counted]
    assert len({str(body["prompt"]) for body in one.counted}) == 3
    assert {body["edge_llm"]["mode"] for body in one.counted} == {"local"}
    assert {body["edge_llm"]["mode"] for body in other.counted} == {"split"}
    assert all(body["cache_prompt"] is False and body["ignore_eos"] for body in one.counted + other.counted)
    assert rows[1].roles == "prefill-1, decode-1"
    assert not found.run.failures


def test_a_row_has_the_phases_own_seconds_loads_of_the_board_and_what_sampling_takes() -> None:
    (row,) = go(Subject("one", (here(Gateway()),), a_file())).figures().rows
    assert row.prompt_tokens_per_s == pytest.approx(20 / 0.5)
    engine = (row.engine_prompt_tokens_per_s, row.engine_generation_tokens_per_s)
    assert list(engine) == pytest.approx([40.0, 20.0])
    assert [row.sampling_tokens_per_s, row.sampling_full_tokens_per_s] == pytest.approx([1000.0, 100.0])
    assert row.load_s == 1.5
    assert row.node == "local"
    assert row.ram_share is not None
    assert row.peak_rss_bytes is not None
    assert row.above_idle_peak_rss_bytes is not None
    assert set(row.workers) == {"mixed-1", "gateway"}
    assert row.file_bytes == 1 << 20


def test_a_line_for_each_request_and_row_is_kept_and_the_record_can_be_read(tmp_path: Path) -> None:
    found = go(Subject("one", (here(Gateway()),), a_file()), folder=tmp_path)
    path = write(found.run.record({}, is_complete=True), tmp_path)
    record = load(path)
    assert record.cases is not None
    assert record.cases.file is not None
    lines = [json.loads(line) for line in (tmp_path / record.cases.file).read_text().splitlines()]
    requests = [line for line in lines if line["case"] == "one, mixed"]
    assert [line["answer_tokens"] for line in requests] == [5, 5, 5]
    assert all(len(line["arrivals_s"]) == 5 and line["own"]["prefill_ms"] == 400.0 for line in requests)
    assert [line["case"] for line in lines if "claim" in line] == ["one, mixed: row"]
    assert len(record.samples["one, mixed: ttft_s"]) == 3
    assert [watched.part for watched in record.resources] == ["idle", "one, mixed"]
    assert [model.name for model in record.models] == ["one"]
    assert {process.name for process in record.processes} == {"one, mixed: mixed-1", "one, mixed: gateway"}


def test_a_model_that_cannot_be_loaded_is_one_failure_and_the_others_go_on() -> None:
    subjects = (
        Subject("bad", (here(Gateway()), here(Gateway(), "split")), a_file("bad", "sha-bad")),
        Subject("one", (here(Gateway()),), a_file()),
    )
    found = go(*subjects, engine=Starting(Scripted(), "bad"))
    assert [(failure.what, "no such tensor" in failure.why) for failure in found.run.failures] == [("bad", True)]
    assert [row.model for row in found.figures().rows] == ["one"]


def test_a_cluster_that_cannot_start_is_a_failure_and_the_next_placement_is_measured() -> None:
    found = go(Subject("one", (Placement("split", "split", broken), here(Gateway())), a_file()))
    assert [failure.what for failure in found.run.failures] == ["one, split"]
    assert "not ready" in found.run.failures[0].why
    assert [row.placement for row in found.figures().rows] == ["mixed"]


def test_a_placement_that_answers_nothing_has_no_row_and_says_why() -> None:
    full = Gateway(fails_after=0)
    found = go(Subject("one", (here(full), here(Gateway(), "local")), a_file()))
    (failure,) = found.run.failures
    assert failure.what == "one, mixed"
    assert "none of 3 requests was answered: HTTP 503" in failure.why
    assert "no room" in failure.why
    assert [row.placement for row in found.figures().rows] == ["local"]
    assert sum(line["case"] == "one, mixed" for line in found.run.cases) == 3


def test_requests_that_fail_are_counted_in_their_row() -> None:
    (row,) = go(Subject("one", (here(Gateway(fails_after=2)),), a_file())).figures().rows
    assert (row.completed, row.requests, row.failed) == (2, 3, {"http_503": 1})


def test_accuracy_is_measured_once_for_all_placements_of_a_file() -> None:
    tasks = (TASKS["own_choice"], TASKS["own_prose"])
    plan = replace(PLAN, accuracy=AccuracyPlan(tasks, limit=4, windows=1))
    scorer = Starting(Scripted())
    found = go(Subject("one", (here(Gateway()), here(Gateway(), "local")), a_file()), plan=plan, scorer=scorer)
    figures = found.figures()
    assert scorer.started == ["one"]
    assert {row.intervals["accuracy"].n for row in figures.rows} == {4}
    assert [row.perplexity for row in figures.rows] == [pytest.approx(20.0855, abs=1e-3)] * 2
    assert all(row.chance is not None and row.differs_from_chance is not None for row in figures.rows)
    assert figures.models["one"]["own_choice"]["n"] == 4
    assert any("own_choice, own_prose: small sets of our own" in line for line in figures.sentences)
    assert [model.name for model in found.run.models] == ["one"]


def test_items_that_fail_are_counted_and_make_a_failure_of_the_run() -> None:
    plan = replace(PLAN, accuracy=AccuracyPlan((TASKS["own_choice"],), limit=0))
    scorer = Starting(Scripted(fails="penguin"))
    found = go(Subject("one", (here(Gateway()),), a_file()), plan=plan, scorer=scorer)
    assert found.figures().models["one"]["own_choice"]["failed"] >= 1
    assert found.run.failures[0].what == "own_choice of one"
    assert "it does not fit" in found.run.failures[0].why


def test_a_model_without_a_measured_placement_is_not_scored() -> None:
    plan = replace(PLAN, accuracy=AccuracyPlan((TASKS["own_choice"],), limit=1))
    scorer = Starting(Scripted())
    go(Subject("one", (Placement("split", "split", broken),), a_file()), plan=plan, scorer=scorer)
    assert scorer.started == []


def test_boards_elsewhere_are_read_at_their_metrics_and_see_no_key_of_the_gateway() -> None:
    gateway, node = Gateway(), Gateway()

    @asynccontextmanager
    async def both() -> AsyncIterator[Started]:
        async with gateway.running() as started:
            yield started

    async def measured() -> Found:
        async with node.running():
            nodes = {"w": f"{node.url}/metrics"}
            placement = Placement("auto", "auto", both, nodes, {"authorization": "Bearer secret"})
            subject = Subject("elsewhere", (placement,), is_here=False)
            return await asyncio.to_thread(partial(go, subject))

    found = asyncio.run(measured())
    (row,) = found.figures().rows
    assert (row.model, row.node, row.roles) == ("one", "w", "prefill, decode")
    assert (row.cpu_share, row.ram_share, row.temperature_c) == (0.4, 0.3, 61.5)
    assert (row.peak_rss_bytes, row.load_s, row.sampling_tokens_per_s) == (1000, None, None)
    assert row.mapped_share == pytest.approx(0.06)
    assert row.claim.words.startswith("has no verdict (1 sample of CPU"), "its requests took a moment"
    assert set(gateway.keys["/v1/completions"]) == {"Bearer secret"}
    assert set(node.keys["/metrics"]) == {None}
    assert not found.run.failures


def test_a_server_with_another_file_of_that_name_is_no_measurement_of_this_one() -> None:
    found = go(Subject("one", (here(Gateway(sha256="sha-else")),), a_file()))
    assert not found.figures().rows
    assert "serves another file" in found.run.failures[0].why


def test_what_is_interrupted_keeps_the_rows_that_are_finished() -> None:
    def interrupt(what: str, _done: int, _total: int) -> None:
        if what == "one, split: 0 of 3":
            raise KeyboardInterrupt

    found = Found(Run("cluster", ["test"], {}, idle_s=0.0))
    children = Children(Starting(Scripted()), Starting(Scripted()), Path("unused"))
    subject = Subject("one", (here(Gateway()), here(Gateway(), "split", "split")), a_file())
    with pytest.raises(KeyboardInterrupt):
        measure(PLAN, [subject], children, found, interrupt)
    assert [row.placement for row in found.figures().rows] == ["mixed"]


def test_a_row_that_is_interrupted_is_kept_as_far_as_it_came() -> None:
    found = Found(Run("cluster", ["test"], {}, idle_s=0.0))
    children = Children(Starting(Scripted()), Starting(Scripted()), Path("unused"))
    subject = Subject("one", (here(Gateway(interrupts_at=3)),), a_file())
    with pytest.raises(KeyboardInterrupt):
        measure(replace(PLAN, requests=300), [subject], children, found, lambda _what, _done, _total: None)
    (row,) = found.figures().rows
    assert row.planned == 300
    assert row.completed == row.requests
    assert 2 <= row.completed < 300
    assert not row.failed, "the request that was under way is nobody's failure"
    assert len(found.run.samples["one, mixed: ttft_s"]) == row.completed
    assert [line["planned"] for line in found.run.cases if "claim" in line] == [300]


def test_progress_counts_requests_every_few_seconds() -> None:
    now_s, said = iter([0.0, 1.0, 5.5, 6.0, 7.0]), list[str]()
    say = Counted("one, mixed", 4, lambda what, _done, _total: said.append(what), lambda: next(now_s))
    for done in range(5):
        say(done)
    assert said == ["one, mixed: 0 of 4", "one, mixed: 2 of 4", "one, mixed: 4 of 4"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"prompt": (1.0, 1.0), "generation": (1.0, 1.0)}),
        ({"prompt": (1.0, 1.0), "generation": (1.0, 1.0)}, None),
        ({"prompt": (9.0, 9.0), "generation": (1.0, 1.0)}, {"prompt": (1.0, 1.0), "generation": (1.0, 1.0)}),
    ],
)
def test_counters_that_are_missing_or_began_again_give_no_rate(
    before: Mapping[str, tuple[float, float]] | None, after: Mapping[str, tuple[float, float]] | None
) -> None:
    assert rates_of(before, after) == {}


def test_a_record_says_what_was_asked() -> None:
    facts = facts_of(PLAN, [Subject("one", (here(Gateway()), here(Gateway(), "split")), a_file())])
    assert facts["placements"] == ["mixed", "split"]
    assert (facts["requests"], facts["prompt_tokens"], facts["answer_tokens"]) == (3, "20", "5")
