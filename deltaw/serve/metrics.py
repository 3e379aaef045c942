"""`GET /metrics`: what the server has counted, as Prometheus reads it.

Names are those that other servers of models use behind their own prefix (`vllm:num_requests_running`), so a dashboard
needs another prefix and nothing else; times are in seconds. Nothing is labelled by what a client sends: a label's
values are a few fixed words, so the page's size is fixed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from deltaw.serve.figures import Figures, Histogram

PREFIX = "deltaw:"
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAUGES = {
    "num_requests_running": ("running", "Requests that are being answered."),
    "num_requests_waiting": ("waiting", "Requests in the queue."),
    "adapters_attached": ("adapters_attached", "Adapters in memory."),
    "adapter_bytes": ("adapter_bytes", "Memory that attached adapters take."),
}
COUNTERS = {
    "prompt_tokens_total": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens_total": ("generation_tokens", "Tokens that were generated."),
    "prefix_cache_hits_total": ("prefix_tokens", "Tokens of prompts whose keys and values were there already."),
    "requests_refused_total": ("refused", "Requests that were refused because the queue was full."),
    "engine_restarts_total": ("restarts", "How often the engine was started anew."),
    "adapter_hits_total": ("adapter_hits", "Requests whose adapter was in memory."),
    "adapter_misses_total": ("adapter_misses", "Requests whose adapter had to be read first."),
    "adapter_loads_total": ("adapter_loads", "Adapters that were read."),
    "adapter_failures_total": ("adapter_failures", "Adapters that couldn't be used."),
    "adapter_evictions_total": ("adapter_evictions", "Adapters that made room for others."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "From a request's arrival to its first token."),
    "inter_token_latency_seconds": ("inter_token", "Between two tokens of an answer."),
    "e2e_request_latency_seconds": ("latency", "From a request's arrival to its end, however it ended."),
}


@dataclass
class Counts:
    """What is counted of HTTP itself: requests by status (499: the client left first)."""

    requests: dict[int, int] = field(default_factory=dict)


def page(figures: Figures, counts: Counts) -> str:
    """The whole text."""
    lines: list[str] = []
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, (attribute, help) in table.items():
            lines += [*_head(name, kind, help), f"{PREFIX}{name} {getattr(figures, attribute)}"]
    for name, label, values, help in (
        ("request_success_total", "finished_reason", figures.ended, "Requests by how they ended."),
        ("http_requests_total", "status", counts.requests, "Answers by status."),
    ):
        lines += [*_head(name, "counter", help), *_labelled(name, label, values)]
    for name, (attribute, help) in HISTOGRAMS.items():
        lines += [*_head(name, "histogram", help), *_buckets(name, getattr(figures, attribute))]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {help}", f"# TYPE {PREFIX}{name} {kind}"]


def _labelled(name: str, label: str, values: Mapping[str, int] | Mapping[int, int]) -> Iterator[str]:
    for value, count in sorted(values.items(), key=str):
        yield f'{PREFIX}{name}{{{label}="{value}"}} {count}'


def _buckets(name: str, histogram: Histogram) -> Iterator[str]:
    below = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        below += count
        yield f'{PREFIX}{name}_bucket{{le="{bound}"}} {below}'
    yield f"{PREFIX}{name}_sum {histogram.sum}"
    yield f"{PREFIX}{name}_count {below}"
