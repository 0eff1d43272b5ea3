"""`edge-llm`: the command tree. Each command parses, calls one function, prints.

Owns names, lazy loading (a command imports only what it needs: a Pi pays seconds for llama_cpp and onnxruntime) and
the translation of our errors into one line and an exit code: 0 ok, 1 failure, 2 usage, 3 threshold failed,
130 interrupted. The commands live in edge_llm/commands, one module each, because together they exceed one page.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import click

import edge_llm
from edge_llm.errors import EdgeLLMError

_COMMANDS: Final = {
    "bench": "edge_llm.commands.bench:bench",
    "chat": "edge_llm.commands.chat:chat",
    "cluster": "edge_llm.commands.cluster:cluster",
    "doctor": "edge_llm.commands.doctor:doctor",
    "down": "edge_llm.commands.up:down",
    "models": "edge_llm.commands.models:models",
    "serve": "edge_llm.commands.serve:serve",
    "status": "edge_llm.commands.up:status",
    "up": "edge_llm.commands.up:up",
    "verify": "edge_llm.commands.verify:verify",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeLLMError as error:
            click.echo(f"edge-llm: {error.message}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edge_llm.__version__)
def cli() -> None:
    """Serve GGUF models on small CPU clusters, prefill and decode split across nodes, token for token exact."""


def main() -> None:
    """Entry point of the `edge-llm` command."""
    try:
        cli(prog_name="edge-llm", windows_expand_args=False)
    except KeyboardInterrupt:  # while a command was being imported
        sys.exit(130)
    sys.exit(0)
