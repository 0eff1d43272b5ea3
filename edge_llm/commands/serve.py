"""`edge-llm serve worker|gateway|key|api-key`: the processes of a cluster, the same ones that `up` starts."""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import click

from edge_llm.config import GatewayConfig, PolicyName, WorkerConfig, load_settings
from edge_llm.pages import huge_page_environment


def _share(_context: click.Context, _option: click.Parameter, file: Path | None) -> Path | None:
    """One file: the section `catalogue` is read where models are looked up, the others by the processes of `up`."""
    if file is not None:
        os.environ["EDGE_LLM_CONFIG"] = str(file.absolute())
    return file


SLO_SETTINGS: Final = {"ttft": "slo_ttft_s", "tpot": "slo_tpot_s"}
config_option = click.option(
    "--config", type=click.Path(path_type=Path), callback=_share, help="Configuration file (YAML)."
)


class SloOption(click.ParamType[Mapping[str, float]]):
    """`ttft=2.5,tpot=0.1`, either or both, in seconds."""

    name = "LIMITS"

    def convert(
        self, value: object, param: click.Parameter | None, context: click.Context | None
    ) -> Mapping[str, float]:
        if isinstance(value, Mapping):  # a converted value may be converted again
            return value
        found: dict[str, float] = {}
        for part in str(value).split(","):
            name, _, seconds = part.strip().partition("=")
            if name not in SLO_SETTINGS or SLO_SETTINGS[name] in found:
                self.fail(f"{value!r} is not like ttft=2.5,tpot=0.1 (seconds; either or both)", param, context)
            try:
                found[SLO_SETTINGS[name]] = float(seconds)
            except ValueError:
                self.fail(f"{name} is a number of seconds, not {seconds!r}", param, context)
            if not 0 < found[SLO_SETTINGS[name]] < math.inf:
                self.fail(f"{name} is more than 0 s and finite, not {seconds}", param, context)
        return found


slo_option = click.option(
    "--slo",
    type=SloOption(),
    help="Limits of latency that workers are chosen by, in seconds: ttft=2.5,tpot=0.1 (default: none).",
)


@click.group()
def serve() -> None:
    """Run one process of a cluster in the foreground."""


@serve.command()
@config_option
@click.option("--model", help="Name in models.yaml or path of a .gguf file.")
@click.option("--role", type=click.Choice(["prefill", "decode", "mixed"]))
@click.option("--name", help="Name of this worker in the cluster (default: role and port).")
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port; 0 takes a free one.")
@click.option("--n-ctx", type=int, help="KV cells per sequence.")
@click.option("--slots", type=int, help="Sequences that decode at once.")
@click.option("--threads", type=int, help="Threads for decode; 0 = all cores.")
@click.option("--threads-batch", type=int, help="Threads for prefill; 0 = all cores.")
@click.option("--chunk-tokens", type=int, help="Prompt tokens per chunk; the same on all nodes.")
@click.option(
    "--handoff",
    type=click.Choice(["overlapped", "serialized"]),
    help="KV for others leaves while the prompt is read (default), or after it: to see what overlapping saves.",
)
@click.option("--k-type", type=click.Choice(["f16", "f32", "bf16", "q8_0", "q4_0"]), help="Type of the K cache.")
@click.option("--v-type", type=click.Choice(["f16", "f32", "bf16", "q8_0", "q4_0"]), help="Type of the V cache.")
@click.option("--policy", type=click.Choice(["exact", "fast"]), help="Kernel policy.")
@click.option("--flash-attention", type=click.Choice(["auto", "on", "off"]))
@click.option("--level-cap", type=click.Choice(["exact", "same-plan", "none"]), help="Promise no more than this.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Cluster key (`edge-llm serve key`).")
@click.option("--key-fd", type=int, hidden=True)
@click.option("--allowed-peers", multiple=True, help="Networks prefill workers may be in (CIDR).")
@click.option("--memory-limit-bytes", type=int, help="Refuse to start above this; 0 = what the board has free.")
@click.option("--simulate", is_flag=True, default=None, help="A clock instead of a model (load and fault tests).")
@click.option("--simulated-prompt-tokens-per-s", type=float, help="Speed of a simulated prompt; 0 = no wait.")
@click.option("--simulated-step-s", type=float, help="What a simulated decode step takes.")
@click.option("--simulated-row-s", type=float, help="What each sequence adds to a simulated decode step.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--metrics-alias", type=click.Choice(["none", "vllm"]), help="Show /metrics under these names, too.")
@click.option("--announce", is_flag=True, default=None, hidden=True)
def worker(config: Path | None, allowed_peers: tuple[str, ...], **flags: Any) -> None:
    """A worker: one model, one engine thread, role prefill, decode or mixed."""
    _start_again_with_huge_pages()
    from edge_llm.worker.serve import run_worker

    run_worker(load_settings(WorkerConfig, flags | {"allowed_peers": allowed_peers or None}, config))


@serve.command()
@config_option
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port of the endpoint (default 8080).")
@click.option("--name", help="Name of this gateway (default: a random one).")
@click.option("--workers-file", type=click.Path(path_type=Path), help="Who the workers are (YAML, see README).")
@click.option("--kubernetes-namespace", metavar="NAMESPACE", help="Find the workers in this namespace instead.")
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="For that, outside a pod (default: as kubectl).")
@click.option("--key-file", type=click.Path(path_type=Path), help="Cluster key (`edge-llm serve key`).")
@click.option("--key-fd", type=int, hidden=True)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--metrics-alias", type=click.Choice(["none", "vllm"]), help="Show /metrics under these names, too.")
@click.option("--api-keys-file", type=click.Path(path_type=Path), help="Who may use it (`edge-llm serve api-key`).")
@click.option("--no-auth", is_flag=True, default=None, help="Let everybody on this machine in; only on loopback.")
@click.option("--drain-s", type=float, help="How long answers may go on after SIGTERM (default 30).")
@click.option(
    "--policy",
    type=click.Choice(get_args(PolicyName)),
    help="How workers are chosen; all but `predicted` (default) are there to be compared with.",
)
@click.option("--policy-seed", type=int, help="For the policy `random`.")
@click.option("--queue-length", type=int, help="Requests that may wait (default 256).")
@click.option("--queue-predicted-wait-s", type=float, help="Refuse who would wait longer (default 30).")
@click.option("--queue-wait-s", type=float, help="Refuse who waited so long after all (default 300).")
@slo_option
@click.option("--announce", is_flag=True, default=None, hidden=True)
def gateway(config: Path | None, slo: Mapping[str, float] | None, **flags: Any) -> None:
    """The gateway: one OpenAI-style endpoint in front of all workers."""
    from edge_llm.gateway.serve import run_gateway

    settings = load_settings(GatewayConfig, {**flags, **(slo or {})}, config)
    if flags["no_auth"] and flags["api_keys_file"] is None:  # the command line beats what a file says
        settings = settings.model_copy(update={"api_keys_file": None})
    run_gateway(settings)


def _start_again_with_huge_pages() -> None:
    """Exec this command once more where that gives its buffers huge pages; process id and descriptors stay."""
    if added := huge_page_environment(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "edge_llm", *sys.argv[1:]], {**os.environ, **added})


@serve.command()
def key() -> None:
    """Print a new cluster key for --key-file; keep the file readable by its owner only."""
    click.echo(f"k{secrets.token_hex(2)}:{secrets.token_hex(32)}")


@serve.command("api-key")
@click.option("--name", required=True, help="Names the key in logs and limits.")
@click.option("--tenant", help="Whose kept prompts it shares (default: the name).")
@click.option("--operator", is_flag=True, help="It may also take workers out and give them other roles, and sees all.")
def api_key(name: str, tenant: str | None, operator: bool) -> None:
    """Make an API key: the key itself on stderr, once; its line for --api-keys-file on stdout, to be appended there.

    \b
      edge-llm serve api-key --name alice >> api-keys.yaml && chmod 600 api-keys.yaml
    """
    from edge_llm.gateway.keys import new_key

    made, line = new_key(name, tenant or name, is_operator=operator)
    click.echo(f"the key of {name}, shown this once: {made}", err=True)
    click.echo(line)
