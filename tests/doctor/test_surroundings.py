"""Storage, network, ports and K3s: each reading and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_llm.doctor.files import Files
from edge_llm.doctor.finding import Finding
from edge_llm.doctor.k3s import check_k3s, read_k3s
from edge_llm.doctor.network import check_network, check_ports, read_network
from edge_llm.doctor.storage import Place, check_models_place, check_root, read_place
from tests.doctor.boards import K3S_VERSION, changed, fitting_pi5, link, mounts, route, tcp, write

Changes = Mapping[str, str | None]
MOUNTINFO = "proc/self/mountinfo"


def place_of(root: Path, changes: Changes, folder: str = "/", free: int | None = None) -> Place:
    found = read_place(Files(write(root, changed(fitting_pi5(), changes))), Path(folder), lambda _folder: free)
    assert found is not None
    return found


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "number", "more", "medium", "device"),
    [
        ("/dev/mmcblk0p2", "179:2", {}, "SD card", "mmcblk0p2"),
        ("/dev/mmcblk0p2", "179:2", {"sys/block/mmcblk0/device/type": "MMC\n"}, "eMMC", "mmcblk0p2"),
        ("/dev/root", "179:2", {}, "SD card", "mmcblk0"),
        ("/dev/root", "259:2", {"sys/dev/block/259:2": "-> ../../devices/x/nvme0n1/nvme0n1p2"}, "NVMe", "nvme0n1p2"),
        ("/dev/sda2", "8:2", {}, "disk", "sda2"),
        ("/dev/sda2", "8:2", {"sys/block/sda": "-> ../devices/platform/xhci/usb2/2-1/block/sda"}, "USB disk", "sda2"),
        ("/dev/vda1", "254:1", {}, "virtual", "vda1"),
        (
            "/dev/mapper/root",
            "253:0",
            {"sys/dev/block/253:0": "-> ../../devices/virtual/block/dm-0"},
            "virtual",
            "dm-0",
        ),
    ],
)
def test_the_medium_behind_the_root_is_found(
    tmp_path: Path, source: str, number: str, more: Changes, medium: str, device: str
) -> None:
    place = place_of(tmp_path, {MOUNTINFO: mounts(source, number), **more})
    assert (place.medium, place.device) == (medium, device)


def test_an_sd_card_is_worse_on_a_server(tmp_path: Path) -> None:
    place = place_of(tmp_path, {MOUNTINFO: mounts("/dev/mmcblk0p2", "179:2")})
    assert check_root(place, runs_server=True, has_k3s=True).status == "fail"
    agent, bare = (check_root(place, runs_server=False, has_k3s=has_k3s) for has_k3s in (True, False))
    assert (agent.status, bare.status) == ("warn", "warn")
    assert "images" in agent.why
    assert "images" not in bare.why


def test_the_deepest_mount_holds_the_models_and_blanks_in_its_name_are_read(tmp_path: Path) -> None:
    more = (
        "40 22 8:1 / /mnt rw shared:9 - ext4 /dev/sda1 rw\n",
        "41 40 0:50 / /mnt/my\\040models rw shared:9 - nfs4 nas:/models rw\n",
    )
    tree = {MOUNTINFO: mounts("/dev/mmcblk0p2", "179:2", *more)}
    assert place_of(tmp_path / "a", tree, "/mnt/other").device == "sda1"
    network = place_of(tmp_path / "b", tree, "/mnt/my models/deep/down")
    assert (network.medium, network.device) == ("network", "nas:/models")
    assert check_models_place(network, needs_bytes=0, is_there=True).status == "warn"


def test_a_later_mount_hides_an_earlier_one_at_the_same_place(tmp_path: Path) -> None:
    tmpfs = "50 22 0:60 / / rw shared:9 - tmpfs tmpfs rw\n"
    assert place_of(tmp_path, {MOUNTINFO: mounts("/dev/sda1", "8:1", tmpfs)}).medium == "memory"


@pytest.mark.parametrize(
    ("free", "needs", "is_there", "status"),
    [
        (100 << 20, 0, False, "fail"),
        (100 << 20, 0, True, "warn"),
        (1 << 30, 0, True, "warn"),
        (1 << 30, 1 << 30, False, "fail"),
        (8 << 30, 1 << 30, False, "ok"),
        (None, 0, True, "ok"),
    ],
)
def test_room_is_judged_by_what_is_still_to_come(
    tmp_path: Path, free: int | None, needs: int, is_there: bool, status: str
) -> None:
    place = place_of(tmp_path, {}, "/home/pi/models", free)
    assert check_models_place(place, needs_bytes=needs, is_there=is_there).status == status


def test_a_read_only_volume_is_fine_once_the_model_is_there(tmp_path: Path) -> None:
    volume = "40 22 0:70 / /models ro shared:9 - ext4 /dev/sdb1 rw\n"
    place = place_of(tmp_path, {MOUNTINFO: mounts("/dev/sda1", "8:1", volume)}, "/models", free=0)
    assert check_models_place(place, needs_bytes=0, is_there=True).status == "ok"
    assert check_models_place(place, needs_bytes=100 << 20, is_there=False).status == "fail"


# --- network ------------------------------------------------------------------------------------------------------


def network(root: Path, changes: Changes, kernel_clock: tuple[bool, float] | None = None) -> dict[str, Finding]:
    facts = read_network(Files(write(root, changed(fitting_pi5(), changes))), kernel_clock)
    found = check_network(facts, kv_bytes_per_token=23_040, has_k3s=True, ports=[8080, 0, 9001])
    return {finding.check.removeprefix("network."): finding for finding in found}


def test_a_slow_link_says_how_many_tokens_it_carries(tmp_path: Path) -> None:
    found = network(tmp_path, link("eth0", speed=100))["link"]
    assert found.status == "warn"
    assert "510 tokens/s" in found.why  # 100 Mbit/s x 0.94 / 8 / 23,040 bytes


def test_half_duplex_is_a_failure_and_so_told_before_the_speed(tmp_path: Path) -> None:
    assert network(tmp_path, link("eth0", speed=100, duplex="half"))["link"].status == "fail"


def test_the_interface_of_the_best_default_route_counts(tmp_path: Path) -> None:
    wireless = {"sys/class/net/wlan0/wireless/": "", "sys/class/net/wlan0/mtu": "1500\n"}
    routes = route(("eth0", "00000000", 600), ("wlan0", "00000000", 100))
    found = network(tmp_path, {**wireless, "proc/net/route": routes})["link"]
    assert (found.status, found.found) == ("warn", "wlan0 is wireless")


def test_a_board_with_ipv6_only_has_a_link_too(tmp_path: Path) -> None:
    zero = "0" * 32
    six = f"{zero} 00 {zero} 00 fe800000000000000000000000000001 00000064 00000001 00000000 00000003     eth0\n"
    found = network(tmp_path, {"proc/net/route": route(), "proc/net/ipv6_route": six})["link"]
    assert found.found.startswith("eth0: 1000")


def test_what_a_container_or_a_virtual_machine_sees_is_not_judged(tmp_path: Path) -> None:
    pod: Changes = {"sys/class/net/eth0/device": None, "sys/class/net/eth0/speed": "10000\n"}
    assert network(tmp_path / "pod", pod)["link"].status == "unknown"
    silent = {"sys/class/net/eth0/speed": "-1\n"}
    assert network(tmp_path / "vm", silent)["link"].status == "unknown"
    assert "link_health" not in network(tmp_path / "vm2", silent)


def test_a_link_that_comes_and_goes_is_noticed_by_its_rate(tmp_path: Path) -> None:
    flaps = link("eth0", carrier_changes=100)
    day = network(tmp_path / "day", {**flaps, "proc/uptime": "86400.0 1\n"})["link_health"]
    year = network(tmp_path / "year", {**flaps, "proc/uptime": f"{365 * 86_400}.0 1\n"})["link_health"]
    assert (day.status, year.status) == ("warn", "ok")
    few = network(tmp_path / "few", {**link("eth0", carrier_changes=6), "proc/uptime": "600.0 1\n"})["link_health"]
    assert few.status == "ok", "a board that has just booted"


def test_a_small_mtu_is_noticed_and_a_large_one_is_fine(tmp_path: Path) -> None:
    assert network(tmp_path / "small", link("eth0", mtu=1280))["link_health"].status == "warn"
    assert network(tmp_path / "large", link("eth0", mtu=9000))["link_health"].status == "ok"


@pytest.mark.parametrize(
    ("kernel_clock", "has_file", "status"),
    [
        ((True, 0.02), False, "ok"),
        ((False, 16.0), False, "warn"),
        ((False, 16.0), True, "ok"),
        (None, True, "ok"),
        (None, False, "unknown"),
    ],
)
def test_the_clock_is_believed_when_kernel_or_service_vouch_for_it(
    tmp_path: Path, kernel_clock: tuple[bool, float] | None, has_file: bool, status: str
) -> None:
    changes: Changes = {} if has_file else {"run/systemd/timesync/synchronized": None}
    assert network(tmp_path, changes, kernel_clock)["clock"].status == status


def test_a_firewall_is_told_with_the_ports_of_this_board_and_of_k3s(tmp_path: Path) -> None:
    found = network(tmp_path / "on", {"etc/ufw/ufw.conf": "ENABLED=yes\n"})["firewall"]
    assert [command for command in found.commands if "8080" in command or "9001" in command] == list(found.commands[:2])
    assert "sudo ufw allow 6443/tcp" in found.commands
    assert "firewall" not in network(tmp_path / "off", {"etc/ufw/ufw.conf": "ENABLED=no\n"})


def test_ports_are_read_from_who_listens_not_from_connections(tmp_path: Path) -> None:
    facts = read_network(Files(write(tmp_path, {"proc/net/tcp": tcp(22, 9001), "proc/net/tcp6": tcp(443)})), None)
    assert facts.listening == frozenset({22, 443, 9001}), "8080 is the local end of a connection"


def test_a_port_is_free_ours_taken_or_of_k3s() -> None:
    def status(port: int, listening: frozenset[int] | None, ours: frozenset[int] = frozenset()) -> list[str]:
        found = check_ports(listening, {"gateway": port}, ours, has_k3s=True)
        return [finding.status for finding in found]

    taken = frozenset({8080})
    assert status(8080, frozenset()) == ["ok"]
    assert status(8080, taken) == ["fail"]
    assert status(8080, taken, ours=taken) == ["ok"]
    assert status(10250, frozenset()) == ["fail"], "the kubelet's, whether it runs now or not"
    assert status(8080, None) == ["unknown"]
    assert status(0, taken) == [], "a free one is taken"


# --- K3s ----------------------------------------------------------------------------------------------------------


def k3s(
    root: Path, changes: Changes, version: str | None = K3S_VERSION, ram_bytes: int = 8 << 30
) -> dict[str, Finding]:
    files = Files(write(root, changed(fitting_pi5(), changes)))
    listening = read_network(files, None).listening
    found = check_k3s(read_k3s(files, lambda _command: version, listening), ram_bytes=ram_bytes, cores=4)
    return {finding.check.removeprefix("k3s."): finding for finding in found}


AS_SERVER = {"etc/systemd/system/k3s-agent.service": None, "etc/systemd/system/k3s.service": "[Service]\n"}


def test_the_version_of_k3s_is_its_own_word(tmp_path: Path) -> None:
    assert k3s(tmp_path / "new", {})["version"].found == "v1.35.3+k3s1"
    old = k3s(tmp_path / "old", {}, "k3s version v1.28.4+k3s2 (6ba6c1b6)\n")["version"]
    assert (old.status, old.found) == ("warn", "v1.28.4+k3s2")
    assert "K3S_URL" in old.commands[0], "without, the installer would make this agent a server"
    assert k3s(tmp_path / "mute", {}, None)["version"].status == "unknown"


def test_a_board_without_k3s_gets_one_line(tmp_path: Path) -> None:
    found = k3s(tmp_path, {"usr/local/bin/k3s": None})
    assert list(found) == ["installed"]
    assert found["installed"].status == "ok"


def test_a_service_that_does_not_run_is_a_failure_with_the_log_to_read(tmp_path: Path) -> None:
    found = k3s(tmp_path, {**AS_SERVER, "proc/net/tcp": tcp(22)})["installed"]
    assert (found.status, "journalctl -u k3s " in found.commands[1]) == ("fail", True)
    nobody = k3s(tmp_path / "none", {"etc/systemd/system/k3s-agent.service": None})["installed"]
    assert nobody.status == "warn"


@pytest.mark.parametrize(
    ("is_server", "ram_gb", "status"),
    [(True, 1, "fail"), (True, 2, "warn"), (True, 4, "ok"), (False, 1, "ok"), (False, 0.4, "fail")],
)
def test_hardware_is_held_against_what_k3s_asks_for(
    tmp_path: Path, is_server: bool, ram_gb: float, status: str
) -> None:
    seen_bytes = int(ram_gb * 1e9 * 0.98)  # the kernel keeps some for itself
    found = k3s(tmp_path, AS_SERVER if is_server else {}, ram_bytes=seen_bytes)["hardware"]
    assert found.status == status


@pytest.mark.parametrize("name", ["raspberrypi", "Pi_A", "-pi", "pi-"])
def test_names_that_collide_or_that_kubernetes_does_not_take_are_noticed(tmp_path: Path, name: str) -> None:
    found = k3s(tmp_path, {"proc/sys/kernel/hostname": f"{name}\n"})["hostname"]
    assert (found.status, found.commands[0].startswith("sudo hostnamectl")) == ("warn", True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", "a: [\n", "not YAML"),
        ("config.yaml", "- a\n- b\n", "no mapping"),
        ("config.yaml", "token: a\ntoken: b\n", "given twice"),
        ("config.yaml.d/one.yaml", "just words\n", "no mapping"),
    ],
)
def test_settings_that_k3s_cannot_read_are_named_with_their_file(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    found = k3s(tmp_path, {f"etc/rancher/k3s/{name}": text})["config"]
    assert found.status == "fail"
    assert found.found.startswith(f"/etc/rancher/k3s/{name}")
    assert words in found.found


def test_an_administrators_file_that_all_can_read_is_noticed(tmp_path: Path) -> None:
    assert k3s(tmp_path, {"etc/rancher/k3s/k3s.yaml": "apiVersion: v1\n"})["kubeconfig"].status == "warn"
    (tmp_path / "etc/rancher/k3s/k3s.yaml").chmod(0o600)
    assert not read_k3s(Files(tmp_path), lambda _command: None, frozenset()).open_kubeconfig
