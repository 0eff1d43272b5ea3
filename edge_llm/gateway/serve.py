"""A gateway process: settings in, port bound, HTTP served until told to stop."""

from __future__ import annotations

import asyncio
import gc
from functools import partial

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.static import StaticFile
from edge_llm.config import GatewayConfig
from edge_llm.errors import ConfigError
from edge_llm.gateway.app import Gateway, create_app
from edge_llm.gateway.edge import is_loopback
from edge_llm.gateway.keys import Credentials, KeysFile, NoKeys
from edge_llm.gateway.wire import bound_connections, bounded
from edge_llm.serving import Server, bind, configure_logging, raise_file_limit, read_keys


def run_gateway(config: GatewayConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError before the port answers."""
    configure_logging(config.log_level)
    raise_file_limit()
    discovery = discovery_of(config)
    credentials = credentials_of(config)
    gateway = Gateway(config, read_keys(config.key_file, config.key_fd), discovery, credentials)
    bound = bind(config.host, config.port)
    bound_connections(bound, config.stall_s)
    server = Server(
        create_app(gateway),
        bound,
        drain=gateway.drain,
        http=bounded(config.max_head_bytes, config.read_s),
        idle_s=config.idle_s,
    )
    # what is loaded stays: a full collection that walks it would hold up every stream and every newcomer
    gc.collect()
    gc.freeze()
    server.run(config.announce, {"gateway": gateway.name})


def discovery_of(config: GatewayConfig) -> Discovery:
    """A file or a namespace that says where workers are, one of the two. Raises ConfigError where it cannot be used."""
    if (config.workers_file is None) == (config.kubernetes_namespace is None):
        both = "not both" if config.workers_file else "this gateway was given neither"
        raise ConfigError(
            "say where the workers are, by --workers-file FILE (README shows one) or, in a cluster, by "
            f"--kubernetes-namespace NAMESPACE; {both}"
        )
    if config.workers_file is not None:
        file = StaticFile(config.workers_file)
        file.places()
        return file
    assert config.kubernetes_namespace is not None
    # a board without a cluster does not pay for the client's import
    from edge_llm.cluster.kubernetes import Kubernetes, client_of

    connect = partial(client_of, config.kubeconfig)
    asyncio.run(connect())  # so that a file that cannot be used is said before the port answers
    return Kubernetes(connect, config.kubernetes_namespace)


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
    if "*" in config.cors_origins:
        raise ConfigError(
            "cors_origins has *, and there are no API keys: every page that is open in a browser here could change "
            "workers; name the origins, or make keys"
        )
    return NoKeys()
