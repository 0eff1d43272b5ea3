"""What every pod of ours must be: unprivileged, bounded, probed, given the time to stop, and settings that are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

import edge_llm
from edge_llm.catalogue.gguf import read_card
from edge_llm.config import DEFAULT_MODEL, CatalogueConfig, GatewayConfig, WorkerConfig, load_settings
from edge_llm.plan.boards import Board, Settings
from edge_llm.plan.fit import fitted
from edge_llm.plan.sizes import from_card
from tests.manifests.reachability import selects
from tests.manifests.rendering import (
    FOLDER,
    OVERLAYS,
    SOURCES,
    Manifest,
    containers_of,
    named,
    of_kind,
    overlay,
    varied,
    workloads,
)

MIB: Final = 1 << 20
# What a process takes to close when it has drained (edge_llm/serving.py waits 5 s for connections), doubled.
CLOSING_S: Final = 10
# Pod Security Standards, `restricted`, Kubernetes 1.37.
VOLUMES: Final = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Fields of the downward API that our pods ask for, as a pod would see them.
SEEN: Final = {
    "metadata.name": "edge-llm-decode-0",
    "metadata.namespace": "edge-llm",
    "metadata.labels['edge-llm/role']": "decode",
}
# Where comments say the sum of a worker.
SUMS_SAID: Final = {
    "prefill": "workers/prefill/kustomization.yaml",
    "decode": "workers/any/worker.yaml",
    "mixed": "workers/any/worker.yaml",
}
BYTES: Final = {"Mi": MIB, "Gi": 1 << 30}


@pytest.fixture(params=[(name, source) for name in OVERLAYS for source in SOURCES], ids=", ".join, scope="module")
def items(request: pytest.FixtureRequest) -> list[Manifest]:
    """Every overlay, its model from everywhere."""
    return varied(*request.param)


def pod_of(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def environment_of(container: Manifest, items: list[Manifest]) -> dict[str, str]:
    """What its process finds, the downward API's fields filled in."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= named(items, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", ()):
        found[variable["name"]] = variable.get("value") or SEEN[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    return found


def settings_of(
    workload: Manifest, container: Manifest, items: list[Manifest], configuration: Path
) -> GatewayConfig | WorkerConfig:
    """As the process would read them; raises what it would say."""
    environ = environment_of(container, items) | {"XDG_CONFIG_HOME": str(configuration)}
    load_settings(CatalogueConfig, {}, None, environ)
    if workload["kind"] == "Deployment":
        return load_settings(GatewayConfig, {}, None, environ)
    return load_settings(WorkerConfig, {}, None, environ)


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * BYTES[unit]


def test_a_pod_keeps_to_the_restricted_standard(items: list[Manifest]) -> None:
    for workload in workloads(items):
        pod = pod_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & pod.keys()
        assert all(len(VOLUMES & volume.keys()) == 1 for volume in pod["volumes"])
        for container in containers_of(workload):
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert rights["readOnlyRootFilesystem"] is True
            assert not {"privileged", "procMount", "runAsUser"} & rights.keys()
            assert not any("hostPort" in port for port in container.get("ports", ()))


def test_the_namespace_enforces_it() -> None:
    for name in OVERLAYS:
        labels = named(overlay(name), "Namespace", "edge-llm")["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_memory_is_bounded_and_promised_once_and_cpu_is_not_throttled(items: list[Manifest]) -> None:
    for workload in workloads(items):
        for container in containers_of(workload):
            wanted, most = container["resources"]["requests"], container["resources"]["limits"]
            assert wanted["memory"] == most["memory"]
            assert "cpu" in wanted
            assert "cpu" not in most
        bounded = [volume["emptyDir"] for volume in pod_of(workload)["volumes"] if "emptyDir" in volume]
        assert all("sizeLimit" in volume for volume in bounded)


def test_only_images_of_this_version_are_used_and_none_is_asked_for_over_the_network(items: list[Manifest]) -> None:
    image = f"localhost/edge-llm:{edge_llm.__version__}"
    for workload in workloads(items):
        for container in containers_of(workload):
            assert (container["image"], container["imagePullPolicy"]) == (image, "IfNotPresent")
        for volume in pod_of(workload)["volumes"]:
            assert volume.get("image", {}).get("pullPolicy", "IfNotPresent") == "IfNotPresent"
        assert workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/version"] == edge_llm.__version__


def test_every_setting_is_one_that_the_program_knows(items: list[Manifest], tmp_path: Path) -> None:
    for workload in workloads(items):
        for container in containers_of(workload):
            settings_of(workload, container, items, tmp_path)
            environ = environment_of(container, items)
            for word in [*container.get("command", ()), *container.get("args", ())]:
                # used where it is set (${NAME:+...}): it need not be, but must be one that could
                may_be_set = re.findall(r"\$\{EDGE_LLM_WORKER_(\w+):\+", word)
                assert {name.lower() for name in may_be_set} <= WorkerConfig.model_fields.keys()
                always = re.sub(r"\$\{\w+:\+[^}]*\}", "", word)
                assert set(re.findall(r"\$\(?\"?(EDGE_LLM_\w+)", always)) <= environ.keys()


def test_the_keys_are_read_where_they_are_mounted(items: list[Manifest], tmp_path: Path) -> None:
    for workload in workloads(items):
        (container,) = pod_of(workload)["containers"]
        settings = settings_of(workload, container, items, tmp_path)
        files = {settings.key_file, getattr(settings, "api_keys_file", None)} - {None}
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "keys"]
        (volume,) = [volume["secret"] for volume in pod_of(workload)["volumes"] if volume["name"] == "keys"]
        assert files == {Path(mount["mountPath"]) / item["path"] for item in volume["items"]}


def test_a_pod_is_given_the_time_that_it_was_told_it_has(items: list[Manifest], tmp_path: Path) -> None:
    for workload in workloads(items):
        (container,) = pod_of(workload)["containers"]
        before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain_s = settings_of(workload, container, items, tmp_path).drain_s
        assert pod_of(workload)["terminationGracePeriodSeconds"] >= before_s + drain_s + CLOSING_S


def test_probes_ask_what_each_is_for(items: list[Manifest]) -> None:
    for workload in workloads(items):
        (container,) = pod_of(workload)["containers"]
        (port,) = container["ports"]
        paths = {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
        for probe, path in paths.items():
            assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
        start, alive = container["startupProbe"], container["livenessProbe"]
        # a large model comes from an SD card; and a board that computes on all cores answers late, but answers
        if workload["kind"] == "StatefulSet":
            assert start["periodSeconds"] * start["failureThreshold"] >= 600
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 60


def test_updates_take_one_after_the_other(items: list[Manifest]) -> None:
    for workload in workloads(items):
        spec = workload["spec"]
        assert spec["minReadySeconds"] > 0
        if workload["kind"] == "Deployment":
            assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        else:
            assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}


def test_what_kubernetes_never_lets_be_changed_bears_no_version(items: list[Manifest]) -> None:
    """An update would be refused, and every user had to delete the workload first."""
    for workload in workloads(items):
        fixed = [workload["spec"]["selector"], *workload["spec"].get("volumeClaimTemplates", ())]
        assert edge_llm.__version__ not in str(fixed)
        assert "app.kubernetes.io/version" not in str(fixed)


def test_no_key_is_in_any_manifest_and_no_pod_starts_without_it(items: list[Manifest]) -> None:
    assert not of_kind(items, "Secret")
    for workload in workloads(items):
        secrets = [volume["secret"] for volume in pod_of(workload)["volumes"] if "secret" in volume]
        (keys,) = secrets
        assert keys["secretName"] == "edge-llm-keys"
        assert "optional" not in keys
        # serving.py and gateway/keys.py refuse files that everybody may read
        assert not keys["defaultMode"] & 0o007
        assert pod_of(workload)["securityContext"]["fsGroup"] == pod_of(workload)["securityContext"]["runAsGroup"]
        files = {item["path"] for item in keys["items"]}
        assert files == ({"cluster.key", "api-keys.yaml"} if workload["kind"] == "Deployment" else {"cluster.key"})


def test_only_the_gateway_may_ask_the_api_server_and_only_where_workers_are(items: list[Manifest]) -> None:
    assert not of_kind(items, "ClusterRole", "ClusterRoleBinding")
    (role,) = of_kind(items, "Role")
    (rule,) = role["rules"]
    assert rule == {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }
    (binding,) = of_kind(items, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["edge-llm-gateway"]
    for workload in workloads(items):
        is_gateway = workload["metadata"]["name"] == "edge-llm-gateway"
        assert pod_of(workload)["automountServiceAccountToken"] is is_gateway
        assert pod_of(workload)["serviceAccountName"] == f"edge-llm-{'gateway' if is_gateway else 'worker'}"
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(items, "ServiceAccount"))


def test_the_gateway_finds_workers_by_labels_and_port(items: list[Manifest]) -> None:
    workers = of_kind(items, "StatefulSet")
    for worker in workers:
        role = worker["metadata"]["labels"]["edge-llm/role"]
        service = named(items, "Service", worker["metadata"]["name"])
        assert worker["metadata"]["name"] == f"edge-llm-{role}"
        assert worker["spec"]["serviceName"] == service["metadata"]["name"]
        assert service["spec"]["clusterIP"] == "None"
        assert "sessionAffinity" not in service["spec"]
        # with it, EndpointSlices call every pod ready
        assert "publishNotReadyAddresses" not in service["spec"]
        assert service["spec"]["ports"] == [{"name": "worker", "port": 9001, "targetPort": "worker"}]
        labels = service["metadata"]["labels"]
        assert (labels["app.kubernetes.io/part-of"], labels["edge-llm/role"]) == ("edge-llm", role)
        others = [one["spec"]["template"]["metadata"]["labels"] for one in workloads(items) if one is not worker]
        assert selects({"matchLabels": service["spec"]["selector"]}, worker["spec"]["template"]["metadata"]["labels"])
        assert not any(selects({"matchLabels": service["spec"]["selector"]}, labels) for labels in others)
        ports = [port for container in pod_of(worker)["containers"] for port in container["ports"]]
        assert ports == [{"name": "worker", "containerPort": 9001}]


def test_the_endpoint_is_the_gateway_on_fixed_ports(items: list[Manifest]) -> None:
    service = named(items, "Service", "edge-llm")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http", "nodePort": 30080}]
    chosen = [
        workload["metadata"]["name"]
        for workload in workloads(items)
        if selects({"matchLabels": service["spec"]["selector"]}, workload["spec"]["template"]["metadata"]["labels"])
    ]
    assert chosen == ["edge-llm-gateway"]


def test_a_board_has_one_worker_of_whatever_role(items: list[Manifest]) -> None:
    labels = [worker["spec"]["template"]["metadata"]["labels"] for worker in of_kind(items, "StatefulSet")]
    for worker in of_kind(items, "StatefulSet"):
        (rule,) = pod_of(worker)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert all(selects(rule["labelSelector"], one) for one in labels)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_worker_runs_where_the_label_says_and_a_single_machine_needs_none(name: str) -> None:
    for worker in of_kind(overlay(name), "StatefulSet"):
        role = worker["metadata"]["labels"]["edge-llm/role"]
        expected = None if name == "single-node" else {"edge-llm/role": role}
        assert pod_of(worker).get("nodeSelector") == expected


def test_every_volume_that_is_mounted_is_there_and_every_replica_has_its_own(items: list[Manifest]) -> None:
    for workload in workloads(items):
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {volume["name"] for volume in pod_of(workload)["volumes"]}
        mounted = {mount["name"] for container in containers_of(workload) for mount in container["volumeMounts"]}
        assert mounted == claims | volumes
        assert not any("persistentVolumeClaim" in volume for volume in pod_of(workload)["volumes"])
        assert claims == ({"data"} if workload["kind"] == "StatefulSet" else set())


def test_the_gateway_is_evicted_after_workers_and_workers_after_others(items: list[Manifest]) -> None:
    values = {item["metadata"]["name"]: item["value"] for item in of_kind(items, "PriorityClass")}
    used = {workload["kind"]: values[pod_of(workload)["priorityClassName"]] for workload in workloads(items)}
    assert used["Deployment"] > used["StatefulSet"] > 0


def test_a_drained_board_takes_one_of_each_with_it(items: list[Manifest]) -> None:
    for budget in of_kind(items, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in budget["spec"]
    for workload in workloads(items):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        held = [one for one in of_kind(items, "PodDisruptionBudget") if selects(one["spec"]["selector"], labels)]
        if workload["spec"]["replicas"] > 1:
            assert len(held) == 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_is_what_cluster_render_computes_for_raspberry_pi_5_of_8_gb(
    name: str, model_path: Path, tmp_path: Path
) -> None:
    found = overlay(name)
    workers = {worker["metadata"]["labels"]["edge-llm/role"]: worker for worker in of_kind(found, "StatefulSet")}
    configs = [settings_of(one, pod_of(one)["containers"][0], found, tmp_path) for one in workers.values()]
    config = configs[0]
    assert isinstance(config, WorkerConfig)
    assert config.model == DEFAULT_MODEL
    boards = [
        Board(f"pi-{role}-{number}", 8 * 10**9, role=role)
        for role, worker in workers.items()
        for number in range(worker["spec"]["replicas"])
    ]
    settings = Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)})
    gateway = pod_of(named(found, "Deployment", "edge-llm-gateway"))["containers"][0]
    fit = fitted(
        boards,
        settings,
        from_card(read_card(model_path), config.policy).sizes,
        splits=True,
        gateway_bytes=bytes_of(gateway["resources"]["requests"]["memory"]),
    )
    assert [group.role for group in fit.groups] == sorted(workers, key=("prefill", "decode", "mixed").index)
    for group in fit.groups:
        containers = containers_of(workers[group.role])
        limits = {one["name"]: bytes_of(one["resources"]["limits"]["memory"]) for one in containers}
        assert (limits["worker"], limits["verify"]) == (group.limit_bytes, group.verify_limit_bytes)
        said = (FOLDER / SUMS_SAID[group.role]).read_text()
        assert f"{group.sum.total_bytes / MIB:,.0f} MiB" in said, "what the comment says is what is computed"


def test_prometheus_looks_for_services_and_ports_that_are_there() -> None:
    items = varied("pi5-1p3d", additions=("components/service-monitor",))
    found: dict[str, list[str]] = {}
    for monitor in of_kind(items, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        found[monitor["metadata"]["name"]] = [
            service["metadata"]["name"]
            for service in of_kind(items, "Service")
            if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
            and endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
        ]
    assert found == {"edge-llm-workers": ["edge-llm-decode", "edge-llm-prefill"], "edge-llm-gateway": ["edge-llm"]}


def test_an_own_list_of_models_is_mounted_where_the_setting_says() -> None:
    items = varied("single-node", additions=("components/own-models-yaml",))
    (worker,) = of_kind(items, "StatefulSet")
    made = named(items, "ConfigMap", "edge-llm-models")
    (volume,) = [volume for volume in pod_of(worker)["volumes"] if volume["name"] == "catalogue"]
    assert volume["configMap"]["name"] == made["metadata"]["name"]
    for container in containers_of(worker):
        place = Path(environment_of(container, items)["EDGE_LLM_CATALOGUE_MODELS_FILE"])
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "catalogue"]
        assert place.parent == Path(mount["mountPath"])
        assert place.name in made["data"]


def test_a_board_folder_is_the_same_on_every_board_and_enough_for_all_workers() -> None:
    items = varied("pi5-2p2d", "model-on-board")
    wanted: Mapping[str, Any] = {"path": "/var/lib/edge-llm"}
    volumes = of_kind(items, "PersistentVolume")
    assert all(volume["spec"]["local"] == wanted for volume in volumes)
    assert len(volumes) >= sum(worker["spec"]["replicas"] for worker in of_kind(items, "StatefulSet"))
    for worker in of_kind(items, "StatefulSet"):
        (claim,) = worker["spec"]["volumeClaimTemplates"]
        assert claim["spec"]["storageClassName"] == volumes[0]["spec"]["storageClassName"]
        # a folder that is everybody's is bound to no board: what is scaled away may come back anywhere
        assert worker["spec"]["persistentVolumeClaimRetentionPolicy"]["whenScaled"] == "Retain"
