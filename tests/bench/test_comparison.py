"""Four arrangements get the same requests at the same times; what is said of them follows from what came back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_llm.bench.comparison import Plan, fitted, fitting_seconds, measure, seconds_of_the_rest, workload
from edge_llm.bench.contestants import AUTO, BASELINE, LOCAL, SERVER, SPLIT, UNSPLIT, Servers
from edge_llm.bench.goodput import REGIMES, STRICT_TPOT, STRICT_TTFT, Unloaded
from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.replayed import Replayed, Tally, Workload
from edge_llm.bench.run import Run
from edge_llm.bench.schemas import GoodputFigures
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.traces import Row, Trace
from edge_llm.bench.verdicts import figures, missed
from edge_llm.errors import WorkerError
from tests.published import reads_back

# The answer to a request alone, which is longer than those of the trace, takes this before each event: limits are
# multiples of it, so whatever a busy machine adds to the others stays within them.
ALONE_S, LONGEST_ANSWER = 0.25, 12
TRACE = Trace("made_up", tuple(Row(number, number * 0.5, 40 + number, LONGEST_ANSWER) for number in range(40)))
PLAN = Plan(
    seconds_per_point=0.2, budget_s=600.0, vocab_size=1000, n_ctx=256, scale=0.5, rate_shares=(0.5, 1.0), passes=2
)


class Cluster:
    """Servers that answer at once and remember what they were asked, by the name of their layout."""

    def __init__(self, broken: str = "", fails: str = "") -> None:
        self.bodies: dict[str, list[dict[str, Any]]] = {}
        self._broken, self._fails = broken, fails

    def fails(self, name: str, _body: dict[str, Any]) -> bool:
        return name == self._fails

    def launch(self, layout: Layout) -> AbstractAsyncContextManager[Started]:
        if layout.name == self._broken:
            raise WorkerError(f"{layout.name} could not start: no memory")
        return self._running(layout.name)

    @asynccontextmanager
    async def _running(self, name: str) -> AsyncIterator[Started]:
        async def answer(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            asked = body["edge_llm"]["mode"] if name == UNSPLIT else name
            self.bodies.setdefault(asked, []).append(body)
            if self.fails(asked, body):
                return web.json_response({"error": {"message": "overloaded"}}, status=503)
            return await _stream(request, body)

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        async with TestServer(app) as server:
            yield Started(str(server.make_url("")), ())


async def _stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    own = {"mode": body["edge_llm"]["mode"].replace("auto", "split")} if "edge_llm" in body else None
    last = {"choices": [], "timings": {"predicted_n": body["max_tokens"], "edge_llm": own}}
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    for event in ({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, last):
        if body["max_tokens"] > LONGEST_ANSWER:
            await asyncio.sleep(ALONE_S)
        await reply.write(f"data: {json.dumps(event)}\n\n".encode())
    await reply.write(b"data: [DONE]\n\n")
    return reply


def say_nothing(_what: str, _done: int, _total: int) -> None:
    return


async def compared(cluster: Cluster, plan: Plan = PLAN, servers: Servers | None = None) -> tuple[Run, Tally]:
    run, tally = Run("goodput", ["test"], {}), Tally()
    await measure(plan, [workload(plan, TRACE)], cluster.launch, servers, run, tally, say_nothing)
    return run, tally


@pytest.mark.anyio
async def test_all_arrangements_get_the_same_requests_and_nobody_gets_a_prompt_twice() -> None:
    cluster = Cluster()
    servers = Servers({"its defaults": (cluster.launch, cluster.launch)})
    run, tally = await compared(cluster, servers=servers)
    assert run.failures == []
    assert {done.arrangement for done in tally.replays} == {SPLIT, LOCAL, AUTO, SERVER}
    sizes = {
        name: Counter((len(body["prompt"]), body["max_tokens"]) for body in bodies)
        for name, bodies in cluster.bodies.items()
    }
    twice = Counter({size: 2 * count for size, count in sizes[SERVER].items()})
    assert sizes[SPLIT] == sizes[LOCAL] == sizes[AUTO] == twice, "who is told the limits is asked under each of them"
    prompts = {name: [tuple(body["prompt"]) for body in bodies] for name, bodies in cluster.bodies.items()}
    for name in (SERVER, BASELINE):
        assert len(set(prompts[name])) == len(prompts[name]), "a prompt that came before would be found in a cache"
    assert not set(prompts[LOCAL]) & set(prompts[AUTO]), "which are the same servers"
    for mode in (SPLIT, LOCAL, AUTO):
        assert {body["edge_llm"]["mode"] for body in cluster.bodies[mode]} == {mode}
    assert all("edge_llm" not in body and body["ignore_eos"] for body in cluster.bodies[SERVER])


@pytest.mark.anyio
async def test_the_record_has_every_request_and_the_figures_every_arrangement() -> None:
    run, tally = await compared(Cluster())
    found = figures(tally)
    assert reads_back(found, GoodputFigures)
    trace = found["traces"]["made_up"]
    assert trace["clipping"]["requests"] == 40
    for regime in REGIMES:
        result = trace["regimes"][regime.name]
        assert list(result["arrangements"]) == [SPLIT, LOCAL, AUTO]
        assert result["auto_split_share"]["share"] == 1.0
        assert result["limits"] == {
            "ttft_s": pytest.approx(regime.ttft_scale * trace["unloaded"]["ttft_s"]),
            "tpot_s": pytest.approx(regime.tpot_scale * trace["unloaded"]["tpot_s"]),
        }
    for done in tally.replays:
        assert len(run.samples[f"{done.where}: at_s"]) == len(done.answers)
        assert len(run.samples[f"{done.where}: ttft_s"]) == sum(run.samples[f"{done.where}: is_answered"])
    assert found["answers_of_other_length"] == 0
    assert json.dumps(found)


@pytest.mark.anyio
async def test_an_arrangement_that_cannot_start_is_a_failure_and_leaves_the_others() -> None:
    run, tally = await compared(Cluster(broken=SPLIT))
    assert {failure.why for failure in run.failures} == {"split could not start: no memory"}
    found = figures(tally)
    rows = found["traces"]["made_up"]["regimes"][STRICT_TPOT.name]["arrangements"]
    assert list(rows) == [LOCAL, AUTO]
    assert any("not measured" in line for line in missed(found))


@pytest.mark.anyio
async def test_without_a_request_alone_there_are_no_limits_and_nothing_is_measured() -> None:
    run, tally = await compared(Cluster(fails=BASELINE))
    assert len(run.failures) == 1
    assert "overloaded" in run.failures[0].why
    assert tally.replays == []
    assert missed(figures(tally)) == ["nothing was measured"]


@pytest.mark.anyio
async def test_higher_rates_than_a_hopeless_one_are_left_out() -> None:
    run, tally = await compared(Cluster(fails=SPLIT), replace(PLAN, passes=1))
    rates = {name: {done.rate_per_s for done in tally.replays if done.arrangement == name} for name in (SPLIT, LOCAL)}
    assert rates[SPLIT] == {min(rates[LOCAL])}
    assert any("overloaded" in note for note in run.notes), "why they failed is said"


@pytest.mark.anyio
async def test_flags_of_the_other_server_are_tried_and_the_best_are_used() -> None:
    bad, good = Cluster(fails=SERVER), Cluster()
    servers = Servers({"its defaults": (bad.launch, bad.launch), "others": (good.launch, good.launch)})
    run, tally = await compared(good, servers=servers)
    assert tally.server_flags == {"made_up": "others"}
    assert all(answer.is_complete for done in tally.replays if done.arrangement == SERVER for answer in done.answers)
    assert any("both regimes together" in note for note in run.notes), "the record says what was not chosen apart"


@pytest.mark.anyio
async def test_flags_of_the_other_server_are_chosen_for_each_trace_by_itself() -> None:
    class Fast(Cluster):
        """Answers requests of one trace only; the other one's are shorter."""

        def __init__(self, are_served_long: bool) -> None:
            super().__init__()
            self._long = are_served_long

        def fails(self, name: str, body: dict[str, Any]) -> bool:
            return name == SERVER and (len(body["prompt"]) > 30) is not self._long

    ours, for_long, for_short = Cluster(), Fast(True), Fast(False)
    servers = Servers({"short": (for_short.launch,) * 2, "long": (for_long.launch,) * 2})
    longer = Trace("longer", tuple(replace(row, prompt_tokens=row.prompt_tokens + 100) for row in TRACE.rows))
    shorter = Trace("shorter", tuple(replace(row, prompt_tokens=20) for row in TRACE.rows))
    run, tally = Run("goodput", ["test"], {}), Tally()
    plan = replace(PLAN, budget_s=4800.0)
    workloads = [workload(plan, trace) for trace in (longer, shorter)]
    await measure(plan, workloads, ours.launch, servers, run, tally, say_nothing)
    assert figures(tally)["llama_server_flags"] == {"longer": "long", "shorter": "short"}


@pytest.mark.anyio
async def test_when_the_budget_is_over_what_is_left_is_named() -> None:
    ticks = iter(range(0, 10**6, 250))
    run, tally = Run("goodput", ["test"], {}), Tally()
    await measure(
        PLAN, [workload(PLAN, TRACE)], Cluster().launch, None, run, tally, say_nothing, clock=lambda: float(next(ticks))
    )
    assert 0 < len(tally.replays) < 6
    assert any("--budget-minutes" in failure.why for failure in run.failures)


def test_replays_are_shortened_to_fit_into_the_budget_or_refused() -> None:
    plan = replace(PLAN, seconds_per_point=75.0, budget_s=4800.0, rate_shares=(0.1,) * 6)
    assert fitting_seconds(plan, workloads=2, contestants=4, trials=3) > 60
    short = fitting_seconds(replace(plan, budget_s=2400.0), 2, 4, 3)
    assert 5 <= short < 40
    with pytest.raises(MeasureFailed, match="at least"):
        fitting_seconds(replace(plan, budget_s=600.0), 2, 4, 3)


def test_a_small_budget_takes_rates_passes_and_trials_before_it_makes_replays_short() -> None:
    asked = Plan(seconds_per_point=75.0, budget_s=4800.0, vocab_size=1000)
    all_of_it = fitted(asked, workloads=2, contestants=7, flags=3)
    assert (all_of_it.plan, all_of_it.are_flags_tried) == (asked, True)
    assert all_of_it.seconds_per_point > 25
    for minutes, rates, are_tried in ((50, 4, True), (40, 3, True), (34, 3, False)):
        fit = fitted(replace(asked, budget_s=60.0 * minutes), 2, 7, 3)
        assert (len(fit.plan.rate_shares), fit.plan.passes, fit.are_flags_tried) == (rates, 1, are_tried)
        assert fit.seconds_per_point >= 25
        assert set(fit.plan.rate_shares) <= set(asked.rate_shares)
        assert (fit.plan.rate_shares[0], fit.plan.rate_shares[-1]) == (asked.rate_shares[0], asked.rate_shares[-1])
        assert f"{rates} rates, passes: 1" in fit.note
    assert 5 <= fitted(replace(asked, budget_s=1300.0), 2, 7, 3).seconds_per_point < 25
    with pytest.raises(MeasureFailed, match="at least"):
        fitted(replace(asked, budget_s=600.0), 2, 7, 3)


def test_what_preparations_did_not_take_makes_replays_longer_and_what_they_took_more_makes_them_shorter() -> None:
    plan = Plan(seconds_per_point=75.0, budget_s=1500.0, vocab_size=1000, rate_shares=(0.1, 0.2, 0.3), passes=1)
    planned_s = fitting_seconds(plan, workloads=2, contestants=5, trials=0)
    assert seconds_of_the_rest(plan, 1300.0, 2, 5) == pytest.approx(planned_s), "as long as was planned"
    assert seconds_of_the_rest(plan, 1420.0, 2, 5) == pytest.approx(planned_s + 4.0)
    assert seconds_of_the_rest(plan, 1000.0, 2, 5) < planned_s
    assert seconds_of_the_rest(plan, 0.0, 2, 5) == 5.0
    assert seconds_of_the_rest(plan, 9000.0, 2, 5) == 75.0, "as was asked"


@pytest.mark.anyio
async def test_ours_are_told_the_limits_of_the_regime_they_run_for_and_the_servers_replay_once_for_all() -> None:
    cluster = Cluster()
    servers = Servers({"its defaults": (cluster.launch, cluster.launch)})
    run, tally = await compared(cluster, servers=servers)
    limits = tally.limits("made_up")
    for name in (SPLIT, LOCAL, AUTO):
        told = {json.dumps(body["edge_llm"].get("slo"), sort_keys=True) for body in cluster.bodies[name]}
        assert told == {json.dumps({"tpot_s": one.tpot_s, "ttft_s": one.ttft_s}) for one in limits.values()}
        assert {done.regime for done in tally.replays if done.arrangement == name} == set(limits)
    assert {done.regime for done in tally.replays if done.arrangement == SERVER} == {None}
    assert any("refuse nobody" in note for note in run.notes), "the record says that no bound of ours refused them"


@pytest.mark.anyio
async def test_no_gateway_of_ours_refuses_who_could_still_wait() -> None:
    options = {}

    class Noting(Cluster):
        def launch(self, layout: Layout) -> AbstractAsyncContextManager[Started]:
            options[layout.name] = layout.gateway_options
            return super().launch(layout)

    await compared(Noting())
    assert all("--queue-predicted-wait-s" in given for given in options.values())
    assert set(options) == {BASELINE, SPLIT, UNSPLIT}


@pytest.mark.anyio
async def test_arrangements_that_share_servers_take_turns_at_each_rate_and_who_is_first_alternates() -> None:
    _, tally = await compared(Cluster(), replace(PLAN, passes=1, rate_shares=(0.01, 100.0)))
    series = [done.arrangement for done in tally.replays if done.regime == STRICT_TPOT.name]
    both = [name for name in series if name != SPLIT]
    assert both == [LOCAL, AUTO, AUTO, LOCAL]


# -- what it means


def answered(at_s: float, ttft_s: float, tpot_s: float, mode: str | None = None) -> Answer:
    own = {"mode": mode} if mode else {}
    return Answer(at_s, 11, "u", at_s, at_s + ttft_s, at_s + ttft_s + 10 * tpot_s, at_s + 99, 11, 11, own=own)


def tally_of(**arrangements: list[list[Answer]]) -> Tally:
    """Rates 1, 2, 3, ... of each. Alone, a request takes 1 s to its first token and 0.01 s for each further one."""
    tally = Tally([Workload(TRACE, workload(PLAN, TRACE).clipping)], {"made_up": Unloaded(1.0, 0.01)}, {"made_up": 3.0})
    for name, rates in arrangements.items():
        tally.replays += [
            Replayed("made_up", name, number + 1.0, tuple(answers)) for number, answers in enumerate(rates)
        ]
    return tally


def alike(ttft_s: float, tpot_s: float, mode: str | None = None) -> list[Answer]:
    return [answered(float(number), ttft_s, tpot_s, mode) for number in range(20)]


TOO_MUCH = alike(9.0, 0.9)
# queues for its one reader at once, but never slows a stream; and the other way round
SPLITTING = [alike(1.0, 0.012), alike(2.0, 0.012), alike(2.9, 0.014), TOO_MUCH]
STAYING = [alike(1.0, 0.03), alike(1.2, 0.04), alike(1.4, 0.05), TOO_MUCH]


def test_who_wins_depends_on_the_limits_and_why_the_other_lost_is_said() -> None:
    auto = [*[alike(1.0, 0.012, "split")] * 3, TOO_MUCH]
    found = figures(tally_of(split=SPLITTING, local=STAYING, auto=auto))
    regimes = found["traces"]["made_up"]["regimes"]
    strict_tpot, strict_ttft = regimes[STRICT_TPOT.name], regimes[STRICT_TTFT.name]
    assert strict_tpot["split_to_local"]["ratio"] > 1 > strict_ttft["split_to_local"]["ratio"]
    assert strict_tpot["arrangements"][SPLIT]["goodput_90"]["bound"] == "between"
    assert strict_tpot["arrangements"][SPLIT]["goodput_90"]["per_node_per_s"] == pytest.approx(1.55)
    assert strict_tpot["arrangements"][LOCAL]["goodput_90"]["bound"] == "at_most"
    lines = "\n".join(found["verdicts"])
    assert "100% TPOT" in lines
    assert "100% of the requests to split miss TTFT" in lines
    assert lines.count("as expected") == 2
    assert lines.count("auto split 100% of 60 answers that came to their end") == 3, "once more of where split wins"
    assert (strict_ttft["auto_split_share_where_split_wins"]["share"]) is None, "there it wins nowhere"
    assert lines.count("unknown of 20") == 2
    assert missed(found) == []


def test_auto_that_is_worse_than_the_better_of_both_or_never_splits_where_that_wins_misses_its_bar() -> None:
    auto = [*[alike(1.0, 0.03, "local")] * 3, TOO_MUCH]
    lines = missed(figures(tally_of(split=SPLITTING, local=STAYING, auto=auto)))
    assert len(lines) == 2
    assert "auto has 0.03 of the goodput" in lines[0]
    assert "auto split 0% of 60 answers only" in lines[1]


def test_auto_need_not_split_at_rates_at_which_nothing_is_won_by_it() -> None:
    """At the first rate either way keeps all in limits, at the third neither does, at the fourth only not splitting."""
    split = [alike(1.0, 0.012), alike(1.0, 0.012), TOO_MUCH, TOO_MUCH]
    local = [alike(1.0, 0.012), TOO_MUCH, TOO_MUCH, alike(1.0, 0.012)]
    unsplit = alike(1.0, 0.012, "local")
    found = figures(tally_of(split=split, local=local, auto=[unsplit, alike(1.0, 0.012, "split"), unsplit, unsplit]))
    strict_tpot = found["traces"]["made_up"]["regimes"][STRICT_TPOT.name]
    assert strict_tpot["split_to_local"]["ratio"] > 1
    share = strict_tpot["auto_split_share_where_split_wins"]
    assert (share["share"], share["answers"], share["rates_per_s"]) == (1.0, 20, [2.0])
    assert strict_tpot["auto_split_share"]["share"] == 0.25
    assert not any("auto split" in line for line in missed(found))


@pytest.mark.parametrize(("rates", "where"), [(SPLITTING[:1] * 3, "above the highest"), ([TOO_MUCH] * 2, "below the")])
def test_curves_that_all_stay_above_the_goal_or_all_below_it_decide_nothing(
    rates: list[list[Answer]], where: str
) -> None:
    found = figures(tally_of(split=rates, local=rates, auto=rates))
    for regime in found["traces"]["made_up"]["regimes"].values():
        assert regime["auto_to_better"]["ratio"] == 1.0
        assert regime["auto_to_better"]["bounds"][AUTO] == regime["auto_to_better"]["bounds"][SPLIT] != "between"
        assert regime["auto_to_better"]["is_decided"] is regime["split_to_local"]["is_decided"] is False
    lines = missed(found)
    assert len(lines) == 4
    assert all("not decided by the rates measured" in line and where in line for line in lines)
    assert sum("not decided" in line for line in found["verdicts"]) == 4
    assert not any("within 5 %" in line for line in found["verdicts"])
    assert json.dumps(found, allow_nan=False)


def test_what_auto_did_under_other_limits_says_nothing_about_these() -> None:
    tally = tally_of(split=SPLITTING, local=STAYING)
    for regime, answers in ((STRICT_TPOT, alike(1.0, 0.012, "split")), (STRICT_TTFT, alike(1.0, 0.03, "local"))):
        tally.replays += [
            Replayed("made_up", AUTO, number + 1.0, tuple(some), regime.name)
            for number, some in enumerate([*[answers] * 3, TOO_MUCH])
        ]
    found = figures(tally)
    regimes = found["traces"]["made_up"]["regimes"]
    assert [regimes[regime.name]["auto_split_share"]["share"] for regime in REGIMES] == [1.0, 0.0]
    assert [len(regimes[regime.name]["arrangements"][AUTO]["curve"]) for regime in REGIMES] == [4, 4]
    assert missed(found) == []


def test_answers_of_another_length_and_a_late_generator_are_said() -> None:
    late = [replace_sent(answer) for answer in alike(0.5, 0.01)]
    found = figures(tally_of(split=[late], local=[late], auto=[late]))
    assert found["generator"]["is_saturated"] is True
    assert any("generator was late" in line for line in missed(found))
    short = alike(0.5, 0.01)
    short[0].counted_tokens = 5
    found = figures(tally_of(split=[short]))
    assert found["answers_of_other_length"] == 1
    (point,) = found["traces"]["made_up"]["regimes"][STRICT_TPOT.name]["arrangements"][SPLIT]["curve"]
    assert (point["failed"], point["attainment"]) == (0.05, 0.95), "it stopped early, and that keeps no limit"


def test_no_request_fills_the_context_to_its_last_position() -> None:
    long = Trace("long", (Row(0, 0.0, 9000, 12), Row(1, 1.0, 9000, 9000)))
    assert max(row.prompt_tokens + row.answer_tokens for row in workload(PLAN, long).trace.rows) < PLAN.n_ctx


def replace_sent(answer: Answer) -> Answer:
    answer.at_s -= 1.0
    return answer


def test_who_was_not_asked_for_as_much_as_the_others_is_not_compared_with_them() -> None:
    found = figures(tally_of(split=SPLITTING, local=STAYING, auto=[alike(1.0, 0.01, "split")] * 2))
    strict_tpot = found["traces"]["made_up"]["regimes"][STRICT_TPOT.name]
    assert [row["is_cut_short"] for row in strict_tpot["arrangements"].values()] == [False, False, True]
    assert "auto_to_better" not in strict_tpot
    assert not any("most requests" in line for line in found["verdicts"])


def test_nothing_is_guessed_of_what_was_not_measured() -> None:
    assert figures(Tally()) == {"traces": {}, "seconds_per_point": 0.0, "verdicts": []}
    only_local = figures(tally_of(local=STAYING))["traces"]["made_up"]
    assert only_local["regimes"][STRICT_TPOT.name]["auto_split_share"]["share"] is None
    assert "auto_to_better" not in only_local["regimes"][STRICT_TPOT.name]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two nodes need a core each")
@pytest.mark.timeout(240)
def test_the_command_compares_simulated_clusters_of_real_processes(tmp_path: Path) -> None:
    trace = tmp_path / "small.csv"
    lines = [f"2023-11-16 18:00:{number:02d}.5,{200 + 10 * number},40" for number in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    command = [sys.executable, "-m", "edge_llm", "bench", "goodput", "--engine", "simulated", "--quick", "--json"]
    command += ["--trace", str(trace), "--seconds-per-point", "5", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for result in found["traces"]["small"]["regimes"].values():
        assert set(result["arrangements"]) == {SPLIT, LOCAL, AUTO}
        assert result["auto_split_share"]["answers"] > 0
    assert found["answers_of_other_length"] == 0
