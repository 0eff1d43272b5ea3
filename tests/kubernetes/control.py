"""The control plane: certificates by kubeadm, etcd, API server, controller manager and scheduler on the first node.

Owns how they are started, and taking the API server away and back. The test's only liberties: etcd does not flush to
disk, and the API server's certificate is for one address. Refuses to know nodes beyond their names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.kubernetes.build import KUBERNETES
from tests.kubernetes.shell import Broken, Daemons, inside, run
from tests.kubernetes.site import DOMAIN, PODS_NET, SERVICES_NET, Node, Site

_READY_S: Final = 90.0
_ETCD: Final = "http://127.0.0.1:2379"
_PEER: Final = "http://127.0.0.1:2380"
PARTS: Final = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")


@dataclass(frozen=True, slots=True)
class Control:
    """Started and stopped as a whole; `apiserver_away` and `apiserver_back` in between."""

    site: Site
    daemons: Daemons

    def start(self) -> None:
        """Returns when the API server is ready."""
        self._certify()
        self._start_etcd()
        self.apiserver_back()
        # the API server as the kubelets' client: logs and exec
        self._kubectl("create", "clusterrolebinding", "kubelet-api", "--clusterrole=system:kubelet-api-admin", _CLIENT)

    def _kubectl(self, *words: str) -> str:
        binary = self.site.binaries / "kubectl"
        return run(*self._inside, binary, "--kubeconfig", self.site.admin, *words)

    @property
    def _inside(self) -> list[str]:
        return inside(self.site.control.namespace)

    def _certify(self) -> None:
        """Keys and kubeconfigs of everybody: kubeadm knows who needs what."""
        kubeadm = self.site.binaries / "kubeadm"
        config = self.site.run / "kubeadm.yaml"
        config.write_text(_kubeadm(self.site))
        for folder in (self.site.pki, self.site.kubeconfigs):
            folder.mkdir(parents=True, exist_ok=True)
        options = ("--config", config)
        run(*self._inside, kubeadm, "init", "phase", "certs", "all", *options)
        for name in ("admin", "super-admin", "controller-manager", "scheduler"):
            words = ("init", "phase", "kubeconfig", name, *options, "--kubeconfig-dir", self.site.kubeconfigs)
            run(*self._inside, kubeadm, *words)
        users = {f"kubelet-{node.name}": (f"system:node:{node.name}", "system:nodes") for node in self.site.nodes}
        for file, (user, group) in {**users, "kube-proxy": ("system:kube-proxy", "")}.items():
            named: list[str | Path] = ["kubeconfig", "user", *options, "--client-name", user]
            named += ["--org", group] if group else []
            (self.site.kubeconfigs / f"{file}.conf").write_text(run(*self._inside, kubeadm, *named))

    def _start(self, name: str, *options: str) -> None:
        self.daemons.start(name, self.site.control.namespace, self.site.binaries / name, *options)

    def _start_etcd(self) -> None:
        self._start(
            "etcd",
            "--name=e0",
            f"--data-dir={self.site.run / 'etcd'}",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            f"--listen-peer-urls={_PEER}",
            f"--initial-advertise-peer-urls={_PEER}",
            f"--initial-cluster=e0={_PEER}",
            "--unsafe-no-fsync",
        )

    def apiserver_away(self) -> None:
        """Who schedules and controls ends with it: in K3s they are one process, elsewhere they lose their lease. (One
        that goes on without may be left with a view of the past, and schedules nothing any more.)"""
        for name in PARTS:
            if name != "etcd":
                self.daemons.stop(name)

    def apiserver_back(self) -> None:
        """Returns when it is ready."""
        self._start("kube-apiserver", *_apiserver(self.site))
        self._until_ready()
        self._start_controllers()

    def _until_ready(self) -> None:
        deadline_s = time.monotonic() + _READY_S
        while time.monotonic() < deadline_s:
            self.daemons.check()
            try:
                if self._kubectl("get", "--raw", "/readyz") == "ok":
                    return
            except Broken:
                time.sleep(0.3)
        raise Broken(
            f"the API server was not ready after {_READY_S:.0f} s: {self.daemons.last_words('kube-apiserver')}"
        )

    def _start_controllers(self) -> None:
        pki, kubeconfigs = self.site.pki, self.site.kubeconfigs
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={kubeconfigs / 'controller-manager.conf'}",
            "--leader-elect=false",
            "--use-service-account-credentials",
            f"--root-ca-file={pki / 'ca.crt'}",
            f"--service-account-private-key-file={pki / 'sa.key'}",
            f"--cluster-signing-cert-file={pki / 'ca.crt'}",
            f"--cluster-signing-key-file={pki / 'ca.key'}",
            "--bind-address=127.0.0.1",
        )
        scheduler = f"--kubeconfig={kubeconfigs / 'scheduler.conf'}"
        self._start("kube-scheduler", scheduler, "--leader-elect=false", "--bind-address=127.0.0.1")

    def stop(self) -> None:
        for name in PARTS:
            self.daemons.stop(name)


_CLIENT: Final = "--user=kube-apiserver-kubelet-client"


def _kubeadm(site: Site) -> str:
    node: Node = site.control
    return f"""\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {node.ip}, bindPort: 6443}}
nodeRegistration: {{name: {node.name}, criSocket: "unix://{site.socket(node)}"}}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v{KUBERNETES}
controlPlaneEndpoint: {node.ip}:6443
certificatesDir: {site.pki}
networking: {{serviceSubnet: {SERVICES_NET}, podSubnet: {PODS_NET}, dnsDomain: {DOMAIN}}}
"""


def _apiserver(site: Site) -> list[str]:
    pki = site.pki
    return [
        f"--advertise-address={site.control.ip}",
        "--bind-address=0.0.0.0",
        "--secure-port=6443",
        f"--etcd-servers={_ETCD}",
        f"--service-cluster-ip-range={SERVICES_NET}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        "--kubelet-certificate-authority=",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-account-key-file={pki / 'sa.pub'}",
        f"--service-account-signing-key-file={pki / 'sa.key'}",
        f"--requestheader-client-ca-file={pki / 'front-proxy-ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki / 'front-proxy-client.crt'}",
        f"--proxy-client-key-file={pki / 'front-proxy-client.key'}",
    ]
