"""Set-up on a bare machine: virtual environment, llama-cpp-python compiled our way, locked packages, default model.

Owns everything between a fresh clone and a working `edge-llm` command, and says in one sentence what is missing before
anything long starts. Runs with the system's python3 before any package exists: standard library only, nothing of ours
imported, syntax that an old Python can still read (so that it can say that it is too old). Like config.py it reads the
environment, and like a command it prints.

Invariants: a second run with nothing to do takes a blink (a stamp in the environment); a wheel in the cache is whole
(one rename) and was compiled for this version, these flags and this CPU; no package index is ever named: pip's own
configuration decides, hashes from the lock files check what came.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Step = Callable[[str], tuple[int, int] | None]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llama-cpp-python"
LOCKS = {False: "requirements.lock", True: "requirements-dev.lock"}

# GGML_LLAMAFILE picks kernels by shape and breaks exactness (README, "Is it exact here?"). GGML_NATIVE compiles for
# this very CPU, but without llama.cpp's AMX kernels: as GCC 12 compiles them they end the process with SIGILL at the
# first prompt (the tile configuration is optimized away: ggml-org/llama.cpp, pull request 26954). The rest shortens the
# build and touches no kernel: 255 s instead of 330 s on 2 cores of 2026.
FLAGS = (
    "-DGGML_LLAMAFILE=OFF",
    "-DGGML_NATIVE=ON",
    "-DCMAKE_C_FLAGS=-U__AMX_INT8__",
    "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
)
MIB = 1 << 20
BYTES_PER_JOB = 1200 * MIB  # the largest file of llama.cpp takes g++ 12 about 1 GB
DISK_WITH_COMPILE = 3 << 30
DISK_WITHOUT_COMPILE = 1 << 30
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
COLLECTING = re.compile(r"^(Collecting|Ignoring|Requirement already) ")


class SetupError(Exception):
    """Something a person must do first; the message is one sentence."""


class Machine(NamedTuple):
    """What set-up needs to know about this machine. None: not there."""

    python: tuple[int, int]
    has_venv: bool
    compiler: str | None
    make: str | None
    free_disk: int
    free_memory: int
    cores: int


class Paths(NamedTuple):
    """Where things go."""

    root: Path
    venv: Path
    cache: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / "edge-llm.stamp"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Set up edge-llm in a virtual environment beside its source.")
    parser.add_argument("--dev", action="store_true", help="also what `make test` needs")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the virtual environment (default .venv)")
    parser.add_argument("--no-model", action="store_true", help="do not fetch the default model")
    options = parser.parse_args(argv)
    paths = Paths(ROOT, options.venv.absolute(), cache_folder(os.environ))
    try:
        with one_at_a_time(paths.cache):
            set_up(paths, options.dev, not options.no_model)
    except (SetupError, OSError) as error:
        say(f"edge-llm set-up: {error}")
        return 1
    except KeyboardInterrupt:
        say("edge-llm set-up: interrupted; run the same command again to continue")
        return 130
    return 0


def set_up(paths: Paths, is_dev: bool, wants_model: bool, look: Callable[[Paths], Machine] | None = None) -> None:
    """Do what is missing, in order of how long it takes to find out that it cannot work. `look` reads the machine."""
    wanted = fingerprint(paths.root, sys.version_info[:2], is_dev)
    if not is_done(paths, wanted, fingerprint(paths.root, sys.version_info[:2], True)):
        machine = (look or this_machine)(paths)
        wheel = cached_wheel(paths, machine.compiler)
        check(machine, wheel is None)
        make_environment(paths)
        install(paths, wheel or compile_wheel(paths, machine), is_dev)
        paths.stamp.write_text(wanted)
    if wants_model:
        run([str(paths.python), "-m", "edge_llm", "models", "pull"], "fetching the default model")


# --- what is here -------------------------------------------------------------------------------------------------


def check(machine: Machine, must_compile: bool) -> None:
    """Raise SetupError that lists everything a person must do first, one clear sentence each."""
    missing = list(problems(machine, must_compile))
    if missing:
        raise SetupError("this machine is not ready:\n  " + "\n  ".join(missing))


def problems(machine: Machine, must_compile: bool) -> Iterator[str]:
    """One sentence for each thing that is missing."""
    if machine.python < (3, 11):
        version = ".".join(map(str, machine.python))
        yield f"Python 3.11 or newer is needed, this is {version}: install one and run `make PYTHON=python3.11 ...`."
    if not machine.has_venv:
        yield "Python's venv module is missing: install it (Debian: sudo apt install python3-venv)."
    if machine.make is None:
        yield "make is missing: install it (Debian: sudo apt install make)."
    if must_compile and machine.compiler is None:
        yield "No C++ compiler was found: install one (Debian: sudo apt install g++)."
    disk = DISK_WITH_COMPILE if must_compile else DISK_WITHOUT_COMPILE
    if machine.free_disk < disk:
        yield f"Set-up needs {disk // MIB} MiB of free disk, {machine.free_disk // MIB} MiB are free: make room."
    if must_compile and machine.free_memory < BYTES_PER_JOB:
        yield (
            f"Compiling {PACKAGE} needs {BYTES_PER_JOB // MIB} MiB of free memory, {machine.free_memory // MIB} MiB "
            "are free: stop other programs or add swap."
        )


def this_machine(paths: Paths) -> Machine:
    """Read it now."""
    paths.cache.mkdir(parents=True, exist_ok=True)
    return Machine(
        python=sys.version_info[:2],
        has_venv=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        compiler=compiler_version(os.environ),
        make=shutil.which("make"),
        free_disk=min(shutil.disk_usage(nearest_folder(place)).free for place in (paths.cache, paths.venv)),
        free_memory=free_memory(Path("/")),
        cores=len(os.sched_getaffinity(0)),
    )


def nearest_folder(place: Path) -> Path:
    """`place`, or the folder above it that is there: it is on the same disk."""
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def compiler_version(environ: Mapping[str, str]) -> str | None:
    """First line of the C++ compiler's --version; None without a compiler, or without the C one that goes with it."""
    found = first_program(environ, "CXX", ["c++", "g++", "clang++"])
    if found is None or first_program(environ, "CC", ["cc", "gcc", "clang"]) is None:
        return None
    done = subprocess.run([found, "--version"], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.partition("\n")[0] or None


def first_program(environ: Mapping[str, str], variable: str, names: list[str]) -> str | None:
    """Where the first of `names` is, or what `variable` names, which may have arguments (`ccache g++`)."""
    words = environ.get(variable, "").split()
    places = (shutil.which(name, path=environ.get("PATH")) for name in (words[:1] or names))
    return next(filter(None, places), None)


def free_memory(root: Path) -> int:
    """Bytes that a compiler may fill: available and swap, or what a control group (v2) leaves (files read are free)."""
    text = (root / "proc/meminfo").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    free = sum(int(lines.get(key, "0 kB").split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    with contextlib.suppress(OSError, ValueError):  # no control group, or `max`
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, max(0, limit - max(0, used - int(found[1] if found else 0))))
    return free


def jobs(memory: int, cores: int) -> int:
    """Compile jobs that memory and cores allow."""
    return max(1, min(cores, memory // BYTES_PER_JOB))


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The same folder as config.cache_dir()."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edge-llm"


def cpu_features(root: Path) -> str:
    """Architecture and a digest of the CPU's features: what -march=native depends on."""
    flags = ""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags = " ".join(sorted(line.partition(":")[2].split()))
                break
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:16]}"


# --- what is done already -----------------------------------------------------------------------------------------


def fingerprint(root: Path, python: tuple[int, ...], is_dev: bool) -> str:
    """Everything that the environment's content depends on: moved to another CPU, it would die of its instructions."""
    digest = hashlib.sha256(repr((python, FLAGS, is_dev, str(root), cpu_features(Path("/")))).encode())
    for name in (LOCKS[is_dev], "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_done(paths: Paths, *accepted: str) -> bool:
    """The environment was completed for one of `accepted` (the developer's set holds the user's)."""
    try:
        return paths.python.exists() and paths.stamp.read_text() in accepted
    except OSError:
        return False


def pinned_version(root: Path) -> str:
    """The version of llama-cpp-python in the lock."""
    found = re.search(rf"^{PACKAGE}==([^\s;\\]+)", (root / LOCKS[False]).read_text(), re.MULTILINE)
    if not found:
        raise SetupError(f"{LOCKS[False]} does not name {PACKAGE}: run `make lock`")
    return found[1]


def wheel_folder(paths: Paths, compiler: str, features: str, flags: Sequence[str] = FLAGS) -> Path:
    """The cache's key: version, flags, CPU and compiler."""
    key = hashlib.sha256(repr((tuple(flags), features, compiler)).encode()).hexdigest()[:16]
    return paths.cache / "wheels" / f"{PACKAGE}-{pinned_version(paths.root)}-{platform.machine()}-{key}"


def cached_wheel(paths: Paths, compiler: str | None) -> Path | None:
    """The wheel compiled earlier. Without a compiler there is no key, and nothing can be found."""
    if compiler is None:
        return None
    return next(wheel_folder(paths, compiler, cpu_features(Path("/"))).glob("*.whl"), None)


@contextlib.contextmanager
def one_at_a_time(cache: Path) -> Iterator[None]:
    """Two set-ups at once take turns."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("edge-llm set-up: another set-up is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- doing it -----------------------------------------------------------------------------------------------------


def make_environment(paths: Paths) -> None:
    """A virtual environment of this Python, made anew when it was made by another."""
    with contextlib.suppress(FileNotFoundError):
        paths.stamp.unlink()
    same = ["-c", f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"]
    if paths.python.exists() and subprocess.run([str(paths.python), *same], check=False).returncode == 0:
        return
    say(f"making the virtual environment {paths.venv.name}")
    run([sys.executable, "-m", "venv", "--clear", str(paths.venv)], "making the virtual environment")


def compile_wheel(paths: Paths, machine: Machine) -> Path:
    """Compile llama-cpp-python from its published source, whose hash the lock holds."""
    assert machine.compiler is not None  # check() was asked first
    count, began = jobs(machine.free_memory, machine.cores), time.monotonic()
    version = pinned_version(paths.root)
    say(f"compiling {PACKAGE} {version} for this CPU with {count} job{'s' * (count > 1)}: 2 to 20 minutes, once")
    with tempfile.TemporaryDirectory(dir=paths.cache, prefix="build-") as scratch:
        wanted = Path(scratch, "source.txt")
        wanted.write_text(only(PACKAGE, (paths.root / LOCKS[False]).read_text()))
        # pip's own wheel cache may hold a wheel of other flags: --no-cache-dir. /tmp may be memory: TMPDIR.
        command = [str(paths.python), "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
        command += ["--require-hashes", "--no-binary", PACKAGE, "--wheel-dir", scratch, "--requirement", str(wanted)]
        environ = {"CMAKE_ARGS": " ".join(FLAGS), "CMAKE_BUILD_PARALLEL_LEVEL": str(count), "TMPDIR": scratch}
        log = paths.cache / "build.log"
        run(command, f"compiling {PACKAGE}", environ=environ, log=log, meter=Meter("compiling", ninja_step))
        (built,) = Path(scratch).glob("*.whl")
        folder = wheel_folder(paths, machine.compiler, cpu_features(Path("/")))
        folder.mkdir(parents=True, exist_ok=True)
        built.replace(folder / built.name)
    say(f"compiled in {time.monotonic() - began:.0f} s, kept in the cache")
    return folder / built.name


def install(paths: Paths, wheel: Path, is_dev: bool) -> None:
    """The locked packages, our wheel, and this project as an editable install."""
    lock = (paths.root / LOCKS[is_dev]).read_text()
    pip = [str(paths.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=paths.cache) as scratch:
        wanted = Path(scratch, "packages.txt")
        wanted.write_text(without(PACKAGE, lock))
        count = sum(1 for _ in requirements(lock))
        say(f"installing {count} packages of {LOCKS[is_dev]}")
        command = [*pip, "--require-hashes", "--requirement", str(wanted)]
        run(command, "installing packages", meter=Meter("installing", counter(COLLECTING, count)))
    run([*pip, "--quiet", "--no-index", "--force-reinstall", str(wheel)], f"installing {PACKAGE}")
    run([*pip, "--quiet", "--no-index", "--no-build-isolation", "--editable", str(paths.root)], "installing edge-llm")


def requirements(lock: str) -> Iterator[str]:
    """The entries of a lock file, each with its hashes."""
    for entry in re.split(r"\n(?=[A-Za-z0-9])", "\n" + lock):
        if re.match(r"[A-Za-z0-9][^\n]*==", entry):
            yield entry.rstrip()


def without(package: str, lock: str) -> str:
    return "\n".join(entry for entry in requirements(lock) if not entry.startswith(f"{package}=="))


def only(package: str, lock: str) -> str:
    return "\n".join(entry for entry in requirements(lock) if entry.startswith(f"{package}=="))


# --- running and showing ------------------------------------------------------------------------------------------


def ninja_step(line: str) -> tuple[int, int] | None:
    """(done, total) of a line like `[78/139] /usr/bin/g++ ...`."""
    found = NINJA_STEP.match(line)
    return (int(found[1]), int(found[2])) if found else None


def counter(pattern: re.Pattern[str], total: int) -> Step:
    """(done, total) by counting the lines that begin like `pattern`."""
    seen = 0

    def step(line: str) -> tuple[int, int] | None:
        nonlocal seen
        seen += bool(pattern.match(line))
        return (min(seen, total), total) if pattern.match(line) else None

    return step


class Meter:
    """Progress of a long command out of its own output: one line that moves on a terminal, sparse lines elsewhere."""

    def __init__(self, what: str, step: Step) -> None:
        self._what, self._step = what, step
        self._shown = -1
        self._is_terminal = sys.stderr.isatty()

    def line(self, text: str) -> None:
        found = self._step(text)
        if found is None:
            return
        done, total = found
        percent = 100 * done // max(1, total)
        if percent == self._shown or (not self._is_terminal and percent // 10 == self._shown // 10):
            return
        self._shown = percent
        words = f"  {self._what} {percent:3d} % ({done} of {total})"
        sys.stderr.write(f"\r{words}\x1b[K" if self._is_terminal else words + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._is_terminal and self._shown >= 0:
            sys.stderr.write("\n")


def run(
    command: list[str],
    what: str,
    *,
    environ: dict[str, str] | None = None,
    log: Path | None = None,
    meter: Meter | None = None,
) -> None:
    """Run to the end. Without a meter its errors and progress are shown; with one all output goes to meter and log."""
    full = {**os.environ, **(environ or {})}
    full.pop("PYTHONPATH", None)
    tail: list[str] = []
    if meter is None:
        status = subprocess.run(command, env=full, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    else:
        status, tail = _watched(command, full, log, meter)
    if status:
        lines = "".join(f"\n  | {line}" for line in tail)
        where = f" (all of it: {log})" if log else ""
        raise SetupError(f"{what} failed with status {status}{where}{lines}")


def _watched(command: list[str], environ: dict[str, str], log: Path | None, meter: Meter) -> tuple[int, list[str]]:
    tail: list[str] = []
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        )
        stack.callback(_end, process)
        stack.callback(meter.close)
        assert process.stdout is not None
        for line in stack.enter_context(process.stdout):
            tail = [*tail[-24:], line.rstrip()]
            meter.line(line)
            if sink is not None:
                sink.write(line)
        return process.wait(), tail


def _end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C leaves no compiler running."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
