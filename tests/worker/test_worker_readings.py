"""What a worker's board uses, from the files of a Pi to the lines of a scrape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_llm.exposition import Exposition
from edge_llm.worker.metrics import Readings, WorkerMetrics
from edge_llm.worker.readings import consumed
from tests.loopback import running_cluster
from tests.scrapes import families_of, value

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def of_a_pi(root: Path) -> None:
    sensor = "sys/class/hwmon/hwmon2"
    write(
        root,
        {
            "proc/stat": f"cpu 1 2 3 4\ncpu0 {5 * TICKS} 0 0 {15 * TICKS} 0 0 0 0\ncpu1 0 0 0 {20 * TICKS} 0 0 0 0\n",
            "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n",
            "proc/net/dev": "x|\ny|\neth0: 900 0 0 0 0 0 0 0 100 0\nlo: 70 0 0 0 0 0 0 0 70 0\n",
            f"proc/{os.getpid()}/status": "RssAnon: 300 kB\nRssFile: 900 kB\n",
            "proc/self/cgroup": "0::/kubepods/a\n",
            "sys/fs/cgroup/memory.current": "5000\n",
            "sys/fs/cgroup/memory.peak": "6000\n",
            f"{sensor}/name": "ina219\n",
            f"{sensor}/power1_input": "6250000\n",
        },
    )


@pytest.mark.anyio
async def test_a_scrape_has_what_a_bench_on_another_board_needs(tmp_path: Path) -> None:
    of_a_pi(tmp_path)
    async with running_cluster() as cluster:
        status = (await cluster.start("mixed", "m1")).worker.status()
    exposition = Exposition()
    readings = Readings(lambda: ("x", "mixed", "m1"), lambda: status, lambda: 0, lambda: consumed(tmp_path))
    WorkerMetrics(exposition.registry, readings)
    families = families_of(exposition.text().decode())
    assert value(families, "node_core_busy_seconds_total", node="m1", core="0") == 5
    assert value(families, "node_core_seconds_total", node="m1", core="1") == 20
    assert value(families, "node_network_bytes_total", direction="in") == 900
    assert value(families, "node_network_bytes_total", direction="loopback") == 70
    assert value(families, "node_power_watts", rail="ina219/power1") == 6.25
    assert value(families, "node_memory_used_bytes", node="m1") == 2000 * 1024
    assert value(families, "worker_group_bytes") == 5000
    assert value(families, "worker_group_peak_bytes") == 6000
    assert value(families, "worker_anonymous_bytes", node="m1") == 300 * 1024
    assert "edge_llm_node_energy_joules" not in families, "a Pi has no such counter"


def test_a_board_that_shows_nothing_uses_nothing_that_is_known(tmp_path: Path) -> None:
    used = consumed(tmp_path)
    assert (used.cores, used.network, used.energy_j, used.power_w) == ({}, None, {}, {})
    assert (used.ram_used_bytes, used.group_bytes, used.group_peak_bytes, used.anonymous_bytes) == (None,) * 4
