"""The description of a cluster, as people write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.config import WorkerConfig
from edge_llm.errors import ConfigError
from edge_llm.plan.description import bytes_of, keys, parse_description, read_description

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
        ("model: m", "cluster.yaml: boards: is missing; the keys are model, gguf"),
        ("{model: m, boards: []}", "boards: there must be at least one"),
        ("{model: m, boards: 3}", "boards: must be a list"),
        ("{model: m, boards: [a]}", "board number 1: must be keys and values; the keys are name, ram"),
        ("{model: m, boards: [{name: a, ram: much}]}", "board a: ram: a size is .*like 8GB"),
        ("{model: m, boards: [{name: a, ram: true}]}", "board a: ram: a size is"),
        ("{model: m, boards: [{name: a, ram: 8}]}", "board a: ram: 8 bytes are no board's memory: write its unit"),
        (
            "{model: m, boards: [{name: a, ram: 8GB, role: both}]}",
            "board a: role: must be 'prefill', 'decode'",
        ),
        ("{model: m, boards: [{name: a, ram: 8GB}, {ram: 8GB}]}", "board number 2: name: is missing"),
        ("{model: m, boards: [{name: A_b, ram: 8GB}]}", "board A_b: name: must be a node's name"),
        ("{model: m, boards: [{name: a..b, ram: 8GB}]}", "board a..b: name: must be a node's name"),
        ("{model: m, boards: [{name: 'a\\nb', ram: 8GB}]}", "name: must be a node's name"),
        ("{model: m, boards: [{name: on, ram: 8GB}]}", "board number 1: name: must be text; .* need quotes"),
        ("{model: m, boards: [{name: a, ram: 8GB, disk: 1}]}", "board a: disk: is not known; the keys are name, ram"),
        (
            "{model: m, boards: [{name: a, ram: 8GB}], slot: 3}",
            r"yaml: slot: is not known \(did you mean slots\?\); the keys are model, gguf",
        ),
        (
            "{modell: m, boards: [{name: a, ram: 8GB}]}",
            r"yaml: modell: is not known \(did you mean model\?\); the keys",
        ),
        ("{Model: m, boards: []}", r"yaml: Model: is not known \(did you mean model\?\); the keys"),
        ("{colour: m}", "yaml: colour: is not known, and model and boards are missing; the keys are model"),
        (
            "{model: m, boards: [{nmae: a, speed: 3}]}",
            r"board number 1: nmae: is not known \(did you mean name\?\), and ram is missing; the keys are name, ram",
        ),
        ("{model: m, boards: [{name: a, ram: 8GB, cpu: Cortex-A72}]}", "board a: cpu: cortex-a72 has no dotprod"),
        ("{model: m, boards: [{name: a, ram: 8GB, cpu: pi4}]}", "a: cpu: cortex-a72 has .* Leave the board out"),
        ("{model: m, boards: [{name: a, ram: 8GB}], slots: 65}", "slots: must be less than or equal to 64"),
        ("{model: m, boards: [{name: a, ram: 8GB}], chunk_tokens: 2048}", "chunk_tokens: must be less .* 1024"),
        ("{model: m, boards: [{name: a, ram: 8GB}, {name: a, ram: 4GB}]}", "a is there twice"),
        ("{model: m, boards: [{name: a, ram: 8GB}], v_type: q8_0}", "v_type: must be 'f16'"),
        ("{model: 'm x', boards: [{name: a, ram: 8GB}]}", "model: must be a name in models.yaml"),
        ("{model: m, boards: [{name: a, ram: 8GB}], image: 'reg/x:'}", "image: must be NAME:TAG"),
        ("{model: m, boards: [{name: a, ram: 8GB}], components: [../x]}", "components.0: must be names of folders"),
        ("{model: m, boards: [{name: a, ram: 8GB}], gguf: x, facts: y}", "yaml: gguf and facts both say"),
        ("{model: m, boards: [{name: a, ram: 8GB}], gguf: '~nobody-of-that-name/x'}", "there is no such user"),
        ("{model: m, model: n, boards: []}", "not YAML: line 1: a key is given twice"),
        ("[", "not YAML: line 1: "),
        ("", "cluster.yaml: must be keys and values; the keys are model"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_description(text, "cluster.yaml")


@pytest.mark.parametrize("word", ["Cortex-A76", "cortex-a76", "CORTEX A76", "a76", "Pi5", "Raspberry Pi 5", "BCM2712"])
def test_one_core_has_one_name_however_it_is_written(word: str) -> None:
    found = parse_description(f"{{model: m, boards: [{{name: a, ram: 8GB, cpu: {word}}}]}}", "x")
    assert found.boards[0].cpu == "cortex-a76"


@pytest.mark.parametrize("word", ["n100", "ryzen 7", "graviton3"])
def test_a_processor_that_is_not_known_is_taken_as_it_is(word: str) -> None:
    found = parse_description(f"{{model: m, boards: [{{name: a, ram: 8GB, arch: amd64, cpu: {word}}}]}}", "x")
    assert found.boards[0].cpu == word.replace(" ", "-")


def test_every_key_says_in_a_line_what_it_means() -> None:
    meanings = dict(keys())
    assert {"model", "boards", "n_ctx", "boards.name", "boards.cpu"} <= meanings.keys()
    assert all(20 < len(f"{key} {meaning}") < 120 and "\n" not in meaning for key, meaning in meanings.items())
    assert meanings["slots"].startswith(f"[{WorkerConfig().slots}] ")
    assert [key for key, meaning in meanings.items() if meaning.startswith("Needed. ")] == [
        "model",
        "boards",
        "boards.name",
        "boards.ram",
    ]


def test_paths_are_relative_to_the_description(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{model: m, gguf: models/m.gguf, boards: [{name: a, ram: 8GB}]}")
    assert read_description(file).gguf == tmp_path / "models" / "m.gguf"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        read_description(tmp_path / "gone.yaml")
