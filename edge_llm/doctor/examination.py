"""The whole examination: areas one after another, each read and judged by its own module.

Owns the order, what one area needs of another, and that an area which breaks is a finding and not the end: this program
is asked when things are broken. Refuses to print.

Files of another board (`--root`) are judged without asking this machine's programs, clock, build, keys and neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from edge_llm.cluster.static import StaticFile
from edge_llm.config import levels_dir
from edge_llm.doctor import asking, board, build, k3s, kernel, limits, model, network, peers, settings, storage
from edge_llm.doctor.files import Files, size_bytes
from edge_llm.doctor.finding import Finding, fail, unknown
from edge_llm.errors import ConfigError
from edge_llm.machine import available_memory_bytes

AREAS: Final = (
    *("board", "kernel", "limits", "storage", "network", "ports", "k3s"),
    *("build", "settings", "keys", "model", "worker", "peers"),
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Outside:
    """What is asked of the running machine. A test has its own."""

    ask: board.Ask = asking.ask_program
    room: storage.Room = asking.free_bytes
    clock: Callable[[], tuple[bool, float] | None] = asking.kernel_clock
    page_bytes: int | None = None
    answers_here: Callable[[int], bool] = peers.answers_here
    build: Callable[..., tuple[build.BuildFacts, dict[str, str]]] = asking.ask_build
    built_s: Callable[[], float | None] = asking.built_s

    def of_another_board(self) -> Outside:
        """Nothing here knows anything of it."""
        return replace(self, ask=asking.no_program, room=lambda _folder: None, clock=lambda: None, page_bytes=None)


class Examination:
    """One run. `findings` grows as it goes, so that an interrupted one keeps what it has."""

    def __init__(
        self,
        files: Files,
        config_file: Path | None,
        environ: Mapping[str, str],
        now: Callable[[], float],
        cluster_ports: Callable[[], Iterable[int]] = tuple,
        outside: Outside | None = None,
        *,
        loads: bool = False,
    ) -> None:
        """`cluster_ports`: of clusters of `edge-llm up` that run; `loads`: load the model for the level."""
        outside = outside or Outside()
        self.findings: list[Finding] = []
        self._files, self._environ, self._now, self._loads = files, environ, now, loads
        self._outside = outside if files.is_this_machine else outside.of_another_board()
        self._cluster_ports = cluster_ports
        self._config_file = config_file

    def run(self, ignored: Sequence[str] = (), progress: Progress = lambda _what, _done, _total: None) -> list[Finding]:
        """All areas but the ignored ones: those are not even asked about."""
        areas: dict[str, Callable[[], list[Finding]]] = {
            "board": lambda: board.check_board(self._board),
            "kernel": self._kernel,
            "limits": lambda: limits.check_limits(self._limits, self._board.cores),
            "storage": self._storage,
            "network": self._network_area,
            "ports": self._ports,
            "k3s": lambda: k3s.check_k3s(self._k3s, ram_bytes=self._board.ram_bytes, cores=self._board.cores),
            "build": self._build,
            "settings": self._settings_area,
            "keys": self._keys,
            "model": self._model_area,
            "worker": self._worker,
            "peers": self._peers,
        }
        wanted = [(name, area) for name, area in areas.items() if name not in ignored]
        for done, (name, area) in enumerate(wanted):
            progress("examining", done, len(wanted))
            self.findings += _guarded(name, area)
        return self.findings

    # -- what several areas need: read when the first of them asks

    @cached_property
    def _settings(self) -> settings.Settings:
        return settings.read_settings(self._config_file, self._environ)

    @cached_property
    def _board(self) -> board.BoardFacts:
        return board.read_board(self._files, self._outside.ask)

    @cached_property
    def _limits(self) -> limits.LimitFacts:
        return limits.read_limits(self._files)

    @cached_property
    def _network(self) -> network.NetworkFacts:
        return network.read_network(self._files, self._outside.clock())

    @cached_property
    def _k3s(self) -> k3s.K3sFacts:
        return k3s.read_k3s(self._files, self._outside.ask, self._network.listening)

    @cached_property
    def _model(self) -> model.ModelFacts:
        return model.read_model(self._settings.worker.model)

    # -- the board

    def _kernel(self) -> list[Finding]:
        facts = kernel.read_kernel(self._files, self._outside.page_bytes)
        is_pi, is_pi5 = self._board.is_pi, self._board.is_pi5
        return kernel.check_kernel(facts, is_pi=is_pi, is_pi5=is_pi5, has_k3s=self._k3s.is_installed)

    def _storage(self) -> list[Finding]:
        root = storage.read_place(self._files, Path("/"), self._outside.room)
        folder = model.models_folder(self._settings.worker.model)
        place = storage.read_place(self._files, folder, self._outside.room)
        return [
            storage.check_root(root, runs_server=self._k3s.role == "server", has_k3s=self._k3s.is_installed),
            storage.check_models_place(
                place, needs_bytes=self._model.needs_bytes, is_there=self._model.card is not None
            ),
        ]

    def _network_area(self) -> list[Finding]:
        card = self._model.card
        kv = card.kv_bytes_per_token(self._settings.worker.k_type, self._settings.worker.v_type) if card else 0
        ports = list(self._wanted_ports().values())
        return network.check_network(self._network, kv_bytes_per_token=kv, has_k3s=self._k3s.is_installed, ports=ports)

    def _wanted_ports(self) -> dict[str, int]:
        return {"gateway": self._settings.gateway.port, "worker": self._settings.worker.port}

    def _ports(self) -> list[Finding]:
        wanted, listening = self._wanted_ports(), self._network.listening
        taken = [port for port in wanted.values() if port in (listening or ())]
        ours = frozenset(self._cluster_ports()) if self._files.is_this_machine else frozenset()
        if self._files.is_this_machine:
            ours |= {port for port in taken if self._outside.answers_here(port)}
        return network.check_ports(listening, wanted, ours, has_k3s=self._k3s.is_installed)

    # -- the program

    def _build(self) -> list[Finding]:
        if not self._files.is_this_machine:
            return []
        worker = self._settings.worker
        given = worker.model_dump(mode="json", exclude_defaults=True) if self._loads else None
        facts, published = self._outside.build(self._environ, given)
        found = build.check_build(facts, self._board.features, worker.policy)
        if published:
            return [*found, build.check_published(published, worker.model)]
        levels = build.read_levels(levels_dir())
        return [*found, build.check_levels(levels, self._outside.built_s(), worker.model, worker.policy)]

    def _settings_area(self) -> list[Finding]:
        found = settings.check_settings(self._settings)
        if not self._files.is_this_machine:
            return found
        folders = settings.check_folders(settings.read_folders())
        return [*found, *settings.check_gateway(self._settings), folders]

    def _keys(self) -> list[Finding]:
        if not self._files.is_this_machine:
            return []
        return settings.check_keys(settings.read_keys(self._settings, self._now()))

    def _model_area(self) -> list[Finding]:
        if self._settings.worker.simulate:
            return []
        found = [model.check_model(self._model)]
        if self._settings.up.model != self._settings.worker.model and self._settings.up.model_fields_set:
            found.append(model.check_model(model.read_model(self._settings.up.model), "model.up_file"))
        if self._model.card is None:
            return found
        memory = model.read_memory(
            self._model.card,
            self._settings.worker,
            self._board.architecture,
            self._available_bytes(),
            min(filter(None, (self._board.ram_bytes, self._limits.memory_bytes)), default=None),
        )
        return [*found, model.check_card(self._model), model.check_memory(memory, self._settings.worker)]

    def _available_bytes(self) -> int | None:
        if self._files.is_this_machine:
            return available_memory_bytes()
        free = size_bytes(self._files.fields("proc/meminfo").get("MemAvailable"))
        return None if free is None else min(free, self._limits.memory_bytes or free)

    def _worker(self) -> list[Finding]:
        quota, there = self._limits.cpu_cores, self._board.cores
        cores = max(1, int(min(quota or there, there))) if there else None
        return [model.check_threads(self._settings.worker, cores, is_pi5=self._board.is_pi5)]

    def _peers(self) -> list[Finding]:
        file = self._settings.gateway.workers_file
        if file is None or not self._files.is_this_machine:
            return []
        try:
            places = StaticFile(file).places()
        except ConfigError as error:
            why = "a gateway refuses to start with it"
            return [fail("peers.file", error.message, why=why, do="correct it; README shows one")]
        return peers.check_peers(peers.ask_peers(places, self._now))


def _guarded(name: str, area: Callable[[], Any]) -> list[Finding]:
    """An area that breaks says so: the others still help."""
    try:
        found: list[Finding] = area()
    except Exception as error:  # noqa: BLE001 - a board in disorder breaks what nobody thought of; Ctrl-C still passes
        return [
            unknown(
                f"{name}.examination",
                f"this check broke: {type(error).__name__}: {error}",
                why="this is a fault of edge-llm, not of the board",
                do="report it, with the output of `edge-llm doctor --json`",
            )
        ]
    return found
