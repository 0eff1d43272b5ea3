"""The test cluster as a whole: up from nothing, kubectl, waiting, and down to nothing.

Owns the order, the lock (one cluster at a time on a machine), and what is left behind: nothing, also after Ctrl-C, and
after a run that was killed, the next one or `down` takes it away. Refuses to know what is deployed.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from edge_llm.config import cache_dir
from tests.kubernetes import cgroups, net, oci
from tests.kubernetes.build import CLUSTER, built
from tests.kubernetes.control import PARTS, Control
from tests.kubernetes.node import PAUSE, Board
from tests.kubernetes.shell import Broken, Daemons, inside, run
from tests.kubernetes.site import PREFIX, Site, site
from tests.kubernetes.volumes import LocalPath, Stock

Say = Callable[[str], None]
_BEFORE: Final = "before.json"
# At most: images, three times unpacked, and models. What is not used takes none.
_MEMORY_BYTES: Final = 12 << 30
_READY_S: Final = 90.0
_POLL_S: Final = 0.2
# Programs make these whatever they are told; those that were not there before are removed.
_STRAY: Final = tuple(
    map(Path, ("/var/lib/kubelet", "/var/lib/cni", "/var/log/containers", "/run/containerd", "/opt/containerd"))
)


@dataclass(slots=True)
class Cluster:
    """A running one. `images`: archives that its nodes imported; `ends`: nobody waits for anything any more."""

    site: Site
    daemons: Daemons
    control: Control
    boards: tuple[Board, ...]
    images: Mapping[str, Path] = field(default_factory=dict)
    volumes: LocalPath | None = None
    kubectl_calls: int = field(default=0)
    ends: threading.Event = field(default_factory=threading.Event)

    def board(self, name: str) -> Board:
        return next(board for board in self.boards if board.node.name == name)

    def _command(self, *words: str | Path) -> list[str]:
        first = self.site.control.namespace
        kubectl = [str(self.site.binaries / "kubectl"), "--kubeconfig", str(self.site.admin)]
        return [*inside(first), *kubectl, *map(str, words)]

    def kubectl(self, *words: str | Path, stdin: str | None = None, deadline_s: float = 60.0) -> str:
        """What it printed. Raises Broken with what it complained about."""
        self.kubectl_calls += 1
        return run(*self._command(*words), stdin=stdin, deadline_s=deadline_s)

    def get(self, *words: str) -> dict[str, Any]:
        """`kubectl get ... -o json`."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *words, "-o", "json"))
        return found

    def items(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(*words)["items"]
        return found

    def watch(self, kind: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command("get", kind, "-A", "--watch", "-o", "json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def until(self, what: str, condition: Callable[[], bool], deadline_s: float = _READY_S) -> float:
        """Seconds until it held. Raises Broken."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < deadline_s and not self.ends.is_set():
            with suppress(Broken):  # an API server that is away says nothing about the condition
                if condition():
                    return time.monotonic() - began_s
            self.ends.wait(_POLL_S)
        self.daemons.check()
        raise Broken(f"{what}: not within {deadline_s:.0f} s")


def leftovers() -> list[Path]:
    """Run folders of runs that ended without cleaning up. The lock must be held."""
    return sorted(path.parent for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*/{_BEFORE}"))


@contextmanager
def only_one() -> Iterator[None]:
    """Names of namespaces and control groups are fixed: two at once would end each other. Raises Broken."""
    path = cache_dir() / "kubernetes" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: IO[str] = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Broken("another test cluster runs on this machine: wait for it or end it") from None
    try:
        yield
    finally:
        lock.close()


@contextmanager
def cluster(
    nodes: int, images: Mapping[str, Path], labels: Mapping[str, Mapping[str, str]], stock: Stock, say: Say
) -> Iterator[Cluster]:
    """A cluster with Ready nodes, for as long as the block runs. `images`: archives that every node imports; `labels`:
    of nodes by name; `stock`: what a new volume holds. Raises Broken, NotBuilt."""
    binaries = built(CLUSTER, say)
    with only_one():
        clean(say)
        folder = _in_memory()
        (folder / _BEFORE).write_text(json.dumps({"folders": _there(), "namespaces": _pod_namespaces()}))
        made = _arranged(site(folder, binaries, nodes), images)
        try:
            _up(made, labels, stock, say)
            yield made
        finally:
            say("taking the cluster down")
            with _undisturbed():
                _down(made)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not leave half of it behind."""
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _arranged(place: Site, images: Mapping[str, Path] | None = None) -> Cluster:
    daemons = Daemons(place.run)
    boards = tuple(Board(place, node, daemons) for node in place.nodes)
    return Cluster(place, daemons, Control(place, daemons), boards, images or {})


def _up(made: Cluster, labels: Mapping[str, Mapping[str, str]], stock: Stock, say: Say) -> None:
    began_s = time.monotonic()

    def lap(what: str) -> None:
        say(f"[{time.monotonic() - began_s:5.1f} s] {what}")

    net.connect(made.site)
    lap(f"network of {len(made.boards)} nodes and a client, 1 Gbit/s")
    made.control.start()
    lap("control plane ready")
    pause = made.site.run / "pause.tar"
    oci.write_image(pause, PAUSE, {"pause": (made.site.binaries / "pause").read_bytes()}, ["/pause"])
    with ThreadPoolExecutor(len(made.boards)) as pool:
        started = [
            pool.submit(board.start, {"pause": pause, **made.images}, labels.get(board.node.name, {}))
            for board in made.boards
        ]
        for one in started:
            one.result()
    lap("nodes started, images imported")
    # the API answers so early that these do not exist yet: without them the first pods are refused
    names = [f"node/{board.node.name}" for board in made.boards]
    for thing in ("serviceaccount/default", "configmap/kube-root-ca.crt", *names):
        made.kubectl("wait", "--for=create", thing, "--timeout=60s", deadline_s=70)
    made.kubectl("wait", "--for=condition=Ready", *names, f"--timeout={_READY_S:.0f}s", deadline_s=_READY_S + 10)
    made.volumes = LocalPath(made.site.run / "volumes", made.watch, made.kubectl, stock)
    made.volumes.start()
    lap(f"{len(names)} nodes Ready")


def clean(say: Say) -> None:
    """Remove what runs left that were killed. The lock must be held."""
    for folder in leftovers():
        say(f"removing what an earlier run left in {folder}")
        count = sum(1 for one in folder.glob("node-*") if one.is_dir())
        _down(_arranged(site(folder, folder, max(count, 1))))


def _down(made: Cluster) -> None:
    """In order, and on through whatever fails."""
    if made.volumes is not None:
        made.volumes.stop()
    before = json.loads((made.site.run / _BEFORE).read_text())
    for board in made.boards:
        board.stop()
    for name in made.daemons.names():  # what scenarios started beside it
        if name not in PARTS:
            made.daemons.stop(name)
    made.control.stop()
    _unmount(made.site.run)
    for name in set(_pod_namespaces()) - set(before["namespaces"]):
        run("ip", "netns", "del", name, may_fail=True)
    net.disconnect(made.site)
    for node in made.site.nodes:
        cgroups.remove(node.cgroup)
    for path in set(map(str, _STRAY)) - set(before["folders"]):
        shutil.rmtree(path, ignore_errors=True)
    run("umount", "-l", made.site.run, may_fail=True)
    shutil.rmtree(made.site.run, ignore_errors=True)


def _in_memory() -> Path:
    """The run's folder. Layers of images are tens of thousands of files for each node: in memory they are quickly there
    and at once gone."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-"))
    run("mount", "-t", "tmpfs", "-o", f"size={_MEMORY_BYTES},mode=0711", "elt", folder)
    return folder


def _there() -> list[str]:
    return [str(path) for path in _STRAY if path.exists()]


def _pod_namespaces() -> list[str]:
    """Network namespaces of pods: the CNI plugins name them so, whoever asked."""
    return [path.name for path in Path("/run/netns").glob("cni-*")]


def _unmount(folder: Path) -> None:
    """Volumes, and the roots of containers."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if mount.startswith(f"{folder}/"):
            run("umount", "-l", mount, may_fail=True)
