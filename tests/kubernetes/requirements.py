"""What the test cluster needs of the machine, checked before anything is started, in one message.

Owns the list of Debian packages. Installs only when it is asked to. Refuses to know Go: see build.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.kubernetes.node import CNI
from tests.kubernetes.shell import Broken

# program: Debian package
_PROGRAMS: Final = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "sysctl": "procps",
}
# What `make image` takes; where there is no image registry, debootstrap makes the base.
_IMAGE_BUILDERS: Final = ("buildah", "podman")
_IMAGE_PACKAGES: Final = ("buildah", "debootstrap")
_PLUGINS: Final = ("bridge", "host-local", "loopback")


def missing() -> list[str]:
    """Packages that are not there."""
    needed = {package for program, package in _PROGRAMS.items() if shutil.which(program) is None}
    if not all((CNI / plugin).exists() for plugin in _PLUGINS):
        needed.add("containernetworking-plugins")
    return sorted(needed)


def apt_line() -> str:
    packages = sorted({*_PROGRAMS.values(), "containernetworking-plugins"})
    return "apt-get install -y --no-install-recommends " + " ".join(packages)


def check() -> None:
    """Raises Broken with what to do."""
    if os.geteuid():
        raise Broken("the test cluster needs root: network namespaces, mounts, control groups")
    if not Path("/sys/fs/cgroup").is_dir():
        raise Broken("this machine has no control groups under /sys/fs/cgroup")
    if packages := missing():
        raise Broken(f"missing: {', '.join(packages)}. On Debian: {apt_line()}")


def install(*, builds_image: bool) -> None:
    """What is missing, also for building the image where that is asked for. Raises Broken."""
    lacks_builder = builds_image and not any(shutil.which(name) for name in _IMAGE_BUILDERS)
    lines = [apt_line()] if missing() else []
    lines += [f"apt-get install -y {' '.join(_IMAGE_PACKAGES)}"] if lacks_builder else []
    for line in lines:
        done = subprocess.run(line.split(), env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False)
        if done.returncode:
            raise Broken(f"{line}: status {done.returncode}")
