"""The one door to llama.cpp: models and contexts of llama-cpp-python's low-level API, typed and owned.

Owns every native pointer and the settings that exactness depends on (blueprint section 4). Refuses to know
sequences, sampling, requests or the canonical KV form: it moves native state bytes, nothing reads them here.

Invariants: a `NativeContext` is used by one thread; it dies before its model; sizes given to native code are
computed here, never taken from the network. `GGML_CPU_TILED_MM` is set before the library's first matmul.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from edge_llm.engine.cpu import check_cpu
from edge_llm.errors import EngineFailed, RestoreRefused
from edge_llm.kv.snapshot import Policy
from edge_llm.pages import ordinary_pages

FlashAttention = Literal["on", "off", "auto"]
KVType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

GGML_TYPES: Final[Mapping[KVType, int]] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
FLASH_ATTENTION: Final[Mapping[FlashAttention, int]] = {"auto": -1, "off": 0, "on": 1}
ABORTED: Final = 2
NO_ROOM: Final = 1
# ggml_backend_dev_type: GGML_BACKEND_DEVICE_TYPE_CPU (ggml-backend.h)
_CPU_DEVICE: Final = 0


@cache
def library() -> Any:
    """llama_cpp's low-level module. Imported late: it costs a second and the tiled kernels read the
    environment once, at the first matmul of the process."""
    os.environ.setdefault("GGML_CPU_TILED_MM", "0")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an assertion must die at once, not wait for a debugger
    check_cpu()
    from llama_cpp import llama_cpp as lib

    lib.llama_log_set(_quiet(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


@cache
def _quiet(lib: Any) -> Any:
    """A log callback that keeps llama.cpp's warnings and errors (levels 3, 4) and drops the rest."""

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _user: object) -> None:
        if level in (3, 4) and os.environ.get("EDGE_LLM_NATIVE_LOG"):
            os.write(2, text)

    return log


def use_tiled_kernels(is_wanted: bool) -> None:
    """Policy `fast` keeps llama.cpp's tiled K-quant matmul; must run before `library()`."""
    os.environ["GGML_CPU_TILED_MM"] = "1" if is_wanted else "0"


def build_facts() -> dict[str, str]:
    """What was built: package version and ggml's own list of features and flags (llama_print_system_info)."""
    info = library().llama_print_system_info().decode()  # first: it asks the CPU before anything of llama.cpp loads
    import llama_cpp

    return {"llama_cpp_python": str(llama_cpp.__version__), "system_info": info.strip()}


def has_shape_dependent_kernels(system_info: str) -> bool:
    """tinyBLAS picks kernels by shape; a build that has it cannot be exact."""
    return re.search(r"\bLLAMAFILE = 1\b", system_info) is not None


def has_tile_kernels(system_info: str) -> bool:
    """llama.cpp's AMX kernels, which end the process as GCC 12 compiles them (bootstrap.py builds without)."""
    return re.search(r"\bAMX_INT8 = 1\b", system_info) is not None


@cache
def _repack_buffer_type() -> int | None:
    """ggml's CPU_REPACK buffer type, or None in a build without it."""
    ggml = library()._lib  # symbols of what libllama was linked with; opening libggml.so again would load a second copy
    pointer = ctypes.c_void_p
    ggml.ggml_backend_dev_by_type.restype = pointer
    ggml.ggml_backend_dev_backend_reg.restype = pointer
    ggml.ggml_backend_dev_backend_reg.argtypes = [pointer]
    ggml.ggml_backend_reg_get_proc_address.restype = pointer
    ggml.ggml_backend_reg_get_proc_address.argtypes = [pointer, ctypes.c_char_p]
    ggml.ggml_backend_buft_name.restype = ctypes.c_char_p
    ggml.ggml_backend_buft_name.argtypes = [pointer]
    device = ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    types = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
    index = 0
    while types and types[index]:
        if ggml.ggml_backend_buft_name(types[index]) == b"CPU_REPACK":
            return int(types[index])
        index += 1
    return None


class _BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override, which llama-cpp-python 0.3.36 leaves out."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def _overrides(tensor_names: Sequence[str]) -> Any:
    """tensor_buft_overrides that put exactly `tensor_names` into CPU_REPACK, or None."""
    buffer_type = _repack_buffer_type()
    if not tensor_names or buffer_type is None:
        return None
    table = (_BufferOverride * (len(tensor_names) + 1))()  # the last one stays empty: end of list
    for row, name in zip(table, tensor_names, strict=False):
        row.pattern = f"^{re.escape(name)}$".encode()
        row.buft = buffer_type
    return table


class NativeModel:
    """One loaded GGUF. Policy exact repacks only the tensors named in `repacked`; fast leaves it to llama.cpp."""

    def __init__(
        self, path: Path, *, policy: Policy = "exact", repacked: Sequence[str] = (), vocab_only: bool = False
    ) -> None:
        lib = self._lib = library()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.use_extra_bufts = policy == "fast" and not has_tile_kernels(build_facts()["system_info"])
        self._table = _overrides(repacked) if policy == "exact" else None
        if self._table is not None:
            params.tensor_buft_overrides = ctypes.cast(self._table, ctypes.c_void_p)
        with ordinary_pages():
            self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise EngineFailed(
                f"llama.cpp cannot load {path}: the file is damaged or its architecture is unknown to this build"
            )
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))

    @property
    def n_ctx_train(self) -> int:
        return int(self._lib.llama_model_n_ctx_train(self.pointer))

    def metadata(self, key: str) -> str | None:
        """A GGUF metadata value as text."""
        buffer = ctypes.create_string_buffer(1 << 16)
        size = self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        if size >= len(buffer):
            buffer = ctypes.create_string_buffer(size + 1)
            size = self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if size < 0 else buffer.value.decode(errors="replace")

    @property
    def description(self) -> str:
        """Architecture, size and format in llama.cpp's words."""
        buffer = ctypes.create_string_buffer(128)
        self._lib.llama_model_desc(self.pointer, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def close(self) -> None:
        if self.pointer:
            self._lib.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """One llama_context. `n_ctx` is cells per sequence. `rows` is the largest micro-batch (n_batch = n_ubatch),
    `outputs` the most rows that want logits in one call."""

    n_ctx: int
    n_seq: int
    rows: int
    outputs: int
    is_unified: bool
    k_type: KVType = "f16"
    v_type: KVType = "f16"
    flash_attention: FlashAttention = "off"
    threads: int = 1
    threads_batch: int = 1


class _AbortFlag:
    """A flag that llama.cpp polls without entering Python.

    The callback is libc's `strlen` on a two-byte buffer: 0 while the first byte is 0, 1 once it is 1. A Python
    callable there costs 64 us a call, 600 calls a step (blueprint section 3)."""

    def __init__(self, lib: Any) -> None:
        self._bytes = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self.callback = lib.ggml_abort_callback(strlen)
        self.never = lib.ggml_abort_callback(0)
        self.data = ctypes.cast(self._bytes, ctypes.c_void_p)

    def set(self) -> None:
        self._bytes[0] = b"\x01"

    def clear(self) -> None:
        self._bytes[0] = b"\x00"


class NativeContext:
    """One llama_context and its batch buffer. Not thread-safe, except `abort`."""

    def __init__(self, model: NativeModel, settings: ContextSettings) -> None:
        lib = self._lib = library()
        self.model = model
        self.settings: ContextSettings = settings
        self._configured = settings
        params = lib.llama_context_default_params()
        params.n_ctx = settings.n_ctx if settings.is_unified else settings.n_ctx * settings.n_seq
        params.n_batch = params.n_ubatch = settings.rows
        params.n_seq_max = settings.n_seq
        params.n_outputs_max = max(settings.outputs, settings.n_seq)  # llama_context::output_reserve asserts it
        params.n_threads, params.n_threads_batch = settings.threads, settings.threads_batch
        params.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
        params.type_k, params.type_v = GGML_TYPES[settings.k_type], GGML_TYPES[settings.v_type]
        params.kv_unified = settings.is_unified
        params.swa_full = True  # every position keeps its own cell: chunked export and exact placement need it
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EngineFailed(
                f"llama.cpp cannot make a context ({settings.n_seq} x {settings.n_ctx} cells, K {settings.k_type}, "
                f"V {settings.v_type}, flash attention {settings.flash_attention}): "
                "too little memory, or a quantized V cache without flash attention"
            )
        self.memory = lib.llama_get_memory(self.pointer)
        self.n_ctx = int(lib.llama_n_ctx_seq(self.pointer))
        self._batch = lib.llama_batch_init(settings.rows, 0, 1)
        self._filled: tuple[Sequence[int], bool] = ([], False)
        self._flag = _AbortFlag(lib)
        self._threads = 0
        self._logit_views: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
        self._logits_address = _logits_address(lib)
        self._views()

    def _views(self) -> None:
        batch, rows = self._batch, self.settings.rows
        self._tokens = np.ctypeslib.as_array(batch.token, (rows,))
        self._positions = np.ctypeslib.as_array(batch.pos, (rows,))
        self._wants = np.ctypeslib.as_array(batch.logits, (rows,))
        np.ctypeslib.as_array(batch.n_seq_id, (rows,))[:] = 1

    def _fill(self, tokens: Sequence[int], positions: npt.ArrayLike, seqs: Sequence[int], wants: bool) -> None:
        count = len(tokens)
        assert 0 < count <= self.settings.rows
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        if self._filled == (seqs, wants):
            return  # a decode step after another: the same rows
        self._batch.n_tokens = count
        self._wants[:count] = wants
        for row, seq in enumerate(seqs):
            self._batch.seq_id[row][0] = seq
        self._filled = (list(seqs), wants)

    def prompt(
        self, tokens: Sequence[int], p0: int, seq: int, *, wants_last: bool = False, can_abort: bool = True
    ) -> bool:
        """KV of `tokens` at positions p0.. of `seq`, no logits, or (`wants_last`, as llama-bench has it) those of the
        last token. False: aborted. Raises EngineFailed."""
        lib = self._lib
        self._fill(tokens, np.arange(p0, p0 + len(tokens)), [seq] * len(tokens), False)
        if wants_last:
            self._wants[len(tokens) - 1] = True
            self._filled = ([], False)
        self._set_threads(self.settings.threads_batch)
        if can_abort:
            lib.llama_set_abort_callback(self.pointer, self._flag.callback, self._flag.data)
        status = lib.llama_decode(self.pointer, self._batch)
        lib.llama_set_abort_callback(self.pointer, self._flag.never, None)
        if status == ABORTED:
            return False
        self._check(status, len(tokens))
        return True

    def decode(self, tokens: Sequence[int], positions: Sequence[int], seqs: Sequence[int]) -> npt.NDArray[np.float32]:
        """One row per sequence; returns logits [rows, n_vocab], valid until the next call."""
        lib = self._lib
        self._fill(tokens, positions, seqs, True)
        self._set_threads(self.settings.threads)
        self._check(lib.llama_decode(self.pointer, self._batch), len(tokens))
        return self._logits(len(tokens))

    def _set_threads(self, threads: int) -> None:
        """llama.cpp takes n_threads_batch for any call of more than one row (llama_context::graph_compute): both."""
        if threads != self._threads:
            self._lib.llama_set_n_threads(self.pointer, threads, threads)
            self._threads = threads

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        """A view of llama.cpp's buffer, made once per place and size: making it costs as much as drawing a token."""
        address = self._logits_address(self.pointer)
        key = (address, rows)
        view = self._logit_views.get(key)
        if view is None:
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            view = np.ctypeslib.as_array(pointer, (rows, self.model.n_vocab))
            if len(self._logit_views) > self.settings.outputs:
                self._logit_views.clear()  # the buffer has moved
            self._logit_views[key] = view
        return view

    def _check(self, status: int, rows: int) -> None:
        if status == NO_ROOM:
            raise EngineFailed(f"no KV cells left for {rows} more rows")
        if status != 0:
            raise EngineFailed(f"llama_decode failed with status {status} on {rows} rows")

    def abort(self) -> None:
        """Any thread: end the running prompt call at the next graph node, and every later one until `arm`."""
        self._flag.set()

    def arm(self) -> None:
        self._flag.clear()

    def use_threads(self, threads: int | None) -> None:
        """Threads of both phases from the next call on (llama_set_n_threads); None: as it was configured."""
        given = self._configured
        self.settings = given if threads is None else replace(given, threads=threads, threads_batch=threads)

    def clear(self) -> None:
        self._lib.llama_memory_clear(self.memory, False)

    def remove(self, seq: int) -> None:
        self._lib.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def truncate(self, seq: int, length: int) -> bool:
        """Forget the positions of `seq` from `length` on. False: this model's memory cannot give back a part of it."""
        return bool(self._lib.llama_memory_seq_rm(self.memory, seq, length, -1))

    def mark(self, source: int, target: int, p0: int, p1: int) -> None:
        """Let `target` hold the cells [p0, p1) of `source` too; copies nothing. Unified contexts only
        (elsewhere llama.cpp asserts and the process dies)."""
        assert self.settings.is_unified
        self._lib.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def last_position(self, seq: int) -> int:
        return int(self._lib.llama_memory_seq_pos_max(self.memory, seq))

    def state(self, seq: int) -> bytearray:
        """llama_state_seq_get_data of `seq`, whatever its size."""
        buffer = bytearray(int(self._lib.llama_state_seq_get_size(self.pointer, seq)))
        self.state_into(seq, memoryview(buffer))
        return buffer

    def state_into(self, seq: int, buffer: memoryview) -> None:
        """The same into a buffer of exactly the right size: asking llama.cpp for the size costs as much as the
        copy, and a fresh buffer as much again in page faults."""
        written = self._lib.llama_state_seq_get_data(self.pointer, _pointer(buffer), len(buffer), seq)
        if written != len(buffer):
            raise EngineFailed(f"llama.cpp wrote {written} of {len(buffer)} bytes of KV state")

    def set_state(self, seq: int, data: memoryview | bytearray) -> None:
        """llama_state_seq_set_data; raises RestoreRefused (the sequence is then empty)."""
        taken = self._lib.llama_state_seq_set_data(self.pointer, _pointer(data), len(data), seq)
        if taken != len(data):
            self.remove(seq)
            raise RestoreRefused(
                f"llama.cpp took {taken} of {len(data)} bytes of KV state; recomputing the prompt here"
            )

    def close(self) -> None:
        if self.pointer:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self.pointer)
            self.pointer = None


@cache
def _logits_address(lib: Any) -> Any:
    """llama_get_logits as an address: a typed pointer costs two more objects for every token."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    return prototype(("llama_get_logits", lib._lib))


def _pointer(buffer: memoryview | bytearray) -> Any:
    """For one call. No ctypes.cast: what it returns and what it was made of hold each other, so that every state stayed
    in memory until Python looked for cycles, which it seldom does (`gc.freeze` in worker/serve.py)."""
    return ctypes.byref(ctypes.c_uint8.from_buffer(buffer))
