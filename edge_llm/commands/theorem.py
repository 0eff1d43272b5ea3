"""`edge-llm bench theorem`: split equals whole, together equals alone, proven on a running cluster."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from edge_llm.bench.layout import Layout
from edge_llm.bench.theorem import Proof, cases, prove
from edge_llm.commands.local_cluster import local_cluster
from edge_llm.commands.progress import progress
from edge_llm.config import DEFAULT_MODEL


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--prompts", type=click.IntRange(1, 10_000), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other prompts.")
@click.option("--url", help="Prove it on this cluster instead of a local one started for it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def theorem(as_json: bool, **options: Any) -> None:
    """Compare token ids: unsplit, split, and split among seven others. Exits 3 when one differs."""
    with progress("answers") as advance:
        proof = asyncio.run(_prove(advance=advance, **options))
    if as_json:
        click.echo(json.dumps(proof.as_json()))
    else:
        click.echo(_words(proof))
    sys.exit(0 if proof.holds else 3)


async def _prove(model: str, prompts: int, seed: int, url: str | None, advance: Callable[[int, int], None]) -> Proof:
    """On the cluster given, or on one of our own with eight slots."""
    if url is not None:
        return await prove(url, None, lambda chunk: cases(prompts, chunk, seed), advance)
    layout = Layout("theorem", prefill=1, decode=1, options=("--slots", "8"))
    async with local_cluster(layout, model) as cluster:
        return await prove(cluster.url, None, lambda chunk: cases(prompts, chunk, seed), advance)


def _words(proof: Proof) -> str:
    verdict = "holds" if proof.holds else "does NOT hold"
    lines = [f"{verdict}: {proof.prompts} prompts, {proof.comparisons} comparisons, {proof.tokens} tokens compared"]
    return "\n".join(
        [
            *lines,
            *(f"  different: {text}" for text in proof.differences),
            *(f"  unproven: {text}" for text in proof.unproven),
        ]
    )
