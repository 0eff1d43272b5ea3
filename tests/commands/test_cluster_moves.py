"""By which steps a board gets a worker of another role for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.commands.cluster_moves import commands, moves
from edge_llm.errors import ConfigError

REPLICAS = {"edge-llm-prefill": 1, "edge-llm-decode": 3}


def test_a_worker_that_is_the_last_of_its_workload_goes_by_itself() -> None:
    plan = moves("edge-llm-decode-2", "prefill", "pi-d", REPLICAS)
    assert plan.steps == (
        ("label", "node", "pi-d", "--overwrite", "edge-llm/role=prefill"),
        ("scale", "statefulset", "edge-llm-decode", "--replicas=2"),
        ("scale", "statefulset", "edge-llm-prefill", "--replicas=2"),
    )
    assert plan.stopped == ("edge-llm-decode-2",)
    assert plan.replicas == {"edge-llm-decode": 2, "edge-llm-prefill": 2}


def test_another_one_is_deleted_with_its_volume_and_the_last_one_takes_its_number() -> None:
    plan = moves("edge-llm-decode-0", "prefill", "pi-b", REPLICAS)
    assert plan.steps[3:] == (
        ("delete", "pvc", "data-edge-llm-decode-0", "--wait=false"),
        ("delete", "pod", "edge-llm-decode-0", "--wait=false"),
    )
    assert plan.stopped == ("edge-llm-decode-0", "edge-llm-decode-2"), "the last one stops, too, to move"


def test_a_volume_that_is_on_every_board_is_kept() -> None:
    plan = moves("edge-llm-decode-0", "prefill", "pi-b", REPLICAS, is_bound=False)
    assert plan.steps[3:] == (("delete", "pod", "edge-llm-decode-0", "--wait=false"),)


def test_steps_can_be_pasted_wherever_the_kubeconfig_lies() -> None:
    steps = moves("edge-llm-decode-2", "prefill", "pi-d", REPLICAS).steps
    assert commands(steps, Path("/home/me/my k3s.yaml"), "edge-llm")[0] == (
        "kubectl --kubeconfig '/home/me/my k3s.yaml' -n edge-llm label node pi-d --overwrite edge-llm/role=prefill"
    )


@pytest.mark.parametrize(
    ("pod", "role", "replicas", "complaint"),
    [
        ("pi-a", "prefill", REPLICAS, "no pod of edge-llm's manifests"),
        ("edge-llm-decode-0", "decode", REPLICAS, "already"),
        ("edge-llm-decode-0", "mixed", REPLICAS, "no StatefulSet edge-llm-mixed"),
        ("edge-llm-mixed-0", "decode", {"edge-llm-decode": 1}, "no StatefulSet edge-llm-mixed"),
    ],
)
def test_what_cannot_be_moved_is_refused_before_anything_is_done(
    pod: str, role: str, replicas: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        moves(pod, role, "board", replicas)
