"""Metrics as Prometheus reads them: how a registry becomes the text of a scrape, buckets, and vLLM's names for ours.

Owns what the metrics of gateways (gateway/metrics.py) and workers (worker/metrics.py) have in common. Refuses to know
what is counted. There is no global registry: each gateway and worker has its own.

Names: ours begin with `edge_llm_`, because `:` is for recording rules; under vLLM's names the same figures serve vLLM's
dashboards and the default mapping of the Gateway API inference extension. No series is labelled with a request: their
number would grow for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from edge_llm.config import MetricsAlias

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
LABELS: Final = ("model_name", "role", "node")
# Seconds. A Pi reads a long prompt for minutes; the defaults of the library end at 10 s.
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Seconds between two tokens: dense where people notice, and up to the pause of a replanned stream.
GAP_SECONDS: Final = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKENS: Final = tuple(float(1 << bit) for bit in range(18))
# What came to pass over what was predicted: 1 is right.
RATIOS: Final = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)

VLLM_NAMES: Final = {
    f"edge_llm_{ours}": f"vllm:{theirs}"
    for ours, theirs in {
        "num_requests_running": "num_requests_running",
        "num_requests_waiting": "num_requests_waiting",
        "kv_cache_usage_ratio": "kv_cache_usage_perc",  # a ratio there, too, whatever its name says
        "prompt_tokens": "prompt_tokens",
        "generation_tokens": "generation_tokens",
        "time_to_first_token_seconds": "time_to_first_token_seconds",
        "inter_token_latency_seconds": "inter_token_latency_seconds",
        "e2e_request_latency_seconds": "e2e_request_latency_seconds",
        "request_queue_time_seconds": "request_queue_time_seconds",
        "request_prefill_time_seconds": "request_prefill_time_seconds",
        "request_decode_time_seconds": "request_decode_time_seconds",
        "prefix_cache_queries": "prefix_cache_queries",
        "prefix_cache_hits": "prefix_cache_hits",
        "request_success": "request_success",
        "request_prompt_tokens": "request_prompt_tokens",
        "request_generation_tokens": "request_generation_tokens",
    }.items()
}


class Exposition(Collector):
    """A registry and how it is shown: without the library's `_created` series, and under other names when asked."""

    def __init__(self, alias: MetricsAlias = "none") -> None:
        self.registry = CollectorRegistry()
        self._names = VLLM_NAMES if alias == "vllm" else {}

    def collect(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            yield _named(family, family.name)
            if family.name in self._names:
                yield _named(family, self._names[family.name])

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self)


def _named(family: Metric, name: str) -> Metric:
    shown = Metric(name, family.documentation, family.type, family.unit if name == family.name else "")
    for sample in family.samples:
        suffix = sample.name.removeprefix(family.name)
        if suffix != "_created":
            shown.samples.append(Sample(name + suffix, sample.labels, sample.value, sample.timestamp))
    return shown
