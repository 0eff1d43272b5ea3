"""A gateway process: settings in, port bound, HTTP served until told to stop."""

from __future__ import annotations

import asyncio

from edge_llm.cluster.static import StaticFile
from edge_llm.config import GatewayConfig
from edge_llm.errors import ConfigError
from edge_llm.gateway.app import Gateway, create_app
from edge_llm.serving import Server, bind, read_keys


def run_gateway(config: GatewayConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError before the port answers."""
    if config.workers_file is None:
        raise ConfigError("no workers: name them in a file and give it with --workers-file (README shows one)")
    discovery = StaticFile(config.workers_file)
    discovery.places()
    gateway = Gateway(config, read_keys(config.key_file, config.key_fd), discovery)
    bound = bind(config.host, config.port)
    server = Server(create_app(gateway), bound, drain=_nothing, log_level=config.log_level)
    server.run(config.announce, {"gateway": gateway.name})


async def _nothing() -> None:
    """Streams that run are given uvicorn's grace."""
    await asyncio.sleep(0)
