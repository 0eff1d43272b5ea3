"""`edge-llm models ...`: what the catalogue has, and proof that the files are what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edge_llm.catalogue.fetch import fetch, fetch_unverified, installed_path, sha256_of
from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.catalogue.manifest import ModelEntry, load_manifest, record_pin
from edge_llm.catalogue.resolve import find, resolve
from edge_llm.commands.progress import progress
from edge_llm.config import DEFAULT_MODEL
from edge_llm.errors import ChecksumMismatch

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
        size = f"{row['size'] >> 20} MiB" if row["size"] else "?"
        click.echo(f"{row['name']:<32} {row['state']:<11} {size:>10}  {row['licence']}")


@models.command()
@click.argument("model")
@json_option
def show(model: str, as_json: bool) -> None:
    """What the GGUF header of MODEL says (fetches it if needed)."""
    with progress(model, is_bytes=True) as report:
        card = read_card(resolve(model, report).path)
    facts = _facts(card)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<22} {value}")


@models.command()
@click.argument("model", default=DEFAULT_MODEL)
def pull(model: str) -> None:
    """Fetch MODEL (the default one when none is named), verify it, install it."""
    entry = find(model)
    with progress(entry.file, is_bytes=True) as report:
        path = fetch(entry, report)
    click.echo(path)


@models.command()
@click.argument("model")
def verify(model: str) -> None:
    """Hash the installed file of MODEL again and compare."""
    entry = find(model)
    path = installed_path(entry)
    if not path.is_file():
        raise ChecksumMismatch(f"{model} is not installed: `edge-llm models pull {model}`")
    digest = sha256_of(path)
    if digest != entry.sha256:
        raise ChecksumMismatch(f"{path} has sha256 {digest}, models.yaml says {entry.sha256}: remove it and pull again")
    click.echo(f"{model} ok {digest}")


@models.command()
@click.argument("model")
def pin(model: str) -> None:
    """Fetch MODEL without a hash to compare with, and record the size and sha256 that came."""
    entry = find(model)
    with progress(entry.file, is_bytes=True) as report:
        path, size, digest = fetch_unverified(entry, report)
    read_card(path)
    where = record_pin(entry.name, size, digest)
    click.echo(f"{model} pinned: {size} bytes, sha256 {digest} (in {where})")


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
        "sources": [source.words for source in entry.sources],
    }


def _facts(card: ModelCard) -> dict[str, Any]:
    return {
        "file": Path(card.path).name,
        "architecture": card.architecture,
        "name": card.name,
        "quantization": card.quantization,
        "parameters": card.n_params,
        "file_bytes": card.file_bytes,
        "memory": card.memory,
        "sliding_window": card.sliding_window or None,
        "layers": card.n_layer,
        "heads": card.n_head,
        "kv_heads": max(card.n_head_kv, default=0),
        "head_size": card.head_size_k,
        "kv_bytes_per_token": card.kv_bytes_per_token(),
        "context": card.n_ctx_train,
        "vocabulary": card.vocab_size,
        "chat_template": card.has_chat_template,
        "licence": card.licence,
    }
