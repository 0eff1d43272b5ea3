"""A gateway process: settings in, port bound, HTTP served until told to stop."""

from __future__ import annotations

import gc

from edge_llm.cluster.static import StaticFile
from edge_llm.config import GatewayConfig
from edge_llm.errors import ConfigError
from edge_llm.gateway.app import Gateway, create_app
from edge_llm.gateway.edge import is_loopback
from edge_llm.gateway.keys import Credentials, KeysFile, NoKeys
from edge_llm.gateway.wire import bound_connections, bounded
from edge_llm.serving import Server, bind, read_keys


def run_gateway(config: GatewayConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError before the port answers."""
    if config.workers_file is None:
        raise ConfigError("no workers: name them in a file and give it with --workers-file (README shows one)")
    discovery = StaticFile(config.workers_file)
    discovery.places()
    credentials = credentials_of(config)
    gateway = Gateway(config, read_keys(config.key_file, config.key_fd), discovery, credentials)
    bound = bind(config.host, config.port)
    bound_connections(bound, config.stall_s)
    server = Server(
        create_app(gateway),
        bound,
        drain=gateway.drain,
        log_level=config.log_level,
        http=bounded(config.max_head_bytes, config.read_s),
    )
    # what is loaded stays: a full collection that walks it would hold up every stream and every newcomer
    gc.collect()
    gc.freeze()
    server.run(config.announce, {"gateway": gateway.name})


def credentials_of(config: GatewayConfig) -> Credentials:
    """The keys file, or nobody's keys where that was said and only this machine can come in. Raises ConfigError."""
    if config.api_keys_file is not None:
        if config.no_auth:
            raise ConfigError("--no-auth and --api-keys-file exclude each other: say whether keys are needed")
        return KeysFile(config.api_keys_file)
    if not is_loopback(config.host):
        raise ConfigError(
            f"{config.host} can be reached from outside, so API keys are needed: `edge-llm serve api-key --name NAME "
            ">> api-keys.yaml`, `chmod 600 api-keys.yaml`, then --api-keys-file api-keys.yaml"
        )
    if not config.no_auth:
        raise ConfigError(
            "no API keys: give them with --api-keys-file (`edge-llm serve api-key` makes one), or let everybody on "
            "this machine in with --no-auth"
        )
    return NoKeys()
