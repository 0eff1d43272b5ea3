"""`make image`: build the container image with buildah or podman, check it, and write it as one file for the boards.

Owns the builder's command line, the base image that is made without a registry, and what is said at the end. Refuses to
know what is in the image (Containerfile, assemble.py). Runs with the system's python3, before any package exists:
standard library and our own modules of that kind only. It prints, like a command.

Invariants: the builder's own settings for package indexes (pip's configuration, certificates) are mounted for the time
of a step and never part of a layer; the file in the output folder is whole (one rename) and was checked.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import edge_llm
from edge_llm.bootstrap import SetupError, say
from edge_llm.image.archive import Contents, complaints, read_archive
from edge_llm.image.wheel import BASELINES, architecture_of

ROOT: Final = Path(__file__).resolve().parent.parent.parent
IMAGE: Final = "localhost/edge-llm"
BASE: Final = "localhost/edge-llm-base"
SUITE: Final = "bookworm"
_CA: Final = "/run/secrets/ca"
_PIP_VARIABLES: Final = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
_UNNEEDED: Final = (
    *("var/cache/apt", "var/lib/apt/lists", "var/log"),
    *("usr/share/man", "usr/share/locale", "usr/share/info"),
)
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Order:
    """What to build. Bases None: the Containerfile's default."""

    architecture: str
    version: str
    revision: str
    base: str | None = None
    build_base: str | None = None

    @property
    def name(self) -> str:
        """What the boards call it."""
        return f"{IMAGE}:{self.version}"

    @property
    def tag(self) -> str:
        """What this machine calls it: images of two architectures have one name on their boards."""
        return f"{IMAGE}:{self.version}-{self.architecture}"

    @property
    def stem(self) -> str:
        return f"edge-llm-{self.version}-{self.architecture}"


def build_command(builder: str, order: Order, host: str, secrets: Mapping[str, Path]) -> list[str]:
    """The builder's arguments, but for the folder."""
    command = [builder, "build", "--layers", "--platform", f"linux/{order.architecture}", "--tag", order.tag]
    given = {
        "BUILDPLATFORM": f"linux/{host}",
        "VERSION": order.version,
        "REVISION": order.revision,
        "BASE": order.base,
        "BUILD_BASE": order.build_base,
    }
    for name, value in given.items():
        command += ["--build-arg", f"{name}={value}"] if value else []
    for name, path in secrets.items():
        command += ["--secret", f"id={name},src={path}"]
    return [*command, "--timestamp", "0", "--file", "Containerfile"]


# --- settings of the building machine -----------------------------------------------------------------------------


def pip_configuration(files: Sequence[str], environ: Mapping[str, str], has_certificates: bool) -> str:
    """One pip.conf out of the user's files (later ones win) and variables, for inside the build."""
    parser = configparser.RawConfigParser()
    for text in files:
        parser.read_string(text)
    if not parser.has_section("global"):
        parser.add_section("global")
    for key in _PIP_VARIABLES:
        if value := environ.get("PIP_" + key.upper().replace("-", "_")):
            parser.set("global", key, value)
    for section in parser.sections():
        parser.remove_option(section, "cert")  # a path of this machine
        parser.remove_option(section, "find-links")
    if has_certificates:
        parser.set("global", "cert", _CA)
    written = io.StringIO()
    parser.write(written)
    return written.getvalue()


def certificates(environ: Mapping[str, str]) -> Path | None:
    """The bundle that this machine's pip was told to use; None: the usual one."""
    named = (environ.get(name) for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))
    return next((Path(path) for path in named if path and Path(path).is_file()), None)


def pip_files(environ: Mapping[str, str]) -> list[str]:
    """The texts of pip's configuration files, in pip's order."""
    home = Path(environ.get("HOME", "/root"))
    own = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    places = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf", own / "pip/pip.conf"]
    if named := environ.get("PIP_CONFIG_FILE"):
        places.append(Path(named))
    return [path.read_text() for path in places if path.is_file()]


@contextlib.contextmanager
def mounted_settings(environ: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """Files for the build's secrets, gone afterwards: they may hold passwords."""
    with tempfile.TemporaryDirectory(prefix="edge-llm-image-") as folder:
        bundle = certificates(environ)
        settings = Path(folder, "pip.conf")
        settings.touch(0o600)
        settings.write_text(pip_configuration(pip_files(environ), environ, bundle is not None))
        yield {"pip": settings} | ({"ca": bundle} if bundle else {})


# --- doing it -----------------------------------------------------------------------------------------------------


def build(order: Order, output: Path, builder: str, host: str) -> Path:
    """The archive, checked."""
    if order.architecture != host:
        check_emulation(BASELINES[order.architecture].machine, Path("/"))
    output.mkdir(parents=True, exist_ok=True)
    with mounted_settings(os.environ) as secrets:
        run([*build_command(builder, order, host, secrets), str(ROOT)], "building the image")
    archive = output / f"{order.stem}.oci.tar"
    part = archive.with_suffix(".part")
    part.unlink(missing_ok=True)
    run([builder, "push", "--quiet", order.tag, f"oci-archive:{part}:{order.name}"], "writing the archive")
    contents = read_archive(part)
    if found := complaints(contents, order.architecture):
        raise SetupError(f"the image is not fit to be used ({part}):\n  " + "\n  ".join(found))
    part.replace(archive)
    assert contents.sbom is not None  # complaints() looked
    (output / f"{order.stem}.sbom.cdx.json").write_text(contents.sbom)
    report(order, archive, contents)
    return archive


def report(order: Order, archive: Path, contents: Contents) -> None:
    packages = len(json.loads(contents.sbom or "{}").get("components", []))
    mib, unpacked = archive.stat().st_size / _MIB, contents.bytes_unpacked / _MIB
    say(f"{archive}: {order.name} for linux/{order.architecture}, {mib:.0f} MiB, {unpacked:.0f} MiB unpacked")
    say(f"  {packages} packages in {order.stem}.sbom.cdx.json beside it; for {BASELINES[order.architecture].boards}")
    say(f"  onto a board without a registry: sudo k3s ctr images import {archive.name}")


def make_base(architecture: str, host: str, builder: str) -> str:
    """A Debian root file system as an image, for places that reach a Debian mirror but no image registry."""
    if architecture != host:
        check_emulation(BASELINES[architecture].machine, Path("/"))
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SetupError("a base image is made with debootstrap, by root (Debian: sudo apt install debootstrap)")
    tag = f"{BASE}:{SUITE}-{architecture}"
    with tempfile.TemporaryDirectory(prefix="edge-llm-base-", dir="/var/tmp") as scratch:
        folder = Path(scratch, "rootfs")
        say(f"making {tag} with debootstrap: 1 to 4 minutes")
        run(["debootstrap", f"--arch={architecture}", "--variant=minbase", SUITE, str(folder)], "debootstrap")
        slim(folder)
        packed = Path(scratch, "context")
        packed.mkdir()
        pack = ["tar", "-C", str(folder), "--sort=name", "--mtime=@0", "--one-file-system", "-cf"]
        run([*pack, str(packed / "rootfs.tar"), "."], "packing the root file system")
        (packed / "Containerfile").write_text('FROM scratch\nADD rootfs.tar /\nCMD ["/bin/sh"]\n')
        platform = ["--platform", f"linux/{architecture}", "--timestamp", "0", "--tag", tag]
        run([builder, "build", *platform, str(packed)], "making the base image")
    return tag


def slim(root: Path) -> None:
    """What Debian's own slim images leave out too: caches, logs, manuals and translations; licences stay."""
    for place in _UNNEEDED:
        for path in (root / place).iterdir() if (root / place).is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted((root / "usr/share/doc").rglob("*"), reverse=True):
        if path.name != "copyright" and (path.is_symlink() or path.is_file()):
            path.unlink()
    for name in ("etc/hostname", "etc/resolv.conf", "etc/machine-id"):  # debootstrap copies the building machine's
        (root / name).unlink(missing_ok=True)


def check_emulation(machine: str, root: Path) -> None:
    """Nothing is compiled under emulation, but installing Debian's python3 runs its maintainer scripts."""
    if not (root / f"proc/sys/fs/binfmt_misc/qemu-{machine}").exists():
        raise SetupError(
            f"this machine cannot start programs for {machine}: sudo apt install qemu-user-static binfmt-support, then "
            f"sudo update-binfmts --enable qemu-{machine}"
        )


def find_builder(named: str | None) -> str:
    for name in [named] if named else ["buildah", "podman"]:
        if shutil.which(name):
            return name
    raise SetupError(f"{named or 'buildah (or podman)'} is missing: install it (Debian: sudo apt install buildah)")


def local_base(builder: str, architecture: str) -> str | None:
    """The image that `make image-base` made here, if it did."""
    tag = f"{BASE}:{SUITE}-{architecture}"
    inspect = [builder, "inspect", "--type", "image", tag]
    found = subprocess.run(inspect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return tag if found.returncode == 0 else None


def revision() -> str:
    """The commit, and whether files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def run(command: Sequence[str], what: str) -> None:
    if status := subprocess.run(command, check=False).returncode:
        raise SetupError(f"{what} failed with status {status}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the container image of edge-llm.")
    parser.add_argument("--arch", choices=BASELINES, help="default: this machine's")
    parser.add_argument("--base", help="base image; default: the one of `make image-base`, else the Containerfile's")
    parser.add_argument("--build-base", help="the same release for this machine's architecture; default: --base")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the archive (default dist)")
    parser.add_argument("--builder", help="buildah or podman; default: the first that is there")
    parser.add_argument("--make-base", action="store_true", help="make the base images with debootstrap instead")
    options = parser.parse_args(argv)
    try:
        host = architecture_of(os.uname().machine)
        architecture, builder = options.arch or host, find_builder(options.builder)
        if options.make_base:
            for each in sorted({architecture, host}):
                here = local_base(builder, each)
                say(f"{here} is there already" if here else f"made {make_base(each, host, builder)}")
            return 0
        base = options.base or local_base(builder, architecture)
        build_base = options.build_base or options.base or local_base(builder, host)
        order = Order(architecture, edge_llm.__version__, revision(), base, build_base)
        build(order, options.output, builder, host)
    except (SetupError, OSError, ValueError) as error:
        say(f"edge-llm image: {error}")
        return 1
    except KeyboardInterrupt:
        say("edge-llm image: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
