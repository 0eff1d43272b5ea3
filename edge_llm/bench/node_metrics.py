"""Another node's board and worker, read at its /metrics beside a run: a Pi that nothing is installed on for it.

Owns asking with a deadline and reading the lines that are ours. Refuses to know who serves them. A node that is away,
slow or says nonsense has no readings then; it never ends a run, and no answer is longer than is read of it.
"""

from __future__ import annotations

import http.client
import math
import re
import time
from typing import Final
from urllib.parse import urlsplit

from edge_llm.bench.board_reader import Rates

_TIMEOUT_S: Final = 2.0
_MOST_BYTES: Final = 1 << 20
# A label's value is quoted, and may have a brace.
_LINE: Final = re.compile(
    r'^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+\d+)?$',
    re.ASCII,
)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_KIND: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)

_BOARD: Final = {
    "edge_llm_node_cpu_usage_ratio": "cpu_share",
    "edge_llm_node_memory_usage_ratio": "ram_share",
    "edge_llm_node_temperature_celsius": "temperature_c",
    "edge_llm_node_cpu_frequency_hertz": "frequency_hz",
}
_WORKER: Final = {
    "process_resident_memory_bytes": "rss_bytes",
    "edge_llm_num_requests_running": "requests_running",
    "edge_llm_kv_cache_usage_ratio": "kv_share",
}
_COUNTERS: Final = {
    ("process_cpu_seconds_total", ""): "cpu_cores",
    ("edge_llm_handoff_bytes_total", "in"): "kv_in_bytes_per_s",
    ("edge_llm_handoff_bytes_total", "out"): "kv_out_bytes_per_s",
}


class NodeMetrics:
    """One node. Names are those of resources.py; what is its worker's begins with `worker/`."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ValueError: no URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{name}: {url} is no URL of a node: it begins with http:// and names a host")
        self._host, self._port = parts.hostname, parts.port
        self._is_tls, self._path = parts.scheme == "https", parts.path.rstrip("/") or "/metrics"
        self._rates = Rates()

    def read(self, now_s: float) -> dict[str, float | None]:
        """`now_s`: monotonic. Readings that the node does not have are None."""
        text = self._fetched()
        values = values_of(text or "")
        row: dict[str, float | None] = {ours: values.get((theirs, "")) for theirs, ours in _BOARD.items()}
        row |= {f"worker/{ours}": values.get((theirs, "")) for theirs, ours in _WORKER.items()}
        row |= {f"worker/{ours}": self._rates.of(ours, values.get(theirs), now_s) for theirs, ours in _COUNTERS.items()}
        return row | {
            f"throttled/{kind}": value for (name, kind), value in values.items() if name == "edge_llm_node_throttled"
        }

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
    """Values by name and what tells its series apart (a throttle's kind, a hand-off's direction, else nothing). Series
    that differ in nothing we know are added up: a worker whose role changed has counted under both."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, labels = found[1], dict(_LABEL.findall(found[2] or ""))
        kind = labels.get("kind") or labels.get("direction") or ""
        value = _value(found[3])
        if value is not None and (not kind or _KIND.fullmatch(kind)):
            values[name, kind] = values.get((name, kind), 0.0) + value
    return values


def _value(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
