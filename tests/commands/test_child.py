"""Children of `edge-llm up`: small programs that behave badly in ways in which real ones did."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from edge_llm.commands.child import KEPT_LINES, LINE_BYTES, Child
from edge_llm.errors import WorkerError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
KEY = b"up:00\n"
IMPORTS = "import json, os, signal, sys, time\n"
READY = "print(json.dumps({'address': '127.0.0.1:1'}), flush=True)\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def child(program: str, **settings: object) -> Child:
    return Child("decode-1", [], 0, program=(sys.executable, "-c", IMPORTS + program), **settings)  # type: ignore[arg-type]


def is_running(child: Child) -> bool:
    return child.process is not None and child.process.returncode is None


async def until_ended(child: Child) -> int:
    assert child.process is not None
    async with asyncio.timeout(20):
        return await child.process.wait()


async def test_a_child_gets_the_key_and_says_when_it_is_ready() -> None:
    one = child(
        "key = os.read(int(sys.argv[sys.argv.index('--key-fd') + 1]), 99).decode()\n"
        "print(json.dumps({'address': '127.0.0.1:1', 'key': key}), flush=True)\n"
        "time.sleep(60)"
    )
    await one.start(KEY)
    assert one.ready == {"address": "127.0.0.1:1", "key": "up:00\n"}
    await one.stop()
    assert not is_running(one)


async def test_a_child_that_logs_a_line_of_megabytes_goes_on_and_is_remembered_in_short() -> None:
    one = child(READY + "sys.stderr.write('x' * 3_000_000 + '\\nlast words')\nsys.stderr.flush()\nsys.exit(7)")
    await one.start(KEY)
    assert await until_ended(one) == 7
    await asyncio.gather(*one.readers)
    long, last = one.tail
    assert long == "x" * LINE_BYTES + " ..."
    assert last == "last words"


async def test_of_many_lines_the_last_ones_are_kept_and_all_are_shown() -> None:
    shown: list[str] = []
    one = child(READY + "for n in range(5000): print('line', n, file=sys.stderr)", show=shown.append)
    await one.start(KEY)
    await until_ended(one)
    await asyncio.gather(*one.readers)
    assert list(one.tail) == [f"line {n}" for n in range(5000 - KEPT_LINES, 5000)]
    assert shown == [f"[decode-1] line {n}" for n in range(5000)]


async def test_a_child_that_prints_after_it_is_ready_does_not_wait_for_a_reader() -> None:
    one = child(READY + "print('y' * 3_000_000, flush=True)\nsys.exit(8)")
    await one.start(KEY)
    assert await until_ended(one) == 8


async def test_a_child_that_says_something_else_first_is_told_by_what_it_said() -> None:
    one = child("print('12 warnings', flush=True)\ntime.sleep(60)")
    with pytest.raises(WorkerError, match="it said b'12 warnings"):
        await one.start(KEY)


async def test_an_error_of_many_lines_is_told_from_its_beginning_on() -> None:
    lines = ["starting", "edge-llm: it does not fit: 9 MiB", *(f"part {n}" for n in range(12)), "Lower --n-ctx"]
    one = child(f"print({chr(10).join(lines)!r}, file=sys.stderr, flush=True)\nsys.exit(1)")
    with pytest.raises(WorkerError) as caught:
        await one.start(KEY)
    assert caught.value.message.splitlines()[1:] == lines[1:]


async def test_a_child_that_does_not_become_ready_is_ended_and_its_last_words_are_said() -> None:
    one = child("print('loading', file=sys.stderr, flush=True)\ntime.sleep(60)")
    with pytest.raises(WorkerError, match=r"decode-1 was not ready within 1 s\nloading"):
        await one.start(KEY, within_s=1.0)
    assert not is_running(one)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sys.exit('no such model')", "exit code 1\nno such model"),
        ("print('hello', flush=True)\ntime.sleep(60)", "instead of being ready"),
        ("print('[1]', flush=True)\ntime.sleep(60)", "instead of being ready"),
        ("print('z' * 200_000, flush=True)\ntime.sleep(60)", "limit"),
    ],
)
async def test_a_child_that_ends_or_says_something_else_is_one_error_and_leaves_no_process(
    program: str, words: str
) -> None:
    one = child(program)
    with pytest.raises(WorkerError) as caught:
        await one.start(KEY, within_s=20)
    assert "decode-1 could not start" in caught.value.message
    assert words in caught.value.message
    assert not is_running(one)


async def test_a_pinned_child_that_dies_at_once_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(_pid: int, _cores: object) -> None:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "sched_setaffinity", too_late)
    with pytest.raises(WorkerError, match="exit code 3"):
        await child("sys.exit(3)", cores=(0,)).start(KEY)


async def test_a_core_that_this_machine_does_not_have_is_an_error_in_words() -> None:
    one = child("time.sleep(60)", cores=(100_000,))
    with pytest.raises(WorkerError, match="Invalid argument"):
        await one.start(KEY)
    assert not is_running(one)


async def test_a_program_that_cannot_be_run_is_an_error_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(WorkerError, match="decode-1 could not be started"):
            await Child("decode-1", [], 0, program=(str(tmp_path / "absent"),)).start(KEY)
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "the event loop may have opened one of its own"


async def test_a_child_that_ignores_sigterm_is_killed_when_its_time_is_over() -> None:
    one = child("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(60)", stop_s=0.3)
    await one.start(KEY)
    began_s = time.monotonic()
    await one.stop()
    assert time.monotonic() - began_s < 20
    assert await until_ended(one) == -9
