"""`edge-llm bench turns`: what the second turn of a conversation costs when the KV of the first one is kept.

Owns the experiment: a long prompt is answered, then asked again with the answer and a little more. It compares times to
first token and the tokens with a run that keeps nothing. Refuses to know clusters (`Launch`) and where KV is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import aiohttp

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.layout import Launch, Layout
from edge_llm.bench.run import Run
from edge_llm.bench.streams import StreamClient, client_of, prompt_ids
from edge_llm.errors import EdgeLLMError

SHARE_BAR: Final = 0.15
_BELOW_EXACT: Final = "level {level}: of an earlier turn only whole chunks of its prompt are used (`edge-llm verify`)"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of issue and papers: a long first turn, an answer, a short second turn."""

    repetitions: int
    vocab_size: int
    prompt_tokens: int = 1000
    answer_tokens: int = 128
    new_tokens: int = 50
    compared_tokens: int = 32
    n_ctx: int = 4096


async def measure(plan: Plan, model: BenchModel, launch: Launch, run: Run, progress: Progress) -> dict[str, Any]:
    """Figures of a cluster of one prefill and one decode worker, split. Fills `run` as it goes; what was measured
    before something failed stays."""
    run.models.append(model.facts)
    run.workload |= asdict(plan)
    try:
        await _conversations(plan, launch, run, progress)
    except (EdgeLLMError, aiohttp.ClientError, OSError) as error:
        run.fail("conversations", str(error) or type(error).__name__)
    return figures(run)


async def _conversations(plan: Plan, launch: Launch, run: Run, progress: Progress) -> None:
    layout = Layout("split", prefill=1, decode=1, options=("--slots", "2", "--n-ctx", str(plan.n_ctx)))
    async with (
        launch(layout) as cluster,
        client_of(cluster.url, _body(is_kept=True)) as keeping,
        client_of(cluster.url, _body(is_kept=False)) as forgetting,
    ):
        # pages of the KV cache, connections and code that are touched for the first time are no part of a first turn
        await forgetting.ask(prompt_ids(plan.prompt_tokens, plan.vocab_size, seed=10**6), 1)
        for repetition in range(plan.repetitions):
            progress("conversations", repetition, plan.repetitions)
            with run.one_case("conversation", repetition=repetition):
                await _conversation(plan, repetition, keeping, forgetting, run)


def figures(run: Run) -> dict[str, Any]:
    """Medians of what is there; `ids_equal` over all conversations."""
    names = ("first_ttft_s", "second_ttft_s", "cold_second_ttft_s", "second_turn_ttft_share", "cached_tokens")
    found: dict[str, Any] = {name: run.median(name) for name in names if run.median(name) is not None}
    if "ids_equal" in run.samples:
        found["ids_equal"] = all(run.samples["ids_equal"])
    return found


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars were not met, as lines for people."""
    lines = []
    share = found.get("second_turn_ttft_share")
    if share is None or share > SHARE_BAR:
        lines.append(f"second_turn_ttft_share is {share}, not at most {SHARE_BAR}")
    if found.get("ids_equal") is not True:
        lines.append("the second turn's tokens are not those of a cold run")
    return lines


def _body(*, is_kept: bool) -> dict[str, Any]:
    vendor = {"mode": "split", "return_token_ids": True}
    return {"ignore_eos": True, "cache_prompt": is_kept, "edge_llm": vendor}


async def _conversation(plan: Plan, number: int, keeping: StreamClient, forgetting: StreamClient, run: Run) -> None:
    prompt = prompt_ids(plan.prompt_tokens, plan.vocab_size, seed=2 * number)
    new = prompt_ids(plan.new_tokens, plan.vocab_size, seed=2 * number + 1)
    first, first_ttft_s = await keeping.ask(prompt, plan.answer_tokens)
    turn = [*prompt, *_ids(first), *new]
    second, second_ttft_s = await keeping.ask(turn, plan.compared_tokens)
    cold, cold_ttft_s = await forgetting.ask(turn, plan.compared_tokens)
    run.add("first_ttft_s", first_ttft_s)
    run.add("second_ttft_s", second_ttft_s)
    run.add("cold_second_ttft_s", cold_ttft_s)
    run.add("second_turn_ttft_share", second_ttft_s / first_ttft_s)
    run.add("cached_tokens", second["timings"]["cache_n"])
    run.add("ids_equal", float(_ids(second) == _ids(cold)))
    level = second["timings"]["edge_llm"]["level"]
    if level != "exact" and (note := _BELOW_EXACT.format(level=level)) not in run.notes:
        run.notes.append(note)


def _ids(last: Mapping[str, Any]) -> Sequence[int]:
    ids: Sequence[int] = last["timings"]["edge_llm"]["token_ids"]
    return ids
