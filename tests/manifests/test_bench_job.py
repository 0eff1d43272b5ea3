"""The template of Jobs that measure, as a cluster gets it: valid, restricted, known to the policies, without a key."""

from __future__ import annotations

from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

import edge_llm
from edge_llm.cluster.kubernetes_jobs import TEMPLATE, job_of
from tests.manifests.reachability import selects
from tests.manifests.rendering import FOLDER, Manifest, named, of_kind, overlay, rendered
from tests.manifests.test_schemas import MINORS


@pytest.fixture(scope="module")
def items() -> list[Manifest]:
    return rendered(FOLDER / "bench")


@pytest.fixture(scope="module")
def job(items: list[Manifest]) -> dict[str, Any]:
    """As `edge-llm bench ... --cluster` makes it."""
    return job_of(named(items, "CronJob", TEMPLATE), ["theorem", "--prompts", "24"])


@pytest.fixture(scope="module")
def spec(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("minor", MINORS)
def test_it_and_the_job_made_of_it_are_valid(items: list[Manifest], job: dict[str, Any], minor: str) -> None:
    for item in (*items, job):
        kubernetes_validate.validate(item, minor, strict=True)


def test_its_pod_is_restricted_bounded_and_told_no_token(spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert "cpu" not in container["resources"]["limits"]


def test_it_runs_the_image_of_this_version_and_nothing_asks_for_it_over_the_network(spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    assert container["image"] == f"localhost/edge-llm:{edge_llm.__version__}"
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_what_runs_says_of_which_version_it_is_and_the_template_too(items: list[Manifest], job: dict[str, Any]) -> None:
    for labelled in (named(items, "CronJob", TEMPLATE), job, job["spec"]["template"]):
        assert labelled["metadata"]["labels"]["app.kubernetes.io/version"] == edge_llm.__version__


def test_the_policies_of_an_overlay_are_about_its_pod(job: dict[str, Any]) -> None:
    labels = job["spec"]["template"]["metadata"]["labels"]
    about = [
        policy["metadata"]["name"]
        for policy in of_kind(overlay("pi5-1p3d"), "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
    ]
    assert sorted(about) == ["edge-llm-bench", "edge-llm-default-deny"]


def test_it_is_neither_a_worker_nor_a_gateway(job: dict[str, Any]) -> None:
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert "edge-llm/role" not in labels
    for service in of_kind(overlay("pi5-1p3d"), "Service"):
        assert not selects({"matchLabels": service["spec"]["selector"]}, labels)


def test_it_asks_the_endpoint_of_the_overlays_with_a_key_that_no_manifest_has(spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    service = named(overlay("pi5-1p3d"), "Service", "edge-llm")
    assert f"--url=http://edge-llm:{service['spec']['ports'][0]['port']}" in container["args"]
    secret = next(volume["secret"] for volume in spec["volumes"] if "secret" in volume)
    mount = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "key")
    assert f"--api-key-file={mount}/{secret['items'][0]['path']}" in container["args"]
    assert not of_kind(rendered(FOLDER / "bench"), "Secret")
    assert secret.get("optional") is not True


def test_its_record_goes_to_a_claim_that_is_kept(items: list[Manifest], spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    (claim,) = of_kind(items, "PersistentVolumeClaim")
    volume = next(one for one in spec["volumes"] if "persistentVolumeClaim" in one)
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mount = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == volume["name"])
    (output,) = (one.partition("=")[2] for one in container["args"] if one.startswith("--output="))
    assert output.startswith(f"{mount}/")


def test_applying_it_runs_nothing(items: list[Manifest]) -> None:
    assert named(items, "CronJob", TEMPLATE)["spec"]["suspend"] is True
