"""One node: containerd, kubelet and kube-proxy in its network namespace, its images, and how all of it is removed.

Owns their settings and the order of their end: containers first, then who would start them again. Shims outlive
containerd by design, so they are found by the socket on their command line. Refuses to know the control plane.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.kubernetes import cgroups
from tests.kubernetes.shell import Broken, Daemons, run
from tests.kubernetes.site import DOMAIN, PODS_NET, Node, Site

PAUSE: Final = "localhost/pause:1"
CNI: Final = Path("/usr/lib/cni")
_SOCKET_S: Final = 30.0
_IMPORT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Board:
    """A node that can be started, stopped, killed and started again."""

    site: Site
    node: Node
    daemons: Daemons

    @property
    def folder(self) -> Path:
        return self.site.folder(self.node)

    def _name(self, program: str) -> str:
        return f"{program}-{self.node.name}"

    def start(self, images: Mapping[str, Path], labels: Mapping[str, str]) -> None:
        """`images`: archives to import, by any name. The node registers itself with `labels`."""
        for name in ("cni", "kubelet", "podlogs", "volumes"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        cgroups.make(self.node.cgroup)
        (self.folder / "containerd.toml").write_text(_containerd(self.site, self.node))
        (self.folder / "cni" / "10-pods.conflist").write_text(_pod_network(self.site, self.node))
        (self.folder / "kubelet.yaml").write_text(_kubelet(self.site, self.node))
        (self.folder / "kube-proxy.yaml").write_text(_kube_proxy(self.site, self.node))
        self._start("containerd", "containerd", "--config", self.folder / "containerd.toml")
        self._until_containerd_answers()
        for path in images.values():
            self.load(path)
        self.start_kubelet(labels)
        self._start("kube-proxy", self.site.binaries / "kube-proxy", f"--config={self.folder / 'kube-proxy.yaml'}")

    def start_kubelet(self, labels: Mapping[str, str]) -> None:
        self._start(
            "kubelet",
            self.site.binaries / "kubelet",
            f"--config={self.folder / 'kubelet.yaml'}",
            f"--kubeconfig={self.site.kubeconfigs / f'kubelet-{self.node.name}.conf'}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'pki'}",
            f"--hostname-override={self.node.name}",
            f"--node-ip={self.node.ip}",
            "--node-labels=" + ",".join(f"{key}={value}" for key, value in labels.items()),
        )

    def load(self, archive: Path) -> None:
        """Import an image, as `k3s ctr images import` does."""
        self._ctr("images", "import", archive, deadline_s=_IMPORT_S)

    def images(self) -> set[str]:
        return set(self._ctr("images", "ls", "-q").split())

    def _start(self, program: str, *command: str | Path) -> None:
        self.daemons.start(self._name(program), self.node.namespace, *command)

    def _ctr(self, *words: str | Path, deadline_s: float = 20.0, may_fail: bool = False) -> str:
        socket = self.site.socket(self.node)
        return run("ctr", "-a", socket, "-n", "k8s.io", *words, deadline_s=deadline_s, may_fail=may_fail)

    def _until_containerd_answers(self) -> None:
        deadline_s = time.monotonic() + _SOCKET_S
        while time.monotonic() < deadline_s:
            self.daemons.check()
            try:
                self._ctr("version")
            except Broken:
                time.sleep(0.2)
            else:
                return
        raise Broken(
            f"containerd of {self.node.name} does not answer: {self.daemons.last_words(self._name('containerd'))}"
        )

    # -- the end

    def stop(self) -> None:
        """Works on what an earlier run left, too."""
        for program in ("kubelet", "kube-proxy"):
            self.daemons.stop(self._name(program))
        if self.daemons.pid(self._name("containerd")) is not None:
            self._end_containers()
        self.daemons.stop(self._name("containerd"))
        self._end_shims()
        for pid in cgroups.processes(self.node.cgroup):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end_containers(self) -> None:
        for task in self._ctr("tasks", "ls", "-q", may_fail=True).split():
            self._ctr("tasks", "kill", "-s", "KILL", task, may_fail=True)
        deadline_s = time.monotonic() + _SOCKET_S
        while self._ctr("tasks", "ls", "-q", may_fail=True).split() and time.monotonic() < deadline_s:
            for task in self._ctr("tasks", "ls", "-q", may_fail=True).split():
                self._ctr("tasks", "rm", "-f", task, may_fail=True)

    def _end_shims(self) -> None:
        mark = f"-address\0{self.site.socket(self.node)}\0".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes()
                if b"containerd-shim" in words and mark in words:
                    os.kill(int(path.parent.name), signal.SIGKILL)


def _containerd(site: Site, node: Node) -> str:
    folder = site.folder(node)
    return f"""\
version = 2
root = "{folder}/ctd"
state = "{folder}/state"
[grpc]
  address = "{site.socket(node)}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE}"
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


def _pod_network(site: Site, node: Node) -> str:
    return f"""\
{{"cniVersion": "1.0.0", "name": "pods", "plugins": [{{"type": "bridge", "bridge": "cni0", "isGateway": true,
  "ipMasq": false, "hairpinMode": true, "ipam": {{"type": "host-local", "dataDir": "{site.folder(node)}/ipam",
  "ranges": [[{{"subnet": "{node.pods_net}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}
"""


def _kubelet(site: Site, node: Node) -> str:
    folder = site.folder(node)
    # no entry for swap, disks and version 1 of cgroups: the test runs on machines that no board is like
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {node.ip}
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {site.pki}/ca.crt}}}}
authorization: {{mode: Webhook}}
cgroupDriver: cgroupfs
cgroupsPerQOS: true
cgroupRoot: /{node.cgroup}
enforceNodeAllocatable: []
failSwapOn: false
failCgroupV1: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix://{site.socket(node)}
podLogsDir: {folder}/podlogs
volumePluginDir: {folder}/volumeplugins
clusterDomain: {DOMAIN}
resolvConf: ""
imageGCHighThresholdPercent: 100
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}}
"""


def _kube_proxy(site: Site, node: Node) -> str:
    return f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {{kubeconfig: {site.kubeconfigs}/kube-proxy.conf}}
mode: iptables
hostnameOverride: {node.name}
clusterCIDR: {PODS_NET}
oomScoreAdj: 0
bindAddress: {node.ip}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
"""
