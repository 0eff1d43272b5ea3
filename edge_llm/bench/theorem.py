"""The theorem, proven on a running cluster from outside: split equals whole, together equals alone.

Owns the prompts, the driving and the comparison. It talks HTTP like any client and shares no code with the
gateway. Refuses to know engines: what it compares are the token ids that clients get.

Each prompt is answered alone and unsplit (the reference), then alone and split, then among seven others: split, and
unsplit. Half of the prompts are greedy, half sampled with a seed. The runs must have happened the way they claim: every
split answer names two workers and got all of its KV, eight rows met in one decode call, two prompts met on one prefill
worker; otherwise the proof fails even if all ids are equal. What workers count since their start is compared with what
it was before, so that an earlier run proves nothing for this one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import aiohttp

from edge_llm.bench.layout import Launch, Layout
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.run import Run
from edge_llm.errors import EdgeLLMError
from edge_llm.worker.messages import WIDE_ROWS

TOGETHER: Final = WIDE_ROWS
WAYS: Final = 4
CROWD_TOKENS: Final = 96
LONG_TOKENS: Final = 2100
MAX_TRIES: Final = 100
# The gateway asks its workers every second how they are.
FRESH_S: Final = 10.0
_POLL_S: Final = 0.1
_WORDS: Final = (
    "river stone lamp 42 garden winter salt engine paper, cloud bridge letter. cheese orbit naïve über 東京 Ελλάδα 🙂 "
    "because after seven quiet morning machine window? table (left) copper \n and the of to in is it that was for"
).split(" ")


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt: token ids are not chosen here, only text or chat and sampling."""

    name: str
    body: dict[str, Any]
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Answer:
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    mode: str
    prefill_node: str
    decode_node: str
    fallback: str | None = None


@dataclass(slots=True)
class Proof:
    """Every comparison by the tokens in it, and every difference found; `holds` is the verdict."""

    prompts: int = 0
    compared: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    model: ModelFacts | None = None

    @property
    def comparisons(self) -> int:
        return len(self.compared)

    @property
    def tokens(self) -> int:
        return sum(self.compared)

    @property
    def holds(self) -> bool:
        return not self.differences and not self.unproven and self.comparisons > 0

    def missed(self) -> list[str]:
        """Why it does not hold, as lines for people."""
        lines = [f"different: {text}" for text in self.differences] + [f"unproven: {text}" for text in self.unproven]
        return lines if lines or self.holds else ["nothing was compared"]

    def as_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "prompts": self.prompts,
            "comparisons": self.comparisons,
            "tokens_compared": self.tokens,
            "shortest_prompt_tokens": min(self.prompt_tokens, default=0),
            "longest_prompt_tokens": max(self.prompt_tokens, default=0),
            "differences": self.differences,
            "unproven": self.unproven,
        }


def cases(count: int, chunk_tokens: int, vocab_size: int, n_ctx: int, seed: int = 0) -> list[Case]:
    """`count` prompts over all lengths that matter, in a fixed order, for a cluster's chunks, vocabulary and context.

    Exact token counts (chunk-1, chunk, chunk+1, 1, 2, more than 2,000 and so on) are given as ids, the rest as text and
    chat. The last TOGETHER have short prompts and long answers: they are all decoding at the same time.
    """
    rng = random.Random(seed)
    lengths = [min(length, n_ctx - CROWD_TOKENS) for length in _exact_lengths(chunk_tokens)]
    makers = (_of_exact_length, _of_some_length, partial(_of_text, n_ctx // 2), partial(_of_chat, n_ctx // 2))
    made = []
    for number in range(count):
        turn, place = divmod(number // 4, len(lengths))
        greedy = (turn + place) % 2 == 0  # neighbours differ, and so does what comes back to a length
        drawn = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.02, "seed": number}
        body: dict[str, Any] = {"max_tokens": 12 + number % 13, **({"temperature": 0} if greedy else drawn)}
        is_crowd = number >= count - TOGETHER
        maker = _of_crowd if is_crowd else makers[number % 4]
        what, more = maker(rng, lengths[place], vocab_size)
        kind = "greedy" if greedy else "sampled"
        made.append(Case(f"{number}: {what}, {kind}", body | more, is_chat="messages" in more))
    return made


def _exact_lengths(chunk_tokens: int) -> tuple[int, ...]:
    """What a small number of prompts must not leave out comes first."""
    one, two = chunk_tokens, 2 * chunk_tokens
    return (one, LONG_TOKENS, 1, one + 1, one - 1, 2, 517, two, 3, two + 7, 1023)


def _of_exact_length(rng: random.Random, length: int, vocab_size: int) -> tuple[str, dict[str, Any]]:
    return f"{length} ids", {"prompt": _ids(rng, length, vocab_size)}


def _of_some_length(rng: random.Random, _length: int, vocab_size: int) -> tuple[str, dict[str, Any]]:
    return _of_exact_length(rng, rng.randrange(17, 250), vocab_size)


def _of_text(most_bytes: int, rng: random.Random, _length: int, _vocab_size: int) -> tuple[str, dict[str, Any]]:
    words = rng.randrange(5, 120)
    return f"text of {words} words", {"prompt": _text(rng, words, most_bytes)}


def _of_chat(most_bytes: int, rng: random.Random, _length: int, _vocab_size: int) -> tuple[str, dict[str, Any]]:
    asked = {"role": "user", "content": _text(rng, rng.randrange(3, 80), most_bytes)}
    return "chat", {"messages": [{"role": "system", "content": "Be brief."}, asked]}


def _of_crowd(rng: random.Random, _length: int, vocab_size: int) -> tuple[str, dict[str, Any]]:
    what, more = _of_exact_length(rng, rng.randrange(2, 20), vocab_size)
    return f"crowd, {what}", more | {"max_tokens": CROWD_TOKENS}


def _ids(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Not from the ends of a vocabulary: special tokens are there."""
    return [rng.randrange(vocab_size // 20, vocab_size - vocab_size // 20) for _ in range(length)]


def _text(rng: random.Random, words: int, most_bytes: int) -> str:
    """No longer than `most_bytes`: some vocabularies have a token for each byte."""
    made = " ".join(rng.choice(_WORDS) for _ in range(words))
    return made.encode()[:most_bytes].decode(errors="ignore")


async def measure(
    launch: Launch,
    prompts: int,
    seed: int,
    proof: Proof,
    run: Run,
    on_done: Callable[[int, int], None],
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The proof on the cluster that `launch` gives; `headers`: what lets us in there. Fills `proof` and `run` as it
    goes; what was compared before something failed stays."""
    try:
        async with launch(Layout("theorem", prefill=1, decode=1, options=("--slots", str(TOGETHER)))) as cluster:
            await prove(cluster.url, prompts, seed, on_done, proof, headers)
    except (EdgeLLMError, aiohttp.ClientError, OSError) as error:
        run.fail("theorem", str(error) or type(error).__name__)
    finally:
        run.models += [proof.model] if proof.model else []
        for tokens in proof.compared:
            run.add("tokens_compared", tokens)
    return proof.as_json()


async def prove(
    url: str,
    prompts: int,
    seed: int = 0,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    proof: Proof | None = None,
    headers: Mapping[str, str] | None = None,
) -> Proof:
    """Ask `prompts` prompts four ways of the gateway at `url` and compare token ids. Raises MeasureFailed."""
    proof = Proof() if proof is None else proof
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(url, timeout=timeout, headers=headers) as session:
        before = await _nodes(session)
        node = next((node for node in before if node["role"] != "prefill"), None)
        if node is None:
            raise MeasureFailed("no worker of the cluster decodes")
        model, chunk_tokens = str(node["model"]), int(node["chunk_tokens"])
        meta = await _meta(session, model)
        proof.model = _facts(model, meta)
        every = cases(prompts, chunk_tokens, int(meta["vocab_size"]), int(meta["n_ctx"]), seed)
        asker = _Asker(session, model, every, on_done)
        proof.prompts = len(every)
        whole = [await asker.one(case, "local") for case in every]
        proof.prompt_tokens += [answer.prompt_tokens for answer in whole]
        for case, reference in zip(every, whole, strict=True):
            _compare(case, "split", reference, await asker.one(case, "split"), proof)
        for mode, way in (("split", "split among others"), ("local", "unsplit among others")):
            for case, reference, answer in zip(every, whole, await asker.together(mode), strict=True):
                _compare(case, way, reference, answer, proof)
        _check_meetings(before, await _nodes(session), proof)
    return proof


@dataclass(slots=True)
class _Asker:
    """Asks every case four ways, and counts."""

    session: aiohttp.ClientSession
    model: str
    every: Sequence[Case]
    on_done: Callable[[int, int], None]
    done: int = 0

    async def one(self, case: Case, mode: str) -> Answer:
        answer = await _ask(self.session, self.model, case, mode)
        self.done += 1
        self.on_done(self.done, WAYS * len(self.every))
        return answer

    async def together(self, mode: str) -> list[Answer]:
        """So many at once; the crowd when all others are through, so that its rows meet."""
        gate = asyncio.Semaphore(TOGETHER)

        async def gated(case: Case) -> Answer:
            async with gate:
                return await self.one(case, mode)

        mixed, crowd = self.every[:-TOGETHER], self.every[-TOGETHER:]
        first = await asyncio.gather(*(gated(case) for case in mixed))
        return [*first, *await asyncio.gather(*(gated(case) for case in crowd))]


async def _ask(session: aiohttp.ClientSession, model: str, case: Case, mode: str) -> Answer:
    path = "/v1/chat/completions" if case.is_chat else "/v1/completions"
    own = {"mode": mode, "return_token_ids": True}
    # each run computes its prompt anew: what is kept of an earlier one would hide what is compared
    body = case.body | {"model": model, "stream": False, "cache_prompt": False, "edge_llm": own}
    data = await _answered(session, path, body, f"{case.name}, mode {mode}")
    split = data["timings"]["edge_llm"]
    return Answer(
        ids=tuple(split["token_ids"]),
        finish_reason=data["choices"][0]["finish_reason"],
        prompt_tokens=data["usage"]["prompt_tokens"],
        mode=split["mode"],
        prefill_node=split["prefill_node"],
        decode_node=split["decode_node"],
        fallback=split["fallback"],
    )


async def _answered(session: aiohttp.ClientSession, path: str, body: dict[str, Any], what: str) -> dict[str, Any]:
    """The answer's body. A full cluster is asked again when it says so, as any good client does."""
    for _ in range(MAX_TRIES):
        async with session.post(path, json=body) as reply:
            data: dict[str, Any] = await reply.json()
            if reply.status == 200:
                return data
            if reply.status != 503 or "retry-after" not in reply.headers:
                break
            pause_s = float(reply.headers["retry-after"])
        await asyncio.sleep(pause_s)
    raise MeasureFailed(f"{what}: HTTP {reply.status}: {str(data)[:300]}")


def _compare(case: Case, way: str, reference: Answer, answer: Answer, proof: Proof) -> None:
    proof.compared.append(len(answer.ids))
    if answer.ids != reference.ids or answer.finish_reason != reference.finish_reason:
        first = next(
            (i for i, (a, b) in enumerate(zip(reference.ids, answer.ids, strict=False)) if a != b), len(answer.ids)
        )
        proof.differences.append(f"{case.name}, {way}: first difference at token {first}")
    if not answer.ids:
        proof.unproven.append(f"{case.name}, {way}: no tokens")
    is_split = answer.mode == "split" and answer.prefill_node != answer.decode_node
    # a prompt of one token has nothing to prefill elsewhere
    if is_split != way.startswith("split") and answer.prompt_tokens > 1:
        proof.unproven.append(f"{case.name}, {way}: ran {answer.mode} on {answer.decode_node}")
    elif is_split and answer.fallback:
        proof.unproven.append(f"{case.name}, {way}: only in part, {answer.fallback}")


async def _nodes(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """The workers, as the gateway has seen them after now."""
    began_s = time.monotonic()
    while True:
        async with session.get("/cluster") as reply:
            data = await reply.json()
            if reply.status != 200:
                raise MeasureFailed(f"/cluster: HTTP {reply.status}: {data}")
            nodes: list[dict[str, Any]] = data["nodes"]
        passed_s = time.monotonic() - began_s
        if passed_s > FRESH_S or all(node["seen_ago_s"] < passed_s for node in nodes):
            return nodes
        await asyncio.sleep(_POLL_S)


async def _meta(session: aiohttp.ClientSession, model: str) -> dict[str, Any]:
    async with session.get("/v1/models") as reply:
        data = await reply.json()
        if reply.status != 200:
            raise MeasureFailed(f"/v1/models: HTTP {reply.status}: {data}")
    return dict(next(entry["meta"] for entry in data["data"] if entry["id"] == model))


def _facts(model: str, meta: Mapping[str, Any]) -> ModelFacts:
    """What the endpoint says of its model; the file may be on another machine."""
    return ModelFacts(
        name=model,
        file="",
        sha256=meta["sha256"],
        size_bytes=0,
        quantization=meta["quantization"],
        architecture=meta["architecture"],
        kv_bytes_per_token=meta["kv_bytes_per_token"],
    )


def _check_meetings(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], proof: Proof) -> None:
    """Whether a decode call was wide since `before`, and whether prompts met on a prefill worker."""
    known = {_life(node): node["load"] for node in before}
    widest, wide, met = 0, 0, 0
    for node in after:
        now, then = node["load"], known.get(_life(node), {"wide_decode_calls": 0, "prompts_met": 0})
        met += now["prompts_met"] - then["prompts_met"]
        wide += now["wide_decode_calls"] - then["wide_decode_calls"]
        widest = max(widest, now["widest_decode_rows"])
    if wide < 1:
        proof.unproven.append(
            f"no decode call of this run had {TOGETHER} rows (widest since the workers started: {widest}): give the "
            f"decode worker {TOGETHER} slots"
        )
    if met < 1:
        proof.unproven.append("no two prompts met on one prefill worker")


def _life(node: Mapping[str, Any]) -> tuple[object, ...]:
    """A worker that was started again counts from zero."""
    return node["worker"], node["pid"], node["started_at"]
