"""Reading a scrape as Prometheus does."""

from __future__ import annotations

import aiohttp
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

Families = dict[str, Metric]


async def scrape(session: aiohttp.ClientSession, url: str) -> Families:
    async with session.get(url) as reply:
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return families_of(await reply.text())


def families_of(text: str) -> Families:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: Families, sample: str, **labels: str) -> float:
    """The one sample of that name with these labels among its own; 0 when nothing was counted."""
    found = [
        s.value
        for family in families.values()
        for s in family.samples
        if s.name == f"edge_llm_{sample}" and labels.items() <= s.labels.items()
    ]
    assert len(found) <= 1, found
    return found[0] if found else 0.0


def names_of(families: Families) -> set[str]:
    """Names that a query may use: also of counters that have counted nothing yet."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    return {name + suffix for name, family in families.items() for suffix in suffixes.get(family.type, ())}
