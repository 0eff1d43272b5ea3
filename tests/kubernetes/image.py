"""The image that nodes import: where it is, whether one of this checkout could be built here at once, and building it.

Owns that a build takes no longer than there is time. Refuses to know how it is built: edge_llm/image/build.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import edge_llm
from edge_llm.bootstrap import SetupError
from edge_llm.image.build import find_builder, local_base
from edge_llm.image.wheel import architecture_of
from tests.kubernetes import oci
from tests.kubernetes.shell import Broken

_FOLDER: Final = Path("dist")
# As root, which the cluster needs, this works where containers cannot be made, too.
_ISOLATION: Final = "BUILDAH_ISOLATION"


def archive() -> Path:
    """Where `make image` leaves it for this machine."""
    return _FOLDER / f"edge-llm-{edge_llm.__version__}-{_architecture()}.oci.tar"


def _architecture() -> str:
    return architecture_of(os.uname().machine)


def revision(path: Path) -> str:
    """The commit that it was built of."""
    return oci.labels(path).get("org.opencontainers.image.revision", "unknown")


def cannot_build() -> str:
    """What is missing for a build that asks no image registry; empty: nothing."""
    try:
        builder = find_builder(None)
    except SetupError as error:
        return str(error)
    return "" if local_base(builder, _architecture()) else "a base image (`make image-base`)"


def build(limit_s: float | None) -> Path:
    """As `make image`. Raises Broken, TimeoutError."""
    command = [sys.executable, "-B", "-m", "edge_llm.image.build", "--output", str(_FOLDER)]
    environment = {_ISOLATION: "chroot", **os.environ}
    # a session of its own: the builder's children are ended with it
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        status = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError("the image was not built in time") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    if status:
        raise Broken(f"the image of this checkout could not be built: status {status}")
    return archive()
