"""Another node's board and worker, read at its /metrics beside a run: a Pi that nothing is installed on for it.

Owns asking with a deadline and reading the lines that are ours (worker/metrics.py). Refuses to know who serves them. A
node that is away, slow or says nonsense has no readings then; it never ends a run, and no answer is longer than is read
of it.
"""

from __future__ import annotations

import http.client
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from edge_llm.bench.board_reader import Rates, core_shares
from edge_llm.errors import EdgeLLMError

_TIMEOUT_S: Final = 2.0
_MOST_BYTES: Final = 1 << 20
_MOST_CORES: Final = 512
# A label's value is quoted, and may have a brace.
_LINE: Final = re.compile(
    r'^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+\d+)?$',
    re.ASCII,
)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# What tells the series of one name apart, where we ask for them one by one.
_APART: Final = ("kind", "direction", "core", "package", "rail")
_KIND: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)
_CORE: Final = re.compile(r"\d{1,3}", re.ASCII)
_ABOUT: Final = ("board", "cpu", "cores", "ram_bytes", "page_bytes", "kernel", "os")
_MOST_TEXT: Final = 120

_GAUGES: Final = {
    "edge_llm_node_cpu_usage_ratio": "cpu_share",
    "edge_llm_node_memory_usage_ratio": "ram_share",
    "edge_llm_node_memory_used_bytes": "ram_used_bytes",
    "edge_llm_worker_group_bytes": "group_bytes",
    "edge_llm_worker_group_peak_bytes": "group_peak_bytes",
    "edge_llm_node_temperature_celsius": "temperature_c",
    "edge_llm_node_cpu_frequency_hertz": "frequency_hz",
    "process_resident_memory_bytes": "worker/rss_bytes",
    "edge_llm_worker_anonymous_bytes": "worker/anonymous_bytes",
    "edge_llm_num_requests_running": "worker/requests_running",
    "edge_llm_kv_cache_usage_ratio": "worker/kv_share",
}
_COUNTERS: Final = {
    ("edge_llm_node_network_bytes_total", "in"): "net_in_bytes_per_s",
    ("edge_llm_node_network_bytes_total", "out"): "net_out_bytes_per_s",
    ("edge_llm_node_network_bytes_total", "loopback"): "loopback_bytes_per_s",
    ("process_cpu_seconds_total", ""): "worker/cpu_cores",
    ("edge_llm_handoff_bytes_total", "in"): "worker/kv_in_bytes_per_s",
    ("edge_llm_handoff_bytes_total", "out"): "worker/kv_out_bytes_per_s",
}
Values = Mapping[tuple[str, str], float]


class NoNode(EdgeLLMError):
    """What was given as the URL of a node is none."""

    code = "no_node"


class NodeMetrics:
    """One node. Names are those of resources.py; what is its worker's begins with `worker/`."""

    def __init__(self, url: str, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises NoNode."""
        self._clock = clock
        try:
            parts = urlsplit(url)
            self._port = parts.port
        except ValueError as error:
            raise NoNode(f"{name}: {url} is no URL of a node: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise NoNode(f"{name}: {url} is no URL of a node: it begins with http:// and names a host")
        self._host, self._is_tls = parts.hostname, parts.scheme == "https"
        self._path = parts.path.rstrip("/") or "/metrics"
        self._rates = Rates()
        self._about: dict[str, str] = {}

    def facts(self) -> dict[str, str]:
        """What the node said that it is (`edge_llm_node_info`), as far as it has been read: its board, processor,
        kernel."""
        return dict(self._about)

    def read(self, now_s: float) -> dict[str, float | None]:
        """`now_s`: monotonic. Readings that the node does not have are None. A busy node answers late: its counters are
        of the time when it did."""
        asked_s = self._clock()
        text = self._fetched() or ""
        values = values_of(text)
        self._about = about_of(text) or self._about
        now_s += self._clock() - asked_s
        row: dict[str, float | None] = {ours: values.get((theirs, "")) for theirs, ours in _GAUGES.items()}
        row |= {ours: self._rates.of(ours, values.get(theirs), now_s) for theirs, ours in _COUNTERS.items()}
        row["power_w"] = self._watts(values, now_s)
        busy = _series(values, "edge_llm_node_core_busy_seconds_total", _CORE)
        passed = _series(values, "edge_llm_node_core_seconds_total", _CORE)
        cores = {int(core): (busy[core], passed[core]) for core in sorted(busy.keys() & passed.keys())[:_MOST_CORES]}
        shares = core_shares(self._rates, cores, now_s)
        if shares["cpu_share"] is None:  # a worker that counts no cores says at least what psutil does
            shares["cpu_share"] = row["cpu_share"]
        throttled = _series(values, "edge_llm_node_throttled", _KIND)
        return row | shares | {f"throttled/{kind}": value for kind, value in throttled.items()}

    def _watts(self, values: Values, now_s: float) -> float | None:
        """As power.py chooses: sensors first, then the energy of all packages."""
        rails = [watts for (name, _), watts in values.items() if name == "edge_llm_node_power_watts"]
        joules = [energy for (name, _), energy in values.items() if name == "edge_llm_node_energy_joules_total"]
        used_w = self._rates.of("energy", sum(joules) if joules else None, now_s)
        return sum(rails) if rails else used_w

    def _fetched(self) -> str | None:
        """The text, or None. A deadline for all of it: one that sends a byte a second is slow, too."""
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        deadline_s = time.monotonic() + _TIMEOUT_S
        connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", self._path, headers={"Accept": "text/plain", "Connection": "close"})
            answer, body = connection.getresponse(), b""
            while answer.status == 200 and len(body) < _MOST_BYTES and time.monotonic() < deadline_s:
                part = answer.read1(1 << 16)
                if not part:
                    return body.decode(errors="replace")
                body += part
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return None


def values_of(text: str) -> dict[tuple[str, str], float]:
    """Values by name and what tells its series apart (`_APART`, else nothing). Series that differ in nothing else we
    know are added up: a worker whose role changed has counted under both."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, labels = found[1], dict(_LABEL.findall(found[2] or ""))
        kind = next((labels[label] for label in _APART if label in labels), "")
        value = _value(found[3])
        if value is not None:
            values[name, kind] = values.get((name, kind), 0.0) + value
    return values


def about_of(text: str) -> dict[str, str]:
    """Labels of `edge_llm_node_info` that we know and that have a value; a node may say what it likes, but not at
    length."""
    line = next((line for line in text.splitlines() if line.startswith("edge_llm_node_info{")), "")
    found = _LINE.match(line)
    labels = dict(_LABEL.findall(found[2] or "")) if found else {}
    return {
        name: labels[name][:_MOST_TEXT] for name in _ABOUT if labels.get(name, "").isprintable() and labels.get(name)
    }


def _series(values: Values, name: str, wanted: re.Pattern[str]) -> dict[str, float]:
    """Of a name, those whose label is what we expect: a node cannot make names of its own."""
    return {kind: value for (known, kind), value in values.items() if known == name and wanted.fullmatch(kind)}


def _value(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
