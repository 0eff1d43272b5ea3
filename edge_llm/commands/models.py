"""`edge-llm models ...`: what the catalogue has, and proof that the files are what they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_llm.catalogue.fetch import fetch, fetch_unverified, installed_path, remember_sha256, sha256_of
from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.catalogue.manifest import ModelEntry, load_listed, load_manifest, record_pin, write_pin
from edge_llm.catalogue.resolve import find, is_path, resolve
from edge_llm.commands.progress import progress
from edge_llm.config import DEFAULT_MODEL, cache_dir
from edge_llm.errors import CatalogueError, ChecksumMismatch
from edge_llm.plan.sizes import facts_of

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """List, fetch and check models."""


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """All entries of models.yaml: size, licence, whether pinned and fetched."""
    rows = [_row(entry) for entry in load_manifest().values()]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        size = f"{row['size'] / (1 << 20):.{0 if row['size'] >= 10 << 20 else 1}f} MiB" if row["size"] else "?"
        click.echo(f"{row['name']:<32} {row['state']:<11} {size:>10}  {row['licence']}")


@models.command()
@click.argument("model")
@json_option
def show(model: str, as_json: bool) -> None:
    """What the GGUF header of MODEL (a name or a path) says; fetches it if needed."""
    with progress(model, is_bytes=True) as report:
        found = resolve(model, report)
    _print(_facts(read_card(found.path), found.sha256), as_json)


@models.command()
@click.argument("model", default=DEFAULT_MODEL)
@json_option
def pull(model: str, as_json: bool) -> None:
    """Fetch MODEL (the default one when none is named), verify it, install it."""
    entry = find(model)
    with progress(entry.file, is_bytes=True) as report:
        path = fetch(entry, report)
    _print({"model": entry.name, "path": str(path), "sha256": entry.sha256}, as_json)


@models.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Read the installed files of MODEL... (all fetched ones when none is named) again and compare their sha256.

    Of a path, the header is read and the sha256 said: nothing is known to compare it with. With --json a line for each.
    """
    problems = []
    for name in names or [entry.name for entry in load_manifest().values() if installed_path(entry).is_file()]:
        try:
            _print({"model": name, "sha256": _verified(name), "ok": True}, as_json)
        except CatalogueError as error:
            problems.append(error.message)
            if as_json:
                _print({"model": name, "ok": False, "problem": error.message}, as_json)
    if problems:
        raise CatalogueError("\n  ".join(problems))


@models.command()
@click.argument("model")
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="Write it into this models.yaml instead.")
@json_option
def pin(model: str, write: Path | None, as_json: bool) -> None:
    """Fetch MODEL without a hash to compare with, and record the size and sha256 that came.

    What was recorded on this machine before is what --write takes over."""
    entry = find(model)
    listed = None if write is None else load_listed(write).get(model)
    if entry.sha256 is not None and (listed is None or listed.sha256 is not None):
        raise CatalogueError(f"{model} has a sha256 already ({entry.sha256}): `edge-llm models pull {model}`")
    with progress(entry.file, is_bytes=True) as report:
        if entry.sha256 is None:
            path, size, digest = fetch_unverified(entry, report)
        else:
            path, digest = fetch(entry, report), entry.sha256
            size = path.stat().st_size
    if write is None:
        write = record_pin(entry.name, size, digest)
    else:
        write_pin(entry.name, size, digest, write)
    _print({"model": model, "path": str(path), "size": size, "sha256": digest, "recorded": str(write)}, as_json)


@models.command()
@click.argument("model")
@click.argument("kind", metavar="TYPE")
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def quantize(model: str, kind: str, target: Path, as_json: bool) -> None:
    """Write MODEL in another format (Q4_0, Q8_0, Q4_K_M, ...) to the file TARGET, a note of its origin beside it."""
    from edge_llm.engine.quantize import quantize as convert

    with progress(model, is_bytes=True) as report:
        source = resolve(model, report).path
    _print({"path": str(target), **asdict(convert(source, target, kind))}, as_json)


@models.command("random")
@click.argument("shape")
@click.argument("kind", metavar="TYPE", default="Q4_0")
@json_option
def random_model(shape: str, kind: str, as_json: bool) -> None:
    """Make a model of SHAPE with random weights in the cache: it says nothing of sense, and is as fast as a real one.

    Shapes: llama-3.2-1b (1.24 billion weights; 2.5 GB on the disk beside the file), and small ones for tests: dense,
    sliding-window, recurrent, wide-kv, head-size-256, mqa, moe.
    """
    from edge_llm.engine.random_model import make_model

    path = make_model(cache_dir() / "random", shape, kind)
    _print({"path": str(path), "size": path.stat().st_size, "sha256": sha256_of(path)}, as_json)


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<22} {'-' if value is None else value}")


def _verified(name: str) -> str:
    """The sha256 of its file. Raises CatalogueError when it is not what it should be."""
    if is_path(name):
        path = resolve(name).path
        read_card(path)
        return sha256_of(path)
    entry = find(name)
    path = installed_path(entry)
    if entry.sha256 is None:
        raise CatalogueError(f"{entry.name} has no sha256 to compare with: `edge-llm models pin {entry.name}`")
    if not path.is_file():
        raise CatalogueError(f"{entry.name} is not installed: `edge-llm models pull {entry.name}`")
    digest = sha256_of(path)
    remember_sha256(path, digest)
    if digest != entry.sha256:
        raise ChecksumMismatch(
            f"{path} has sha256 {digest}, models.yaml says {entry.sha256}: get it again with "
            f"`edge-llm models pull {entry.name}`"
        )
    return digest


def _row(entry: ModelEntry) -> dict[str, Any]:
    is_fetched = installed_path(entry).is_file()
    state = "fetched" if is_fetched else "pinned" if entry.sha256 else "not pinned"
    return {
        "name": entry.name,
        "family": entry.family,
        "state": state,
        "size": entry.size,
        "sha256": entry.sha256,
        "licence": entry.licence,
        "note": entry.note,
        "sources": [source.words for source in entry.sources],
    }


def _facts(card: ModelCard, sha256: str) -> dict[str, Any]:
    return {
        "file": Path(card.path).name,
        "sha256": sha256,
        "architecture": card.architecture,
        "name": card.name,
        "quantization": card.quantization,
        "parameters": card.n_params,
        "file_bytes": card.file_bytes,
        "weights_bytes": card.weights_bytes,
        "memory": card.memory,
        "sliding_window": card.sliding_window or None,
        "layers": card.n_layer,
        "heads": card.n_head,
        "kv_heads": max(card.n_head_kv, default=0),
        "head_size_k": card.head_size_k,
        "head_size_v": card.head_size_v,
        "kv_bytes_per_token": card.kv_bytes_per_token(),
        "context": card.n_ctx_train,
        "vocabulary": card.vocab_size,
        **facts_of(card),
        "chat_template": card.has_chat_template,
        "licence": card.licence,
    }
