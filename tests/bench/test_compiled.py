"""Records say with which flags llama-cpp-python was compiled, and do not guess."""

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest

from edge_llm import bootstrap
from edge_llm.bench.compiled import UNKNOWN, compiled_facts, facts_of

WHEEL = "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"


def installed_from(folder: str) -> dict[str, object]:
    """What pip writes down about a wheel that it installed from `folder`."""
    return {"url": f"file://{folder}/{WHEEL}", "archive_info": {"hashes": {"sha256": "ab" * 32}}}


def own_folder(compiler: str) -> str:
    paths = bootstrap.Paths(bootstrap.ROOT, Path("venv"), Path("/somebody's/cache"))
    return str(bootstrap.wheel_folder(paths, compiler, bootstrap.cpu_features(Path("/"))))


def test_a_wheel_of_set_up_has_its_flags() -> None:
    facts = facts_of(installed_from(own_folder("g++ 12")), "g++ 12")
    assert facts == {
        "wheel": WHEEL,
        "wheel_sha256": "ab" * 32,
        "compiler": "g++ 12",
        "cmake_flags": " ".join(bootstrap.FLAGS),
    }


@pytest.mark.parametrize(
    ("folder", "compiler"),
    [("/downloads", "g++ 12"), (own_folder("g++ 11"), "g++ 12"), (own_folder("g++ 12"), "")],
    ids=["from elsewhere", "compiled before the compiler changed", "no compiler here"],
)
def test_flags_that_cannot_be_proven_are_unknown(folder: str, compiler: str) -> None:
    assert facts_of(installed_from(folder), compiler) == {
        "wheel": WHEEL,
        "wheel_sha256": "ab" * 32,
        "cmake_flags": UNKNOWN,
    }


def test_nothing_that_pip_did_not_write_is_an_error() -> None:
    assert facts_of({}, "g++ 12")["cmake_flags"] == UNKNOWN


def test_the_environment_that_runs_the_tests_says_what_pip_installed() -> None:
    said = json.loads(distribution("llama-cpp-python").read_text("direct_url.json") or "{}")
    facts = compiled_facts()
    assert facts["version"] == distribution("llama-cpp-python").version
    assert facts["wheel_sha256"] == said.get("archive_info", {}).get("hashes", {}).get("sha256", "")
