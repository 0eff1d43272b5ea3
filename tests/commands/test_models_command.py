"""`edge-llm models ...` as a user runs it, with a catalogue of the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml

from edge_llm.engine.random_model import SHAPES
from tests.programs import edge_llm


@dataclass(frozen=True)
class Desk:
    """A user's machine: one folder with everything, and the command."""

    folder: Path
    environment: dict[str, str]

    @property
    def catalogue(self) -> Path:
        return self.folder / "models.yaml"

    @property
    def installed(self) -> Path:
        return self.folder / "installed"

    @property
    def source(self) -> Path:
        return self.folder / "source.gguf"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = edge_llm(self.environment, "models", *arguments)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ok(self, *arguments: str) -> str:
        """What it prints when it succeeds."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, *arguments: str) -> str:
        """What it says when it fails."""
        done = self.run(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("edge-llm: ") or "\n  " in done.stderr
        return done.stderr


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A catalogue of `good` (pinned), `lying` (its hash is another's), `open` (no hash); one small GGUF for all."""
    folders = {name: str(tmp_path / name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    places = {"MODELS_FILE": tmp_path / "models.yaml", "MODELS_DIR": tmp_path / "installed"}
    settings = {f"EDGE_LLM_CATALOGUE_{name}": str(path) for name, path in places.items()}
    desk = Desk(tmp_path, {**os.environ, **folders, **settings})
    writer = gguf.GGUFWriter(desk.source, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_context_length(512)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = [{"file": "source.gguf"}]
    size = desk.source.stat().st_size
    entries = {
        "good": {"file": "good.gguf", "size": size, "sha256": desk.digest, "licence": "MIT", "sources": source},
        "lying": {"file": "lying.gguf", "size": size, "sha256": "0" * 64, "licence": "MIT", "sources": source},
        "open": {"file": "open.gguf", "licence": "Apache-2.0", "sources": source},
    }
    desk.catalogue.write_text(yaml.safe_dump({"models": entries}))
    return desk


def states(desk: Desk) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads(desk.ok("list", "--json"))}


def test_the_list_says_what_is_pinned_and_what_is_fetched(desk: Desk) -> None:
    assert states(desk) == {"good": "pinned", "lying": "pinned", "open": "not pinned"}
    desk.ok("pull", "good")
    assert states(desk)["good"] == "fetched"
    lines = desk.ok("list").splitlines()
    assert [line.split()[0] for line in lines] == ["good", "lying", "open"]
    assert lines[2].split()[-1] == "Apache-2.0"


def test_pull_installs_the_verified_file_and_says_where(desk: Desk) -> None:
    answer = json.loads(desk.ok("pull", "good", "--json"))
    assert answer == {"model": "good", "path": str(desk.installed / "good.gguf"), "sha256": desk.digest}
    assert (desk.installed / "good.gguf").read_bytes() == desk.source.read_bytes()
    assert str(desk.installed / "good.gguf") in desk.ok("pull", "good")


def test_pull_refuses_what_is_not_what_the_catalogue_says(desk: Desk) -> None:
    words = desk.refusal("pull", "lying")
    assert desk.digest in words
    assert "0" * 64 in words
    assert not (desk.installed / "lying.gguf").exists()


def test_pull_refuses_an_entry_without_a_hash_and_pin_opens_it(desk: Desk) -> None:
    assert "edge-llm models pin open" in desk.refusal("pull", "open")
    recorded = json.loads(desk.ok("pin", "open", "--json"))
    assert (recorded["size"], recorded["sha256"]) == (desk.source.stat().st_size, desk.digest)
    assert recorded["recorded"].startswith(str(desk.folder / "XDG_DATA_HOME"))
    assert states(desk)["open"] == "fetched"
    (desk.installed / "open.gguf").unlink()
    assert json.loads(desk.ok("pull", "open", "--json"))["sha256"] == desk.digest
    assert "has a sha256 already" in desk.refusal("pin", "open")


def test_a_pin_can_be_written_into_the_catalogue_itself(desk: Desk) -> None:
    recorded = json.loads(desk.ok("pin", "open", "--write", str(desk.catalogue), "--json"))
    assert recorded["recorded"] == str(desk.catalogue)
    entries = yaml.safe_load(desk.catalogue.read_text())["models"]
    assert entries["open"]["sha256"] == desk.digest
    assert not (desk.folder / "XDG_DATA_HOME").exists()


def test_what_was_pinned_here_first_can_still_be_written_into_the_catalogue(desk: Desk) -> None:
    """`cluster render` needs a pin here, and the boards then need it in the list."""
    desk.ok("pin", "open")
    desk.ok("pin", "open", "--write", str(desk.catalogue))
    written = yaml.safe_load(desk.catalogue.read_text())["models"]["open"]
    assert (written["size"], written["sha256"]) == (desk.source.stat().st_size, desk.digest)
    assert "has a sha256 already" in desk.refusal("pin", "open", "--write", str(desk.catalogue))


def test_show_says_what_the_header_says_of_a_name_and_of_a_path(desk: Desk) -> None:
    facts = json.loads(desk.ok("show", "good", "--json"))
    assert (facts["file"], facts["architecture"], facts["layers"], facts["context"]) == ("good.gguf", "llama", 2, 512)
    other = json.loads(desk.ok("show", str(desk.source), "--json"))
    assert other == facts | {"file": "source.gguf"}
    assert facts["sha256"] == desk.digest
    assert "architecture           llama" in desk.ok("show", "good").splitlines()


def test_verify_reads_the_files_again(desk: Desk) -> None:
    assert "edge-llm models pull good" in desk.refusal("verify", "good")
    desk.ok("pull", "good")
    expected = {"model": "good", "sha256": desk.digest, "ok": True}
    assert json.loads(desk.ok("verify", "good", "--json")) == json.loads(desk.ok("verify", "--json")) == expected
    path = desk.installed / "good.gguf"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    words = desk.refusal("verify", "good")
    assert desk.digest in words
    assert "edge-llm models pull good" in words
    desk.ok("pull", "good")
    assert json.loads(desk.ok("verify", "good", "--json")) == expected


def test_verify_of_a_file_that_nothing_vouches_for_says_how_to_pin_it(desk: Desk) -> None:
    desk.installed.mkdir()
    (desk.installed / "open.gguf").write_bytes(desk.source.read_bytes())
    words = desk.refusal("verify", "open")
    assert "edge-llm models pin open" in words
    assert "None" not in words


def test_verify_names_every_wrong_file_not_only_the_first(desk: Desk) -> None:
    desk.installed.mkdir()
    (desk.installed / "good.gguf").write_bytes(b"wrong")
    (desk.installed / "lying.gguf").write_bytes(b"wrong")
    done = desk.run("verify")
    assert done.returncode == 1
    assert "good.gguf" in done.stderr
    assert "lying.gguf" in done.stderr


@pytest.mark.parametrize("command", ["show", "pull", "verify", "pin"])
def test_an_unknown_name_is_refused_with_the_nearest(desk: Desk, command: str) -> None:
    assert "did you mean good?" in desk.refusal(command, "goood")


def test_a_wrong_catalogue_is_said_with_its_place(desk: Desk) -> None:
    desk.catalogue.write_text("models:\n  m: {file: m.gguf, sha265: x}\n")
    words = desk.refusal("list")
    assert str(desk.catalogue) in words
    assert "sha265" in words
    desk.catalogue.unlink()
    assert str(desk.catalogue) in desk.refusal("list")


def test_progress_goes_to_stderr_and_the_answer_alone_to_stdout(desk: Desk) -> None:
    done = desk.run("pull", "good", "--json")
    assert json.loads(done.stdout)
    assert done.stderr.startswith("good.gguf: ")


def test_a_random_model_is_made_in_the_cache_once_and_named(desk: Desk) -> None:
    made = json.loads(desk.ok("random", "dense", "Q8_0", "--json"))
    path = Path(made["path"])
    assert path.is_relative_to(desk.folder)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == made["sha256"]
    assert json.loads(desk.ok("show", made["path"], "--json"))["quantization"] == "Q8_0"
    assert json.loads(desk.ok("random", "dense", "Q8_0", "--json")) == made


@pytest.mark.parametrize("wrong", [("klein-bottle", "Q4_0"), ("dense", "Q4_9")])
def test_a_shape_or_format_that_is_none_is_refused_with_those_there_are(desk: Desk, wrong: tuple[str, str]) -> None:
    said = desk.refusal("random", *wrong)
    assert any(word in said for word in wrong)
    assert "llama-3.2-1b" in said or "Q4_0" in said


def test_the_help_names_every_shape_that_can_be_made(desk: Desk) -> None:
    for words in (desk.ok("random", "--help"), edge_llm(desk.environment, "verify", "--help").stdout):
        assert not [shape for shape in SHAPES if shape not in "".join(words.split())]
