"""The description of a cluster, as people write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.config import WorkerConfig
from edge_llm.errors import ConfigError
from edge_llm.plan.description import bytes_of, parse_description, read_description

WHOLE = """
model: m
boards:
  - {name: pi-a, ram: 8GB, k3s: server, cpu: cortex-a76}
  - {name: pi-b, ram: 7.8GiB, role: decode, arch: amd64, cores: 8, reserve: 1GiB}
slots: 3
k_type: q8_0
prefix_cache: 64MiB
"""


def test_what_is_not_said_is_what_a_worker_does_by_itself() -> None:
    found = parse_description("{model: m, boards: [{name: a, ram: 8GB}]}", "x")
    worker = WorkerConfig()
    assert (found.settings.slots, found.settings.n_ctx) == (worker.slots, worker.n_ctx)
    assert (found.settings.spare_slots, found.settings.prefix_cache_bytes) == (
        worker.spare_slots,
        worker.prefix_cache_bytes,
    )
    assert (found.boards[0].role, found.boards[0].arch, found.components, found.policy) == (
        None,
        "arm64",
        None,
        "exact",
    )


def test_everything_that_is_said_arrives() -> None:
    found = parse_description(WHOLE, "x")
    first, second = found.boards
    assert (first.ram_bytes, first.is_server, first.cpu, first.role) == (8_000_000_000, True, "cortex-a76", None)
    assert (second.role, second.arch, second.cores, second.reserve_bytes) == ("decode", "amd64", 8, 1 << 30)
    assert (found.settings.slots, found.settings.k_type, found.settings.prefix_cache_bytes) == (3, "q8_0", 64 << 20)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("8GiB", 8 << 30),
        ("512Mi", 512 << 20),
        (1024, 1024),
        ("1.5 GiB", 3 << 29),
    ],
)
def test_sizes_are_read_as_they_are_sold_and_as_kubernetes_writes_them(text: object, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: m", "boards"),
        ("{model: m, boards: []}", "boards"),
        ("{model: m, boards: [{name: a, ram: much}]}", "boards.0.ram: .*like 8GB"),
        ("{model: m, boards: [{name: a, ram: true}]}", "boards.0.ram"),
        ("{model: m, boards: [{name: a, ram: 8GB, role: both}]}", "boards.0.role"),
        ("{model: m, boards: [{name: A_b, ram: 8GB}]}", "boards.0.name"),
        ("{model: m, boards: [{name: a, ram: 8GB, disk: 1}]}", "boards.0.disk.*the keys are name, ram"),
        ("{model: m, boards: [{name: a, ram: 8GB}], slot: 3}", "slot: .*the keys are model, gguf"),
        ("{model: m, boards: [{name: a, ram: 8GB}, {name: a, ram: 4GB}]}", "a is there twice"),
        ("{model: m, boards: [{name: a, ram: 8GB}], v_type: q8_0}", "v_type"),
        ("{model: 'm x', boards: [{name: a, ram: 8GB}]}", "model"),
        ("{model: m, model: n, boards: []}", "not YAML: a key is given twice"),
        ("[", "not YAML"),
        ("", "the file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_description(text, "cluster.yaml")


def test_paths_are_relative_to_the_description(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{model: m, gguf: models/m.gguf, boards: [{name: a, ram: 8GB}]}")
    assert read_description(file).gguf == tmp_path / "models" / "m.gguf"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        read_description(tmp_path / "gone.yaml")
