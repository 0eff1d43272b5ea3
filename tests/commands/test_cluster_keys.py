"""The cluster commands and API keys: real gateway, real commands."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.conftest import Service, serving
from tests.gateway.test_operating import TwoKeys
from tests.loopback import running_cluster

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running_cluster() as cluster, serving(cluster, TwoKeys()) as made:
        yield made


async def run(service: Service, folder: Path, key: str | None, *words: str) -> tuple[int, str]:
    """Exit code, and both outputs."""
    more = []
    if key is not None:
        (folder / "key").write_text(key)
        more = ["--api-key-file", str(folder / "key")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_llm", "cluster", *words, "--url", service.url, *more),
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in said, said.decode()
    return process.returncode, said.decode()


async def test_every_key_may_look_and_only_an_operators_may_change(service: Service, tmp_path: Path) -> None:
    node = await service.start("mixed", "m1")
    code, said = await run(service, tmp_path, None, "status")
    assert (code, "(give it with --api-key-file)" in said) == (1, True), said
    code, said = await run(service, tmp_path, "sk-guest\n", "status")
    assert code == 0, said
    code, said = await run(service, tmp_path, "sk-guest\n", "role", "m1", "decode")
    assert code == 1
    assert "the API key guest may not change workers: its entry needs `operator: true`" in said
    assert node.worker.status().role == "mixed"
    code, said = await run(service, tmp_path, "sk-boss\n", "role", "m1", "decode")
    assert code == 0, said
    assert node.worker.status().role == "decode"


async def test_a_key_that_may_not_is_said_before_what_else_is_wrong(service: Service, tmp_path: Path) -> None:
    await service.start("mixed", "m1")
    for words in (("drain", "nobody"), ("drain", "nobody", "--undo"), ("role", "nobody", "decode"), ("drain", "m1")):
        code, said = await run(service, tmp_path, "sk-guest\n", *words)
        assert code == 1
        assert "the API key guest may not change workers: its entry needs `operator: true`" in said
    code, said = await run(service, tmp_path, "sk-boss\n", "drain", "nobody")
    assert "the gateway knows no worker nobody" in said


async def test_what_takes_an_order_back_names_the_gateway_and_the_key(service: Service, tmp_path: Path) -> None:
    for name in ("m1", "m2"):
        await service.start("mixed", name)
    code, said = await run(service, tmp_path, "sk-boss\n", "drain", "m1")
    assert code == 0, said
    key = tmp_path / "key"
    assert f"`edge-llm cluster drain m1 --undo --url {service.url} --api-key-file {key}` takes it back" in said


@pytest.mark.parametrize("content", ["", "two words", "two\nlines", "schlüssel"])
async def test_a_file_that_holds_no_key_alone_is_said_to(service: Service, tmp_path: Path, content: str) -> None:
    code, said = await run(service, tmp_path, content, "status")
    assert code == 1
    assert "must hold your API key alone" in said
