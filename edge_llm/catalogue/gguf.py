"""What a GGUF header says, read with bounds before anything native sees the file.

Owns `ModelCard`. Refuses to know where files come from and how they are run. The header is hostile: counts, lengths,
types, alignment and tensor offsets are checked against the file's size (the overflows reported against GGUF parsers are
all in that arithmetic), and whatever is wrong is a CatalogueError. The `gguf` package gives the constants (types, block
sizes, file types); its reader is not used, because it builds every token of the vocabulary: 10 s for 150,000 tokens
and merges, 0.3 s here.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from edge_llm.errors import CatalogueError
from edge_llm.kv.snapshot import MemoryKind

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_TENSORS: Final = 1 << 16
_MAX_VALUES: Final = 1 << 16
_MAX_ARRAY: Final = 1 << 24
_MAX_STRING: Final = 16 << 20
_MAX_ALIGNMENT: Final = 4096
_MAX_LAYERS: Final = 4096
_MAX_COUNT: Final = 1 << 31
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9
# Architectures whose state is not (only) a KV cache: llama.cpp src/llama-arch.cpp, llm_arch_is_recurrent/_is_hybrid.
_RECURRENT: Final = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
_HYBRID: Final = frozenset(
    (
        "jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe qwen3next kimi-linear "
        "bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp deepseek4 minimax-01"
    ).split()
)
# Architectures that llama.cpp runs with a sliding window (src/models/*.cpp: swa_type). Others may name a window in the
# file (phi3, llama, qwen2 do) and are run with full attention. A number: the window when the file names none.
_SLIDING: Final = {
    **dict.fromkeys(
        (
            "exaone-moe gemma3n exaone4 olmo2 plamo3 gemma-embedding step35 gpt-oss spark2_5 cohere2 cohere2moe afmoe "
            "gemma3 laguna granite_swa mellum mimo2 gemma4 smallthinker maple modern-bert muse-glimmer dots3note"
        ).split(),
        0,
    ),
    "gemma2": 4096,
    "llama4": 8192,
}
KV_TYPE_BYTES: Final = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `shape` as GGUF has it (fastest dimension first), `type` the ggml type's name."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The header in the words of this project. Counts are per layer where they differ by layer."""

    path: Path
    architecture: str
    name: str
    quantization: str
    memory: MemoryKind
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: tuple[int, ...]
    head_size_k: int
    head_size_v: int
    n_ctx_train: int
    sliding_window: int
    vocab_size: int
    n_params: int
    licence: str
    has_chat_template: bool
    rope: str
    tensors: tuple[Tensor, ...]
    file_bytes: int

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    def kv_bytes_per_token(self, k_type: str = "f16", v_type: str = "f16") -> int:
        """KV bytes of one position over all layers."""
        k, v = KV_TYPE_BYTES[k_type], KV_TYPE_BYTES[v_type]
        return int(sum(heads * (self.head_size_k * k + self.head_size_v * v) for heads in self.n_head_kv))


def file_type(name: str) -> int:
    """llama.cpp's number of a quantization such as Q4_0 or Q4_K_M. Raises CatalogueError with the known names."""
    for prefix in ("MOSTLY_", "ALL_"):
        if f"{prefix}{name}" in LlamaFileType.__members__:
            return int(LlamaFileType[f"{prefix}{name}"])
    known = ", ".join(sorted(kind.removeprefix("MOSTLY_") for kind in LlamaFileType.__members__ if kind != "GUESSED"))
    raise CatalogueError(f"unknown quantization {name!r}: known are {known}")


def read_card(path: Path) -> ModelCard:
    """Read and check a header. Raises CatalogueError that says what is wrong with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            values, tensors = _Header(file, size, path).read()
    except OSError as error:
        raise CatalogueError(f"cannot read {path}: {error.strerror or error}") from error
    return _card(path, size, values, tensors)


class _Header:
    """A bounded reader of the header: nothing is allocated by a length that the file cannot hold."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._size, self._path = file, size, path

    def read(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        if self._bytes(4) != _MAGIC:
            raise self._bad("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise self._bad(f"GGUF version {version} is not one of {_VERSIONS}")
        n_tensors, n_values = self._scalar("<Q"), self._scalar("<Q")
        if n_tensors > _MAX_TENSORS or n_values > _MAX_VALUES:
            raise self._bad(f"it claims {n_tensors} tensors and {n_values} values")
        values = dict(self._pair() for _ in range(n_values))
        found = [self._tensor() for _ in range(n_tensors)]
        self._check_offsets(found, values.get("general.alignment", 32))
        return values, tuple(tensor for tensor, _ in found)

    def _check_offsets(self, found: list[tuple[Tensor, int]], alignment: Any) -> None:
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"alignment {alignment} is not a power of two up to {_MAX_ALIGNMENT}")
        start, expected = -(-self._file.tell() // alignment) * alignment, 0
        for tensor, offset in found:
            # llama.cpp wants the same: one after the other, so none overlaps another (ggml's gguf.cpp)
            if offset != expected:
                raise self._bad(f"tensor {tensor.name} begins at {offset}, not at {expected}")
            if start + offset + tensor.n_bytes > self._size:
                raise self._bad(f"tensor {tensor.name} lies outside the file (interrupted download?)")
            expected += -(-tensor.n_bytes // alignment) * alignment

    def _tensor(self) -> tuple[Tensor, int]:
        name = self._string()
        n_dims = self._scalar("<I")
        if not 1 <= n_dims <= 4:
            raise self._bad(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(n_dims))
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self._bad(f"tensor {name} has the unknown type {kind}") from error
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        count = math.prod(shape)
        if (
            any(not 1 <= side <= 1 << 40 for side in shape)
            or shape[0] % block
            or count // block * block_bytes > self._size
        ):
            raise self._bad(f"tensor {name} of shape {shape} does not fit the file")
        return Tensor(name, ggml_type.name, shape, count // block * block_bytes), offset

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(self._scalar("<I"))

    def _value(self, kind: int) -> Any:
        """A scalar or text; of an array only its length and, if short and numeric, its items."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._bad(f"a value has the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if count > min(_MAX_ARRAY, self._size) or (kind not in _SCALARS and kind != _STRING):
            raise self._bad(f"an array claims {count} items of type {kind}")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._scalar("<Q"), _MAX_STRING)
            return _Length(count)
        form = _SCALARS[kind]
        if count > 4096:
            self._skip(count * struct.calcsize(form), self._size)
            return _Length(count)
        return [self._scalar(form) for _ in range(count)]

    def _string(self) -> str:
        length = self._scalar("<Q")
        if length > _MAX_STRING:
            raise self._bad(f"a text claims {length} bytes")
        return self._bytes(length).decode("utf-8", errors="replace")

    def _skip(self, size: int, limit: int) -> None:
        if size > limit or self._file.tell() + size > self._size:
            raise self._bad("it ends in the middle of its header")
        self._file.seek(size, 1)

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise self._bad("it ends in the middle of its header")
        return data

    def _bad(self, why: str) -> CatalogueError:
        return CatalogueError(f"{self._path.name} is no usable GGUF file: {why}")


class _Length(int):
    """The length of an array whose items were not kept."""


def _card(path: Path, size: int, values: dict[str, Any], tensors: tuple[Tensor, ...]) -> ModelCard:
    architecture = str(values.get("general.architecture", ""))
    if not architecture:
        raise CatalogueError(f"{path.name} names no architecture")

    def number(key: str, default: int = 0, most: int = _MAX_COUNT) -> int:
        value = values.get(f"{architecture}.{key}", default)
        return _count(path, key, max(value, default=0) if isinstance(value, list) else value, most)

    n_layer = number("block_count", most=_MAX_LAYERS)
    n_embd, n_head = number("embedding_length"), number("attention.head_count")
    heads_kv = values.get(f"{architecture}.attention.head_count_kv", n_head)
    listed = heads_kv if isinstance(heads_kv, list) else [heads_kv] * n_layer
    per_layer = tuple(_count(path, "attention.head_count_kv", heads) for heads in listed[:_MAX_LAYERS])
    head = n_embd // n_head if n_head else 0
    window = number("attention.sliding_window", _SLIDING.get(architecture, 0)) if architecture in _SLIDING else 0
    return ModelCard(
        path=path,
        architecture=architecture,
        name=str(values.get("general.name", path.stem)),
        quantization=_quantization(values, tensors),
        memory=_memory_kind(architecture, window),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=number("feed_forward_length"),
        n_head=n_head,
        n_head_kv=per_layer,
        head_size_k=number("attention.key_length", head),
        head_size_v=number("attention.value_length", head),
        n_ctx_train=number("context_length"),
        sliding_window=window,
        vocab_size=_count(path, "tokenizer.ggml.tokens", _length(values.get("tokenizer.ggml.tokens")))
        or number("vocab_size"),
        n_params=sum(math.prod(tensor.shape) for tensor in tensors),
        licence=str(values.get("general.license", "not stated in the file")),
        has_chat_template="tokenizer.chat_template" in values,
        rope=repr(sorted((key, value) for key, value in values.items() if ".rope." in key)),
        tensors=tensors,
        file_bytes=size,
    )


def _count(path: Path, key: str, value: object, most: int = _MAX_COUNT) -> int:
    """A value of the file as a count; files have been seen with floats where whole numbers belong."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value != int(value):
        raise CatalogueError(f"{path.name} is no usable GGUF file: {key} is {str(value)[:40]!r}")
    return int(value)


def _length(value: object) -> int:
    """How many items an array has, whether they were kept or not."""
    return len(value) if isinstance(value, list) else value if isinstance(value, _Length) else 0


def _memory_kind(architecture: str, window: int) -> MemoryKind:
    if architecture in _RECURRENT:
        return "recurrent"
    if architecture in _HYBRID:
        return "hybrid"
    return "sliding-window" if window else "full"


def _quantization(values: dict[str, Any], tensors: tuple[Tensor, ...]) -> str:
    try:
        return str(LlamaFileType(values["general.file_type"]).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        counts: dict[str, int] = {}
        for tensor in tensors:
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.n_bytes
        return max(counts, key=lambda kind: counts[kind], default="unknown")
