"""What the Containerfile promises to whoever runs the image, read from its text."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from edge_llm.image.archive import SBOM_PATH, USER
from edge_llm.image.assemble import SBOM

ROOT = Path(__file__).parent.parent.parent
STAGE = re.compile(r"^FROM (?:--platform=(\S+) )?(\S+)(?: AS (\w+))?$")


def instructions() -> Iterator[str]:
    """One line each, without comments."""
    text = "\n".join(line for line in (ROOT / "Containerfile").read_text().splitlines() if not line.startswith("#"))
    yield from (line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip())


def stages() -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for line in instructions():
        if line.startswith("FROM "):
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
    return found


def last(word: str) -> list[str]:
    return [line.removeprefix(f"{word} ") for line in stages()[-1][1] if line.startswith(f"{word} ")]


def test_the_base_is_an_argument_whose_default_names_no_registry() -> None:
    (default,) = [line.partition("BASE=")[2] for line in instructions() if line.startswith("ARG BASE=")]
    assert re.fullmatch(r"debian:\w+-slim", default)


def test_every_stage_comes_from_an_argument_or_another_stage() -> None:
    names: set[str] = set()
    for line, _ in stages():
        found = STAGE.match(line)
        assert found is not None
        assert found[2] in {"${BASE}", "${BUILD_BASE}"} | names
        names.add(found[3] or "")


def test_compilers_and_pip_run_on_the_building_machine_only() -> None:
    for line, body in stages():
        runs = " ".join(each for each in body if each.startswith("RUN "))
        if "g++" in runs or "pip" in runs or "edge_llm.image" in runs:
            assert "FROM tools" in line or "${BUILDPLATFORM}" in line


def test_the_image_runs_as_a_user_of_its_own_with_one_command() -> None:
    assert last("USER") == [USER]
    assert last("ENTRYPOINT") == ['["edge-llm"]']


def test_the_last_stage_only_copies() -> None:
    assert last("RUN") == []
    assert [line.split()[0] for line in last("COPY")] == ["--from=packages"]


def test_everything_that_is_written_is_below_one_folder() -> None:
    (environment,) = last("ENV")
    places = dict(word.split("=", 1) for word in environment.split())
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "EDGE_LLM_CATALOGUE_MODELS_DIR"):
        assert Path(places[name]).is_relative_to("/var/lib/edge-llm")


def test_settings_of_the_builder_are_mounted_never_copied_or_arguments() -> None:
    text = "\n".join(instructions())
    assert not re.findall(r"^(?:COPY|ADD|ARG|ENV) .*(?:pip\.conf|CERT|INDEX)", text, re.MULTILINE)
    indexed = [line for line in instructions() if "pip install" in line or "edge_llm.image." in line]
    assert indexed
    for line in indexed:
        assert "type=secret,id=pip" in line
        assert "type=secret,id=ca" in line


def test_what_pip_installs_is_checked_by_hash() -> None:
    assert all("--require-hashes" in line for line in instructions() if "pip install" in line)


def test_the_sbom_is_where_the_check_looks_for_it() -> None:
    assert SBOM_PATH == f"opt/edge-llm/{SBOM}"


def test_the_context_is_a_list_of_what_the_wheel_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {*wheel["packages"], *wheel["force-include"], "pyproject.toml", "README.md", "requirements.lock"}
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == wanted
