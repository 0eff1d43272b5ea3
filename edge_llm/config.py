"""Settings: parsed once, frozen, passed down. Flags beat environment, environment beats the file, the file defaults.

Owns every setting's name, default and bounds, the folders this program uses, and the messages about wrong ones.
Environment names are EDGE_LLM_<SECTION>_<KEY> (EDGE_LLM_WORKER_N_CTX). The file is one YAML with the sections
`worker`, `gateway`, `up` and `catalogue`; its place is --config, EDGE_LLM_CONFIG, or `edge-llm/config.yaml` in the
user's configuration folder. Unknown keys are errors: a typing mistake must not silently become a default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_llm.errors import ConfigError

DEFAULT_MODEL: Final = "smollm2-135m-instruct-q4_1"
PRIVATE_NETWORKS: Final = ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
PUBLIC_HUB: Final = "https://huggingface.co"
_ENV: Final = "EDGE_LLM"

Port = Annotated[int, Field(ge=0, le=65535)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerConfig(_Settings):
    """One worker. `threads` and `threads_batch` (decode and prefill) 0 = all cores this process may use."""

    model: str = DEFAULT_MODEL
    role: Literal["prefill", "decode", "mixed"] = "mixed"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    host: str = "127.0.0.1"
    port: Port = 0
    n_ctx: Annotated[int, Field(ge=64, le=1 << 20)] = 4096
    slots: Annotated[int, Field(ge=1, le=64)] = 8
    threads: Annotated[int, Field(ge=0, le=512)] = 0
    threads_batch: Annotated[int, Field(ge=0, le=512)] = 0
    chunk_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    k_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = "f16"
    v_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = "f16"
    policy: Literal["exact", "fast"] = "exact"
    flash_attention: Literal["auto", "on", "off"] = "auto"
    level_cap: Literal["exact", "same-plan", "none"] = "exact"
    key_file: Path | None = None
    key_fd: int | None = None
    allowed_peers: tuple[str, ...] = PRIVATE_NETWORKS
    memory_limit_bytes: Annotated[int, Field(ge=0)] = 0
    simulate: bool = False
    announce: bool = False
    gateway_lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0

    @model_validator(mode="after")
    def _networks_are_networks(self) -> Self:
        for network in self.allowed_peers:
            ip_network(network)
        return self


class GatewayConfig(_Settings):
    """The gateway. `workers_file` lists the workers (README shows the format)."""

    host: str = "127.0.0.1"
    port: Port = 8080
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    workers_file: Path | None = None
    key_file: Path | None = None
    key_fd: int | None = None
    announce: bool = False
    probe_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    queue_length: Annotated[int, Field(ge=0, le=100_000)] = 256
    queue_wait_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    keep_alive_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    default_max_tokens: Annotated[int, Field(ge=1)] = 512
    replan_limit: Annotated[int, Field(ge=0, le=16)] = 3


class UpConfig(_Settings):
    """The embedded cluster of `edge-llm up`."""

    prefill: Annotated[int, Field(ge=0, le=64)] = 1
    decode: Annotated[int, Field(ge=0, le=64)] = 1
    mixed: Annotated[int, Field(ge=0, le=64)] = 0
    model: str = DEFAULT_MODEL
    port: Port = 8080
    threads: Annotated[int, Field(ge=0, le=512)] = 0
    pin: bool = False

    @model_validator(mode="after")
    def _somebody_decodes(self) -> Self:
        if not self.decode and not self.mixed:
            raise ValueError("a cluster needs at least one worker that decodes: --decode 1 or --mixed 1")
        return self


class CatalogueConfig(_Settings):
    """Where models are listed and kept. `models_file` None: the models.yaml that comes with this program;
    `models_dir` None: in the cache folder; `hub` None: HF_ENDPOINT, else the public hub."""

    models_file: Path | None = None
    models_dir: Path | None = None
    hub: Annotated[str, Field(pattern=r"^https?://")] | None = None


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
    values: dict[str, Any] = dict(_from_file(section, file, environ))
    values |= _from_environment(section, kind, environ)
    values |= {key: value for key, value in flags.items() if value is not None}
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(_explain(section, error)) from error


def catalogue_settings(environ: Mapping[str, str] | None = None) -> CatalogueConfig:
    """The section `catalogue` with its defaults filled in. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    given = load_settings(CatalogueConfig, {}, None, environ)
    return CatalogueConfig(
        models_file=given.models_file or _shipped_models_file(),
        models_dir=given.models_dir or _folder("XDG_CACHE_HOME", ".cache", environ) / "models",
        hub=(given.hub or environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/"),
    )


def _shipped_models_file() -> Path:
    """A checkout has it at the top level, an installed package carries a copy."""
    package = Path(__file__).parent
    checkout = package.parent / "models.yaml"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "models.yaml"


def _from_file(section: str, file: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    named = file or (Path(environ[f"{_ENV}_CONFIG"]) if f"{_ENV}_CONFIG" in environ else None)
    path = named or _folder("XDG_CONFIG_HOME", ".config", environ) / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        if named is not None:
            raise ConfigError(f"there is no configuration file {path}") from None
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not content.keys() <= _SECTIONS.keys():
        raise ConfigError(f"{path}: the sections are {', '.join(_SECTIONS)}; {_unknown(content, _SECTIONS)}")
    values = content.get(section) or {}
    known = _SECTIONS[section].model_fields
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ConfigError(f"{path}, section {section}: the keys are {', '.join(known)}; {_unknown(values, known)}")
    return values


def _from_environment(section: str, kind: type[_Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    prefix = f"{_ENV}_{section.upper()}_"
    given = {name.removeprefix(prefix).lower(): value for name, value in environ.items() if name.startswith(prefix)}
    unknown = given.keys() - kind.model_fields.keys()
    if unknown:
        names = ", ".join(prefix + name.upper() for name in sorted(unknown))
        allowed = ", ".join(prefix + key.upper() for key in kind.model_fields)
        raise ConfigError(f"unknown environment setting {names}; known are {allowed}")
    return {key: value.split(",") if key == "allowed_peers" else value for key, value in given.items()}


def _explain(section: str, error: ValidationError) -> str:
    lines = [
        f"{section}.{'.'.join(map(str, problem['loc'])) or '*'}: {problem['msg']} (got {problem['input']!r})"
        for problem in error.errors(include_url=False)
    ]
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
