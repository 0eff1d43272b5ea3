"""Small GGUF files, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

Maker = Callable[..., Path]


@pytest.fixture
def make_gguf(tmp_path: Path) -> Maker:
    """make_gguf(name, architecture, tokens=..., heads_kv=..., **extra uint32 values below the architecture)."""

    def make(
        name: str = "tiny.gguf",
        architecture: str = "llama",
        *,
        tokens: int = 32,
        heads_kv: int | list[int] = 2,
        template: bool = True,
        **extra: int,
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name("Tiny")
        writer.add_license("MIT")
        writer.add_block_count(3)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(heads_kv)
        writer.add_context_length(512)
        writer.add_feed_forward_length(128)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        for key, value in extra.items():
            writer.add_uint32(f"{architecture}.{key.replace('__', '.')}", value)
        writer.add_token_list([f"t{index}" for index in range(tokens)])
        writer.add_token_scores([0.0] * tokens)
        if template:
            writer.add_chat_template("{{ messages }}")
        writer.add_tensor("token_embd.weight", np.zeros((tokens, 64), np.float32))
        rows = np.zeros((8, 64), np.float32)
        quantized = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
