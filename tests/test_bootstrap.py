"""Set-up without building: what is missing is said first, and what would be built is kept under the right key.

The compile itself runs against a stand-in for the environment's Python that behaves like pip and ninja.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm import bootstrap
from edge_llm.bootstrap import (
    BYTES_PER_JOB,
    COLLECTING,
    FLAGS,
    MIB,
    PACKAGE,
    ROOT,
    Machine,
    Meter,
    Paths,
    SetupError,
    cache_folder,
    cached_wheel,
    check,
    compile_wheel,
    compiler_version,
    counter,
    cpu_features,
    fingerprint,
    free_memory,
    install,
    is_done,
    jobs,
    ninja_step,
    only,
    problems,
    requirements,
    set_up,
    wheel_folder,
    without,
)
from edge_llm.config import cache_dir
from edge_llm.machine import cpu_kind

READY = Machine((3, 11), True, "g++ (Debian) 12.2.0", "/usr/bin/make", 100 << 30, 8 << 30, 4)
LOCK = """\
# made by `make lock`
click==8.3.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via edge-llm
llama-cpp-python==0.3.36 \\
    --hash=sha256:cc
uvicorn==0.38.0 ; sys_platform != 'win32' \\
    --hash=sha256:dd
"""


# --- what is missing ----------------------------------------------------------------------------------------------


def test_a_ready_machine_has_no_problems() -> None:
    assert list(problems(READY, must_compile=True)) == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (READY._replace(python=(3, 9)), ["Python 3.11", "3.9"]),
        (READY._replace(has_venv=False), ["venv", "apt install python3-venv"]),
        (READY._replace(make=None), ["make", "apt install make"]),
        (READY._replace(compiler=None), ["C++ compiler", "apt install g++"]),
        (READY._replace(free_disk=500 * MIB), ["3072 MiB of free disk", "500 MiB are free"]),
        (READY._replace(free_memory=500 * MIB), ["1200 MiB of free memory", "500 MiB"]),
    ],
)
def test_what_is_missing_is_one_sentence_that_says_what_to_do(machine: Machine, words: list[str]) -> None:
    (sentence,) = problems(machine, must_compile=True)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_all_that_is_missing_is_said_at_once() -> None:
    with pytest.raises(SetupError) as caught:
        check(READY._replace(has_venv=False, compiler=None, free_disk=0), must_compile=True)
    assert len(str(caught.value).splitlines()) == 4


def test_what_only_a_compile_needs_is_not_asked_when_the_wheel_is_there() -> None:
    check(READY._replace(compiler=None, free_memory=0, free_disk=2 << 30), must_compile=False)


def run(folder: Path, path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Set-up as `make` starts it, on a machine whose programs are those in `path`."""
    command = [sys.executable, "-I", str(ROOT / "edge_llm/bootstrap.py"), "--venv", str(folder / "new/venv")]
    wanted = {"PATH": str(path), "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), **environment}
    done = subprocess.run([*command, *arguments], env=wanted, capture_output=True, text=True, check=False, timeout=30)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def program(folder: Path, name: str, text: str = "echo 'fake 1.0'") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_bare_machine_is_told_what_to_install_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = run(tmp_path, tmp_path / "bin")
    assert done.returncode == 1
    assert "apt install g++" in done.stderr
    assert "apt install make" in done.stderr
    assert "virtual environment" not in done.stderr
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "cache/edge-llm").iterdir()) == [tmp_path / "cache/edge-llm/setup.lock"]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "file") in line


def test_a_compiler_is_both_of_its_halves(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path)}
    assert compiler_version(environment) is None
    program(tmp_path, "g++", "echo 'g++ (Debian) 12'; echo more")
    assert compiler_version(environment) is None
    program(tmp_path, "gcc")
    assert compiler_version(environment) == "g++ (Debian) 12"


def test_the_users_own_compiler_is_taken_with_its_arguments(tmp_path: Path) -> None:
    for name in ("g++", "gcc"):
        program(tmp_path, name)
    program(tmp_path, "mine", "echo mine 7")
    environment = {"PATH": str(tmp_path), "CXX": "mine -m64", "CC": "gcc"}
    assert compiler_version(environment) == "mine 7"
    assert compiler_version(environment | {"CXX": "absent"}) is None


def test_an_old_python_can_read_it_to_hear_that_it_is_too_old() -> None:
    ast.parse((ROOT / "edge_llm/bootstrap.py").read_text(), feature_version=(3, 7))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "cores", "expected"),
    [(8 << 30, 4, 4), (2 * BYTES_PER_JOB, 4, 2), (2 * BYTES_PER_JOB - 1, 4, 1), (0, 4, 1), (64 << 30, 1, 1)],
)
def test_compile_jobs_are_what_memory_and_cores_allow(memory: int, cores: int, expected: int) -> None:
    assert jobs(memory, cores) == expected


def test_free_memory_counts_swap_and_minds_a_control_group(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", "MemTotal: 4000000 kB\nMemAvailable:  3000 kB\nSwapFree:  1000 kB\nHugePages_Total: 0\n")
    assert free_memory(tmp_path) == 4000 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", f"{2 * MIB}\n")
    write("sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {MIB}\n")
    assert free_memory(tmp_path) == 4000 * 1024
    write("sys/fs/cgroup/memory.max", f"{3 * MIB}\n")
    assert free_memory(tmp_path) == 2 * MIB
    write("sys/fs/cgroup/memory.max", f"{MIB // 2}\n")
    assert free_memory(tmp_path) == 0


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A source tree, an environment whose Python is a stand-in, and a cache."""
    found = Paths(tmp_path / "source", tmp_path / "venv", tmp_path / "cache")
    for folder in (found.root, found.cache):
        folder.mkdir()
    for name in (*bootstrap.LOCKS.values(), "pyproject.toml"):
        (found.root / name).write_text(LOCK)
    stand_in(found)
    return found


def stand_in(paths: Paths, build: str = "") -> None:
    """`python -m pip wheel --wheel-dir DIR` speaks like ninja and makes a wheel; everything is written down."""
    built = "llama_cpp_python-0.3.36-py3-none-any.whl"
    script = f"""
echo "$CMAKE_BUILD_PARALLEL_LEVEL|$CMAKE_ARGS|$*" >> {paths.cache}/calls
while [ "$#" -gt 0 ]; do
  case "$1" in
    --requirement) cat "$2" >> {paths.cache}/requirements ;;
    --wheel-dir)
      for step in 1 2 3 4; do echo "  [$step/4] /usr/bin/g++ -c $step.cpp"; done
      {build or f"echo wheel > $2/{built}"}
      ;;
  esac
  shift
done
"""
    program(paths.python.parent, "python", script)


def calls(paths: Paths) -> list[str]:
    return (paths.cache / "calls").read_text().splitlines()


def test_a_wheel_is_kept_by_version_flags_cpu_and_compiler(paths: Paths) -> None:
    def folder(compiler: str = "g++ 12", features: str = "x86_64-aa", flags: tuple[str, ...] = FLAGS) -> Path:
        return wheel_folder(paths, compiler, features, flags)

    first = folder()
    assert first == folder()
    assert first.is_relative_to(paths.cache)
    assert "0.3.36" in first.name
    others = {folder(compiler="g++ 13"), folder(features="x86_64-bb"), folder(flags=(*FLAGS, "-DX=1"))}
    lock = paths.root / bootstrap.LOCKS[False]
    lock.write_text(LOCK.replace("0.3.36", "0.3.37"))
    assert len({first, folder(), *others}) == 5


def test_a_lock_without_the_package_says_what_to_do(paths: Paths) -> None:
    (paths.root / bootstrap.LOCKS[False]).write_text("click==8.3.0\n")
    with pytest.raises(SetupError, match="make lock"):
        wheel_folder(paths, "g++", "x86_64")


def test_set_up_and_the_program_name_the_same_cache_and_the_same_cpu(tmp_cache: Path) -> None:
    assert cache_folder(os.environ) == cache_dir()
    assert cpu_features(Path("/")).partition("-")[2] == cpu_kind().partition("/")[2]


# --- the compile --------------------------------------------------------------------------------------------------


def test_a_compile_shows_progress_and_leaves_a_whole_wheel_in_the_cache(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = compile_wheel(paths, READY._replace(free_memory=2 * BYTES_PER_JOB))
    assert cached_wheel(paths, READY.compiler) == wheel
    assert wheel.read_text() == "wheel\n"
    assert cached_wheel(paths, "another compiler") is None
    assert cached_wheel(paths, None) is None
    said = capsys.readouterr().err
    assert "with 2 jobs" in said
    assert [line for line in said.splitlines() if "%" in line] == [
        f"  compiling {25 * step:3d} % ({step} of 4)" for step in (1, 2, 3, 4)
    ]
    assert (paths.cache / "build.log").read_text().count("g++ -c") == 4
    (call,) = calls(paths)
    count, flags, arguments = call.split("|")
    assert (count, flags) == ("2", " ".join(FLAGS))
    assert {"--no-cache-dir", "--require-hashes", "--no-binary"} <= set(arguments.split())
    assert (paths.cache / "requirements").read_text().split() == [
        "llama-cpp-python==0.3.36",
        "\\",
        "--hash=sha256:cc",
    ]


@pytest.mark.parametrize("build", ["echo 'fatal error: no space'; exit 3", "kill -9 $$"])
def test_a_compile_that_fails_shows_its_last_lines_and_leaves_nothing(paths: Paths, build: str) -> None:
    stand_in(paths, build)
    with pytest.raises(SetupError) as caught:
        compile_wheel(paths, READY)
    words = str(caught.value)
    assert "failed with status" in words
    assert str(paths.cache / "build.log") in words
    assert "[4/4] /usr/bin/g++ -c 4.cpp" in words
    assert cached_wheel(paths, READY.compiler) is None
    assert not list(paths.cache.glob("build-*"))


def test_packages_come_by_their_hashes_and_ours_from_the_wheel(paths: Paths) -> None:
    wheel = paths.cache / "ours.whl"
    install(paths, wheel, is_dev=False)
    packages, ours, project = calls(paths)
    assert "--require-hashes" in packages
    assert PACKAGE not in (paths.cache / "requirements").read_text()
    assert "--no-index" in ours
    assert str(wheel) in ours
    assert f"--editable {paths.root}" in project


def test_a_second_set_up_only_looks(paths: Paths) -> None:
    def look(_: Paths) -> Machine:
        looks.append(1)
        return READY

    looks: list[int] = []
    set_up(paths, is_dev=True, wants_model=True, look=look)
    assert calls(paths)[-1].endswith("-m edge_llm models pull")
    (paths.cache / "calls").unlink()
    set_up(paths, is_dev=True, wants_model=False, look=look)
    set_up(paths, is_dev=False, wants_model=False, look=look)
    assert looks == [1]
    assert not (paths.cache / "calls").exists()


def test_a_changed_lock_sets_up_again_with_the_wheel_of_the_first_time(paths: Paths) -> None:
    set_up(paths, is_dev=False, wants_model=False, look=lambda _: READY)
    lock = paths.root / bootstrap.LOCKS[False]
    lock.write_text(LOCK.replace("8.3.0", "8.3.1"))
    (paths.cache / "calls").unlink()
    set_up(paths, is_dev=False, wants_model=False, look=lambda _: READY)
    assert not [call for call in calls(paths) if "pip wheel" in call]
    assert [call for call in calls(paths) if "--require-hashes" in call]


def test_a_set_up_that_broke_off_is_not_done(paths: Paths) -> None:
    set_up(paths, is_dev=False, wants_model=False, look=lambda _: READY)
    wanted = fingerprint(paths.root, sys.version_info[:2], False)
    assert is_done(paths, wanted)
    assert not is_done(paths, fingerprint(paths.root, (3, 99), False))
    program(paths.python.parent, "python", 'case "$*" in *pip*) exit 1 ;; esac')
    (paths.root / "pyproject.toml").write_text("changed")
    with pytest.raises(SetupError, match="installing packages failed"):
        set_up(paths, is_dev=False, wants_model=False, look=lambda _: READY)
    assert not is_done(paths, wanted)


def test_a_machine_that_is_not_ready_starts_nothing(paths: Paths) -> None:
    with pytest.raises(SetupError, match="not ready"):
        set_up(paths, is_dev=False, wants_model=False, look=lambda _: READY._replace(free_disk=0))
    assert not (paths.cache / "calls").exists()


# --- progress -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  [78/139] /usr/bin/g++ -DGGML_BUILD -c ggml.cpp", (78, 139)),
        ("[1/2] Linking CXX shared library", (1, 2)),
        ("  Downloading llama_cpp_python-0.3.36.tar.gz (76.6 MB)", None),
        ("note: see [3/4] of the manual", None),
        ("[x/4] no number", None),
    ],
)
def test_a_step_of_ninja_is_a_line_that_begins_with_it(line: str, expected: tuple[int, int] | None) -> None:
    assert ninja_step(line) == expected


def test_installing_counts_packages_and_never_more_than_there_are() -> None:
    step = counter(COLLECTING, 2)
    lines = ["Collecting click==8.3.0", "  Downloading click", "Ignoring uvloop", "Collecting one-more"]
    assert [step(line) for line in lines] == [(1, 2), None, (2, 2), (2, 2)]


def test_elsewhere_than_on_a_terminal_progress_is_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("compiling", ninja_step)
    for step in range(1, 140):
        meter.line(f"[{step}/139] c++")
    meter.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "  compiling 100 % (139 of 139)"


# --- locks --------------------------------------------------------------------------------------------------------


def test_a_lock_is_entries_with_their_hashes() -> None:
    assert [entry.partition("==")[0] for entry in requirements(LOCK)] == ["click", PACKAGE, "uvicorn"]
    assert only(PACKAGE, LOCK).split() == ["llama-cpp-python==0.3.36", "\\", "--hash=sha256:cc"]
    rest = without(PACKAGE, LOCK)
    assert "sha256:bb" in rest
    assert "sha256:dd" in rest
    assert "sha256:cc" not in rest


@pytest.mark.parametrize("name", bootstrap.LOCKS.values())
def test_our_locks_hold_every_package_by_hash(name: str) -> None:
    lock = (ROOT / name).read_text()
    entries = list(requirements(lock))
    assert all("--hash=sha256:" in entry for entry in entries)
    assert sum(entry.startswith(f"{PACKAGE}==") for entry in entries) == 1
