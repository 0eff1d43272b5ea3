"""`edge-llm cluster ...`: render a cluster that fits, look at one that runs, change who does what in it."""

from __future__ import annotations

import click

from edge_llm.commands.cluster_orders import drain, role
from edge_llm.commands.cluster_render import render
from edge_llm.commands.cluster_status import status
from edge_llm.commands.cluster_top import top


@click.group()
def cluster() -> None:
    """Render manifests that fit, show a running cluster, take workers out, move roles."""


for _command in (drain, render, role, status, top):
    cluster.add_command(_command)
