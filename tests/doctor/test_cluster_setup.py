"""What is forgotten on the way from blank boards to the first answer, as `doctor --cluster` finds it."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.doctor.cluster import check_cluster
from edge_llm.doctor.finding import Finding
from edge_llm.errors import ConfigError

IMAGE = "localhost/edge-llm:0.1.0"


def node(name: str, role: str | None, *, is_ready: bool = True, images: tuple[str, ...] = (IMAGE,)) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"edge-llm/role": role} if role else {}},
        "spec": {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if is_ready else "Unknown"}],
            "images": [{"names": [image]} for image in images],
        },
    }


def workload(name: str, replicas: int, role: str | None = None) -> dict[str, Any]:
    pod: dict[str, Any] = {"containers": [{"name": "worker", "image": IMAGE}]}
    if role:
        pod["nodeSelector"] = {"edge-llm/role": role}
    return {"metadata": {"name": name}, "spec": {"replicas": replicas, "template": {"spec": pod}}}


def pod(name: str, phase: str = "Running", *, is_ready: bool = True, **status: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(is_ready)}, *status.pop("conditions", ())]
    return {"metadata": {"name": name}, "status": {"phase": phase, "conditions": conditions, **status}}


class Cluster:
    """What kubectl would give. `secret` None: there is none."""

    def __init__(self) -> None:
        self.nodes = [node("pi-1", "prefill"), node("pi-2", "decode")]
        self.sets = [workload("edge-llm-prefill", 1, "prefill"), workload("edge-llm-decode", 1, "decode")]
        self.pods = [pod("edge-llm-gateway-x"), pod("edge-llm-prefill-0"), pod("edge-llm-decode-0")]
        self.secret: dict[str, Any] | None = {"data": {"cluster.key": "c2VjcmV0", "api-keys.yaml": "c2VjcmV0"}}
        self.asked: list[str] = []
        self.refuses = ""

    def get(self, *what: str) -> Any:
        self.asked.append(what[0])
        if what[0] == self.refuses:
            raise ConfigError(f"`kubectl get {what[0]}` failed: Forbidden")
        deployments = [workload("edge-llm-gateway", 1)] if self.sets else []
        lists = {"nodes": self.nodes, "statefulsets": self.sets, "deployments": deployments, "pods": self.pods}
        return self.secret if what[0] == "secret" else {"items": lists[what[0]]}

    def found(self) -> dict[str, Finding]:
        return {one.check: one for one in check_cluster(self.get, "edge-llm")}

    def problem(self) -> Finding:
        """The only one."""
        bad = [one for one in self.found().values() if one.status != "ok"]
        assert len(bad) == 1, bad
        return bad[0]


def test_a_cluster_as_the_guide_leaves_it_is_well() -> None:
    found = Cluster().found()
    assert {one.status for one in found.values()} == {"ok"}
    assert found["cluster.workloads"].found == "edge-llm-gateway 1, edge-llm-prefill 1, edge-llm-decode 1"


def test_no_cluster_is_one_finding_with_what_to_do() -> None:
    cluster = Cluster()
    cluster.refuses = "nodes"
    assert list(cluster.found()) == ["cluster.reached"]
    assert "KUBECONFIG" in cluster.problem().do


def test_who_may_not_see_the_namespace_still_hears_of_the_nodes() -> None:
    cluster = Cluster()
    cluster.refuses = "statefulsets"
    assert cluster.found()["cluster.nodes"].status == "ok"
    assert (cluster.problem().check, cluster.problem().status) == ("cluster.workloads", "unknown")


def test_a_board_that_is_off_and_one_that_was_left_cordoned_are_named() -> None:
    cluster = Cluster()
    cluster.nodes[1]["spec"]["unschedulable"] = True
    assert cluster.problem().commands == ("kubectl uncordon pi-2",)
    cluster.nodes[0]["status"]["conditions"][0]["status"] = "Unknown"
    assert (cluster.problem().status, cluster.problem().found) == ("fail", "not Ready: pi-1")


@pytest.mark.parametrize(
    ("roles", "check", "words"),
    [
        (("prefil", "decode"), "cluster.labels", "pi-1 has edge-llm/role=prefil"),
        ((None, None), "cluster.labels", "no node has a role"),
        (("prefill", None), "cluster.boards", "1 decode workers for 0 boards of that label"),
    ],
)
def test_a_role_label_that_is_missing_or_misspelt_is_said(
    roles: tuple[str | None, ...], check: str, words: str
) -> None:
    cluster = Cluster()
    cluster.nodes = [node(f"pi-{number}", role) for number, role in enumerate(roles, 1)]
    assert cluster.found()[check].status in ("warn", "fail")
    assert words in cluster.found()[check].found


def test_workers_that_may_run_anywhere_need_no_label() -> None:
    cluster = Cluster()
    cluster.nodes, cluster.sets = [node("pi-1", None)], [workload("edge-llm-mixed", 1)]
    assert {one.status for one in cluster.found().values()} == {"ok"}


def test_boards_without_a_worker_are_a_warning_with_the_command_that_uses_them() -> None:
    cluster = Cluster()
    cluster.nodes.append(node("pi-3", "decode"))
    problem = cluster.problem()
    assert (problem.check, problem.status) == ("cluster.boards", "warn")
    assert problem.commands == ("kubectl -n edge-llm scale statefulset/edge-llm-decode --replicas=2",)


@pytest.mark.parametrize(
    ("secret", "words"),
    [(None, "no Secret edge-llm-keys"), ({"data": {"cluster.key": "c2VjcmV0"}}, "has no api-keys.yaml")],
)
def test_a_missing_secret_or_half_of_one_fails_and_what_it_holds_is_shown_nowhere(
    secret: dict[str, Any] | None, words: str
) -> None:
    cluster = Cluster()
    cluster.secret = secret
    assert (cluster.problem().check, cluster.problem().status) == ("cluster.keys", "fail")
    assert words in cluster.problem().found
    assert "c2VjcmV0" not in str(cluster.found())


def test_nothing_applied_yet_is_said_once() -> None:
    cluster = Cluster()
    cluster.sets, cluster.pods = [], []
    assert cluster.problem().check == "cluster.workloads"


def test_a_board_without_the_image_is_named_and_one_that_names_too_few_images_is_not_known() -> None:
    cluster = Cluster()
    cluster.nodes[1]["status"]["images"] = [{"names": ["localhost/edge-llm:0.0.9"]}]
    problem = cluster.problem()
    assert (problem.check, problem.status) == ("cluster.images", "fail")
    assert problem.found == f"pi-2: no {IMAGE}"
    cluster.nodes[1]["status"]["images"] = [{"names": [f"image-{number}"]} for number in range(50)]
    assert (cluster.problem().check, cluster.problem().status) == ("cluster.images", "unknown")


def test_images_of_a_registry_need_not_be_there() -> None:
    cluster = Cluster()
    for one in cluster.sets:
        one["spec"]["template"]["spec"]["containers"][0]["image"] = "ghcr.example/edge-llm:0.1.0"
    cluster.nodes = [node("pi-1", "prefill"), node("pi-2", "decode")]
    assert cluster.found()["cluster.images"].status == "ok"


def state(name: str, **what: Any) -> dict[str, Any]:
    return {"name": name, "ready": False, "state": what}


@pytest.mark.parametrize(
    ("status", "severity", "words", "command"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes: memory"}]},
            "fail",
            "not placed: 0/2 nodes: memory",
            "describe pod",
        ),
        (
            {"containerStatuses": [state("worker", waiting={"reason": "ErrImagePull", "message": "no such host"})]},
            "fail",
            "ErrImagePull no such host",
            "describe pod",
        ),
        (
            {"initContainerStatuses": [state("model", waiting={"reason": "CrashLoopBackOff", "message": "back-off"})]},
            "fail",
            "CrashLoopBackOff",
            "logs edge-llm-decode-0 -c model",
        ),
        (
            {"initContainerStatuses": [state("verify", running={"startedAt": "now"})]},
            "warn",
            "verify runs, not ready yet",
            "logs edge-llm-decode-0 -c verify",
        ),
        (
            {"containerStatuses": [state("worker", terminated={"exitCode": 137, "reason": "OOMKilled"})]},
            "fail",
            "worker ended with 137: OOMKilled",
            "logs edge-llm-decode-0 -c worker",
        ),
    ],
)
def test_a_pod_that_is_not_ready_is_asked_why(status: dict[str, Any], severity: str, words: str, command: str) -> None:
    cluster = Cluster()
    cluster.pods[2] = pod("edge-llm-decode-0", "Pending", is_ready=False, **status)
    problem = cluster.problem()
    assert (problem.check, problem.status) == ("cluster.pods", severity)
    assert words in problem.found
    assert command in problem.commands[0]


def test_a_pod_that_was_evicted_and_replaced_is_a_warning_that_says_how_to_remove_it() -> None:
    cluster = Cluster()
    cluster.pods.append(pod("edge-llm-gateway-old", "Failed", is_ready=False))
    problem = cluster.problem()
    assert (problem.check, problem.status) == ("cluster.pods", "warn")
    assert "edge-llm-gateway-old" in problem.found


def test_a_job_that_has_ended_is_no_problem() -> None:
    cluster = Cluster()
    cluster.pods.append(pod("edge-llm-bench-x", "Succeeded", is_ready=False))
    assert cluster.found()["cluster.pods"].status == "ok"
