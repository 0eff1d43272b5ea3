"""What K3s's local-path does, in small: a folder of the node for every claim that a pod on that node waits for.

Owns the storage class `local-path`, the folders and their volumes. As there: hostPath with node affinity, a folder that
everybody may write, gone with its claim. Unlike there, `stock` may put files into a new folder: how a model comes onto
a board that has no network. Refuses to know what the files are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.kubernetes.shell import Broken

CLASS: Final = "local-path"
PROVISIONER: Final = "edge-llm.invalid/local-path"
_SELECTED: Final = "volume.kubernetes.io/selected-node"
_AGAIN_S: Final = 1.0
STORAGE_CLASS: Final = f"""\
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {CLASS}, annotations: {{storageclass.kubernetes.io/is-default-class: "true"}}}}
provisioner: {PROVISIONER}
reclaimPolicy: Delete
volumeBindingMode: WaitForFirstConsumer
"""
# namespace, claim, node, folder
Stock = Callable[[str, str, str, Path], None]


@dataclass(slots=True)
class LocalPath:
    """Watches claims in a thread until it is stopped. `watch` begins a `kubectl get ... --watch` with these words."""

    root: Path
    watch: Callable[..., subprocess.Popen[str]]
    kubectl: Callable[..., str]
    stock: Stock
    _ends: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _watching: list[subprocess.Popen[str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.kubectl("apply", "-f", "-", stdin=STORAGE_CLASS)
        for kind, seen in (("persistentvolumeclaims", self._claimed), ("persistentvolumes", self._released)):
            thread = threading.Thread(target=self._follow, args=(kind, seen), name=f"local-path {kind}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._ends.set()
        for child in self._watching:
            child.terminate()
        for thread in self._threads:
            thread.join(10)

    def folder(self, namespace: str, claim: str) -> Path | None:
        """Of a claim that has one."""
        return next(iter(sorted(self.root.glob(f"*/*_{namespace}_{claim}"))), None)

    def _follow(self, kind: str, seen: Callable[[dict[str, Any]], None]) -> None:
        """An API server that goes away ends the watch, which is then begun again."""
        while not self._ends.is_set():
            child = self.watch(kind)
            self._watching.append(child)
            for item in _objects(child):
                try:
                    seen(item)
                except (Broken, OSError) as error:
                    self.troubles.append(str(error))
            child.wait()
            self._watching.remove(child)
            self._ends.wait(_AGAIN_S)

    def _claimed(self, claim: dict[str, Any]) -> None:
        about, spec = claim["metadata"], claim["spec"]
        node = about.get("annotations", {}).get(_SELECTED)
        if not node or spec.get("volumeName") or spec.get("storageClassName") != CLASS or "deletionTimestamp" in about:
            return
        folder = self.root / node / f"pvc-{about['uid']}_{about['namespace']}_{about['name']}"
        if folder.exists():
            return
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        self.stock(about["namespace"], about["name"], node, folder)
        self.kubectl("create", "-f", "-", stdin=json.dumps(_volume(claim, node, folder)))

    def _released(self, volume: dict[str, Any]) -> None:
        spec = volume["spec"]
        if volume.get("status", {}).get("phase") == "Released" and spec.get("storageClassName") == CLASS:
            self.kubectl("delete", "pv", volume["metadata"]["name"], "--ignore-not-found", "--wait=false")
            shutil.rmtree(spec["hostPath"]["path"], ignore_errors=True)


def _objects(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What `kubectl get --watch -o json` prints: one object after another, without anything between them."""
    assert child.stdout is not None
    decoder, text = json.JSONDecoder(), ""
    for line in child.stdout:
        text = (text + line).lstrip()
        if line.rstrip() != "}":  # only the last line of an object is a brace alone at its beginning
            continue
        with suppress(json.JSONDecodeError):
            item, end = decoder.raw_decode(text)
            text = text[end:]
            yield item


def _volume(claim: dict[str, Any], node: str, folder: Path) -> dict[str, Any]:
    about, spec = claim["metadata"], claim["spec"]
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": f"pvc-{about['uid']}",
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "accessModes": spec["accessModes"],
            "storageClassName": CLASS,
            # what is released is deleted by us: the controller knows no way to delete a hostPath of another node
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": about["namespace"],
                "name": about["name"],
                "uid": about["uid"],
            },
            "hostPath": {"path": str(folder), "type": "DirectoryOrCreate"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
