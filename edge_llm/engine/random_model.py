"""Models with random weights: every shape and format in seconds, without a download.

Owns the recipes (tensor names and header keys as llama.cpp's loaders want them) for `edge-llm verify --random`,
`edge-llm models random` and the tests. Refuses to know sequences. The weights are seeded, so a file is the same
everywhere; they are scaled so that the logits of neighbouring tokens lie close together and a wrong bit shows in the
text.

A random model can hide what a real one shows (attention is nearly uniform): it proves formats and shapes, not models.
Time and memory of a step follow from shape and format alone, so a shape of real size measures a board.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from edge_llm.catalogue.gguf import file_type
from edge_llm.engine.quantize import quantize
from edge_llm.errors import CatalogueError

_SPECIAL: Final = ("<unk>", "<s>", "</s>")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
# Weights drawn at a time: they come as doubles, and a vocabulary of them all would take gigabytes.
_AT_ONCE: Final = 1 << 22
_TEMPLATE: Final = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What to build. `window` > 0 needs an architecture with sliding windows, `experts` a mixture; where `is_tied` the
    embedding is the output matrix too."""

    architecture: str = "llama"
    n_layer: int = 2
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 64
    n_ff: int = 512
    n_vocab: int = 512
    window: int = 0
    experts: int = 0
    n_ctx: int = 4096
    is_tied: bool = False
    keys: Mapping[str, float | int] = field(default_factory=dict)


SHAPES: Final[Mapping[str, Shape]] = {
    "dense": Shape(),
    "sliding-window": Shape("gemma2", n_layer=4, window=96, is_tied=True, keys={"attn_logit_softcapping": 50.0}),
    "recurrent": Shape("mamba"),
    "wide-kv": Shape(n_layer=32, n_embd=64, n_head=32, n_head_kv=32, head_size=96, n_ff=64),
    "head-size-256": Shape(n_head=2, n_head_kv=2, head_size=256),
    "mqa": Shape(n_head=8, n_head_kv=1, head_size=32),
    "moe": Shape(experts=4),
    # meta-llama/Llama-3.2-1B's config.json; 1.24 billion weights
    "llama-3.2-1b": Shape(
        n_layer=16,
        n_embd=2048,
        n_head=32,
        n_head_kv=8,
        n_ff=8192,
        n_vocab=128_256,
        n_ctx=131_072,
        is_tied=True,
    ),
}


def make_model(folder: Path, shape: str = "dense", quantization: str = "Q4_0", seed: int = 1) -> Path:
    """The file of this shape, format and seed in `folder`, made if it is not there. Raises CatalogueError for a shape
    or format that is none."""
    if shape not in SHAPES:
        raise CatalogueError(f"no shape is called {shape!r}: there are {', '.join(SHAPES)}")
    if quantization != "F16":
        file_type(quantization)
    target = folder / f"random-{shape}-{quantization}-{seed}.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / f"random-{shape}-F16-{seed}.gguf"
    if not plain.is_file():
        draft = plain.with_name(f"{plain.name}.{os.getpid()}.draft")
        write_model(draft, SHAPES[shape], seed)
        draft.replace(plain)
    if quantization != "F16":
        quantize(plain, target, quantization)
    return target


def write_model(path: Path, shape: Shape, seed: int) -> None:
    """Write `shape` with f16 weights (norms f32)."""
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    _write_header(writer, shape)
    rng = np.random.default_rng(seed)
    for name, dims in _tensors(shape).items():
        writer.add_tensor(name, _values(rng, name, dims))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_header(writer: Any, shape: Shape) -> None:
    arch = shape.architecture
    writer.add_name(f"random {arch}")
    writer.add_license("none: random numbers")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(0 if arch == "mamba" else shape.n_ff)
    writer.add_head_count(0 if arch == "mamba" else shape.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * shape.n_embd)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(16)
    else:
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
        writer.add_rope_dimension_count(shape.head_size)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
    for key, value in shape.keys.items():
        writer.add_float32(f"{arch}.{key}", float(value))
    _write_vocabulary(writer, shape.n_vocab)


def _write_vocabulary(writer: Any, n_vocab: int) -> None:
    """Byte-level: three special tokens, 256 bytes, the space, then words that no text tokenizes to."""
    rest = n_vocab - len(_SPECIAL) - 256
    words = ["\u2581", *(f"w{i}" for i in range(1, rest))]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1e4] * rest)
    writer.add_token_types([_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * rest])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_TEMPLATE)


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and numpy shapes (rows first)."""
    found = {"token_embd.weight": (shape.n_vocab, shape.n_embd), "output_norm.weight": (shape.n_embd,)}
    if not shape.is_tied:
        found["output.weight"] = (shape.n_vocab, shape.n_embd)
    layer = _mamba_layer(shape) if shape.architecture == "mamba" else _attention_layer(shape)
    for number in range(shape.n_layer):
        found |= {f"blk.{number}.{name}": dims for name, dims in layer.items()}
    return found


def _attention_layer(shape: Shape) -> dict[str, tuple[int, ...]]:
    n, q, kv = shape.n_embd, shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (n,),
        "attn_q.weight": (q, n),
        "attn_k.weight": (kv, n),
        "attn_v.weight": (kv, n),
        "attn_output.weight": (n, q),
        "ffn_norm.weight": (n,),
    }
    if shape.architecture == "gemma2":
        layer |= {"post_attention_norm.weight": (n,), "post_ffw_norm.weight": (n,)}
    if shape.experts:
        e, ff = shape.experts, shape.n_ff
        layer |= {
            "ffn_gate_inp.weight": (e, n),
            "ffn_gate_exps.weight": (e, ff, n),
            "ffn_up_exps.weight": (e, ff, n),
            "ffn_down_exps.weight": (e, n, ff),
        }
    else:
        layer |= {
            "ffn_gate.weight": (shape.n_ff, n),
            "ffn_up.weight": (shape.n_ff, n),
            "ffn_down.weight": (n, shape.n_ff),
        }
    return layer


def _mamba_layer(shape: Shape) -> dict[str, tuple[int, ...]]:
    n, inner, state, rank = shape.n_embd, 2 * shape.n_embd, 16, 16
    return {
        "attn_norm.weight": (n,),
        "ssm_in.weight": (2 * inner, n),
        "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (n, inner),
    }


def _values(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> Any:
    """Weights with the variance that keeps activations at size one; norms one; the SSM's decay negative."""
    if name.endswith("norm.weight"):
        return np.ones(dims, np.float32)
    if name.endswith("ssm_a"):
        return -np.tile(np.arange(1, dims[1] + 1, dtype=np.float32), (dims[0], 1))
    if len(dims) == 1 or "conv1d" in name:
        return (0.1 * rng.standard_normal(dims)).astype(np.float32)
    # embeddings and attention a little louder than neutral, so that positions matter
    scale = 1.0 if name.startswith("token_embd") else 2.0 / np.sqrt(dims[-1])
    found = np.empty(dims, np.float16)
    for rows in np.array_split(found.reshape(-1, dims[-1]), max(1, found.size // _AT_ONCE)):
        rows[:] = scale * rng.standard_normal(rows.shape)
    return found
