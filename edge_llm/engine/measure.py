"""Measuring the engine in a process of its own: `python -m edge_llm.engine.measure`, one JSON line in, one out.

Owns what is timed and how: through the real sequencer, sampling and text included, the way a worker runs it. It
exists because benches must not load llama.cpp themselves (import contract) and because a measured process is pinned
to a core by whoever starts it. Refuses to know records, ratios and llama.cpp's tools.

Protocol: engine/asked.py.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_llm.engine.asked import serve
from edge_llm.engine.backend import Logits
from edge_llm.engine.engine import ServedPrompt, Step
from edge_llm.engine.llama import LlamaBackend
from edge_llm.engine.load import LlamaSettings, load_backend
from edge_llm.engine.sampling import sample
from edge_llm.engine.sequencer import Sequencer
from edge_llm.errors import EngineFailed
from edge_llm.kv.codec import StateBlob
from edge_llm.machine import available_memory_bytes, process_usage
from edge_llm.request import Generation, SamplingParams

Result = dict[str, Any]
GREEDY: Final = SamplingParams(temperature=0.0)
# What chat programs send by default, with every stage on.
# all stages; as many biases as OpenAI's clients send at most
FULL: Final = SamplingParams(
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    repeat_penalty=1.1,
    seed=1,
    logit_bias={64 * token: -1.0 for token in range(300)},
)
NUCLEUS: Final = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
PLAIN: Final = SamplingParams(temperature=1.0, seed=1)
_SAMPLERS: Final[Mapping[str, SamplingParams]] = {"greedy": GREEDY, "full": FULL, "top_p": NUCLEUS, "plain": PLAIN}


class Bench:
    """One loaded engine and the things that can be timed on it."""

    def __init__(self, backend: LlamaBackend) -> None:
        self._backend = backend
        self._sequencer = Sequencer(backend, backend.pieces, first=backend.first_rates)
        self._vocab_size = backend.facts.vocab_size

    def ready(self) -> Result:
        facts = self._backend.facts
        return {
            "event": "ready",
            "architecture": facts.architecture,
            "quantization": facts.quantization,
            "kv_bytes_per_token": facts.kv_bytes_per_token,
            "vocab_size": facts.vocab_size,
            "splits": facts.splits,
            "chunk_tokens": facts.chunk_tokens,
            "n_ctx": facts.n_ctx,
            "slots": facts.slots,
            "policy": facts.policy,
            "is_flash_attention": facts.is_flash_attention,
            "build": facts.build,
        }

    def close(self) -> None:
        self._backend.close()

    def answer(self, request: Mapping[str, Any]) -> Result:
        """Run one request; the clock of every figure is this process's."""
        arguments = dict(request)
        operations: dict[str, Callable[..., Result]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "export": self.export,
            "sampler": self.sampler,
        }
        operation = operations[arguments.pop("op")]
        cpu_before_s, started_s = time.process_time(), time.perf_counter()
        result = operation(**arguments)
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_before_s
        return {"event": "result", **result, "wall_s": wall_s, "cpu_s": cpu_s, **_memory()}

    def prefill(self, tokens: int, is_served: bool, seed: int = 0) -> Result:
        """KV of `tokens` tokens in pieces of a chunk: as a prefill worker (chunks exported), or on a slot."""
        ids = self._ids(tokens + 1, seed)
        started_s = time.perf_counter()
        if is_served:
            self._sequencer.serve(ServedPrompt("bench", ids))
        else:
            self._sequencer.begin(0, _generation(0, ids, 1))
        done, decode_s = 0, 0.0
        while done < tokens:
            step = self._step()
            done += step.prompt_tokens
            decode_s += step.decode_s  # the step that ends a local prompt also draws its first token
        elapsed_s = time.perf_counter() - started_s - decode_s
        self._sequencer.end(0)
        return {"tokens_per_s": tokens / elapsed_s}

    def decode(
        self,
        rows: int,
        prompt_tokens: int,
        tokens: int,
        holes: Sequence[int] = (),
        warm_steps: int = 0,
        seed: int = 0,
    ) -> Result:
        """`tokens` greedy tokens of `rows` sequences behind prompts of `prompt_tokens`; slots in `holes` have ended.
        `warm_steps` are taken before the clock starts, and one in which those restored later join the first."""
        slots = [slot for slot in range(rows) if slot not in holes]
        ids = self._ids(prompt_tokens + 1, seed)
        snapshot = self._snapshot(ids) if prompt_tokens else None
        for slot in slots:
            self._sequencer.begin(slot, _generation(slot, ids, 1 + warm_steps + tokens + 1), snapshot)
        for _ in range(1 + warm_steps):
            self._step()
        started_s = time.perf_counter()
        for _ in range(tokens):
            if self._step().decoded_rows != len(slots):
                raise EngineFailed(f"a decode step did not have the {len(slots)} rows that were asked for")
        elapsed_s = time.perf_counter() - started_s
        for slot in slots:
            self._sequencer.end(slot)
        return {"tokens_per_s": tokens * len(slots) / elapsed_s, "step_s": elapsed_s / tokens}

    def export(self, tokens: int, seed: int = 0) -> Result:
        """What reading KV out costs beside computing it, chunk by chunk, and in one piece at the end."""
        backend, chunk, ids = self._backend, self._backend.facts.chunk_tokens, self._ids(tokens, seed)
        self._compute(ids)  # touches every buffer of computing, so that growth below is exporting's
        rss_before, rss_peak = _memory()["rss_bytes"], 0
        compute_s = export_s = 0.0
        exported_bytes = 0
        backend.serve_open()
        for p0 in range(0, tokens, chunk):
            p1 = min(p0 + chunk, tokens)
            before_s = time.perf_counter()
            backend.serve_prompt(ids[p0:p1], p0)
            computed_s = time.perf_counter()
            exported_bytes += len(backend.serve_export(p0, p1))
            export_s += time.perf_counter() - computed_s
            compute_s += computed_s - before_s
            rss_peak = max(rss_peak, _memory()["rss_bytes"])
        whole_started_s = time.perf_counter()
        whole_bytes = len(backend.serve_export(0, tokens))
        whole_s = time.perf_counter() - whole_started_s
        return {
            "compute_s": compute_s,
            "export_s": export_s,
            "exported_bytes": exported_bytes,
            "whole_export_s": whole_s,
            "whole_bytes": whole_bytes,
            "growth_bytes": max(0, rss_peak - rss_before),
            "whole_growth_bytes": max(0, _memory()["rss_bytes"] - rss_before),
        }

    def sampler(self, vocab_size: int, repeats: int, history: int = 512, seed: int = 0) -> Result:
        """Seconds of one draw from logits as models give them: a bell with a few likely tokens on top."""
        generator = np.random.default_rng(seed)
        logits = generator.normal(0.0, 2.0, vocab_size).astype(np.float32)
        logits[generator.integers(0, vocab_size, 40)] += np.linspace(4, 14, 40, dtype=np.float32)
        ids = [int(token) for token in generator.integers(0, vocab_size, history)]
        return {f"{name}_s": _draw_s(params, logits, ids, repeats) for name, params in _SAMPLERS.items()}

    def _ids(self, count: int, seed: int) -> tuple[int, ...]:
        draw = random.Random(seed)
        return tuple(draw.randrange(self._vocab_size) for _ in range(count))

    def _compute(self, ids: Sequence[int]) -> None:
        chunk = self._backend.facts.chunk_tokens
        self._backend.serve_open()
        for p0 in range(0, len(ids), chunk):
            self._backend.serve_prompt(ids[p0 : p0 + chunk], p0)

    def _snapshot(self, ids: tuple[int, ...]) -> StateBlob:
        """One prompt's KV, to start many sequences at the same depth in the same step."""
        chunk, last = self._backend.facts.chunk_tokens, len(ids) - 1
        for p0 in range(0, last, chunk):
            self._backend.prompt(0, ids[p0 : min(p0 + chunk, last)], p0)
        blob = self._backend.export(0, last)
        self._backend.drop(0)
        return blob

    def _step(self) -> Step:
        step = self._sequencer.step()
        if step.failures:
            raise step.failures[0].error
        return step


def _generation(slot: int, ids: tuple[int, ...], max_tokens: int) -> Generation:
    return Generation(f"bench-{slot}", 0, ids, max_tokens, GREEDY)


def _draw_s(params: SamplingParams, logits: Logits, ids: Sequence[int], repeats: int) -> float:
    """Median seconds of a draw; the first is for caches."""
    times = []
    for position in range(repeats + 1):
        started_s = time.perf_counter()
        sample(logits, ids, params, position)
        times.append(time.perf_counter() - started_s)
    return float(np.median(times[1:]))


def _memory() -> dict[str, int]:
    usage = process_usage(os.getpid())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_bytes": usage.rss_bytes if usage else 0, "rss_peak_bytes": peak_bytes}


def _settings(arguments: Sequence[str]) -> LlamaSettings:
    parser = argparse.ArgumentParser(prog="python -m edge_llm.engine.measure", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policy", choices=["exact", "fast"], default="exact")
    parser.add_argument("--flash-attention", choices=["auto", "on", "off"], default="auto")
    given = parser.parse_args(arguments)
    return LlamaSettings(
        model_path=given.model,
        model_name=given.model.stem,
        model_sha256="",  # nothing here leaves the process
        n_ctx=given.n_ctx,
        slots=given.slots,
        chunk_tokens=given.chunk_tokens,
        threads=given.threads,
        threads_batch=given.threads,
        policy=given.policy,
        flash_attention=given.flash_attention,
        available_bytes=available_memory_bytes(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests from stdin until it ends."""
    settings = _settings(sys.argv[1:] if arguments is None else arguments)
    return serve(lambda: Bench(load_backend(settings)))


if __name__ == "__main__":
    sys.exit(main())
