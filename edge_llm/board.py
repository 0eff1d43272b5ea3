"""What a board is beside its processor: system, boot parameters, disk and network card. Read from files, never asked.

Owns what a reader of a record needs to judge a figure by and cannot be read off the processor. Refuses to know what is
measured, and readings that change while it is (machine.py). What cannot be read is None or empty.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.machine import file_number, file_text

# Of the boot parameters those that change speed or memory; others may name disks and hosts.
_PARAMETERS: Final = re.compile(
    r"(numa\w*|cgroup_\w+|systemd\.unified_cgroup_hierarchy|isolcpus|nohz_full|maxcpus|mitigations|psi"
    r"|(default_)?hugepages\w*|transparent_hugepage)(=\S*)?"
)


@dataclass(frozen=True, slots=True)
class BoardFacts:
    """os: the distribution's name for itself. disk: the kernel's name of the device under a folder (mmcblk0p2 is an SD
    card or eMMC). network_mbit_per_s: by card, of those that are connected and say so."""

    os: str | None
    boot_parameters: tuple[str, ...]
    disk: str | None
    network_mbit_per_s: dict[str, int]


def board_facts(folder: Path, root: Path = Path("/")) -> BoardFacts:
    """`folder`: where the disk is looked for. `root`: of the file system that is read."""
    release = file_text(root / "etc/os-release") or ""
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)"?$', release, re.MULTILINE)
    parameters = (file_text(root / "proc/cmdline") or "").split()
    return BoardFacts(
        os=name[1] if name else None,
        boot_parameters=tuple(word for word in parameters if _PARAMETERS.fullmatch(word)),
        disk=_disk(folder, root),
        network_mbit_per_s=_cards(root),
    )


def _disk(folder: Path, root: Path) -> str | None:
    try:  # a folder that is not there yet will be made in the nearest one that is
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        device = nearest.stat().st_dev
        return os.readlink(root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").rpartition("/")[2]
    except OSError:
        return None


def _cards(root: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for card in sorted((root / "sys/class/net").glob("*")):
        # a card has a device behind it; bridges and pairs of containers have none
        speed = file_number(card / "speed") if (card / "device").exists() else None
        if speed is not None and speed > 0:
            found[card.name] = int(speed)
    return found
