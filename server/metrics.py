"""What a gateway and a worker count, under the names that the dashboard reads.

The registry is injected: a test, or two processes in one, have their own. Labels hold no request
ids and no prompts; the series of a version that is gone are removed. Who counts what, so that a sum
over processes counts nothing twice: the gateway requests, waiting, refusals, deadlines and quality;
the worker everything about queue time, stages, steps, batches and swaps. Warm-up is never traffic:
nothing here may be called for warm-up or golden rows.
"""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# 1 ms to 30 s in steps of about 1.5: a quantile read from them is within a quarter of the truth.
REQUEST_BUCKETS_S = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0),
)
# A stage or step of a small model takes less than a millisecond.
STAGE_BUCKETS_S = (0.0001, 0.0002, 0.0005, *REQUEST_BUCKETS_S)
# A swap takes milliseconds where weights are set, minutes where an engine is built.
SWAP_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """Every series of design §13 but those of the distiller."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fewstep_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fewstep_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"fewstep_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests_total", "Requests answered", "model", "tier", "status")
        self.request_seconds = histogram(
            "request_seconds", "From HTTP request to answer", REQUEST_BUCKETS_S, "model", "tier", "version"
        )
        self.queue_seconds = histogram(
            "queue_seconds", "From queue entry to first engine call", REQUEST_BUCKETS_S, "model"
        )
        self.stage_seconds = histogram(
            "stage_seconds", "Engine time of one batch in one stage", STAGE_BUCKETS_S, "model", "stage"
        )
        self.step_seconds = histogram(
            "step_seconds", "One network evaluation of one batch", STAGE_BUCKETS_S, "model", "version", "backend"
        )
        self.batch_rows = histogram("batch_rows", "Network rows in one evaluation", ROW_BUCKETS, "model")
        self.call_seconds = counter("call_seconds_total", "Engine time of live calls", "stage")
        self.call_expected_seconds = counter(
            "call_expected_seconds_total", "What the cost model said before each of those calls", "stage"
        )
        self.steps = counter("steps_total", "Row steps done", "model", "version")
        self.judged = counter("judged_total", "Pictures of refine=redo: kept, or redone", "model", "verdict")
        self.waiting = gauge("waiting", "Requests queued and not claimed", "model", "class")
        self.running = gauge("running", "Rows inside this worker", "model")
        self.cancelled = counter("cancelled_total", "Requests canceled", "where")
        self.shed = counter("shed_total", "Requests refused before they were queued", "reason")
        self.deadline_missed = counter("deadline_missed_total", "Requests that ran out of time", "model")
        self.tier_downgraded = counter("tier_downgraded_total", "Requests served below the default tier", "from", "to")
        self.degraded = gauge("degraded", "Rungs below the default tier that auto serves at", "model", "class")
        self.swap_seconds = histogram("swap_seconds", "One phase of a swap", SWAP_BUCKETS_S, "model", "phase")
        self.swap_stall_seconds = histogram(
            "swap_stall_seconds", "Longest time in a swap with a live row waiting and no step", STAGE_BUCKETS_S, "model"
        )
        self.swaps = counter("swaps_total", "Swaps ended", "model", "result")
        self.model_info = gauge("model_info", "1 for each version that serves", "model", "version", "backend")
        self.embedding_cache = counter("embedding_cache_total", "Prompt embeddings asked for", "result")
        self.resident_bytes = gauge("resident_bytes", "Memory of the weights that this worker holds")
        self.resident_limit_bytes = gauge("resident_limit_bytes", "What it may hold")
        self.evictions = counter("evictions_total", "Versions unloaded to make room", "model")
        self.demand_load_seconds = histogram(
            "demand_load_seconds",
            "From the first row that waited for a version until it was loaded",
            SWAP_BUCKETS_S,
            "model",
        )
        self.engine_cache_bytes = gauge("engine_cache_bytes", "Compiled engines on this worker's disk")
        self.engine_cache_limit_bytes = gauge("engine_cache_limit_bytes", "What they may take")
        self.redis_memory_bytes = gauge("redis_memory_bytes", "Memory that Redis uses")
        self.redis_memory_limit_bytes = gauge("redis_memory_limit_bytes", "What it may use; else its machine's memory")
        self.redis_durable = gauge("redis_durable", "1 while Redis appends to its file and the last writes succeeded")
        self.student_quality = gauge("student_quality", "From the version's report", "model", "version", "metric")

    def forget_version(self, model: str, version: str) -> None:
        """Removes the series of a version that no longer serves."""
        for family in (self.request_seconds, self.step_seconds, self.steps, self.model_info):
            _forget(family, model=model, version=version)

    def forget_quality(self, model: str, version: str) -> None:
        """Removes the figures of a version that is no longer offered, though requests that have it may still end."""
        _forget(self.student_quality, model=model, version=version)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The series and their content type: what an Accept header asks for. Exemplars are in OpenMetrics only."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def make() -> Metrics:
    """The metrics of one process, with its memory, CPU and garbage collector beside them."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return Metrics(registry)


def _forget(family: MetricWrapperBase, **labels: str) -> None:
    family.remove_by_labels(labels)


def quality(report: dict[str, Any]) -> dict[str, float]:
    """The figures of a report that make a series: every number by its name, per step count where there are several."""
    figures: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            figures[name] = float(value)
        elif isinstance(value, dict) and all(str(key).isdigit() for key in value):
            for steps, entry in value.items():
                inner = quality(entry) if isinstance(entry, dict) else {}
                figures |= {f"{metric}@{steps}": number for metric, number in inner.items()}
    return figures
