"""`edge-llm bench theorem`: split equals whole, together equals alone, proven on a running cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from edge_llm.commands.endpoint import Address
from edge_llm.commands.in_cluster import InCluster
from edge_llm.commands.measuring import command_line, finish, json_option, output_option, steps, until_interrupted
from edge_llm.config import DEFAULT_MODEL


@click.command(cls=InCluster)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--prompts", type=click.IntRange(1, 10_000), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other prompts.")
@click.option("--url", type=Address(), help="Prove it on this cluster instead of a local one started for it.")
@click.option("--api-key-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A key for --url.")
@output_option
@json_option
def theorem(
    model: str, prompts: int, seed: int, url: str | None, api_key_file: Path | None, output: Path, as_json: bool
) -> None:
    """Compare token ids: unsplit, split, and split among seven others. Exits 3 when one differs."""
    from edge_llm.bench.run import Run
    from edge_llm.bench.theorem import Proof, measure

    if api_key_file is not None and url is None:
        raise click.UsageError("--api-key-file is for the gateway at --url")
    config = {"prompts": prompts, "seed": seed, "is_own": url is None}
    proof, run = Proof(), Run("theorem", command_line(), config, folder=output)
    with steps() as report:
        found, is_complete = until_interrupted(
            lambda: asyncio.run(
                measure(
                    _launcher(url, model),
                    prompts,
                    seed,
                    proof,
                    run,
                    lambda done, all_: report("answers", done, all_),
                    {"authorization": f"Bearer {api_key_file.read_text().strip()}"} if api_key_file else None,
                )
            ),
            proof.as_json,
        )
    finish(run, found, is_complete, output, as_json, proof.missed())


def _launcher(url: str | None, model: str) -> Any:
    """The cluster given, or one of our own."""
    from edge_llm.bench.layout import Layout, Started
    from edge_llm.commands.local_cluster import local_cluster

    @asynccontextmanager
    async def given(_layout: Layout) -> AsyncIterator[Started]:
        yield Started(url or "", ())

    return given if url is not None else lambda layout: local_cluster(layout, model)
