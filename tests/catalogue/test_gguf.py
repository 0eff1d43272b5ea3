"""GGUF headers: what a card says, and that a hostile file is a CatalogueError, never anything else."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.errors import CatalogueError

Maker = Callable[..., Path]
U32, U64, STRING, ARRAY, FLOAT = 4, 10, 8, 9, 6


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sides = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sides + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def test_a_card_says_what_the_header_says(make_gguf: Maker) -> None:
    card = read_card(make_gguf())
    assert (card.architecture, card.name, card.quantization, card.licence) == ("llama", "Tiny", "Q8_0", "MIT")
    assert (card.n_layer, card.n_embd, card.n_ff, card.n_head, card.n_head_kv) == (3, 64, 128, 4, (2, 2, 2))
    assert (card.head_size_k, card.head_size_v, card.n_ctx_train, card.vocab_size) == (16, 16, 512, 32)
    assert card.has_chat_template
    assert card.memory == "full"
    assert card.n_params == 32 * 64 + 8 * 64
    assert {tensor.name: tensor.type for tensor in card.tensors} == {
        "token_embd.weight": "F32",
        "blk.0.attn_q.weight": "Q8_0",
    }
    assert card.weights_bytes == 32 * 64 * 4 + 8 * 2 * 34


def test_kv_bytes_follow_heads_per_layer_and_cache_types(make_gguf: Maker) -> None:
    card = read_card(make_gguf(heads_kv=[1, 0, 4], attention__key_length=32, attention__value_length=64))
    assert card.kv_bytes_per_token() == 5 * (32 + 64) * 2
    assert card.kv_bytes_per_token("q8_0", "f16") == 5 * (34 + 64 * 2)


@pytest.mark.parametrize(
    ("architecture", "extra", "memory", "window"),
    [
        ("gemma3", {"attention__sliding_window": 512}, "sliding-window", 512),
        ("gemma3", {}, "full", 0),
        ("gemma2", {}, "sliding-window", 4096),
        ("phi3", {"attention__sliding_window": 2047}, "full", 0),
        ("llama", {"attention__sliding_window": 4096}, "full", 0),
        ("mamba", {}, "recurrent", 0),
        ("lfm2", {}, "hybrid", 0),
    ],
)
def test_memory_kind_is_what_llama_cpp_will_do(
    make_gguf: Maker, architecture: str, extra: dict[str, int], memory: str, window: int
) -> None:
    card = read_card(make_gguf(architecture=architecture, **extra))
    assert (card.memory, card.sliding_window) == (memory, window)


def test_a_vocabulary_of_150000_is_read_in_a_blink(make_gguf: Maker) -> None:
    path = make_gguf(tokens=150_000)
    began = time.process_time()
    card = read_card(path)
    assert card.vocab_size == 150_000
    assert time.process_time() - began < 1.0


def test_the_default_model_has_the_shape_that_the_blueprint_computes_with(model_path: Path) -> None:
    card = read_card(model_path)
    assert (card.architecture, card.quantization, card.memory, card.n_layer) == ("llama", "Q4_1", "full", 30)
    assert card.kv_bytes_per_token() == 22.5 * 1024
    assert (card.vocab_size, card.n_ctx_train, card.has_chat_template) == (49_152, 8_192, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "middle of its header"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(tensors=1 << 62), "claims"),
        (header(values=1 << 62), "claims"),
        (header(values=1, rest=struct.pack("<Q", 1 << 63)), "text claims"),
        (header(values=1, rest=pair("k", ARRAY, struct.pack("<IQ", U32, 1 << 62))), "array claims"),
        (header(values=1, rest=pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1))), "array claims"),
        (header(values=1, rest=pair("k", 99, b"")), "unknown type 99"),
        (header(), "no architecture"),
        (
            header(values=2, rest=ARCHITECTURE + pair("llama.block_count", U64, struct.pack("<Q", 1 << 40))),
            "block_count",
        ),
        (header(values=2, rest=ARCHITECTURE + pair("llama.block_count", STRING, text("many"))), "block_count"),
        (
            header(values=2, rest=ARCHITECTURE + pair("llama.block_count", FLOAT, struct.pack("<f", float("nan")))),
            "block_count",
        ),
        (header(values=1, rest=pair("general.alignment", U32, struct.pack("<I", 0))), "alignment 0"),
        (header(values=1, rest=pair("general.alignment", U32, struct.pack("<I", 1 << 20))), "alignment"),
        (header(tensors=1, rest=tensor("t", (1 << 62, 4), 0, 0)), "does not fit"),
        (header(tensors=1, rest=tensor("t", (1 << 33, 1 << 33), 0, 0)), "does not fit"),
        (header(tensors=1, rest=tensor("t", (0,), 0, 0)), "does not fit"),
        (header(tensors=1, rest=tensor("t", (31,), 8, 0)), "does not fit"),
        (header(tensors=1, rest=tensor("t", (1,) * 5, 0, 0)), "dimensions"),
        (header(tensors=1, rest=tensor("t", (4,), 1_000, 0)), "unknown type"),
        (header(tensors=1, rest=tensor("t", (4,), 0, 1 << 63) + bytes(64)), "begins at"),
        (header(tensors=1, rest=tensor("t", (4,), 0, 7) + bytes(64)), "begins at 7"),
        (
            header(tensors=2, rest=tensor("t", (4,), 0, 0) + tensor("u", (4,), 0, 0) + bytes(90)),
            "u begins at 0, not at 32",
        ),
        (header(tensors=2, rest=tensor("t", (4,), 0, 0) + tensor("u", (4,), 0, 32) + bytes(40)), "u lies outside"),
    ],
)
def test_a_corrupt_header_is_refused_with_its_reason(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CatalogueError, match=words):
        read_card(path)


def test_a_file_cut_anywhere_is_refused(make_gguf: Maker, tmp_path: Path) -> None:
    whole = make_gguf().read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(whole) - 300, 41), len(whole) - 100]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CatalogueError):
            read_card(cut)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="cannot read"):
        read_card(tmp_path / "absent.gguf")
    with pytest.raises(CatalogueError, match="cannot read"):
        read_card(tmp_path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2_000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_mutated_headers_give_a_card_or_a_catalogue_error(
    make_gguf: Maker, tmp_path: Path, changes: list[tuple[int, bytes]]
) -> None:
    source = tmp_path / "tiny.gguf"
    if not source.exists():
        make_gguf()
    content = bytearray(source.read_bytes())
    for place, replacement in changes:
        content[place : place + len(replacement)] = replacement
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    card = card_or_refusal(path)
    assert card is None or (len(card.n_head_kv) <= 4096 and card.weights_bytes <= len(content))


def card_or_refusal(path: Path) -> ModelCard | None:
    """Any exception but a CatalogueError fails the test."""
    try:
        return read_card(path)
    except CatalogueError:
        return None
