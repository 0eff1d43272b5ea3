"""Whole boards: as it should be, with every mistake, of another kind, and boards that say nothing or lie."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_llm.doctor.examination import AREAS, Examination
from edge_llm.doctor.files import Files
from edge_llm.doctor.finding import Finding, exit_code, report_of
from tests.doctor.boards import changed, fitting_pi5, mini_pc, unfit_pi5, write
from tests.doctor.examined import NOW_S, examined, outside, statuses

Environment = dict[str, str]
AT = datetime.fromtimestamp(NOW_S, UTC)


def of(found: dict[str, Finding], status: str) -> set[str]:
    return {check for check, finding in found.items() if finding.status == status}


def test_a_board_as_it_should_be_gives_no_complaint(tmp_path: Path, tiny: Environment) -> None:
    found = examined(write(tmp_path / "pi", fitting_pi5()), tiny)
    assert of(found, "warn") == of(found, "fail") == set()
    assert of(found, "unknown") == {"k3s.version"}, "the program of another board cannot be asked"
    assert found["board.model"].found == "Raspberry Pi 5 Model B Rev 1.0, 4 cores, aarch64"
    assert found["board.ram"].found == "7.9 GiB"
    assert found["kernel.release"].found == "6.12.47+rpt-rpi-2712, Debian GNU/Linux 12 (bookworm)"
    assert found["kernel.numa"].found == "spread over 8 nodes"
    assert found["kernel.page_size"].found.startswith("16 KiB")
    assert found["storage.root"].found == "NVMe (nvme0n1p2, ext4)"
    assert found["network.link"].found == "eth0: 1000 Mbit/s, full, MTU 1500"
    assert found["k3s.installed"].found == "agent, running"


def test_every_mistake_is_named_and_says_why_it_matters_and_what_to_do(tmp_path: Path, tiny: Environment) -> None:
    found = examined(write(tmp_path / "pi", unfit_pi5()), tiny)
    assert of(found, "fail") == {
        "board.throttling",
        "board.temperature",
        "kernel.memory_cgroup",
        "storage.root",
        "network.link",
        "ports.gateway",
        "k3s.installed",
        "k3s.config",
        "model.memory",
    }
    assert of(found, "warn") == {
        "board.ram",
        "board.cooling",
        "board.governor",
        "board.load",
        "kernel.numa",
        "kernel.huge_pages",
        "kernel.swap",
        "limits.memory",
        "limits.cpu",
        "network.link_health",
        "network.firewall",
        "k3s.hardware",
        "k3s.hostname",
        "k3s.kubeconfig",
    }
    for finding in found.values():
        if finding.status in ("warn", "fail"):
            assert finding.why, finding.check
            assert finding.do, finding.check


def test_memory_that_others_use_is_a_warning_and_a_limit_a_failure(tmp_path: Path, tiny: Environment) -> None:
    full = {"proc/meminfo": "MemTotal: 8255488 kB\nMemAvailable: 100000 kB\n"}
    assert examined(write(tmp_path / "full", changed(fitting_pi5(), full)), tiny)["model.memory"].status == "warn"
    limit: dict[str, str | None] = {"sys/fs/cgroup/user.slice/memory.max": f"{100 << 20}\n"}
    found = examined(write(tmp_path / "limit", changed(fitting_pi5(), limit)), tiny)["model.memory"]
    assert (found.status, "The sum:" in found.why) == ("fail", True)


def test_a_mini_pc_is_not_asked_for_what_only_a_pi_has(tmp_path: Path, tiny: Environment) -> None:
    found = examined(write(tmp_path / "pc", mini_pc()), tiny)
    assert of(found, "warn") == of(found, "fail") == set()
    assert not {"board.throttling", "board.cooling", "kernel.numa", "kernel.nvme_host_memory"} & found.keys()
    assert found["board.model"].found == "Beelink EQ12, 4 cores, x86_64"
    assert found["board.cpu_features"].found == "AVX2, FMA, F16C, avx_vnni"
    assert found["k3s.installed"].status == "ok"


def test_a_board_that_says_nothing_is_unknown_and_not_well(tmp_path: Path, tiny: Environment) -> None:
    found = examined(tmp_path / "nothing", tiny)
    for check in ("board.model", "board.ram", "board.temperature", "kernel.memory_cgroup", "storage.root"):
        assert found[check].status == "unknown", check
    for check in ("kernel.swap", "kernel.huge_pages", "network.link", "network.clock", "ports.gateway"):
        assert found[check].status == "unknown", check
    for check in ("limits.memory", "limits.cpu", "model.memory", "worker.threads", "k3s.installed"):
        assert found[check].status == "unknown", check
    assert "how much is free cannot be read" in found["model.memory"].found
    assert found["board.model"].found == "neither its name nor its architecture can be read"
    assert not [one for one in found.values() if one.status in ("warn", "fail")]


@pytest.mark.parametrize(
    "nonsense", ["", "\0\0\n", "nonsense\n", "-1\n", "9" * 400, "a:b:c\n:\n", "- - - - - - - - - - -\n"]
)
def test_files_that_lie_break_nothing(tmp_path: Path, tiny: Environment, nonsense: str) -> None:
    tree = {name: text if text.startswith("-> ") else nonsense for name, text in unfit_pi5().items()}
    found = examined(write(tmp_path / "pi", tree), tiny)
    assert {finding.area for finding in found.values()} <= set(AREAS)
    assert not [finding for finding in found.values() if finding.check.endswith(".examination")]


def test_no_single_file_is_needed(tmp_path: Path, tiny: Environment) -> None:
    for number, name in enumerate(fitting_pi5()):
        found = examined(write(tmp_path / str(number), changed(fitting_pi5(), {name: None})), tiny)
        assert not [finding for finding in found.values() if finding.check.endswith(".examination")], name


def test_folders_where_files_should_be_break_nothing(tmp_path: Path, tiny: Environment) -> None:
    tree = {name if name.endswith("/") else f"{name}/": "" for name in fitting_pi5()}
    found = examined(write(tmp_path / "pi", tree), tiny)
    assert not [finding for finding in found.values() if finding.check.endswith(".examination")]


def test_an_area_that_breaks_says_so_and_the_others_go_on(tmp_path: Path, tiny: Environment) -> None:
    def broken() -> tuple[bool, float] | None:
        raise ZeroDivisionError("clock")

    run = Examination(Files(), None, tiny, lambda: NOW_S, outside=replace(outside(), clock=broken))
    found = {finding.check: finding for finding in run.run(["peers"])}
    assert found["network.examination"].status == "unknown"
    assert "ZeroDivisionError: clock" in found["network.examination"].found
    assert found["board.ram"].status in ("ok", "warn")


def test_an_ignored_area_is_not_examined_and_an_ignored_check_not_counted(tmp_path: Path, tiny: Environment) -> None:
    root = write(tmp_path / "pi", changed(fitting_pi5(), {"sys/class/thermal/thermal_zone0/temp": "84000\n"}))
    found = examined(root, tiny, ignored=["k3s"])
    assert not [check for check in found if check.startswith("k3s.")]
    assert exit_code(report_of(found.values(), [], AT, "1")) == 2
    kept = report_of(found.values(), ["board.temperature"], AT, "1")
    assert (exit_code(kept), kept.status, kept.ignored) == (0, "ok", ("board.temperature",))
    assert "board.temperature" not in [finding.check for finding in kept.findings]


def test_the_worst_finding_names_the_report_and_what_is_not_known_is_no_fault() -> None:
    ok, warned, failed, unknown = (Finding("a.b", status, "") for status in ("ok", "warn", "fail", "unknown"))
    cases = [([], 0), ([unknown], 0), ([ok, unknown], 0), ([ok, warned, unknown], 1), ([warned, failed, ok], 2)]
    assert [exit_code(report_of(found, [], AT, "1")) for found, _ in cases] == [code for _, code in cases]
    assert report_of([ok, warned, unknown], [], AT, "1").counts == {"ok": 1, "warn": 1, "fail": 0, "unknown": 1}


def test_statuses_are_the_four_that_the_schema_has(tmp_path: Path, tiny: Environment) -> None:
    found = statuses(examined(write(tmp_path / "pi", unfit_pi5()), tiny))
    assert set(found.values()) <= {"ok", "warn", "fail", "unknown"}
