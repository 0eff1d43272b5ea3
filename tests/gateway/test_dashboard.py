"""The dashboard asks only for what is there: names and labels of its queries against scrapes of a working cluster."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml

from edge_llm.exposition import Exposition
from edge_llm.machine import CoreTime, NetworkBytes
from edge_llm.worker.messages import Board
from edge_llm.worker.metrics import Readings, WorkerMetrics
from edge_llm.worker.readings import Consumed
from tests.gateway.conftest import COMPLETIONS, asking, serving
from tests.loopback import CHUNK, Node, prompt_of, running_cluster
from tests.scrapes import Families, families_of, names_of, scrape

pytestmark = pytest.mark.anyio
FOLDER: Final = Path(__file__).parents[2] / "k3s_manifests/dashboards"
DASHBOARD: Final[dict[str, Any]] = json.loads((FOLDER / "edge-llm.json").read_text())
PANELS: Final[list[dict[str, Any]]] = DASHBOARD["panels"]
GRAPHS: Final = [panel for panel in PANELS if panel["type"] != "row"]
NAME: Final = re.compile(r"\b(?:edge_llm|process)_\w+")
SELECTOR: Final = re.compile(r"((?:edge_llm|process)_\w+)\{([^}]*)\}")
MATCHER: Final = re.compile(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"")
GROUPED: Final = re.compile(r"by \(([^)]*)\)")
BOARD_SERIES: Final = ("edge_llm_node_", "edge_llm_worker_group_", "edge_llm_worker_anonymous_")
CHOSEN: Final = re.compile(r"label_values\((\w+), (\w+)\)")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def scrapes() -> AsyncIterator[list[Families]]:
    """Of a gateway and two workers that split a prompt, and of a worker whose board has all sensors."""
    async with running_cluster() as cluster, serving(cluster) as service:
        nodes = [await service.start("prefill", "p1"), await service.start("decode", "d1")]
        await service.post(COMPLETIONS, asking(prompt_of(3 * CHUNK), "split"))
        await service.post(COMPLETIONS, {"model": "nobody", "prompt": "a"})
        urls = [service.url, *(f"http://{node.peer.address}" for node in nodes)]
        yield [await scrape(cluster.session, f"{url}/metrics") for url in urls] + [_of_a_pi(nodes[1])]


def _of_a_pi(node: Node) -> Families:
    board = Board(cpu_share=0.1, ram_share=0.2, temperature_c=50.0, frequency_hz=2.4e9, throttled={"throttled": False})
    status = msgspec.structs.replace(node.worker.status(), board=board)
    used = Consumed(
        cores={0: CoreTime(1.0, 2.0)},
        network=NetworkBytes(1, 2, 3),
        energy_j={"package-0": 1.0},
        power_w={"VDD_CORE_A": 2.0},
        ram_used_bytes=1,
        group_bytes=1,
        group_peak_bytes=1,
        anonymous_bytes=1,
    )
    exposition = Exposition()
    readings = Readings(lambda: ("simulated", "decode", "d1"), lambda: status, lambda: 0, lambda: used)
    WorkerMetrics(exposition.registry, readings)
    return families_of(exposition.text().decode())


def queries() -> Iterator[tuple[str, str]]:
    for panel in GRAPHS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def labels_of(scrapes: list[Families]) -> dict[str, set[str]]:
    """Labels of every sample name that has samples."""
    found: dict[str, set[str]] = {}
    for families in scrapes:
        for family in families.values():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_name_that_a_panel_asks_for_is_in_a_scrape(scrapes: list[Families]) -> None:
    known = set().union(*map(names_of, scrapes))
    asked = {name for _, expr in queries() for name in NAME.findall(expr)}
    assert len(asked) > 40
    assert asked - known == set()


async def test_every_series_of_a_board_is_on_a_panel(scrapes: list[Families]) -> None:
    known = {name for name in set().union(*map(names_of, scrapes)) if name.startswith(BOARD_SERIES)}
    asked = {name for _, expr in queries() for name in NAME.findall(expr)}
    assert {name for name in known if not name.endswith("_created")} - asked == set()


async def test_every_label_that_a_panel_asks_for_is_on_its_series(scrapes: list[Families]) -> None:
    known = labels_of(scrapes)
    for title, expr in queries():
        selected = SELECTOR.findall(expr)
        assert selected or "edge_llm_rejected_total" in expr, title
        for name, matchers in selected:
            if name in known:
                assert set(MATCHER.findall(matchers)) <= known[name], (title, name)
        for name in set(NAME.findall(expr)) & known.keys():
            for group in GROUPED.findall(expr):
                assert {label.strip() for label in group.split(",")} <= known[name], (title, name, group)


async def test_the_variables_offer_what_is_there(scrapes: list[Families]) -> None:
    known = labels_of(scrapes)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("model", "node"):
        found = CHOSEN.fullmatch(variables[name]["query"]["query"])
        assert found is not None
        assert found[2] in known[found[1]]
    used = {word for _, expr in queries() for word in re.findall(r"\$(\w+)", expr)}
    assert used == {"model", "node", "__rate_interval"}


def test_it_is_a_dashboard_that_grafana_imports() -> None:
    assert DASHBOARD["uid"] == "edge-llm"
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert "id" not in DASHBOARD, "an id belongs to one Grafana"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Requests", "Phases", "Nodes", "Boards", "Decisions", "Reliability"]
    for panel in GRAPHS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        assert panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_kustomize_gives_it_to_grafanas_sidecar() -> None:
    component = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (generator,) = component["configMapGenerator"]
    assert generator["files"] == ["edge-llm.json"]
    assert generator["options"]["labels"]["grafana_dashboard"] == "1"
