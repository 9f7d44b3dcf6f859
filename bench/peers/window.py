"""One window: a server under one load for some seconds, and what came of it.

The load generator is a process of its own. CPU seconds of server and generator are read beside it, so the figures say
when the generator was itself the limit.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import load as load_generator
from bench.load import Record
from bench.machine import quantile
from bench.peers.pictures import Ask, Painter
from bench.peers.servers import OUT, PNG, Running, usage
from engines import images
from engines.backends.base import tolerance

SLO_FACTOR = 3.0
_LIMIT_SHARE = 0.8  # of a core: a generator that takes more may be late itself
_SAMPLE = 6  # pictures of a window that are compared with the reference
_KEEP_EVERY = 10  # pictures are kept of so many requests, to be such a sample
_LATE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a window: a start that is not counted, then what is."""

    warm_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    server_cpu_s: float
    load_cpu_s: float
    rss_mb: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A load as it was answered: request k of `asked` is the one that `Record.body` names."""

    asked: Sequence[Ask]
    records: Sequence[Record]
    samples: Sequence[Sample]
    begin_s: float
    end_s: float


def take(running: Running, asked: Sequence[Ask], load: Mapping[str, Any], shape: Shape, folder: Path) -> Taken:
    """`load` is `mode` with `concurrency` or `rate`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"seconds": shape.warm_s + shape.seconds, "timeout_s": _LATE_S, "keep_every": _KEEP_EVERY, **load}
    processes, samples = running.processes(), []
    with running.generate(asked, folder, **given) as process:
        try:
            generator = psutil.Process(process.pid)
            deadline_s = time.monotonic() + shape.warm_s + shape.seconds + _LATE_S + 30
            while process.poll() is None:
                if time.monotonic() > deadline_s:
                    raise SystemExit("the load generator did not end in time")
                here, theirs = usage(processes), usage([generator])
                samples.append(Sample(time.time(), here.cpu_s, theirs.cpu_s, here.rss_mb))
                time.sleep(0.2)
        finally:
            process.kill()
    records = load_generator.read(folder / OUT)
    if not records:
        raise SystemExit("the load generator sent nothing")
    begin_s = min(one.sent_s for one in records) + shape.warm_s
    return Taken(asked, records, samples, begin_s, begin_s + shape.seconds)


def figures(taken: Taken, slo_ms: Mapping[str, float], steps: Mapping[str, int]) -> dict[str, Any]:
    """Throughput counts answers that came inside the window; latencies, SLO and goodput are of requests sent inside it.

    `slo_ms` and `steps` by kind. A request that failed has missed its SLO.
    """
    seconds = taken.end_s - taken.begin_s
    sent = [one for one in taken.records if taken.begin_s <= one.sent_s < taken.end_s]
    good = [one for one in sent if one.status == 200]
    came = [
        one for one in taken.records if one.status == 200 and taken.begin_s <= one.sent_s + one.seconds < taken.end_s
    ]
    kind = {id(one): taken.asked[one.body].kind for one in sent}
    in_time = [one for one in good if 1000 * one.seconds <= slo_ms[kind[id(one)]]]
    by_steps: dict[int, list[float]] = {}
    for one in good:
        by_steps.setdefault(steps[kind[id(one)]], []).append(one.seconds)
    spent = _spent(taken)
    return {
        "images_per_s": round(len(came) / seconds, 2),
        **_quantiles([one.seconds for one in good]),
        "p95_1step_ms": round(1000 * quantile(by_steps.get(1, []), 0.95), 2),
        "by_steps": {str(k): {"requests": len(v), **_quantiles(v)} for k, v in sorted(by_steps.items())},
        "slo_attainment": round(len(in_time) / max(1, len(sent)), 4),
        "goodput_per_s": round(len(in_time) / seconds, 2),
        "requests": len(sent),
        "failed": len(sent) - len(good),
        "errors": dict(Counter(one.error[:120] for one in sent if one.status != 200).most_common(3)),
        **spent,
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
    return {name: round(1000 * quantile(seconds, share), 2) for name, share in shares.items()}


def _spent(taken: Taken) -> dict[str, Any]:
    """A rate, times the window: over the samples inside it, or over all where it was too short to hold two."""
    inside = [one for one in taken.samples if taken.begin_s <= one.at_s <= taken.end_s]
    inside = inside if len(inside) > 1 else list(taken.samples)
    first, last, seconds = inside[0], inside[-1], taken.end_s - taken.begin_s
    between_s = last.at_s - first.at_s
    share = (last.load_cpu_s - first.load_cpu_s) / between_s
    return {
        "cpu_s": round((last.server_cpu_s - first.server_cpu_s) / between_s * seconds, 3),
        "rss_mb": round(max(one.rss_mb for one in inside), 1),
        "load_cpu_share": round(share, 3),
        "load_is_limit": share > _LIMIT_SHARE,
    }


def wrong(taken: Taken, painter: Painter, sizes: Mapping[str, tuple[int, int]]) -> int:
    """Answers that are no PNG of their kind's size, and of a sample those that are not their seed's picture."""
    good = [one for one in taken.records if one.status == 200]
    faulty = {id(one) for one in good if _size(one.head) != sizes[taken.asked[one.body].kind]}
    allowed = tolerance(painter.config.backend, painter.config.precision)
    for one in _spread([one for one in good if one.picture], _SAMPLE):
        [reference] = painter.paint([taken.asked[one.body]])
        pixels = torch.from_numpy(images.decode(one.picture).copy()).permute(2, 0, 1)
        if allowed.fault(pixels, reference) is not None:
            faulty.add(id(one))
    return len(faulty)


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """`count` of them, evenly from first to last."""
    if len(records) <= count:
        return list(records)
    return [records[index * (len(records) - 1) // (count - 1)] for index in range(count)]


def _size(head: bytes) -> tuple[int, int] | None:
    """Width and height that a PNG's first chunk names."""
    if not head.startswith(PNG) or len(head) < 24:
        return None
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
