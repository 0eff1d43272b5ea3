"""Every overlay, with every choice its user has, renders and is valid by the newest three minors' schemas, strictly."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor  # type: ignore[import-untyped]
from packaging.version import Version

from tests.manifests.rendering import (
    ADDITIONS,
    INSTALL_FILE,
    OVERLAYS,
    RELEASE_FILE,
    SOURCES,
    Manifest,
    install_text,
    named,
    of_kind,
    overlay,
    release_text,
    varied,
)

# "1.35.0": the three newest, each once.
MINORS: Final = [f"{minor}.0" for minor in sorted({major_minor(one) for one in all_versions()}, key=Version)[-3:]]
# Kubernetes has no schemas for what others define.
FOREIGN: Final = {"ServiceMonitor"}
_checked: Final[set[str]] = set()


def check(items: Sequence[Manifest]) -> None:
    """Against every minor; what overlays share is looked at once."""
    for item in items:
        text = json.dumps(item, sort_keys=True)
        if item["kind"] in FOREIGN or text in _checked:
            continue
        for minor in MINORS:
            try:
                kubernetes_validate.validate(item, minor, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = f"{item['kind']} {item['metadata']['name']}, {'.'.join(map(str, error.path))}"
                raise AssertionError(f"{where}, Kubernetes {minor}: {error.message}") from error
        _checked.add(text)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name: str) -> None:
    check(overlay(name))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_wherever_its_model_comes_from(name: str, source: str) -> None:
    check(varied(name, source))


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_with_everything_that_can_be_added(name: str) -> None:
    items = varied(name, additions=ADDITIONS)
    check(items)
    assert len(of_kind(items, "ServiceMonitor")) == 2
    assert len(of_kind(items, "Ingress")) == 1
    assert named(items, "ConfigMap", "edge-llm-dashboard")["metadata"]["namespace"] == "edge-llm"


def test_three_minors_one_after_the_other_are_looked_at() -> None:
    numbers = [tuple(map(int, minor.split(".")[:2])) for minor in MINORS]
    assert numbers == [(1, numbers[0][1] + step) for step in range(3)]
    assert numbers[-1] >= (1, 37)


def test_a_word_that_kubernetes_does_not_know_is_found() -> None:
    items = copy.deepcopy(overlay("single-node"))
    named(items, "Deployment", "edge-llm-gateway")["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(AssertionError, match="livenesProbe"):
        check(items)


def test_the_version_in_the_manifests_is_that_of_this_checkout() -> None:
    assert RELEASE_FILE.read_text() == release_text(), "run `make manifests`"


def test_install_yaml_is_what_its_overlay_renders_to() -> None:
    assert INSTALL_FILE.read_text() == install_text(), "run `make manifests`"


def test_waivers_of_the_policy_checks_are_few_and_each_has_its_reason() -> None:
    text = (Path(__file__).parent / "checkov.yaml").read_text()
    waived = yaml.safe_load(text)["skip-check"]
    assert len(waived) <= 5
    assert len(re.findall(r"^  - CKV2?_K8S_\d+ # \S.{20,}$", text, re.MULTILINE)) == len(waived)
