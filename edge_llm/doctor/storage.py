"""Disks: what the system and the models lie on, and how much room is left.

Owns finding the device behind a folder, and judging it. Refuses to know which models there are.

Source: "etcd is write intensive; SD cards and eMMC cannot handle the IO load" (K3s documentation, requirements).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge_llm.doctor.files import Files, gib
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

Medium = Literal["SD card", "eMMC", "NVMe", "disk", "USB disk", "network", "memory", "virtual", "unknown"]
Room = Callable[[Path], int | None]
"""Free bytes of the file system that a folder is on; None: not known."""

_NETWORK: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})
_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_VIRTUAL: Final = frozenset({"overlay", "aufs", "squashfs"})
# linux/Documentation/admin-guide/devices.txt: what a device is called where its name is not given.
_MAJORS: Final = {"179": "mmcblk0", "259": "nvme0n1", "8": "sda"}
_LITTLE_BYTES: Final = 2 << 30
_NOTHING_BYTES: Final = 300 << 20
_ELSEWHERE: Final = "export EDGE_LLM_CATALOGUE_MODELS_DIR=/path/on/another/disk"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder and what is under it. `is_read_only`: of the file system."""

    folder: str
    device: str
    medium: Medium
    file_system: str
    is_read_only: bool
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Mount:
    point: str
    number: str
    options: tuple[str, ...]
    file_system: str
    source: str


def read_place(files: Files, folder: Path, room: Room) -> Place | None:
    """None when the mounts cannot be read. `folder` is absolute; one that is not there yet is where it would be."""
    mounts = [mount for line in (files.text("proc/self/mountinfo") or "").splitlines() if (mount := _mount(line))]
    found = [mount for mount in mounts if folder == Path(mount.point) or Path(mount.point) in folder.parents]
    if not found:
        return None
    longest = max(len(mount.point) for mount in found)
    mount = [mount for mount in found if len(mount.point) == longest][-1]  # a later one hides those before it
    device = _device(files, mount)
    return Place(
        folder=str(folder),
        device=device,
        medium=_medium(files, mount, device),
        file_system=mount.file_system,
        is_read_only="ro" in mount.options,
        free_bytes=room(folder),
    )


def check_root(place: Place | None, *, runs_server: bool, has_k3s: bool) -> Finding:
    """What the system is on."""
    check = "storage.root"
    if place is None:
        return unknown(check, "/proc/self/mountinfo cannot be read")
    words = f"{place.medium} ({place.device}, {place.file_system})"
    if place.medium not in ("SD card", "eMMC"):
        return ok(check, words)
    do = "move the system to an NVMe or USB SSD and boot from there (SD Card Copier, then raspi-config, Advanced)"
    if runs_server:
        why = "this board is a K3s server: its database writes all the time, cards are too slow for it and wear out"
        return fail(check, words, why=why, do=do)
    why = "a model is read at a fraction of an SSD's speed, and logs and swap wear the card out"
    if has_k3s:
        why += "; K3s unpacks its images there"
    return warn(check, words, why=why, do=do)


def check_models_place(place: Place | None, *, needs_bytes: int, is_there: bool) -> Finding:
    """Where models are kept. `needs_bytes`: still to be fetched; `is_there`: the configured model can be read."""
    check = "storage.models"
    if place is None:
        return unknown(check, "/proc/self/mountinfo cannot be read")
    free = "" if place.free_bytes is None else f", {gib(place.free_bytes)} free"
    words = f"{place.folder} on {place.medium} ({place.device}){free}"
    if place.is_read_only:  # a volume that somebody else fills
        if is_there:
            return ok(check, f"{words}, read-only")
        why = "the configured model is not there, and nothing can be written"
        do = "put it there from where it can be written, or keep models elsewhere"
        return fail(check, f"{words}, read-only", why=why, do=do, commands=[_ELSEWHERE])
    least = needs_bytes + (0 if is_there else _NOTHING_BYTES)
    if place.free_bytes is not None and place.free_bytes < least:
        return fail(
            check,
            words,
            why=f"{gib(least)} are needed for the configured model and what is written beside it",
            do="make room, or keep models elsewhere",
            commands=[f"du -sh {place.folder}/*", _ELSEWHERE],
        )
    if place.medium == "network":
        return warn(
            check,
            words,
            why="model files are mapped: what the kernel drops comes back over the network, in the middle of an answer",
            do="keep a copy on each board's own disk: edge-llm models pull NAME",
        )
    if place.medium == "memory":
        return warn(
            check,
            words,
            why="models here take memory twice, and are gone after a boot",
            do="keep them on a disk",
            commands=[_ELSEWHERE],
        )
    if place.free_bytes is not None and place.free_bytes < _LITTLE_BYTES + needs_bytes:
        return warn(
            check,
            words,
            why="another model, a compiled wheel or a container image will not fit",
            do="make room",
            commands=[f"du -sh {place.folder}/*"],
        )
    return ok(check, words)


def _mount(line: str) -> _Mount | None:
    """A line of mountinfo: `36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/sda1 rw` (proc(5))."""
    head, _, tail = line.partition(" - ")
    fields, rest = head.split(), tail.split()
    if len(fields) < 6 or len(rest) < 2:
        return None
    point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
    options = (*fields[5].split(","), *(rest[2].split(",") if len(rest) > 2 else ()))
    return _Mount(point, fields[2], options, rest[0], rest[1])


def _device(files: Files, mount: _Mount) -> str:
    """Its kernel name: `/dev/root` and mapped devices say nothing."""
    name = mount.source.removeprefix("/dev/")
    if re.match(r"(mmcblk|nvme|sd|vd|xvd)", name):
        return name
    link = files.link(f"sys/dev/block/{mount.number}")
    if link:
        return link.rsplit("/", 1)[-1]
    return _MAJORS.get(mount.number.partition(":")[0], mount.source)


def _medium(files: Files, mount: _Mount, device: str) -> Medium:
    if mount.file_system in _NETWORK:
        return "network"
    if mount.file_system in _MEMORY:
        return "memory"
    if mount.file_system in _VIRTUAL:
        return "virtual"
    if found := re.match(r"mmcblk\d+", device):
        return "eMMC" if files.text(f"sys/block/{found[0]}/device/type") == "MMC" else "SD card"
    if device.startswith("nvme"):
        return "NVMe"
    if found := re.match(r"sd[a-z]+", device):
        return "USB disk" if "/usb" in (files.link(f"sys/block/{found[0]}") or "") else "disk"
    return "virtual" if re.match(r"(vd|xvd|loop|zram|dm-)", device) else "unknown"
