"""What this board is told to do: the settings, the keys, the folders.

Owns reading the settings as the processes of a cluster would, and saying what is wrong before they do. Refuses to
change anything, and to show a key. What a worker or gateway would refuse at its start is a failure here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edge_llm.config import (
    CatalogueConfig,
    GatewayConfig,
    UpConfig,
    WorkerConfig,
    cache_dir,
    data_dir,
    levels_dir,
    load_settings,
    state_dir,
)
from edge_llm.doctor.finding import Finding, fail, ok, warn
from edge_llm.errors import ConfigError

_SECTIONS: Final[Mapping[str, type[Any]]] = {
    "worker": WorkerConfig,
    "gateway": GatewayConfig,
    "up": UpConfig,
    "catalogue": CatalogueConfig,
}
_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Sections as they are in force; one with an error has its defaults. `errors`: by section, for people."""

    worker: WorkerConfig = field(default_factory=WorkerConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    up: UpConfig = field(default_factory=UpConfig)
    catalogue: CatalogueConfig = field(default_factory=CatalogueConfig)
    errors: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None


def read_settings(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """`file`: as --config gives it."""
    found: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, kind in _SECTIONS.items():
        try:
            found[name] = load_settings(kind, {}, file, environ)
        except ConfigError as error:
            errors[name] = error.message
    return Settings(**found, errors=errors, file=_file_in_use(file, environ))


def check_settings(settings: Settings) -> list[Finding]:
    """One finding: a file that cannot be read is wrong in every section in the same words."""
    check, where = "settings.file", settings.file or "no file"
    if not settings.errors:
        return [ok(check, f"{where}; valid")]
    return [
        fail(
            check,
            "; ".join(dict.fromkeys(settings.errors.values())),
            why="the processes of a cluster refuse to start with wrong settings",
            do="correct it; README has an example, edge_llm/config.py every key",
        )
    ]


def check_gateway(settings: Settings) -> list[Finding]:
    """Whether a gateway with these settings would open its door; nothing where none is set up on this board."""
    config = settings.gateway
    if config.workers_file is None and config.kubernetes_namespace is None:
        return []
    from edge_llm.gateway.serve import credentials_of

    check = "settings.gateway"
    is_about_keys = config.api_keys_file is None or config.no_auth  # what is in the file is said under keys.api
    error = _refusal(lambda: credentials_of(config)) if is_about_keys else ""
    if not error and config.key_file is None and config.key_fd is None:
        error = "no cluster key (gateway.key_file), unless --key-file gives it"
    if error:
        return [fail(check, error, why="the gateway refuses to start", do="say it in the settings, or at its start")]
    workers = config.workers_file or f"the namespace {config.kubernetes_namespace}"
    return [ok(check, f"{config.host} port {config.port}, workers of {workers}")]


def _file_in_use(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The place that settings come from, where there is one."""
    if file is not None:
        return str(file)
    if named := environ.get("EDGE_LLM_CONFIG"):
        return named
    base = environ.get("XDG_CONFIG_HOME")
    usual = (Path(base) if base else Path.home() / ".config") / "edge-llm" / "config.yaml"
    return str(usual) if usual.is_file() else None


# --- keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """One key file. `error`: what its reader would say, empty when it is fine; `mode`: permission bits;
    `expired`, `ending`: names of API keys whose time is over, or over within a week."""

    what: str
    path: str
    error: str
    mode: int | None
    expired: tuple[str, ...] = ()
    ending: tuple[str, ...] = ()


def read_keys(settings: Settings, now_s: float) -> list[KeyFacts]:
    """The key files that the settings name."""
    from edge_llm.serving import read_keys as read_cluster_key

    found: list[KeyFacts] = []
    cluster = {"worker": settings.worker.key_file, "gateway": settings.gateway.key_file}
    for who, path in cluster.items():
        if path is not None and str(path) not in [facts.path for facts in found]:
            error = _refusal(lambda path=path: read_cluster_key(path, None))  # type: ignore[misc]
            found.append(KeyFacts(f"cluster key of the {who}", str(path), error, _mode(path)))
    if settings.gateway.api_keys_file is not None:
        found.append(_api_keys(settings.gateway.api_keys_file, now_s))
    return found


def check_keys(keys: list[KeyFacts]) -> list[Finding]:
    if not keys:
        return [ok("keys.cluster", "none is configured; `edge-llm up` needs none, two boards do: edge-llm serve key")]
    return [_key(facts) for facts in keys]


def _key(facts: KeyFacts) -> Finding:
    check = "keys.api" if facts.what == "API keys" else "keys.cluster"
    words = f"{facts.what}, {facts.path}"
    if facts.error:
        close = [f"chmod 600 {facts.path}"] if facts.mode is not None and facts.mode & 0o007 else []
        make = [f"edge-llm serve key > {facts.path} && chmod 600 {facts.path}"] if facts.mode is None else []
        do = "close it, and make a new key when others use this machine" if close else "put the right file there"
        return fail(check, facts.error, why="the process that needs it refuses to start", do=do, commands=close or make)
    if facts.expired:
        names = ", ".join(facts.expired)
        return warn(
            check, f"{words}: expired: {names}", why="they are answered 401", do="remove or renew their entries"
        )
    if facts.ending:
        names = ", ".join(facts.ending)
        return warn(check, f"{words}: over within a week: {names}", why="then they are answered 401", do="renew them")
    if facts.mode is not None and facts.mode & 0o070:
        return warn(
            check,
            f"{words}: the group can read it",
            why="whoever holds the key can be a worker or a gateway of this cluster",
            do="close it to the group, unless you meant it",
            commands=[f"chmod 600 {facts.path}"],
        )
    return ok(check, words)


def _api_keys(path: Path, now_s: float) -> KeyFacts:
    from edge_llm.gateway.keys import KeysFile, parse_keys

    error = _refusal(lambda: KeysFile(path))
    if error:
        return KeyFacts("API keys", str(path), error, _mode(path))
    ends = {key.id: key.expires_s for key in parse_keys(path.read_text(), str(path)) if key.expires_s is not None}
    expired = tuple(name for name, end_s in ends.items() if end_s <= now_s)
    ending = tuple(name for name, end_s in ends.items() if now_s < end_s <= now_s + 7 * _DAY_S)
    return KeyFacts("API keys", str(path), "", _mode(path), expired, ending)


def _refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except ConfigError as error:
        return error.message
    return ""


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


# --- folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """A folder of this program, and whether this user may write there (or make it)."""

    what: str
    path: str
    is_writable: bool


def read_folders() -> list[FolderFacts]:
    folders = {"cache": cache_dir(), "state": state_dir(), "data": data_dir(), "levels": levels_dir()}
    return [FolderFacts(what, str(path), _is_writable(path)) for what, path in folders.items()]


def check_folders(folders: list[FolderFacts]) -> Finding:
    check = "settings.folders"
    closed = [folder for folder in folders if not folder.is_writable]
    if not closed:
        return ok(check, "all can be written")
    words = ", ".join(f"{folder.path} ({folder.what})" for folder in closed)
    return warn(
        check,
        f"cannot be written: {words}",
        why="models are hashed at each start, verified levels and running clusters are not remembered",
        do="give them to this user (sudo makes such folders), or set XDG_CACHE_HOME, XDG_STATE_HOME and XDG_DATA_HOME",
        commands=[f"sudo chown -R $USER {folder.path}" for folder in closed],
    )


def _is_writable(path: Path) -> bool:
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    return nearest is not None and os.access(nearest, os.W_OK | os.X_OK)
