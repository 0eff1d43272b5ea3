"""Settings: parsed once, frozen, passed down. Flags beat environment, environment beats the file, the file defaults.

Owns every setting's name, default and bounds, the folders this program uses, and the messages about wrong ones.
Environment names are EDGE_LLM_<SECTION>_<KEY> (EDGE_LLM_WORKER_N_CTX). The file is one YAML with the sections
`worker`, `gateway`, `up` and `catalogue`; its place is --config, EDGE_LLM_CONFIG, or `edge-llm/config.yaml` in the
user's configuration folder. Unknown keys are errors: a typing mistake must not silently become a default.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge_llm.errors import ConfigError

DEFAULT_MODEL: Final = "smollm2-135m-instruct-q4_1"
PRIVATE_NETWORKS: Final = ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
PUBLIC_HUB: Final = "https://huggingface.co"
# Each checkpoint copies the whole sequence while its streams wait: more often, and they do little else.
LEAST_CHECKPOINT_TOKENS: Final = 8
_ENV: Final = "EDGE_LLM"

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Port = Annotated[int, Field(ge=0, le=65535)]
LatencyLimit = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
WorkerRole = Literal["prefill", "decode", "mixed"]
LogLevel = Literal["debug", "info", "warning", "error"]
MetricsAlias = Literal["none", "vllm"]
PolicyName = Literal["predicted", "round_robin", "random", "least_busy"]


class ClosedLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if len(keys) != len(set(map(str, keys))):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerConfig(_Settings):
    """One worker."""

    model: str = DEFAULT_MODEL
    """Name in models.yaml or path of a .gguf file."""
    role: WorkerRole = "mixed"
    """What it does at first; a worker's role is what it reports."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Its name in the cluster; empty: role and port."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """Port to listen on; 0 takes a free one."""
    n_ctx: Annotated[int, Field(ge=64, le=1 << 20)] = 4096
    """KV cells per sequence: prompt and answer together."""
    slots: Annotated[int, Field(ge=1, le=64)] = 8
    """Sequences that decode at once; memory grows with slots x n_ctx."""
    spare_slots: Annotated[int, Field(ge=0, le=64)] = 2
    """Slots of a worker of role prefill, for when the decode workers are full or gone; none where memory is short."""
    spare_prompts: bool = True
    """Whether a worker of role decode may compute prompts for others when the prefill workers are overloaded."""
    threads: Annotated[int, Field(ge=0, le=512)] = 0
    """For decode; 0 = all cores this process may use."""
    threads_batch: Annotated[int, Field(ge=0, le=512)] = 0
    """For prefill; 0 = all cores this process may use."""
    chunk_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    """Prompt tokens per chunk; the same on all nodes."""
    handoff: Literal["overlapped", "serialized"] = "overlapped"
    """KV for other workers leaves while the prompt is read, or `serialized` after it: to see what overlapping saves."""
    k_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = "f16"
    """Type of the K cache."""
    v_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = "f16"
    """Type of the V cache; other than f16, f32 and bf16 needs flash attention, which `exact` switches off."""
    policy: Literal["exact", "fast"] = "exact"
    """`exact` switches off what makes results depend on shape, `fast` takes llama.cpp's own choices."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """`auto` follows the policy."""
    level_cap: Literal["exact", "same-plan", "none"] = "exact"
    """Promise no more than this, whatever was verified."""
    key_file: UserPath | None = None
    """The cluster key (`edge-llm serve key`)."""
    key_fd: int | None = None
    """The same from an inherited descriptor, for `edge-llm up`."""
    allowed_peers: tuple[str, ...] = PRIVATE_NETWORKS
    """Networks that prefill workers may be in; in the environment separated by commas."""
    memory_limit_bytes: Annotated[int, Field(ge=0)] = 0
    """Refuse to start above this; 0 = what the board has free."""
    simulate: bool = False
    """A clock instead of a model, for load and fault tests."""
    simulated_prompt_tokens_per_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """How fast a simulated prompt is computed; 0 is as fast as it goes."""
    simulated_step_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    """What a simulated decode step takes, however many sequences are in it."""
    simulated_row_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    """What each sequence adds to a simulated decode step."""
    announce: bool = False
    """Say on stdout when ready, for `edge-llm up`."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Host memory for KV of finished prompts and answers: what they begin with is computed once. 0 keeps none."""
    log_level: LogLevel = "info"
    """What is less than this is not written to the log."""
    metrics_alias: MetricsAlias = "none"
    """Show the figures of /metrics under another server's names, too."""
    gateway_lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """A sequence whose gateway is gone for so long is freed."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 120.0
    """At most so long after SIGTERM it goes on: until other workers have the KV of what runs here, for which they have
    as long as it takes on the slowest way known (worker/handover.py), and what it reads for others is read."""

    @field_validator("allowed_peers")
    @classmethod
    def _networks_are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ip_network(network)
        return networks


class GatewayConfig(_Settings):
    """The gateway."""

    host: str = "127.0.0.1"
    """Address to listen on; other than loopback needs `api_keys_file`."""
    port: Port = 8080
    """Port of the endpoint."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Its name towards workers; empty: a random one."""
    workers_file: UserPath | None = None
    """Who the workers are; read again when it changes. Either this or `kubernetes_namespace`."""
    kubernetes_namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] | None = None
    """Find the workers by the EndpointSlices of this namespace."""
    kubeconfig: UserPath | None = None
    """How to reach the Kubernetes API server; None: by the pod's service account, else as kubectl does."""
    key_file: UserPath | None = None
    """The cluster key (`edge-llm serve key`)."""
    key_fd: int | None = None
    """The same from an inherited descriptor, for `edge-llm up`."""
    api_keys_file: UserPath | None = None
    """Who may use the endpoint (`edge-llm serve api-key`); read again when it changes."""
    no_auth: bool = False
    """Let everybody in who reaches the port; only on loopback."""
    announce: bool = False
    """Say on stdout when ready, for `edge-llm up`."""
    policy: PolicyName = "predicted"
    """How workers are chosen; all but `predicted` are there to be compared with."""
    policy_seed: Annotated[int, Field(ge=0)] = 0
    """For the policy `random`."""
    cross_class: Literal["never", "when_faster"] = "when_faster"
    """Whether KV may go between workers whose results differ in bits; such answers have level none."""
    probe_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Between two questions to a worker how it is."""
    queue_length: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Requests that may wait; more are refused with status 503."""
    queue_bytes: Annotated[int, Field(ge=1024)] = 64 << 20
    """What requests that wait or are being read may take of memory; more are refused with status 503."""
    queue_predicted_wait_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A request that would wait longer, as far as is known, is refused at once with status 503."""
    queue_wait_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """A request that waited so long after all is refused with status 503."""
    slo_ttft_s: LatencyLimit | None = None
    """Limit of the time to first token that workers are chosen by when a request names none; None: no limit."""
    slo_tpot_s: LatencyLimit | None = None
    """The same of the mean time between two tokens of an answer."""
    default_deadline_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """Time for a whole answer when the request does not say one; 0 = as long as it takes."""
    keep_alive_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """After so much silence a stream gets an empty line."""
    idle_s: Annotated[float, Field(ge=1, le=3600)] = 100.0
    """A connection on which nothing is asked is closed after so long. Longer than proxies keep theirs (nginx 60 s, Go's
    and so Traefik's 90 s): one that sends into a connection that just closes tells its client 502."""
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.\[\]:-]+)$")]] = []
    """Origins, as http://localhost:3000, whose pages may ask from a browser, and whatever the key that they send, or
    nobody's key, may; "*": all. None by default."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    """A larger request is refused with status 413."""
    max_head_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 32 << 10
    """Request line and headers; more are refused with status 431."""
    read_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Time for a client to send its request, once for the headers and once for the body."""
    stream_buffer_bytes: Annotated[int, Field(ge=1024)] = 256 << 10
    """What a client may leave unread of one answer; with more the answer ends."""
    stall_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """A client that takes nothing for so long loses its connection."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long running answers may go on after SIGTERM."""
    leaving_s: Annotated[float, Field(ge=0, le=600)] = 0.0
    """After SIGTERM, go on answering, each time for the last time on a connection, until nothing was asked for so long:
    where clients are sent elsewhere once /readyz says 503 (Kubernetes), none is refused. Within `drain_s`."""
    settle_s: Annotated[float, Field(ge=0, le=600)] = 15.0
    """How long after its start a gateway that has not found a decode worker says 503 on /readyz."""
    default_max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Length of an answer when the request does not say one, as far as the context has room."""
    log_level: LogLevel = "info"
    """What is less than this is not written to the log."""
    metrics_alias: MetricsAlias = "none"
    """Show the figures of /metrics under another server's names, too."""
    open_metrics: bool = False
    """Whoever reaches the gateway may read /metrics: for scrapers that cannot send a key. It says numbers, and names of
    nodes and models."""
    checkpoint_tokens: Annotated[int, Field(ge=0)] = 0
    """After so many tokens of an answer each time (8 at least), another worker fetches its KV, so that a takeover
    computes about as many and not all; 0: never."""
    replan_limit: Annotated[int, Field(ge=0, le=16)] = 3
    """Workers that one answer may lose before it fails."""

    @field_validator("checkpoint_tokens")
    @classmethod
    def _checkpoints_are_off_or_worth_their_copy(cls, tokens: int) -> int:
        if 0 < tokens < LEAST_CHECKPOINT_TOKENS:
            raise ValueError(
                f"either 0 (no checkpoints) or at least {LEAST_CHECKPOINT_TOKENS}: each one copies the whole sequence, "
                "and the worker's streams wait for that"
            )
        return tokens


class UpConfig(_Settings):
    """The embedded cluster of `edge-llm up`."""

    prefill: Annotated[int, Field(ge=0, le=64)] = 1
    """Prefill workers."""
    decode: Annotated[int, Field(ge=0, le=64)] = 1
    """Decode workers."""
    mixed: Annotated[int, Field(ge=0, le=64)] = 0
    """Workers that do both."""
    simulated: Annotated[int, Field(ge=0, le=64)] = 0
    """So many simulated workers and no model; half of them prefill unless roles are given. 0: real workers."""
    model: str = DEFAULT_MODEL
    """Name in models.yaml or path of a .gguf file."""
    port: Port = 8080
    """Port of the endpoint."""
    threads: Annotated[int, Field(ge=0, le=512)] = 0
    """Per worker; 0 shares the cores out."""
    pin: bool = False
    """Give each worker cores of its own."""
    show_logs: bool = False
    """Pass the logs of gateway and workers on to stderr."""

    @property
    def roles(self) -> tuple[WorkerRole, ...]:
        """The role of each worker. Simulated ones that were given no role become what was not given: decode first."""
        counts: dict[WorkerRole, int] = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        given = self.model_fields_set & counts.keys()
        if self.simulated and not given:
            half = self.simulated // 2
            counts = {"prefill": half, "decode": self.simulated - half, "mixed": 0}
            if not half:
                counts = {"prefill": 0, "decode": 0, "mixed": 1}
        elif self.simulated:
            counts = {role: count if role in given else 0 for role, count in counts.items()}
            rest = max(0, self.simulated - sum(counts.values()))
            counts |= dict.fromkeys([role for role in ("decode", "prefill", "mixed") if role not in given][:1], rest)
        return tuple(role for role, count in counts.items() for _ in range(count))

    @model_validator(mode="after")
    def _somebody_decodes(self) -> Self:
        if not {"decode", "mixed"} & set(self.roles):
            raise ValueError("a cluster needs at least one worker that decodes: --decode 1 or --mixed 1")
        if self.simulated and len(self.roles) != self.simulated:
            raise ValueError(f"{len(self.roles)} workers have roles, --simulated says {self.simulated}")
        return self


class CatalogueConfig(_Settings):
    """Where models are listed and kept."""

    models_file: UserPath | None = None
    """The list of models; None: the models.yaml that comes with this program."""
    models_dir: UserPath | None = None
    """Where fetched models live; None: in the cache folder."""
    hub: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Address of the hub for `hf` sources; None: HF_ENDPOINT, else the public hub."""


SettingsType = TypeVar("SettingsType", bound=_Settings)
_SECTIONS: Final[Mapping[str, type[_Settings]]] = {
    "worker": WorkerConfig,
    "gateway": GatewayConfig,
    "up": UpConfig,
    "catalogue": CatalogueConfig,
}


def load_settings(
    kind: type[SettingsType],
    flags: Mapping[str, object],
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> SettingsType:
    """Settings of one section. `flags` with value None were not given. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    section = next(name for name, known in _SECTIONS.items() if known is kind)
    path, in_file = _from_file(section, file, environ)
    in_environment = _from_environment(section, kind, environ)
    given = {key: value for key, value in flags.items() if value is not None}
    origins = dict.fromkeys(in_file, f" in {path}")
    origins |= {key: f" in {_ENV}_{section.upper()}_{key.upper()}" for key in in_environment} | dict.fromkeys(given, "")
    try:
        return kind(**(in_file | in_environment | given))
    except ValidationError as error:
        raise ConfigError(_explain(section, error, origins)) from error


def catalogue_settings(environ: Mapping[str, str] | None = None) -> CatalogueConfig:
    """The section `catalogue` with its defaults filled in. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    given = load_settings(CatalogueConfig, {}, None, environ)
    hub = given.hub or environ.get("HF_ENDPOINT") or PUBLIC_HUB
    if not hub.startswith(("http://", "https://")):
        raise ConfigError(f"HF_ENDPOINT must be the address of a hub, https://..., not {hub!r}")
    return CatalogueConfig(
        models_file=given.models_file or _shipped_models_file(),
        models_dir=given.models_dir or _folder("XDG_CACHE_HOME", ".cache", environ) / "models",
        hub=hub.rstrip("/"),
    )


def _shipped_models_file() -> Path:
    """A checkout has it at the top level, an installed package carries a copy."""
    package = Path(__file__).parent
    checkout = package.parent / "models.yaml"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "models.yaml"


def _from_file(section: str, file: Path | None, environ: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """The file's place and what it says."""
    named = file or (Path(environ[f"{_ENV}_CONFIG"]) if f"{_ENV}_CONFIG" in environ else None)
    path = named or _folder("XDG_CONFIG_HOME", ".config", environ) / "config.yaml"
    try:
        content = yaml.load(path.read_text(), Loader=ClosedLoader)
    except FileNotFoundError:
        if named is not None:
            raise ConfigError(f"there is no configuration file {path}") from None
        return path, {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    if content is None:
        return path, {}
    if not isinstance(content, dict) or not content.keys() <= _SECTIONS.keys():
        raise ConfigError(f"{path}: the sections are {', '.join(_SECTIONS)}; {_unknown(content, _SECTIONS)}")
    values = {} if content.get(section) is None else content[section]
    known = _SECTIONS[section].model_fields
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ConfigError(f"{path}, section {section}: the keys are {', '.join(known)}; {_unknown(values, known)}")
    return path, values


def _from_environment(section: str, kind: type[_Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    prefix = f"{_ENV}_{section.upper()}_"
    given = {name.removeprefix(prefix).lower(): value for name, value in environ.items() if name.startswith(prefix)}
    unknown = given.keys() - kind.model_fields.keys()
    if unknown:
        names = ", ".join(prefix + name.upper() for name in sorted(unknown))
        allowed = ", ".join(prefix + key.upper() for key in kind.model_fields)
        raise ConfigError(f"unknown environment setting {names}; known are {allowed}")
    return {
        key: [part.strip() for part in value.split(",")] if key == "allowed_peers" else value
        for key, value in given.items()
    }


def _explain(section: str, error: ValidationError, origins: Mapping[str, str]) -> str:
    """`origins`: where each given key was found, as words that follow its name."""
    lines = []
    for problem in error.errors(include_url=False):
        place, what = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if not place:  # about several settings together
            lines.append(f"{section}: {what}")
            continue
        lines.append(f"{section}.{place}{origins.get(str(problem['loc'][0]), '')}: {what} (got {problem['input']!r})")
    return "wrong setting: " + "; ".join(lines)


def _unknown(content: object, known: Mapping[str, object]) -> str:
    """For people: what is wrong with a mapping that should have only `known` keys."""
    if not isinstance(content, dict):
        return "it has no keys"
    return "unknown: " + ", ".join(str(key) for key in content if key not in known)


def _folder(variable: str, default: str, environ: Mapping[str, str]) -> Path:
    base = environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "edge-llm"


def cache_dir() -> Path:
    """Things that can be made again: wheels, model files fetched, reference tools."""
    return _folder("XDG_CACHE_HOME", ".cache", os.environ)


def state_dir() -> Path:
    """What runs and what was verified: the `up` state file, levels."""
    return _folder("XDG_STATE_HOME", ".local/state", os.environ)


def data_dir() -> Path:
    """What the user recorded: pinned hashes."""
    return _folder("XDG_DATA_HOME", ".local/share", os.environ)


def levels_dir() -> Path:
    """Where `edge-llm verify` leaves what it found, per identity."""
    return state_dir() / "levels"
