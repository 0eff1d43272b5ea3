"""K3s on this board: whether it is there, as what, and whether the board bears it.

Owns reading its files under a root and judging them; the judging functions are pure. Refuses to ask its API: that needs
rights. A board without K3s is fine: two boards are joined by a file.

Sources: K3s documentation, requirements (server: 2 cores and 2 GB, agent: 512 MB, without any workload; no two nodes of
one name) and configuration (files, roles); `preStop.sleep`, which lets answers end, is on by default since Kubernetes
1.30 (KEP-3960).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

import yaml

from edge_llm.config import ClosedLoader
from edge_llm.doctor.board import Ask
from edge_llm.doctor.files import Files, gib
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

Role = Literal["server", "agent"]

_BINARIES: Final = ("usr/local/bin/k3s", "opt/bin/k3s", "usr/bin/k3s")
_CONFIG: Final = "etc/rancher/k3s/config.yaml"
_KUBECONFIG: Final = "etc/rancher/k3s/k3s.yaml"
_UNITS: Final[dict[Role, str]] = {"server": "k3s", "agent": "k3s-agent"}
_OLDEST: Final = (1, 30)
_SERVER_BYTES: Final = 1_900_000_000  # what the kernel leaves of 2 GB
_SERVER_COMFORT_BYTES: Final = 3_700_000_000  # and of 4 GB
_AGENT_BYTES: Final = 480_000_000
_KUBELET_PORT: Final = 10250
_HOSTNAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_DEFAULT_NAMES: Final = frozenset({"raspberrypi", "localhost", "ubuntu", "debian"})
_INSTALL: Final[dict[Role, str]] = {
    "server": "curl -sfL https://get.k3s.io | sh -s - server",
    "agent": "curl -sfL https://get.k3s.io | K3S_URL=https://SERVER:6443 K3S_TOKEN=TOKEN sh -",
}


@dataclass(frozen=True, slots=True)
class K3sFacts:
    """`can_be_told`: files of this board can be read at all. `role` None: installed, but no service is set up.
    `version` None: not known. `config_error`: what is wrong with its files, empty when nothing is."""

    is_installed: bool
    can_be_told: bool
    role: Role | None
    version: tuple[int, int] | None
    version_words: str | None
    is_running: bool | None
    hostname: str | None
    config_is_locked: bool
    config_error: str
    open_kubeconfig: bool


def read_k3s(files: Files, ask: Ask, listening: frozenset[int] | None) -> K3sFacts:
    binary = next((name for name in _BINARIES if files.exists(name)), None)
    words = _version_words(ask([f"/{binary}", "--version"])) if binary else None
    found = re.match(r"v(\d+)\.(\d+)", words or "")
    return K3sFacts(
        is_installed=binary is not None,
        can_be_told=bool(files.names("etc") or files.names("proc")),
        role=next((role for role, unit in _UNITS.items() if files.exists(f"etc/systemd/system/{unit}.service")), None),
        version=(int(found[1]), int(found[2])) if found else None,
        version_words=words,
        is_running=None if listening is None else _KUBELET_PORT in listening,
        hostname=files.text("proc/sys/kernel/hostname"),
        config_is_locked=files.is_locked(_CONFIG),
        config_error=_config_error(files),
        open_kubeconfig=files.is_open_to_all(_KUBECONFIG),
    )


def check_k3s(facts: K3sFacts, *, ram_bytes: int | None, cores: int) -> list[Finding]:
    """All about K3s, in the order they are shown; one line where there is none."""
    if not facts.is_installed and not facts.can_be_told:
        return [unknown("k3s.installed", "neither /etc nor /proc can be read")]
    if not facts.is_installed:
        return [ok("k3s.installed", "not here; it is not needed: boards are joined by a file, or by K3s")]
    found = [
        installed(facts),
        version(facts),
        hardware(facts.role, ram_bytes, cores),
        hostname(facts),
        config(facts),
        kubeconfig(facts),
    ]
    return [finding for finding in found if finding is not None]


def installed(facts: K3sFacts) -> Finding:
    check = "k3s.installed"
    if facts.role is None:
        return warn(
            check,
            "the program is here, but no service of it",
            why="nothing starts it at boot",
            do="set it up as a server, or as an agent of one (the token: /var/lib/rancher/k3s/server/node-token there)",
            commands=list(_INSTALL.values()),
        )
    if facts.is_running is None:
        return unknown(check, f"{facts.role}; whether it runs cannot be read")
    if not facts.is_running:
        unit = _UNITS[facts.role]
        return fail(
            check,
            f"{facts.role}, not running (nobody listens on the kubelet's port {_KUBELET_PORT})",
            why="this node takes no pods",
            do="start it, and see what it says",
            commands=[f"sudo systemctl restart {unit}", f"sudo journalctl -u {unit} -n 50 --no-pager"],
        )
    return ok(check, f"{facts.role}, running")


def version(facts: K3sFacts) -> Finding:
    check = "k3s.version"
    if facts.version is None:
        return unknown(check, "it does not say", do="look", commands=["k3s --version"])
    words = facts.version_words or ""
    if facts.version < _OLDEST:
        return warn(
            check,
            words,
            why="before 1.30 `preStop.sleep` is off, and answers of a pod that is stopped are cut",
            do="run the installer again, with the variables and flags of the first time: it forgets what is not given",
            commands=[_INSTALL[facts.role or "server"]],
        )
    return ok(check, words)


def hardware(role: Role | None, ram_bytes: int | None, cores: int) -> Finding | None:
    check = "k3s.hardware"
    if role is None or ram_bytes is None:
        return None
    words = f"{role} on {gib(ram_bytes)}, {cores} cores"
    least = _SERVER_BYTES if role == "server" else _AGENT_BYTES
    if ram_bytes < least or (role == "server" and 0 < cores < 2):
        return fail(
            check,
            words,
            why="K3s asks for 2 GB and 2 cores on a server, 512 MB on an agent, before any model is loaded",
            do="make another board the server",
        )
    if role == "server" and ram_bytes < _SERVER_COMFORT_BYTES:
        return warn(
            check,
            words,
            why="a server takes up to 2 GB itself: little is left for a model",
            do="keep workers off this node",
            commands=["sudo k3s kubectl taint nodes $(hostname) node-role.kubernetes.io/control-plane:NoSchedule"],
        )
    return ok(check, words)


def hostname(facts: K3sFacts) -> Finding:
    check, name = "k3s.hostname", facts.hostname
    if name is None:
        return unknown(check, "not known")
    why = "a node is known by it: two of one name push each other out of the cluster"
    commands = ["sudo hostnamectl set-hostname pi-a"]
    if not _HOSTNAME.fullmatch(name):
        why = "Kubernetes takes lower-case letters, digits, dots and dashes only: the node gets another name, or none"
        return warn(check, name, why=why, do="give it another name", commands=commands)
    if name in _DEFAULT_NAMES:
        return warn(check, f"{name}, as every new board", why=why, do="give it a name of its own", commands=commands)
    return ok(check, name)


def config(facts: K3sFacts) -> Finding:
    check = "k3s.config"
    if facts.config_error:
        return fail(
            check,
            facts.config_error,
            why="K3s does not start with settings that it cannot read",
            do="correct the file, then start K3s again",
            commands=[f"sudo nano /{_CONFIG}", f"sudo systemctl restart {_UNITS[facts.role or 'server']}"],
        )
    if facts.config_is_locked:
        return unknown(check, f"/{_CONFIG} can be read by root only (as it should: it may hold the token)")
    return ok(check, "readable and YAML, or none")


def kubeconfig(facts: K3sFacts) -> Finding | None:
    if not facts.open_kubeconfig:
        return None
    return warn(
        "k3s.kubeconfig",
        f"/{_KUBECONFIG} can be read by everybody",
        why="whoever reads it is the cluster's administrator",
        do="close it, and remove write-kubeconfig-mode from K3s's settings",
        commands=[f"sudo chmod 600 /{_KUBECONFIG}"],
    )


def _version_words(text: str | None) -> str | None:
    """`k3s version v1.33.4+k3s1 (148243c4)` -> `v1.33.4+k3s1`."""
    found = re.search(r"k3s version (\S+)", text or "")
    return found[1] if found else None


def _config_error(files: Files) -> str:
    """Its files are merged key by key, so that each must be a mapping."""
    drop_ins = [name for name in files.names(f"{_CONFIG}.d") if name.endswith(".yaml")]
    for name in (_CONFIG, *(f"{_CONFIG}.d/{name}" for name in drop_ins)):
        text = files.text(name)
        if text is None:
            continue
        try:
            content = yaml.load(text, Loader=ClosedLoader)
        # the library lets what it cannot make of a date or of a very deep list through as it is
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            return f"/{name} is not YAML: {' '.join(str(error).split())[:200]}"
        if content is not None and not isinstance(content, dict):
            return f"/{name} is no mapping of settings"
    return ""
