"""Names and paths: which of the two a word is, and that both end at a file that is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_llm.catalogue.manifest import record_pin
from edge_llm.catalogue.resolve import find, resolve
from edge_llm.errors import CatalogueError

CONTENT = b"GGUF and more"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, tmp_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a catalogue of tiny-one and tiny-two and the file they come from."""
    (tmp_path / "source.bin").write_bytes(CONTENT)
    (tmp_path / "models.yaml").write_text(
        f"models:\n"
        f"  tiny-one: {{file: one.gguf, size: {len(CONTENT)}, sha256: {DIGEST}, sources: [{{file: source.bin}}]}}\n"
        f"  tiny-two: {{file: two.gguf, sources: [{{file: source.bin}}]}}\n"
    )
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_FILE", str(tmp_path / "models.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_fetched_and_keeps_its_name(folder: Path, tmp_cache: Path) -> None:
    model = resolve("tiny-one")
    assert (model.name, model.path, model.sha256) == ("tiny-one", tmp_cache / "models" / "one.gguf", DIGEST)
    assert model.path.read_bytes() == CONTENT


def test_a_pinned_name_has_the_hash_that_was_recorded(folder: Path) -> None:
    record_pin("tiny-two", len(CONTENT), DIGEST)
    assert resolve("tiny-two").sha256 == DIGEST


@pytest.mark.parametrize("word", ["mine.gguf", "./mine.gguf", "sub/../mine.gguf", "~/mine.gguf", "{folder}/mine.gguf"])
def test_a_path_is_taken_as_it_is_wherever_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "sub").mkdir()
    (folder / "mine.gguf").write_bytes(CONTENT)
    model = resolve(word.format(folder=folder))
    assert (model.name, model.path, model.sha256) == ("mine", folder / "mine.gguf", DIGEST)


def test_what_names_a_folder_is_a_path_without_an_ending(folder: Path) -> None:
    (folder / "plain").write_bytes(CONTENT)
    assert resolve("./plain").path == folder / "plain"
    with pytest.raises(CatalogueError, match="unknown model 'plain'"):
        resolve("plain")


def test_a_link_is_followed_but_names_the_model(folder: Path) -> None:
    (folder / "blob").write_bytes(CONTENT)
    (folder / "nice.gguf").symlink_to("blob")
    model = resolve("nice.gguf")
    assert (model.name, model.path) == ("nice", folder / "blob")


@pytest.mark.parametrize(
    "word", ["absent.gguf", "/", "./absent", "~nobody-at-all/m.gguf", f"{'x' * 300}.gguf", "\0.gguf"]
)
def test_a_path_to_nothing_is_said_in_words(folder: Path, word: str) -> None:
    with pytest.raises(CatalogueError, match=r"there is no file|cannot read"):
        resolve(word)


def test_an_unknown_name_shows_the_nearest_and_that_paths_work(folder: Path) -> None:
    with pytest.raises(CatalogueError, match=r"did you mean tiny-one.*\.gguf file works too"):
        find("Tiny-On")
    with pytest.raises(CatalogueError, match="known are tiny-one, tiny-two"):
        find("zzz")
