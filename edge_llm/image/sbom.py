"""The list of what is in an image (SBOM), as CycloneDX 1.6 JSON.

Owns the document. Refuses to know how an image is made: installed Python packages, pip's report of what it installed
and dpkg's status come as arguments. Pure.

Invariants: the same packages give the same bytes (sorted, no date; the serial number is a digest of the content). A
hash is of the file that was installed, as pip reports it; where none is known, none is written.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

_NAMESPACE: Final = uuid.UUID("3b1f8e54-6f0e-5f59-9a52-0d1c7f3ad1a6")  # ours, drawn once


@dataclass(frozen=True, slots=True)
class Installed:
    """A Python distribution. `licence` as its metadata has it; `properties` for what only we know."""

    name: str
    version: str
    licence: str | None = None
    sha256: str | None = None
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """The image itself."""

    name: str
    version: str
    architecture: str


@dataclass(frozen=True, slots=True)
class Debian:
    """An installed Debian package, and the release it is of (`bookworm`)."""

    name: str
    version: str
    architecture: str
    source: str | None = None


def bill(subject: Subject, python: Iterable[Installed], debian: Iterable[Debian], release: str) -> str:
    """The document, ending with a newline."""
    components = [_python(package) for package in python] + [_debian(package, release) for package in debian]
    components.sort(key=lambda component: str(component["bom-ref"]))
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": f"{subject.name}@{subject.version}",
                "name": subject.name,
                "version": subject.version,
                "properties": [{"name": "edge-llm:architecture", "value": subject.architecture}],
            }
        },
        "components": components,
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}"
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _python(package: Installed) -> dict[str, Any]:
    purl = f"pkg:pypi/{canonical(package.name)}@{quote(package.version)}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
    }
    if package.licence:
        component["licenses"] = [{"license": {"name": package.licence}}]
    if package.sha256:
        component["hashes"] = [{"alg": "SHA-256", "content": package.sha256}]
    if package.properties:
        component["properties"] = [{"name": name, "value": value} for name, value in package.properties]
    return component


def _debian(package: Debian, release: str) -> dict[str, Any]:
    purl = f"pkg:deb/debian/{quote(package.name)}@{quote(package.version)}?arch={package.architecture}"
    purl += f"&distro={quote(release)}" if release else ""
    properties = [{"name": "edge-llm:debian-source", "value": package.source}] if package.source else []
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
    }
    return component | ({"properties": properties} if properties else {})


def canonical(name: str) -> str:
    """A Python package's name as indexes compare it."""
    return "-".join(part for part in name.lower().replace("_", "-").replace(".", "-").split("-") if part)


def hashes_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Package name to the SHA-256 of the file that pip installed, out of `pip install --report`."""
    found = {}
    for item in report.get("install", []):
        archive = item.get("download_info", {}).get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256") or str(archive.get("hash", "")).removeprefix("sha256=")
        if digest:
            found[canonical(item["metadata"]["name"])] = digest
    return found


def debian_packages(status: str) -> list[Debian]:
    """Of /var/lib/dpkg/status: what is installed, not what was removed."""
    found = []
    for paragraph in status.split("\n\n"):
        lines = (line.partition(":") for line in paragraph.splitlines() if line[:1] not in ("", " ", "\t"))
        fields = {name: value.strip() for name, _, value in lines}
        if fields.get("Status", "").endswith(" installed") and {"Package", "Version"} <= fields.keys():
            source = fields.get("Source", "").partition(" ")[0] or None
            found.append(Debian(fields["Package"], fields["Version"], fields.get("Architecture", "all"), source))
    return found


def debian_release(os_release: str) -> str:
    """VERSION_CODENAME of /etc/os-release; empty when it has none."""
    for line in os_release.splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip().strip('"')
    return ""
