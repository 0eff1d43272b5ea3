"""What is said of a model before its workers refuse to start."""

from __future__ import annotations

import pytest

from edge_llm.catalogue.manifest import ModelEntry
from edge_llm.errors import ConfigError
from edge_llm.plan.listed import check_same, remarks
from edge_llm.plan.sizes import KnownModel, check_context
from tests.plan.test_fit import sizes

SHA256 = "a" * 64
PINNED = ModelEntry(name="pinned", file="Pinned-Q4_0.gguf", size=1000, sha256=SHA256)
UNPINNED = ModelEntry(name="unpinned", file="Unpinned-Q4_0.gguf")
LIST = {entry.name: entry for entry in (PINNED, UNPINNED)}


def model(file: str = "Pinned-Q4_0.gguf", file_bytes: int = 1000, sha256: str = "", context: int = 8192) -> KnownModel:
    return KnownModel(sizes, True, 1, file_bytes, context, file, sha256)


def said(name: str, of: KnownModel) -> list[str]:
    return list(remarks(name, LIST, "models.yaml", of, "facts: x.json"))


def test_a_pinned_model_and_its_own_facts_need_no_words() -> None:
    check_same("pinned", LIST, model(), "facts: x.json")
    check_same("pinned", LIST, model(sha256=SHA256), "facts: x.json")
    assert said("pinned", model()) == []
    assert said("pinned", model(file="copy-of-it.gguf")) == [], "its size is right, whatever the file is called"


@pytest.mark.parametrize("other", [model("Other.gguf", 999), model("Other.gguf", 1000, "b" * 64)])
def test_facts_of_another_model_are_refused(other: KnownModel) -> None:
    with pytest.raises(ConfigError, match=r"facts: x\.json is of another model than pinned: of Other\.gguf with"):
        check_same("pinned", LIST, other, "facts: x.json")


def test_a_model_without_a_hash_is_rendered_with_what_must_be_done_first() -> None:
    check_same("unpinned", LIST, model("Unpinned-Q4_0.gguf"), "facts: x.json")
    (note,) = said("unpinned", model("Unpinned-Q4_0.gguf"))
    assert note.startswith("workers would refuse to start: unpinned has no sha256 in models.yaml")
    assert "`edge-llm models pin unpinned --write models.yaml`" in note
    assert "own-models-yaml" in note


def test_where_nothing_else_can_be_compared_the_files_name_is() -> None:
    *_, note = said("unpinned", model("Other.gguf"))
    assert note.startswith("sizes are of Other.gguf (facts: x.json), workers load Unpinned-Q4_0.gguf")
    assert said("/var/lib/models/Other.gguf", model("Other.gguf")) == []
    (note,) = said("/var/lib/models/Other.gguf", model())
    assert "workers load /var/lib/models/Other.gguf" in note


def test_a_name_that_is_in_no_list_is_noted_with_the_nearest() -> None:
    check_same("pined", LIST, model(), "gguf: x")
    (note,) = said("pined", model())
    assert note.startswith("workers would refuse to start: pined is not in models.yaml, did you mean pinned?")


def test_a_context_is_no_longer_than_what_the_model_was_trained_for() -> None:
    check_context("m", model(), 8192)
    check_context("m", model(context=0), 1 << 20)
    with pytest.raises(ConfigError, match=r"8,193 is more than m was trained for, 8,192 tokens.* Write n_ctx: 8192 or"):
        check_context("m", model(), 8193)
