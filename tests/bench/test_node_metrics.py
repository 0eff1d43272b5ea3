"""Other nodes over real sockets: our own workers, and whatever else may answer at such a port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from edge_llm.bench.node_metrics import NodeMetrics, about_of, values_of
from tests.loopback import CHUNK, prompt_of, running_cluster

TEXT = """\
# HELP edge_llm_node_temperature_celsius Of the processor.
edge_llm_node_temperature_celsius{node="pi-1"} 61.45
edge_llm_node_cpu_frequency_hertz{node="pi-1"} 2.4e+09
edge_llm_node_cpu_usage_ratio{node="pi-1"} 0.75
edge_llm_node_throttled{node="pi-1",kind="under_voltage"} 1.0
edge_llm_node_throttled{node="pi-1",kind="throttled"} 0.0
process_cpu_seconds_total 12.5
process_resident_memory_bytes 3.5e+08 1700000000000
edge_llm_handoff_bytes_total{model_name="a \\"b\\" } c",role="decode",node="pi-1",direction="in"} 100
edge_llm_handoff_bytes_total{model_name="x",role="mixed",node="pi-1",direction="in"} 20
"""


@contextmanager
def node(*answers: bytes) -> Iterator[str]:
    """Says each of these to one connection, whatever is asked, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                with connection, suppress(OSError):  # who has heard enough hangs up
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def standing_clock() -> float:
    return 0.0


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_node_is_read_under_the_names_of_a_board() -> None:
    later = TEXT.replace("12.5", "15.5").replace("} 20", "} 60").replace("} 100", "} 130")
    with node(http(TEXT.encode()), http(later.encode())) as url:
        metrics = NodeMetrics(url, "pi-1", standing_clock)
        first, second = metrics.read(10.0), metrics.read(12.0)
    assert (first["temperature_c"], first["frequency_hz"], first["cpu_share"]) == (61.45, 2.4e9, 0.75)
    assert (first["throttled/under_voltage"], first["throttled/throttled"]) == (1.0, 0.0)
    assert first["worker/rss_bytes"] == 3.5e8
    assert (first["ram_share"], first["worker/kv_share"]) == (None, None), "a node that does not say it"
    assert (first["worker/cpu_cores"], second["worker/cpu_cores"]) == (None, 1.5)
    assert second["worker/kv_in_bytes_per_s"] == 35.0, "under both names of its role together"


ABOUT = 'edge_llm_node_info{board="Raspberry Pi 5 Model B Rev 1.0",cores="4",cpu="Cortex-A76",node="pi-1",os=""} 1.0\n'


def test_a_node_says_what_it_is_as_long_as_it_was_ever_heard() -> None:
    with node(http(ABOUT.encode()), http(TEXT.encode())) as url:
        metrics = NodeMetrics(url, "pi-1", standing_clock)
        assert metrics.facts() == {}
        for at_s in (10.0, 11.0):
            metrics.read(at_s)
            assert metrics.facts() == {"board": "Raspberry Pi 5 Model B Rev 1.0", "cores": "4", "cpu": "Cortex-A76"}


def test_a_node_cannot_say_what_is_not_asked_nor_at_length() -> None:
    assert about_of('edge_llm_node_info{board="' + "x" * 5000 + '",secret="y"} 1.0') == {"board": "x" * 120}
    assert about_of('edge_llm_node_info{board="\x1b[31m"} 1.0') == {}


NOTHING = {
    "an error": http(b"no", "500 Internal Server Error"),
    "a redirection": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "nothing at all": b"",
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nedge_llm_node_cpu_us",
    "a page": http(b"<html>edge_llm_node_cpu_usage_ratio 0.5 </html>"),
    "bytes": http(bytes(range(256)) * 16),
    "a broken length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no numbers": http(b"edge_llm_node_cpu_usage_ratio NaN\nedge_llm_node_memory_usage_ratio high\n"),
    "too much": http(b"edge_llm_node_cpu_usage_ratio 0.5\n" * 100_000),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_whatever_a_node_says_its_readings_are_null_and_nothing_fails(kind: str) -> None:
    with node(NOTHING[kind]) as url:
        row = NodeMetrics(url, "pi-1").read(1.0)
    assert set(row.values()) == {None}
    assert "cpu_share" in row


def test_a_node_that_is_away_has_no_readings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert set(NodeMetrics(f"http://127.0.0.1:{port}/metrics", "pi-1").read(1.0).values()) == {None}


def test_counters_of_cores_and_energy_are_shares_and_watts_of_the_time_between() -> None:
    def at(busy_s: float, all_s: float, joules: float) -> bytes:
        return http(
            f'edge_llm_node_core_busy_seconds_total{{node="a",core="0"}} {busy_s}\n'
            f'edge_llm_node_core_busy_seconds_total{{node="a",core="1"}} 0\n'
            f'edge_llm_node_core_seconds_total{{node="a",core="0"}} {all_s}\n'
            f'edge_llm_node_core_seconds_total{{node="a",core="1"}} {all_s}\n'
            f'edge_llm_node_core_seconds_total{{node="a",core="../x"}} {all_s}\n'
            f'edge_llm_node_energy_joules_total{{node="a",package="intel-rapl:0"}} {joules}\n'
            f'edge_llm_node_energy_joules_total{{node="a",package="intel-rapl:1"}} {joules}\n'
            f'edge_llm_node_cpu_usage_ratio{{node="a"}} 0.125\n'.encode()
        )

    with node(at(10, 20, 100), at(11, 22, 110)) as url:
        metrics = NodeMetrics(url, "pi-1", standing_clock)
        first, second = metrics.read(1.0), metrics.read(3.0)
    assert (first["cpu_share"], first["cpu0_share"], first["power_w"]) == (0.125, None, None)
    assert second["cpu0_share"] == pytest.approx(0.5)
    assert second["cpu_share"] == pytest.approx(0.25)
    assert second["power_w"] == pytest.approx(10.0)
    assert [name for name in second if ".." in name] == []


def test_a_node_that_answers_late_has_its_rates_over_the_time_between_its_answers() -> None:
    clock = iter([0.0, 0.5, 10.0, 12.5]).__next__
    with node(http(b"process_cpu_seconds_total 1\n"), http(b"process_cpu_seconds_total 7\n")) as url:
        metrics = NodeMetrics(url, "pi-1", clock)
        metrics.read(1.0)
        assert metrics.read(2.0)["worker/cpu_cores"] == pytest.approx(6 / 3)


def test_rails_that_a_sensor_measures_are_added_up() -> None:
    text = 'edge_llm_node_power_watts{rail="ina219/power1"} 4.5\nedge_llm_node_power_watts{rail="x"} 1\n'
    with node(http(text.encode())) as url:
        assert NodeMetrics(url, "pi-1").read(1.0)["power_w"] == 5.5


def test_a_hostile_node_cannot_make_names_of_its_own() -> None:
    text = 'edge_llm_node_throttled{kind="../../x"} 1\nedge_llm_node_throttled{kind="' + "a" * 99 + '"} 1\n'
    with node(http(text.encode())) as url:
        row = NodeMetrics(url, "pi-1").read(1.0)
    assert [name for name in row if name.startswith("throttled")] == []


def test_values_of_a_line_that_is_almost_right_are_left_out() -> None:
    lines = ("x", "x{", "x{} ", "x{a=1} 2", "{} 1", "x 1 2 3", "é 1")
    for line in lines:
        assert values_of(line) in ({}, {("x", ""): 2.0}), line
    assert values_of("x 1\n\nx 2\n") == {("x", ""): 3.0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_our_own_workers_are_understood() -> None:
    """A name that is changed there must be changed here."""
    async with running_cluster() as cluster:
        prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
        metrics = NodeMetrics(f"http://{decode.peer.address}/metrics", "d1")
        before = await asyncio.to_thread(metrics.read, 1.0)
        await (await cluster.gateway.ask(decode.peer, prompt_of(3 * CHUNK), [prefill.peer], max_tokens=4)).over()
        after = await asyncio.to_thread(metrics.read, 2.0)
    named = ("cpu_share", "ram_share", "ram_used_bytes", "worker/requests_running", "worker/kv_share")
    assert all(before[name] is not None for name in named), before
    assert before.keys() == after.keys() >= {"cpu0_share", "net_in_bytes_per_s", "loopback_bytes_per_s", "power_w"}
    assert 0 < (after["worker/anonymous_bytes"] or 0) <= 2 * (after["worker/rss_bytes"] or 0)
    assert (after["loopback_bytes_per_s"] or 0) > 0, "a hand-off over loopback"
    assert (after["worker/kv_in_bytes_per_s"] or 0) >= 0
    assert (before["worker/rss_bytes"] or 0) > 1e6
    assert after["worker/cpu_cores"] is not None
