"""The rendered overlay as a cluster gets it: by kubectl, against the shipped manifests, valid and with the sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

import edge_llm
from edge_llm.catalogue.memory import ModelSizes
from edge_llm.commands.kubectl import rendered
from edge_llm.errors import ConfigError
from edge_llm.plan.boards import MIB
from edge_llm.plan.changes import Earlier, earlier_of
from edge_llm.plan.description import Description, parse_description
from edge_llm.plan.fit import Fitted, fitted
from edge_llm.plan.manifests import manifests_folder, read_earlier, read_shipped, write_overlay
from edge_llm.plan.overlay import Shipped, component_notes, files, kustomization, labels, settings, volume_notes

# About Llama 3.2 1B in Q4_0.
SIZES = ModelSizes(740 * MIB, 530 * MIB, 32 << 10, 128_256, 32, 2048, 8192)
FILE_BYTES = 750 * MIB
MODELS = "models: {}\n"
FOUR = """
model: llama-3.2-1b-instruct-q4_0
boards:
  - {name: pi-a, ram: 8GB, k3s: server, cpu: cortex-a76}
  - {name: pi-b, ram: 8GB, cpu: cortex-a76}
  - {name: pi-c, ram: 8GB, cpu: cortex-a76}
  - {name: pi-d, ram: 8GB, cpu: cortex-a76}
slots: 2
n_ctx: 2048
"""
ONE = "{model: llama-3.2-1b-instruct-q4_0, boards: [{name: pi, ram: 8GB}], slots: 2, n_ctx: 2048}"


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    return read_shipped(manifests_folder())


def fit(described: Description, shipped: Shipped) -> Fitted:
    return fitted(
        described.boards, described.settings, lambda *_: SIZES, splits=True, gateway_bytes=shipped.gateway_bytes
    )


def applied(text: str, shipped: Shipped, target: Path, file_bytes: int = FILE_BYTES) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send for a description."""
    described = parse_description(text, "test")
    overlay = files(described, fit(described, shipped), shipped, file_bytes, MODELS)
    write_overlay(target, overlay, manifests_folder())
    return [item for item in yaml.safe_load_all(rendered(target)) if item]


def labels_of(text: str, shipped: Shipped) -> list[str]:
    described = parse_description(text, "test")
    return labels(described, fit(described, shipped))


def overlay_of(text: str, shipped: Shipped, file_bytes: int) -> str:
    described = parse_description(text, "test")
    return kustomization(described, fit(described, shipped), shipped, file_bytes)


def notes_of(text: str, shipped: Shipped, file_bytes: int, earlier: str = "") -> list[str]:
    described = parse_description(text, "test")
    planned = fit(described, shipped)
    return list(volume_notes(described, planned, shipped, file_bytes, earlier_of(earlier)))


def one(items: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [
        item
        for item in items
        if item["kind"] == kind and re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", item["metadata"]["name"])
    ]
    return found


def test_four_boards_get_replicas_settings_and_limits(shipped: Shipped, tmp_path: Path) -> None:
    items = applied(FOUR, shipped, tmp_path / "cluster")
    described = parse_description(FOUR, "test")
    groups = {group.role: group for group in fit(described, shipped).groups}
    assert (len(groups["prefill"].boards), len(groups["decode"].boards)) == (1, 3)
    for role, group in groups.items():
        workload = one(items, "StatefulSet", f"edge-llm-{role}")
        pod = workload["spec"]["template"]["spec"]
        assert group.verify_limit_bytes is not None
        assert workload["spec"]["replicas"] == len(group.boards)
        assert pod["nodeSelector"] == {"edge-llm/role": role}
        verify = next(container for container in pod["initContainers"] if container["name"] == "verify")
        for container, limit in ((pod["containers"][0], group.limit_bytes), (verify, group.verify_limit_bytes)):
            assert container["resources"]["limits"]["memory"] == f"{limit // MIB}Mi"
            assert container["resources"]["requests"]["memory"] == f"{limit // MIB}Mi"
            assert container["resources"]["requests"]["cpu"], "what the manifests say of CPU stays"
    told = one(items, "ConfigMap", "edge-llm-worker")["data"]
    assert told.items() >= settings(described).items()
    assert told["EDGE_LLM_WORKER_PORT"] == "9001", "what is not described stays as shipped"
    assert (told["EDGE_LLM_WORKER_THREADS"], told["EDGE_LLM_WORKER_THREADS_BATCH"]) == ("2", "4"), "boards are Pi 5"


def test_what_is_applied_is_valid_in_the_newest_kubernetes(shipped: Shipped, tmp_path: Path) -> None:
    for text in (FOUR, ONE):
        for item in applied(text, shipped, tmp_path / str(len(text))):
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_verify_is_left_out_where_it_does_not_fit_and_that_is_said(shipped: Shipped, tmp_path: Path) -> None:
    small = FOUR.replace("ram: 8GB, cpu", "ram: 3.4GB, role: decode, cpu").replace("n_ctx: 2048", "n_ctx: 512")
    items = applied(small, shipped, tmp_path / "cluster")
    pod = one(items, "StatefulSet", "edge-llm-decode")["spec"]["template"]["spec"]
    verify = next(container for container in pod["initContainers"] if container["name"] == "verify")
    assert verify["env"] == [{"name": "EDGE_LLM_VERIFY_FIRST", "value": "no"}]
    notes = fit(parse_description(small, "x"), shipped).notes
    assert any("`edge-llm verify` (8 sequences of 2048 tokens)" in note for note in notes)


def test_one_board_needs_no_label_and_no_second_one(shipped: Shipped, tmp_path: Path) -> None:
    items = applied(ONE, shipped, tmp_path / "cluster")
    workload = one(items, "StatefulSet", "edge-llm-mixed")
    assert "nodeSelector" not in workload["spec"]["template"]["spec"]
    assert labels_of(ONE, shipped) == []
    assert [item["metadata"]["name"] for item in items if item["kind"] == "StatefulSet"] == ["edge-llm-mixed"]


def test_the_labels_name_every_board_once(shipped: Shipped) -> None:
    assert labels_of(FOUR, shipped) == [
        "kubectl label node pi-a edge-llm/role=prefill",
        "kubectl label node pi-b pi-c pi-d edge-llm/role=decode",
    ]


def test_a_board_that_needs_more_than_a_label_gets_none(shipped: Shipped) -> None:
    described = parse_description(FOUR, "test")
    assert labels(described, fit(described, shipped), moving=["pi-a", "pi-c"]) == [
        "kubectl label node pi-b pi-d edge-llm/role=decode"
    ]


@pytest.mark.parametrize(
    ("text", "roles"),
    [(FOUR, {"pi-a": "prefill", "pi-b": "decode", "pi-c": "decode", "pi-d": "decode"}), (ONE, {"pi": "mixed"})],
)
def test_a_rendered_folder_says_which_board_has_which_role(
    text: str, roles: dict[str, str], shipped: Shipped, tmp_path: Path
) -> None:
    assert read_earlier(tmp_path) == Earlier()
    applied(text, shipped, tmp_path)
    assert read_earlier(tmp_path) == Earlier(roles)  # type: ignore[arg-type]


def test_a_large_model_gets_a_volume_that_holds_it_twice(shipped: Shipped, tmp_path: Path) -> None:
    items = applied(FOUR, shipped, tmp_path / "cluster", file_bytes=8 << 30)
    claims = one(items, "StatefulSet", "edge-llm-decode")["spec"]["volumeClaimTemplates"]
    assert claims[0]["spec"]["resources"]["requests"]["storage"] == "17Gi"


def test_volumes_of_another_size_come_with_what_an_installed_cluster_needs_for_them(shipped: Shipped) -> None:
    (note,) = notes_of(FOUR, shipped, 8 << 30)
    assert "17Gi instead of the 10Gi that are shipped" in note
    names = "edge-llm-prefill edge-llm-decode"
    assert f"`kubectl -n edge-llm delete sts {names} --cascade=orphan --ignore-not-found`" in note
    assert notes_of(FOUR, shipped, FILE_BYTES) == []
    assert notes_of(f"{FOUR}components: [model-on-board]\n", shipped, 8 << 30) == []


def test_volumes_that_get_the_shipped_size_back_need_the_same(shipped: Shipped) -> None:
    small, large = overlay_of(FOUR, shipped, FILE_BYTES), overlay_of(FOUR, shipped, 8 << 30)
    (note,) = notes_of(FOUR, shipped, FILE_BYTES, earlier=large)
    assert "of the size that is shipped" in note
    assert "--cascade=orphan" in note
    assert notes_of(FOUR, shipped, FILE_BYTES, earlier=small) == []


def test_an_image_of_ones_own_replaces_the_shipped_name_everywhere(shipped: Shipped, tmp_path: Path) -> None:
    text = FOUR + "image: registry.lan:5000/me/edge-llm:test\n"
    items = applied(text, shipped, tmp_path / "cluster")
    images = {
        container["image"]
        for item in items
        if item["kind"] in ("StatefulSet", "Deployment")
        for container in (
            *item["spec"]["template"]["spec"]["containers"],
            *item["spec"]["template"]["spec"].get("initContainers", ()),
        )
    }
    assert images == {"registry.lan:5000/me/edge-llm:test"}


def test_components_can_be_chosen_and_what_is_not_shipped_is_refused(shipped: Shipped, tmp_path: Path) -> None:
    items = applied(FOUR + "components: [model-download]\n", shipped, tmp_path / "cluster")
    assert f":{edge_llm.__version__}" in json.dumps(items), "the version is always named"
    policies = [item["metadata"]["name"] for item in items if item["kind"] == "NetworkPolicy"]
    assert policies == ["edge-llm-model-download"]
    described = parse_description(FOUR + "components: [telepathy]\n", "x")
    with pytest.raises(ConfigError, match=r"telepathy: not shipped; there are .*network-policy"):
        kustomization(described, fit(described, shipped), shipped, FILE_BYTES)


def test_volumes_that_are_for_labelled_boards_only_make_the_one_board_need_its_label(shipped: Shipped) -> None:
    on_board = ONE.replace("}], slots", "}], components: [model-on-board], slots")
    assert labels_of(on_board, shipped) == ["kubectl label node pi edge-llm/role=mixed"]


@pytest.mark.parametrize(("boards", "volumes"), [(2, 6), (6, 6), (7, 7), (12, 12)])
def test_every_worker_has_a_folder_on_its_board_however_many_there_are(
    boards: int, volumes: int, shipped: Shipped, tmp_path: Path
) -> None:
    listed = "".join(f"  - {{name: pi-{number}, ram: 8GB}}\n" for number in range(boards))
    text = f"model: m\nboards:\n{listed}slots: 2\nn_ctx: 2048\ncomponents: [network-policy, model-on-board]\n"
    items = applied(text, shipped, tmp_path)
    found = [item for item in items if item["kind"] == "PersistentVolume"]
    assert {item["metadata"]["name"] for item in found} == {f"edge-llm-on-board-{n + 1}" for n in range(volumes)}
    assert len({json.dumps([item["spec"], item["metadata"]["labels"]], sort_keys=True) for item in found}) == 1
    for item in found:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_volumes_that_are_not_needed_any_more_are_gone(shipped: Shipped, tmp_path: Path) -> None:
    listed = ", ".join(f"{{name: pi-{number}, ram: 8GB}}" for number in range(7))
    applied(f"{{model: m, boards: [{listed}], components: [model-on-board], slots: 2}}", shipped, tmp_path)
    applied(ONE, shipped, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("volumes.yaml")) == ["volumes.yaml"], "the shipped one"


def test_a_list_of_ones_own_is_that_of_this_machine(shipped: Shipped, tmp_path: Path) -> None:
    items = applied(FOUR + "components: [model-download, own-models-yaml]\n", shipped, tmp_path)
    assert one(items, "ConfigMap", "edge-llm-models")["data"]["models.yaml"] == MODELS


def test_what_is_lost_by_naming_components_is_said(shipped: Shipped) -> None:
    def notes(components: str) -> list[str]:
        described = parse_description(f"{FOUR}components: {components}\n", "x")
        return list(component_notes(described, fit(described, shipped), shipped))

    (note,) = notes("[model-on-board]")
    assert "without network-policy (default deny: " in note
    assert "pi5" in note
    assert "high-availability" in note
    assert "model-download" not in note, "the model comes from the boards"
    assert notes("[network-policy, model-on-board, pi5, high-availability]") == []
    assert "model-download" in notes("[ingress]")[0]
    described = parse_description(FOUR, "x")
    assert list(component_notes(described, fit(described, shipped), shipped)) == []


@pytest.mark.parametrize(
    ("components", "complaint"),
    [
        ("[model-on-board, model-download]", "model-download and model-on-board: a model comes from one place"),
        ("[network-policy]", "cannot fetch their model: add one of model-download, model-image-volume, model-on-board"),
    ],
)
def test_components_that_leave_workers_without_their_model_are_refused(
    components: str, complaint: str, shipped: Shipped
) -> None:
    described = parse_description(f"{FOUR}components: {components}\n", "x")
    with pytest.raises(ConfigError, match=complaint):
        kustomization(described, fit(described, shipped), shipped, FILE_BYTES)


@pytest.mark.parametrize(
    ("components", "storage"), [("[]", "17Gi"), ("[model-download]", "17Gi"), ("[model-on-board]", "10Gi")]
)
def test_a_volume_holds_the_model_where_it_is_downloaded(
    components: str, storage: str, shipped: Shipped, tmp_path: Path
) -> None:
    items = applied(f"{FOUR}components: {components}\n", shipped, tmp_path / "cluster", file_bytes=8 << 30)
    (claim,) = one(items, "StatefulSet", "edge-llm-decode")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == storage


def test_two_gateways_are_for_where_an_update_has_room_for_a_third(shipped: Shipped, tmp_path: Path) -> None:
    roomy = one(applied(FOUR, shipped, tmp_path / "roomy"), "Deployment", "edge-llm-gateway")
    assert roomy["spec"]["replicas"] == 2
    tight = FOUR.replace("ram: 8GB, cpu", "ram: 3.4GB, role: decode, cpu").replace("n_ctx: 2048", "n_ctx: 512")
    tight = tight.replace("ram: 8GB, k3s: server", "ram: 4.2GB, k3s: agent, role: prefill")
    assert fit(parse_description(tight, "x"), shipped).gateways < 3
    assert one(applied(tight, shipped, tmp_path / "tight"), "Deployment", "edge-llm-gateway")["spec"]["replicas"] == 1


def test_boards_that_are_called_pi_5_but_lack_its_cores_keep_settings_for_any_board(
    shipped: Shipped, tmp_path: Path
) -> None:
    items = applied(FOUR.replace("ram: 8GB", "ram: 8GB, cores: 2"), shipped, tmp_path / "cluster")
    worker = one(items, "StatefulSet", "edge-llm-decode")["spec"]["template"]["spec"]["containers"][0]
    assert worker["resources"]["requests"]["cpu"] == "1"


def test_rendering_again_replaces_what_was_rendered_and_nothing_else(shipped: Shipped, tmp_path: Path) -> None:
    target = tmp_path / "cluster"
    applied(FOUR, shipped, target)
    stale = target / "edge-llm" / "base" / "stale.yaml"
    stale.write_text("")
    applied(ONE, shipped, target)
    assert not stale.exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "kustomization.yaml").write_text("resources: []\n")
    with pytest.raises(ConfigError, match="was not rendered by this command"):
        applied(ONE, shipped, foreign)
    assert (foreign / "kustomization.yaml").read_text() == "resources: []\n"
    (tmp_path / "other" / "edge-llm").mkdir(parents=True)
    with pytest.raises(ConfigError, match="in the way"):
        applied(ONE, shipped, tmp_path / "other")


def test_the_folder_needs_nothing_outside_of_it(shipped: Shipped, tmp_path: Path) -> None:
    target = tmp_path / "cluster"
    applied(FOUR, shipped, target)
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    target.rename(moved)
    assert rendered(moved)


def test_the_manifests_are_found_in_an_installed_package(tmp_path: Path) -> None:
    """As a wheel lays it out: k3s_manifests inside the package, no pyproject.toml above it."""
    package = Path(edge_llm.__file__).parent
    (tmp_path / "edge_llm").mkdir()
    for item in package.iterdir():
        if item.name != "__pycache__":
            (tmp_path / "edge_llm" / item.name).symlink_to(item)
    (tmp_path / "edge_llm" / "plan").unlink()
    (tmp_path / "edge_llm" / "plan").mkdir()
    for item in (package / "plan").glob("*.py"):
        (tmp_path / "edge_llm" / "plan" / item.name).write_text(item.read_text())
    (tmp_path / "edge_llm" / "k3s_manifests").symlink_to(manifests_folder())
    said = subprocess.run(
        [sys.executable, "-c", "from edge_llm.plan.manifests import manifests_folder; print(manifests_folder())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert said.stdout.strip() == str(tmp_path / "edge_llm" / "k3s_manifests")
