"""What `bench node` reads and prints in the way of llama-bench: lists and ranges, test names, columns, formats. Pure.

Owns the list syntax (`1,2,4`, `a-b`, `a-b+s`, `a-b*m`), the names of tests (`pp512`, `tg128 @ d512`), the columns of
llama-bench under its own names and in its order, our columns behind them, and the text of every output format.
Refuses to know how a row was measured and where it is written.

Invariants: the first columns are llama-bench's (llama-bench.cpp, test::get_fields), so that what reads its CSV, JSON
and SQL reads ours; a figure that was not measured is null (empty in CSV and Markdown), never 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal

from edge_llm.errors import ConfigError
from edge_llm.kv.snapshot import Policy

FlashAttention = Literal["on", "off", "auto"]
Row = Mapping[str, Any]
FORMATS: Final = ("md", "csv", "json", "jsonl", "sql")

# llama-bench's columns, in its order.
LLAMA_BENCH_COLUMNS: Final = tuple(
    (
        "build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params "
        "n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu "
        "no_kv_offload flash_attn devices tensor_split tensor_buft_overrides load_mode lazy_mode embeddings "
        "no_op_offload no_host repack fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts "
        "stddev_ts"
    ).split()
)
OUR_COLUMNS: Final = tuple(
    (
        "test policy level n_parallel n_threads_batch is_complete step_bytes bandwidth_bytes_per_s roofline_share "
        "rss_peak_bytes pss_bytes anonymous_bytes cpu_s wall_s cpu_share power_w llama_bench_ts ratio"
    ).split()
)
SAMPLES: Final = ("samples_ns", "samples_ts", "llama_bench_samples_ts")
_INTEGERS: Final = frozenset(
    (
        "build_number n_batch n_ubatch n_threads poll model_size model_n_params n_gpu_layers main_gpu n_prompt n_gen "
        "n_depth avg_ns stddev_ns no_op_offload n_cpu_moe fit_target fit_min_ctx flash_attn cpu_strict no_kv_offload "
        "embeddings no_host repack n_parallel n_threads_batch is_complete step_bytes rss_peak_bytes pss_bytes "
        "anonymous_bytes"
    ).split()
)
_REALS: Final = frozenset(
    (
        "avg_ts stddev_ts bandwidth_bytes_per_s roofline_share cpu_s wall_s cpu_share power_w llama_bench_ts ratio"
    ).split()
)
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST_VALUES: Final = 1000
_FLASH_WORDS: Final[Mapping[str, FlashAttention]] = {
    **dict.fromkeys(("on", "enabled", "true", "1"), "on"),
    **dict.fromkeys(("off", "disabled", "false", "0"), "off"),
    **dict.fromkeys(("auto", "-1"), "auto"),
}


class BadList(ConfigError):
    """A list of the command line cannot be read."""

    code = "bad_list"


@dataclass(frozen=True, slots=True)
class NodeTest:
    """One row to measure. `n_parallel` sequences decode together; prompts and mixed tests have one. `n_threads` decode,
    `n_threads_batch` compute prompts, also the untimed one behind which a test at a depth begins."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: FlashAttention = "auto"
    n_threads: int = 1
    n_threads_batch: int = 1
    policy: Policy = "exact"
    n_parallel: int = 1

    @property
    def name(self) -> str:
        """As llama-bench names it; ` x 4`: four sequences decode together, which llama-bench has not."""
        if not self.n_gen:
            name = f"pp{self.n_prompt}"
        elif not self.n_prompt:
            name = f"tg{self.n_gen}"
        else:
            name = f"pp{self.n_prompt}+tg{self.n_gen}"
        if self.n_parallel > 1:
            name += f" x {self.n_parallel}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def phase(self) -> Literal["prefill", "decode", "both"]:
        return "prefill" if not self.n_gen else "decode" if not self.n_prompt else "both"

    @property
    def shown_threads(self) -> int:
        """What the column n_threads says: the phase's own threads."""
        return self.n_threads_batch if self.phase == "prefill" else self.n_threads

    @property
    def cells(self) -> int:
        """Cells of a sequence; llama.cpp rounds them up to multiples of 256."""
        return -(-(self.n_prompt + self.n_gen + self.n_depth) // 256) * 256

    @property
    def micro_batch(self) -> int:
        """Rows of one call: what llama.cpp makes of -b and -ub."""
        return min(self.n_batch, self.n_ubatch, self.cells)

    @property
    def tokens(self) -> int:
        """What one repetition computes, over all sequences."""
        return (self.n_prompt + self.n_gen) * self.n_parallel

    @property
    def effective_flash_attention(self) -> FlashAttention:
        """As the engine has it (engine/load.py): policy exact turns `auto` into off."""
        return "off" if self.flash_attention == "auto" and self.policy == "exact" else self.flash_attention


@dataclass(frozen=True, slots=True)
class Sweep:
    """Lists of llama-bench's options and ours; every combination is a test. `threads` are pairs (decode, prefill)."""

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    n_pg: tuple[tuple[int, int], ...] = ()
    n_depth: tuple[int, ...] = (0,)
    n_batch: tuple[int, ...] = (2048,)
    n_ubatch: tuple[int, ...] = (512,)
    type_k: tuple[str, ...] = ("f16",)
    type_v: tuple[str, ...] = ("f16",)
    flash_attention: tuple[FlashAttention, ...] = ("auto",)
    threads_decode: tuple[int, ...] = (1,)
    threads_prefill: tuple[int, ...] = (1,)
    policies: tuple[Policy, ...] = ("exact",)
    n_parallel: tuple[int, ...] = (1,)

    def tests(self) -> list[NodeTest]:
        """In llama-bench's order; policy outermost, as it needs a process of its own. None twice."""
        axes = (self.policies, self.n_batch, self.n_ubatch, self.type_k, self.type_v, self.flash_attention)
        found = [
            NodeTest(*sizes[:2], depth, n_batch, n_ubatch, type_k, type_v, flash, *sizes[2:4], policy, sizes[4])
            for policy, n_batch, n_ubatch, type_k, type_v, flash in product(*axes)
            for decode, prefill in self._thread_pairs()
            for depth in self.n_depth
            for sizes in self._sizes(decode, prefill)
        ]
        return list(dict.fromkeys(found))

    def curve(self, contexts: Sequence[int]) -> list[NodeTest]:
        """Prompts that fill each of these contexts, with and without flash attention, other settings the first ones."""
        settings = (self.n_batch[0], self.n_ubatch[0], self.type_k[0], self.type_v[0])
        threads = (self.threads_decode[0], self.threads_prefill[0])
        flashes: tuple[FlashAttention, ...] = ("off", "on")
        return [
            NodeTest(context, 0, 0, *settings, flash, *threads, self.policies[0])
            for context in contexts
            for flash in flashes
        ]

    def _thread_pairs(self) -> list[tuple[int, int]]:
        """Both phases' threads: the same where one list was given for both."""
        if self.threads_decode == self.threads_prefill:
            return [(one, one) for one in self.threads_decode]
        return list(product(self.threads_decode, self.threads_prefill))

    def _sizes(self, decode: int, prefill: int) -> list[tuple[int, int, int, int, int]]:
        """Prompt and decode tokens, threads of each phase, sequences. The threads of a phase that does not run are
        always the same ones, so that a sweep of the other phase does not measure twice."""
        fastest = max(self.threads_prefill)  # computes what lies before a decode test, untimed
        prompts = [(n, 0, prefill, prefill, 1) for n in self.n_prompt if n]
        decodes = [(0, n, decode, fastest, rows) for n in self.n_gen if n for rows in self.n_parallel]
        both = [(n_prompt, n_gen, decode, prefill, 1) for n_prompt, n_gen in self.n_pg if n_prompt or n_gen]
        return prompts + decodes + both


def numbers(texts: Sequence[str], what: str, least: int = 0) -> tuple[int, ...]:
    """Values of all lists given for one option: `1,2,4`, `1-4`, `0-4096+1024`, `1-64*2`. Raises BadList."""
    found: list[int] = []
    for item in (item for text in texts for item in text.split(",")):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise BadList(f"{what}: cannot read {item!r}: give numbers like 1,2,4 or ranges a-b, a-b+step, a-b*factor")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadList(f"{what}: the range {item} ends before it begins")
        found += _steps(first, last, match[3] or "+", int(match[4] or 1), what, item)
    if any(value < least for value in found):
        raise BadList(f"{what}: {min(found)} is below {least}")
    return tuple(dict.fromkeys(found))


def _steps(first: int, last: int, sign: str, step: int, what: str, item: str) -> list[int]:
    values = []
    value = first
    while value <= last:
        values.append(value)
        following = value + step if sign == "+" else value * step
        if following <= value or len(values) > _MOST_VALUES:
            raise BadList(f"{what}: the range {item} does not end, or has more than {_MOST_VALUES} values")
        value = following
    return values


def words(texts: Sequence[str], what: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Words of all lists given for one option, each one of `allowed`. Raises BadList."""
    found = [item.strip() for text in texts for item in text.split(",")]
    for item in found:
        if item not in allowed:
            raise BadList(f"{what}: {item!r} is none of {', '.join(allowed)}")
    return tuple(dict.fromkeys(found))


def flash_attentions(texts: Sequence[str], what: str) -> tuple[FlashAttention, ...]:
    """`0,1`, `on,off`, `auto`, in llama.cpp's spellings. Raises BadList."""
    return tuple(dict.fromkeys(_FLASH_WORDS[word] for word in words(texts, what, tuple(_FLASH_WORDS))))


def pairs(texts: Sequence[str], what: str) -> tuple[tuple[int, int], ...]:
    """`512,128`, one pair for each time the option was given. Raises BadList."""
    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+),(\d+)", text.strip())
        if match is None:
            raise BadList(f"{what}: cannot read {text!r}: give a prompt and a decode length like 512,128")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


# -- output


class Table:
    """Rows in one format, as they come: `head`, then a `line` for each, then `foot`. Texts end with a line break."""

    def __init__(self, form: str, varying: Collection[str] = (), notes: Sequence[str] = ()) -> None:
        """`varying`: columns that a person wants to see in this run, besides those that are always shown."""
        self._form, self._notes = form, notes
        self._columns = [column for column in _MARKDOWN if column.is_always or column.name in varying]
        self._lines = 0

    def head(self) -> str:
        every = (*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS)
        if self._form == "csv":
            return ",".join(every) + "\n"
        if self._form == "json":
            return "[\n"
        if self._form == "sql":
            types = ",\n".join(f"  {column} {_sql_type(column)}" for column in every)
            return f"CREATE TABLE IF NOT EXISTS llama_bench (\n{types}\n);\n\n"
        if self._form == "md":
            names = "|".join(f" {_padded(column.title, column.width)} " for column in self._columns)
            lines = "|".join(
                f" {'-' * (abs(column.width) - 1)}{':' if column.width > 0 else '-'} " for column in self._columns
            )
            return f"|{names}|\n|{lines}|\n"
        return ""

    def line(self, row: Row) -> str:
        self._lines += 1
        every = (*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS)
        if self._form == "csv":
            return ",".join('"' + _text(row.get(column)).replace('"', '""') + '"' for column in every) + "\n"
        if self._form == "jsonl":
            return json.dumps(complete(row)) + "\n"
        if self._form == "json":
            text = json.dumps(complete(row), indent=2).replace("\n", "\n  ")
            return f"{',' + chr(10) if self._lines > 1 else ''}  {text}"
        if self._form == "sql":
            values = ", ".join(_quoted(row.get(column)) for column in every)
            return f"INSERT INTO llama_bench ({', '.join(every)}) VALUES ({values});\n"
        cells = "|".join(f" {_padded(column.show(row), column.width)} " for column in self._columns)
        return f"|{cells}|\n"

    def foot(self) -> str:
        if self._form == "json":
            return "\n]\n" if self._lines else "]\n"
        if self._form == "md" and self._notes:
            return "\n" + "\n".join(self._notes) + "\n"
        return ""


def complete(row: Row) -> dict[str, Any]:
    """Every column, in order, null where there is no figure; then the samples."""
    every = (*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS)
    return {column: row.get(column) for column in every} | {name: row[name] for name in SAMPLES if name in row}


def _text(value: object) -> str:
    """As llama-bench writes it: 0 and 1 for claims, six digits behind the point."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _quoted(value: object) -> str:
    return "NULL" if value is None else "'" + _text(value).replace("'", "''") + "'"


def _sql_type(column: str) -> str:
    return "INTEGER" if column in _INTEGERS else "REAL" if column in _REALS else "TEXT"


def _padded(text: str, width: int) -> str:
    return text.rjust(width) if width > 0 else text.ljust(-width)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column for people. Width as llama-bench has it, negative: left-aligned."""

    name: str
    title: str
    width: int
    show: Callable[[Row], str]
    is_always: bool = False


def _plain(name: str) -> Callable[[Row], str]:
    return lambda row: _text(row.get(name))


def _share(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{100 * row[name]:.1f} %"


def _mebibytes(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{row[name] / (1 << 20):.0f}"


def _number(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}f}"


def _size(row: Row) -> str:
    size = row["model_size"]
    return f"{size / (1 << 20):.2f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.2f} GiB"


def _params(row: Row) -> str:
    count = row["model_n_params"]
    return f"{count / 1e6:.2f} M" if count < 1_000_000_000 else f"{count / 1e9:.2f} B"


def _speed(row: Row) -> str:
    partial = "" if row.get("is_complete", True) else " (cut short)"
    return f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}{partial}"


# llama-bench's columns and widths first; `policy` because it says which kernels ran.
_MARKDOWN: Final = (
    _Column("model_type", "model", -30, _plain("model_type"), is_always=True),
    _Column("model_size", "size", 10, _size, is_always=True),
    _Column("model_n_params", "params", 10, _params, is_always=True),
    _Column("backends", "backend", -10, _plain("backends"), is_always=True),
    _Column("n_threads", "threads", 7, _plain("n_threads"), is_always=True),
    _Column("n_batch", "n_batch", 7, _plain("n_batch")),
    _Column("n_ubatch", "n_ubatch", 8, _plain("n_ubatch")),
    _Column("type_k", "type_k", 6, _plain("type_k")),
    _Column("type_v", "type_v", 6, _plain("type_v")),
    _Column("flash_attn", "fa", 3, _plain("flash_attn")),
    _Column("policy", "policy", -6, _plain("policy"), is_always=True),
    _Column("level", "level", -10, _plain("level"), is_always=True),
    _Column("test", "test", 15, _plain("test"), is_always=True),
    _Column("t/s", "t/s", 20, _speed, is_always=True),
    _Column("roofline_share", "roofline", 8, _share("roofline_share"), is_always=True),
    _Column("rss_peak_bytes", "peak MiB", 8, _mebibytes("rss_peak_bytes"), is_always=True),
    _Column("cpu_share", "CPU", 7, _share("cpu_share"), is_always=True),
    _Column("power_w", "power W", 7, _number("power_w", 2)),
    _Column("llama_bench_ts", "llama-bench t/s", 15, _number("llama_bench_ts", 2)),
    _Column("ratio", "ratio", 6, _number("ratio", 3)),
)
