"""What an earlier run has measured: the lines beside its record, by what they are a measurement of.

Owns reading them for `--resume`. Refuses to know what a case says beyond that. A line that is cut off is skipped, and
so is one that failed: it is tried again.
"""

from __future__ import annotations

from pathlib import Path

from edge_llm.bench.accuracy.measure import Facts, Key, key_of
from edge_llm.bench.cases import lines_of
from edge_llm.errors import ConfigError

_STAMP = "at"  # when it was finished: a line of this run says so itself


def finished(path: Path) -> dict[Key, Facts]:
    """Raises ConfigError when the file cannot be read or has no such lines, BadCases."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    found = {
        key_of(case): {key: value for key, value in case.items() if key != _STAMP}
        for case in lines_of(data, path.name)
        if {"model_sha256", "task", "item", "setup"} <= case.keys() and "failed" not in case
    }
    if not found:
        raise ConfigError(f"{path} has no finished case of `bench accuracy`: give the .cases.jsonl beside its record")
    return found
