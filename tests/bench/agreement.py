"""`bench serve` and a client that shares no code with it, by turns, against one plain llama-server: `make agreement`.

Owns the turns, the ratios of medians and the record. Refuses to know how either client measures. The server has one
core and both clients the other: what differs between them is how they measure, and what the machine did meanwhile. A
shared machine drifts by a few per cent within half a minute, so rounds are short and many.
Needs `make reference-tools`. Exits with 3 when a median differs by more than BAR.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Final

from edge_llm.bench.models import local_model
from edge_llm.bench.processes import pinned
from edge_llm.bench.record import RESULTS_DIR, write
from edge_llm.bench.reference_tools import require
from edge_llm.bench.run import Run
from edge_llm.catalogue.gguf import read_card
from edge_llm.commands.local_cluster import llama_server
from edge_llm.config import DEFAULT_MODEL
from edge_llm.errors import EdgeLLMError

BAR: Final = 0.03
COMPARED: Final = ("ttft_ms", "tpot_ms", "e2el_ms", "output_throughput")
REQUESTS: Final = 4
PROMPT_TOKENS: Final = 150
ANSWER_TOKENS: Final = 32
N_CTX: Final = 2048
SERVER_CORE: Final = 0
CLIENT_CORE: Final = 1
Found = dict[str, float]


def theirs(url: str, vocab_size: int, seed: int) -> Found:
    """As the independent client sees it."""
    sizes = (1, REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS, vocab_size, seed)
    found: Found = json.loads(_output([str(Path(__file__).with_name("independent_client.py")), url, *map(str, sizes)]))
    return found


def ours(url: str, vocab_size: int, seed: int) -> Found:
    """As `bench serve` sees it: the command itself, with a record of its own that nobody keeps."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"--concurrency 1 --warm-up 0 --requests {REQUESTS} --prompts ids --vocab-size {vocab_size}"
        words += f" --prompt-tokens {PROMPT_TOKENS} --answer-tokens {ANSWER_TOKENS} --seed {seed}"
        command = ["-m", "edge_llm", "bench", "serve", "--url", url, *words.split(), "--output", folder, "--json"]
        printed = json.loads(_output(command).splitlines()[-1])
    (contender,) = printed["contenders"].values()
    figures: dict[str, Any] = contender["loads"][0]["figures"]
    values = {name: figures[name] for name in COMPARED}
    return {name: value["median"] if isinstance(value, dict) else value for name, value in values.items()}


def _output(command: Sequence[str]) -> str:
    with pinned([CLIENT_CORE]):
        return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout


def ratios(run: Run) -> dict[str, float]:
    """Median over rounds of ours over theirs; each round has both, so what the machine does in minutes cancels out."""
    found: dict[str, float] = {}
    for name in COMPARED:
        pairs = zip(run.samples.get(f"ours_{name}", []), run.samples.get(f"theirs_{name}", []), strict=False)
        if each := [mine / other for mine, other in pairs]:
            found[f"{name}_ratio"] = round(median(each), 4)
    return found


async def compared(run: Run, rounds: int) -> None:
    """Rounds by turns, each client first in every second one."""
    tools = require("default")
    run.engine("llama-server", tools.facts)
    model = local_model(DEFAULT_MODEL, lambda *_: None)
    run.models.append(model.facts)
    vocab_size = read_card(model.path).vocab_size
    async with llama_server(tools.tool("llama-server"), model.path, SERVER_CORE, 1, N_CTX, ()) as server:
        await asyncio.to_thread(theirs, server.url, vocab_size, rounds)  # the first prompts of a server are slow
        for number in range(rounds):
            with run.one_case("round", number=number):
                for client in (ours, theirs)[:: 1 if number % 2 else -1]:
                    found = await asyncio.to_thread(client, server.url, vocab_size, number)
                    for name in COMPARED:
                        run.add(f"{client.__name__}_{name}", found[name])
            print(f"round {number + 1} of {rounds}: {json.dumps(ratios(run))}", file=sys.stderr)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make agreement ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path(RESULTS_DIR), help="folder of the record")
    asked = parser.parse_args(words)
    sizes = {"requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS, "n_ctx": N_CTX}
    run = Run("agreement", ["make", "agreement", *words], {"rounds": asked.rounds, **sizes}, folder=asked.output)
    is_complete = False
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(compared(run, asked.rounds))
            is_complete = True
    except EdgeLLMError as error:
        print(f"agreement: {error.message}", file=sys.stderr)
        return 2
    found = ratios(run)
    print(json.dumps(found))
    print(f"record: {write(run.record(found, is_complete), asked.output)}")
    if not is_complete:
        return 130
    return 0 if all(abs(value - 1) <= BAR for value in found.values()) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
