"""Who can exchange KV with whom: old and new builds side by side, other files, other cache types, other machines."""

from __future__ import annotations

import json
from typing import Any

from edge_llm.cluster.view import Node
from edge_llm.commands.cluster_exchange import exchange, sentences, serves
from edge_llm.gateway.overview import overview
from tests.nodes import node_of

OLD = {"llama_cpp_python": "0.3.35", "system_info": "x" * 300}
NEW = {"llama_cpp_python": "0.3.36", "system_info": "x" * 300}


def shown(*nodes: Node) -> list[dict[str, Any]]:
    """As GET /cluster shows them."""
    found: list[dict[str, Any]] = json.loads(overview("g", {}, nodes, {}, 0.0))["nodes"]
    return found


def test_workers_of_one_class_exchange_kv_token_for_token() -> None:
    nodes = shown(node_of("p1", "prefill"), node_of("d1", "decode"))
    assert sentences(nodes) == ["p1, d1 exchange KV of m, token for token (class bbbbbbbb)"]
    assert exchange(nodes) == [
        {
            "model": "m",
            "workers": ["p1", "d1"],
            "classes": [{"exactness_class": "b" * 64, "workers": ["p1", "d1"]}],
            "alone": "",
        }
    ]


def test_a_level_that_nobody_measured_promises_nothing() -> None:
    nodes = shown(node_of("p1", "prefill", level="unverified"), node_of("d1", "decode", level="unverified"))
    (line,) = sentences(nodes)
    assert line == (
        "p1, d1 exchange KV of m, with level unverified: nothing is promised until it is measured (class bbbbbbbb)"
    )
    other = shown(
        *(node_of(name, "decode", level="unverified") for name in ("d1", "d2")),
        node_of("p1", "prefill", exactness_class="c" * 64),
    )
    assert not any("token for token" in line for line in sentences(other))


def test_where_levels_differ_what_is_promised_is_that_of_who_decodes() -> None:
    nodes = shown(
        node_of("p1", "prefill"), node_of("d1", "decode"), node_of("d2", "decode", level="none", level_reason="rows")
    )
    (line,) = sentences(nodes)
    assert "where p1 or d1 decodes token for token; where d2 decodes with level none: nothing is promised" in line


def test_an_upgrade_that_changes_the_class_says_which_build_is_where_and_what_is_promised() -> None:
    nodes = shown(
        node_of("p1", "prefill", build=OLD, version="0.1.0"),
        node_of("d1", "decode", build=OLD, version="0.1.0"),
        node_of("d2", "decode", build=NEW, version="0.2.0", exactness_class="c" * 64),
    )
    lines = sentences(nodes)
    assert lines[0] == "p1, d1, d2 exchange KV of m, in 2 exactness classes:"
    assert "  p1, d1: among themselves token for token, class bbbbbbbb" in lines
    assert "  d2: class cccccccc" in lines
    (between,) = [line for line in lines if "only where that is faster" in line]
    assert "level none" in between
    assert between.endswith("build: llama_cpp_python 0.3.35, 0.3.36")
    assert lines[-1] == "versions of edge-llm: 0.1.0 on p1, d1; 0.2.0 on d2"


def test_a_long_part_of_a_build_is_named_not_printed() -> None:
    nodes = shown(
        node_of("p1", "prefill", build=OLD),
        node_of("d1", "decode", build=OLD | {"system_info": "y" * 300}, exactness_class="c" * 64),
    )
    assert any(line.endswith("build: system_info") for line in sentences(nodes))


def test_equal_builds_of_two_classes_differ_in_policy_or_machine() -> None:
    policy = shown(node_of("p1", "prefill"), node_of("d1", "decode", exactness_class="c" * 64, policy="fast"))
    assert any("policy exact, fast" in line for line in sentences(policy))
    machine = shown(node_of("p1", "prefill"), node_of("d1", "decode", exactness_class="c" * 64))
    assert any("the CPU, or the results of its kernels" in line for line in sentences(machine))


def test_kv_that_does_not_mean_the_same_goes_nowhere_and_the_reason_is_given() -> None:
    other_file = shown(node_of("p1", "prefill"), node_of("d1", "decode", compatibility="c" * 64, model_sha256="1" * 64))
    assert "p1 and d1 do not: their files of this model differ" in sentences(other_file)
    other_type = shown(node_of("p1", "prefill"), node_of("d1", "decode", compatibility="c" * 64, kv_bytes_per_token=32))
    assert any("64 and 32 bytes a token (k_type, v_type)" in line for line in sentences(other_type))
    other_layout = shown(node_of("p1", "prefill"), node_of("d1", "decode", compatibility="c" * 64))
    assert any("laid out differently" in line for line in sentences(other_layout))


def test_workers_of_different_models_are_not_compared() -> None:
    nodes = shown(node_of("a", "mixed"), node_of("b", "mixed", model="n", compatibility="c" * 64))
    assert not any(" do not: " in line for line in sentences(nodes))


def test_a_worker_alone_says_why() -> None:
    whole = shown(node_of("m1", "mixed", splits=False, split_reason="mamba keeps recurrent state"))
    assert sentences(whole) == ["m1: no KV goes anywhere: mamba keeps recurrent state"]
    single = shown(node_of("m1", "mixed"))
    assert "nobody else has this model" in sentences(single)[0]
    writers = shown(node_of("d1", "decode"), node_of("d2", "decode"))
    assert "none of them reads prompts" in sentences(writers)[0]
    readers = shown(node_of("p1", "prefill"), node_of("p2", "prefill"))
    assert "none of them decodes" in sentences(readers)[0]


def test_a_gateway_of_an_older_version_leaves_it_open() -> None:
    nodes = shown(node_of("p1", "prefill"), node_of("d1", "decode"))
    for node in nodes:
        del node["compatibility"]
    assert all("older version" in line for line in sentences(nodes))


def test_a_cluster_serves_while_somebody_who_decodes_is_ready() -> None:
    assert serves(shown(node_of("d1", "decode")))
    assert not serves(shown(node_of("p1", "prefill")))
    assert not serves(shown(node_of("d1", "decode", is_ready=False, is_draining=True)))
    assert not serves([])
