"""What is read of a board beside its processor."""

from __future__ import annotations

import os
from pathlib import Path

from edge_llm.board import BoardFacts, board_facts


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_pi_says_its_system_its_disk_its_cards_and_the_boot_parameters_that_change_figures(tmp_path: Path) -> None:
    put(tmp_path, "etc/os-release", 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nVERSION_ID="13"\n')
    put(
        tmp_path,
        "proc/cmdline",
        "numa_policy=interleave root=PARTUUID=8f3a-02 cgroup_enable=memory cgroup_memory=1 mitigations=off quiet\n",
    )
    device = os.stat(tmp_path).st_dev
    blocks = tmp_path / "sys/dev/block"
    blocks.mkdir(parents=True)
    (blocks / f"{os.major(device)}:{os.minor(device)}").symlink_to("../../devices/mmc0/block/mmcblk0/mmcblk0p2")
    put(tmp_path, "sys/class/net/eth0/speed", "1000\n")
    put(tmp_path, "sys/class/net/eth0/device/uevent", "")
    put(tmp_path, "sys/class/net/wlan0/speed", "-1\n")
    put(tmp_path, "sys/class/net/wlan0/device/uevent", "")
    put(tmp_path, "sys/class/net/veth7/speed", "10000\n")
    assert board_facts(tmp_path, tmp_path) == BoardFacts(
        os="Debian GNU/Linux 13 (trixie)",
        boot_parameters=("numa_policy=interleave", "cgroup_enable=memory", "cgroup_memory=1", "mitigations=off"),
        disk="mmcblk0p2",
        network_mbit_per_s={"eth0": 1000},
    )


def test_what_cannot_be_read_is_not_made_up(tmp_path: Path) -> None:
    assert board_facts(tmp_path / "to" / "be" / "made", tmp_path) == BoardFacts(None, (), None, {})
