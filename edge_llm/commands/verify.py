"""`edge-llm verify`: how exact is this model, on this machine, by this build?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_llm.commands.progress import progress
from edge_llm.config import DEFAULT_MODEL, cache_dir, levels_dir

if TYPE_CHECKING:
    from edge_llm.engine.level import LevelRecord


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--random", "random_format", help="A small random-weight model in this format instead (Q4_0, Q6_K, ...).")
@click.option(
    "--shape",
    default="dense",
    show_default=True,
    help="Shape of the random model: dense, sliding-window, recurrent, wide-kv, head-size-256, mqa, moe, llama-3.2-1b.",
)
@click.option("--policy", type=click.Choice(["exact", "fast"]), default="exact", show_default=True)
@click.option("--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--k-type", type=click.Choice(["f16", "f32", "bf16", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--v-type", type=click.Choice(["f16", "f32", "bf16", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--chunk-tokens", type=click.IntRange(8, 1024), default=128, show_default=True)
@click.option("--quick", is_flag=True, help="Depths 0 and 200 only: a look, nothing is recorded.")
@click.option("--no-write", is_flag=True, help="Do not record the level for workers.")
@click.option("--if-unknown", is_flag=True, help="Do nothing when a level is recorded already.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(as_json: bool, quick: bool, no_write: bool, if_unknown: bool, **options: Any) -> None:
    """Compare logits bit for bit and record the level that workers publish. Exits 1 when split differs from whole."""
    from edge_llm.engine.level import UNVERIFIED, read_level, write_level
    from edge_llm.engine.load import load_backend
    from edge_llm.engine.verify import DEPTHS, Report, Verifier, thread_counts

    with progress("loading", is_bytes=True) as report:
        backend = load_backend(_settings(report, **options))
    known = read_level(levels_dir(), backend.facts.identity)
    if if_unknown and known != UNVERIFIED:
        _print_known(known, backend.facts.model_name, as_json)
        backend.close()
        return
    depths = (0, 200) if quick else DEPTHS
    with progress("rows") as advance:
        found: Report = Verifier(backend, depths, threads=thread_counts(), on_progress=advance).run()
    facts = backend.facts
    backend.close()
    if not (quick or no_write):
        write_level(levels_dir(), facts.identity, found.record)
    _print(found, facts.model_name, facts.policy, as_json)
    if quick and not as_json:
        click.echo("a look, which is not recorded: without --quick it is, and workers publish the level")
    if not found.split_equals_whole:
        sys.exit(1)


def _settings(report: Any, **options: Any) -> Any:
    from edge_llm.catalogue.resolve import resolve
    from edge_llm.engine.load import LlamaSettings
    from edge_llm.engine.random_model import make_model

    model = options["model"]
    if options["random_format"]:
        if click.get_current_context().get_parameter_source("model") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--model and --random exclude each other: say which model")
        model = str(make_model(Path(cache_dir()) / "random", options["shape"], options["random_format"]))
    found = resolve(model, report)
    return LlamaSettings(
        model_path=found.path,
        model_name=found.name,
        model_sha256=found.sha256,
        n_ctx=2048,
        slots=8,
        chunk_tokens=options["chunk_tokens"],
        k_type=options["k_type"],
        v_type=options["v_type"],
        policy=options["policy"],
        flash_attention=options["flash_attention"],
    )


def _print_known(known: LevelRecord, model: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"model": model, **asdict(known), "is_recorded": True}))
        return
    click.echo(f"level {known.level} for {model}, recorded before: {known.reason}")


def _print(found: Any, model: str, policy: str, as_json: bool) -> None:
    if as_json:
        rows = [asdict(row) | {"holds": row.holds} for row in found.rows]
        head = {"model": model, "policy": policy, "level": found.level, "reason": found.reason, "width": found.width}
        click.echo(json.dumps({**head, "seconds": round(found.seconds, 1), "rows": rows}))
        return
    for row in found.rows:
        mark = "equal    " if row.holds else "DIFFERENT"
        click.echo(f"{mark} {row.name:<10} {row.compared:>5} compared  {row.seconds:6.1f} s  {row.question}")
        if not row.holds:
            detail = (
                row.error or f"{row.different} differ, first at {row.first_divergence}, by {row.largest_difference:.3g}"
            )
            click.echo(f"          {detail}")
    click.echo(f"level {found.level} for {model}, policy {policy}: {found.reason}")
