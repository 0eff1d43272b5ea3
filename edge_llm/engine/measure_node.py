"""Measuring phases of a model as llama-bench does: `python -m edge_llm.engine.measure_node`, JSON lines in and out.

Owns what a test is here: our loading (policy, repacked tensors) and our native contexts; random tokens, no text, no
sampling; the clock around whole prompts and decode steps; what the process used meanwhile. It is measure.py's sister:
that one times the engine as workers run it, with sampling and text. Refuses to know sweeps, records and llama.cpp's
tools.

Protocol: that of asked.py. After loading: {"event": "ready", ...facts}. `open` makes a context for one test and
warms it up, `run` is one repetition, `shut` frees the context; `curve` is a point of peak memory against context. An
operation that fails leaves no context open. End of input ends the process.

As in llama-bench: a prompt is calls of up to a micro-batch of rows, the last token of it gives logits; a decode step
is one token of every sequence with logits; what lies before a test at a depth is computed once and untimed. Memory of
a phase is the process's highest since the repetition began (after what earlier tests left was given back).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from edge_llm.catalogue.gguf import read_card
from edge_llm.catalogue.memory import check_fits, repacked_tensors
from edge_llm.engine.asked import serve
from edge_llm.engine.level import LevelRecord
from edge_llm.engine.load import LlamaSettings, identity_of, model_memory, recorded_level
from edge_llm.engine.native import (
    FlashAttention,
    KVType,
    NativeContext,
    NativeModel,
    build_facts,
    has_tile_kernels,
    use_tiled_kernels,
)
from edge_llm.errors import EdgeLLMError, EngineFailed
from edge_llm.machine import available_memory_bytes, cpu_kind, peak_memory_bytes, reset_peak_memory

Result = dict[str, Any]
_EXPERTS: Final = ("expert_used_count", "expert_count")
_CURVE_STEPS: Final = 4
_ADVICE: Final = (
    "Ask for fewer tokens (-d, -p, -n, -pg, --memory-curve) or sequences (--batch), smaller types of KV (-ctk, -ctv), "
    "or another quantization of the model."
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `open` is told: edge_llm/bench/node_rows.py's NodeTest, as far as the engine is concerned."""

    n_prompt: int
    n_gen: int
    n_depth: int
    cells: int
    micro_batch: int
    type_k: KVType
    type_v: KVType
    flash_attention: FlashAttention
    n_threads: int
    n_threads_batch: int
    n_parallel: int


class NodeBench:
    """One loaded model, and at most one test that is open."""

    def __init__(self, settings: LlamaSettings) -> None:
        self._settings = settings
        self._card = read_card(settings.model_path)
        self._repacked = repacked_tensors(self._card, cpu_kind().split("/")[0]) if settings.policy == "exact" else []
        self._fits(replace(settings, n_ctx=256, slots=1))
        use_tiled_kernels(settings.policy == "fast")
        self._model = NativeModel(settings.model_path, policy=settings.policy, repacked=self._repacked)
        self._build = build_facts() | {"repacked_tensors": str(len(self._repacked))}
        # what NativeModel does (native.py): exact repacks the tensors that were named, fast whatever this build can
        can_repack = not has_tile_kernels(self._build["system_info"])
        self._is_repacked = bool(self._repacked) if settings.policy == "exact" else can_repack
        self._levels: dict[tuple[str, str, str], LevelRecord] = {}
        self._open: _OpenTest | None = None

    def ready(self) -> Result:
        used, count = (self._model.metadata(f"{self._card.architecture}.{key}") for key in _EXPERTS)
        is_mixture = used is not None and count is not None and int(count) > 0
        return {
            "event": "ready",
            "description": self._model.description,
            "build": self._build,
            "is_repacked": self._is_repacked,
            "expert_share": int(used or 0) / int(count or 1) if is_mixture else 1.0,
            "pid": os.getpid(),
        }

    def answer(self, request: Mapping[str, Any]) -> Result:
        arguments = dict(request)
        operations: dict[str, Callable[..., Result]] = {
            "open": self.open,
            "run": self.run,
            "shut": self.shut,
            "curve": self.curve,
        }
        try:
            return {"event": "result", **operations[arguments.pop("op")](**arguments)}
        except EdgeLLMError:
            self.shut()
            raise

    def open(self, test: Mapping[str, Any], is_warm: bool = True) -> Result:
        """A context for `test`; warmed up, as llama-bench does, by its prompt and one step."""
        self.shut()
        wanted = Wanted(**test)
        settings = self._fits(
            replace(
                self._settings,
                n_ctx=wanted.cells,
                slots=wanted.n_parallel,
                chunk_tokens=wanted.micro_batch,
                k_type=wanted.type_k,
                v_type=wanted.type_v,
                flash_attention=wanted.flash_attention,
                threads=wanted.n_threads,
                threads_batch=wanted.n_threads_batch,
            )
        )
        level = self._level(settings)
        _give_back()
        self._open = _OpenTest(self._model, settings, wanted)
        if is_warm:
            self._open.warm_up()
        return {"level": level.level, "level_reason": level.reason, "level_rows": level.width}

    def run(self, seed: int = 0) -> Result:
        """One repetition of the open test."""
        if self._open is None:
            raise EngineFailed("no test is open")
        return self._open.run(seed)

    def shut(self) -> Result:
        if self._open is not None:
            self._open.close()
            self._open = None
        return {}

    def curve(self, test: Mapping[str, Any]) -> Result:
        """Peak memory of filling a context of `cells` with a prompt, and of decoding at its end."""
        tokens = int(test["cells"]) - _CURVE_STEPS
        self.open({**test, "n_prompt": tokens, "n_gen": 0, "n_depth": 0}, is_warm=False)
        assert self._open is not None
        prefill = self._open.run(0)
        decode = self._open.follow(_CURVE_STEPS)
        self.shut()
        return {"prefill_peak_bytes": prefill["rss_peak_bytes"], "decode_peak_bytes": decode, "tokens": tokens}

    def close(self) -> None:
        self.shut()
        self._model.close()

    def _fits(self, settings: LlamaSettings) -> LlamaSettings:
        """`settings`, unless their memory sum is more than the board had free at the start."""
        if settings.available_bytes is not None:
            what = f"{settings.model_name} with {settings.slots} x {settings.n_ctx} cells"
            check_fits(model_memory(self._card, settings, self._repacked), settings.available_bytes, what, _ADVICE)
        return settings

    def _level(self, settings: LlamaSettings) -> LevelRecord:
        """What `edge-llm verify` found for these kernels on this node."""
        key = (settings.k_type, settings.v_type, settings.effective_flash_attention)
        if key not in self._levels:
            identity = identity_of(self._model, self._card, settings, self._build)
            self._levels[key] = recorded_level(settings, identity, self._build)
        return self._levels[key]


class _OpenTest:
    """A context and the test that runs in it."""

    def __init__(self, model: NativeModel, settings: LlamaSettings, test: Wanted) -> None:
        self._test, self._rows = test, settings.rows
        self._n_vocab = model.n_vocab
        outputs = settings.slots
        self._context = NativeContext(model, settings.context(n_seq=settings.slots, is_unified=False, outputs=outputs))
        self._depth = 0  # tokens that lie in every sequence before a repetition

    def warm_up(self) -> None:
        draw = random.Random(-1)
        if self._test.n_prompt:
            self._prompt(self._test.n_prompt, 0, draw)
        if self._test.n_gen:
            self._decode(1, self._test.n_prompt, draw)
        self._context.clear()

    def run(self, seed: int) -> Result:
        """Nanoseconds of one repetition, and what the process used in it."""
        test, draw = self._test, random.Random(seed)
        self._go_to_depth(draw)
        is_fresh = reset_peak_memory(os.getpid())
        cpu_before_s, started_ns = time.process_time(), time.perf_counter_ns()
        if test.n_prompt:
            self._prompt(test.n_prompt, test.n_depth, draw)
        prompt_ns = time.perf_counter_ns() - started_ns
        if test.n_gen:
            self._decode(test.n_gen, test.n_depth + test.n_prompt, draw)
        elapsed_ns = time.perf_counter_ns() - started_ns
        return {
            "elapsed_ns": elapsed_ns,
            "prompt_ns": prompt_ns if test.n_prompt else 0,
            "cpu_s": time.process_time() - cpu_before_s,
            "rss_peak_bytes": peak_memory_bytes(os.getpid()),
            "is_peak_of_phase": is_fresh,
        }

    def follow(self, steps: int) -> int | None:
        """Decode behind a prompt that has just been computed; the highest memory meanwhile."""
        reset_peak_memory(os.getpid())
        self._decode(steps, self._test.n_prompt, random.Random(0))
        return peak_memory_bytes(os.getpid())

    def close(self) -> None:
        self._context.close()

    def _go_to_depth(self, draw: random.Random) -> None:
        """Every sequence holds `n_depth` tokens: computed once, then only cut back to."""
        depth, sequences = self._test.n_depth, range(self._test.n_parallel)
        if depth and self._depth == depth and all(self._context.truncate(one, depth) for one in sequences):
            return
        self._context.clear()
        self._depth = 0
        if not depth:
            return
        self._prompt(depth, 0, draw)
        if len(sequences) > 1:
            state = self._context.state(0)
            for one in sequences[1:]:
                self._context.set_state(one, state)
            del state
            _give_back()
        self._depth = depth

    def _prompt(self, tokens: int, p0: int, draw: random.Random) -> None:
        """Tokens of the first sequence, in calls of a micro-batch; the last one gives logits."""
        end = p0 + tokens
        for begin in range(p0, end, self._rows):
            count = min(self._rows, end - begin)
            ids = [draw.randrange(self._n_vocab) for _ in range(count)]
            self._context.prompt(ids, begin, 0, wants_last=begin + count == end)

    def _decode(self, steps: int, p0: int, draw: random.Random) -> None:
        """One token of every sequence a step."""
        sequences = list(range(self._test.n_parallel))
        for position in range(p0, p0 + steps):
            ids = [draw.randrange(self._n_vocab) for _ in sequences]
            self._context.decode(ids, [position] * len(ids), sequences)


def _give_back() -> None:
    """Return to the system what was freed: it would count as memory of the next test (glibc keeps it)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _settings(arguments: Sequence[str]) -> LlamaSettings:
    parser = argparse.ArgumentParser(prog="python -m edge_llm.engine.measure_node", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--sha256", default="", help="Of the file: levels are recorded by it.")
    parser.add_argument("--policy", choices=["exact", "fast"], default="exact")
    parser.add_argument("--levels-dir", type=Path)
    given = parser.parse_args(arguments)
    return LlamaSettings(
        model_path=given.model,
        model_name=given.name or given.model.stem,
        model_sha256=given.sha256,
        serves_prompts=False,
        policy=given.policy,
        levels_dir=given.levels_dir,
        available_bytes=available_memory_bytes(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests from stdin until it ends."""
    settings = _settings(sys.argv[1:] if arguments is None else arguments)
    return serve(lambda: NodeBench(settings))


if __name__ == "__main__":
    sys.exit(main())
