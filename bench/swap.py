"""Hot swaps under load against equal windows without one: `python -m bench.swap` writes bench/swap.json.

Students with different weights go round a ring of at least three, so that a swap never goes to one that is still
resident (`keep_previous_s` is 0). The load is open loop at 60 % of the capacity measured just before. A swap window
runs from `staged` until no request pins the old version; a control window of equal length follows it. Stall is the
longest time in a window with a live row waiting and no live engine call completed; golden and warm-up steps are not
live. Every picture is compared with those of all versions, made in this process by the same backend.
"""

import argparse
import asyncio
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from bench.load import Record
from bench.machine import described, quantile, spread
from bench.system import CACHE, MODEL, PROMPTS, SEEDS, System, system
from distill_jobs.tasks import shapes
from engines.backends.base import Profile, Tolerance, choose, device_of, tolerance
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import shown
from engines.registry.base import Outcome, TierTarget
from engines.student import sample
from server.brokers.base import Broker, new_identity, open_broker

out = Console(stderr=True)
_OUT = Path(__file__).parent / "swap.json"
_BATCHES = (1, 2, 4, 8)
_SHARE = 0.6
_SWAP_WITHIN_S = 130.0


@dataclass(frozen=True, slots=True)
class Window:
    """Unix seconds."""

    begin_s: float
    end_s: float

    def has(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


@dataclass(frozen=True, slots=True)
class Swap:
    outcome: Outcome
    window: Window
    control: Window
    publish_to_live_s: float
    phases: Mapping[str, float]


class Step(msgspec.Struct, frozen=True):
    """A line of the worker's step log."""

    at_s: float
    gap_s: float = 0.0
    seconds: float = 0.0
    stage: str = ""
    rows: int = 0
    swap: str = ""
    phase: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=shapes.TASK.pipeline, help="a diffusers directory")
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="at least so many in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--versions", type=int, default=4, help="in the ring, at least 3")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--capacity-seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    report = described("bench.swap")
    runs = []
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        for run in range(given.runs):
            runs.append(asyncio.run(one_run(Path(folder) / str(run), given)))
            out.print({k: v for k, v in runs[-1].items() if k != "phases"})
    report |= summed(runs)
    given.out.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n")
    out.print_json(json.dumps(report))


def summed(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts are sums of all runs, everything else their median."""
    counts = ("swaps", "requests", "failed", "wrong")
    rest = ("stall_ms_max", "control_ms_max", "step_ms_p95", "p95_ms_in_swap", "p95_ms_control", "publish_to_live_s")
    made: dict[str, Any] = {name: sum(run[name] for run in runs) for name in counts}
    made |= {name: spread([run[name] for run in runs])["median"] for name in rest}
    names = runs[0]["phases"]
    made["phases"] = {name: round(statistics.median(run["phases"][name] for run in runs), 4) for name in names}
    made["spread"] = {name: spread([run[name] for run in runs]) for name in rest}
    made["stall_within_control_plus_step"] = made["stall_ms_max"] <= made["control_ms_max"] + made["step_ms_p95"]
    made["p95_ratio"] = round(made["p95_ms_in_swap"] / max(1e-9, made["p95_ms_control"]), 3)
    return made


async def one_run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    found = choose(given.backend)
    log = folder / "steps.jsonl"
    env = {
        "WORKER_BACKEND": found.backend,
        "WORKER_PRECISION": found.precision,
        "WORKER_BATCH_SIZES": json.dumps(_BATCHES),
        "WORKER_KEEP_PREVIOUS_S": "0",
        "WORKER_STEPS_LOG": str(log),
    }
    started = system(folder, given.pipeline, versions=given.versions, steps=given.steps, threads=given.threads, env=env)
    with started as (up, ring):
        references = pictures(up, ring, given)
        up.loaded(mode="closed", concurrency=32, seconds=3.0)
        full = up.loaded(mode="closed", concurrency=32, seconds=given.capacity_seconds)
        capacity = sum(one.status == 200 for one in full) / given.capacity_seconds
        rate = _SHARE * capacity
        out.print({"capacity": round(capacity, 2), "rate": round(rate, 2)})
        broker = open_broker(up.stack.redis_url, new_identity("bench"))
        await broker.start()
        try:
            with up.load(mode="open", rate=rate, keep_every=1) as load:
                begun_s = time.time()
                await asyncio.sleep(2.0)
                swaps = [await swap(up, broker, ring[(i + 1) % len(ring)], given.steps) for i in range(given.swaps)]
                await asyncio.sleep(max(0.0, begun_s + 1.05 * given.requests / rate - time.time()))
        finally:
            await broker.close()
    verdict = Verdict(references, tolerance(found.backend, found.precision))
    return measured(swaps, load.records, steps(log, begun_s), verdict) | {
        "capacity_images_per_s": round(capacity, 2),
        "rate": round(rate, 2),
        "engine": f"{found.backend} {found.precision}",
        "steps_per_image": given.steps,
        "ring": [shown(version) for version in ring],
    }


async def swap(up: System, broker: Broker, version: str, count: int) -> Swap:
    """One promotion, its window and its control window."""
    current = up.registry.current(MODEL)
    assert current is not None
    asked_s = time.time()
    candidate = up.registry.propose(
        MODEL,
        {"low": TierTarget(student=version, steps=count)},
        default_tier="low",
        allowed={version: [count]},
        base_revision=current.number,
    )
    await broker.announce(f"deployments/{MODEL}")
    while (outcome := up.registry.outcome(MODEL, candidate.swap_id)) is None:
        if time.time() - asked_s > _SWAP_WITHIN_S:
            raise SystemExit(f"swap to {shown(version)} did not end")
        await asyncio.sleep(0.005)
    live_s = time.time()
    if outcome.state != "live":
        raise SystemExit(f"swap to {shown(version)} was {outcome.state}: {outcome.reason}")
    while not all(phase.phase == "drained" for phase in (await broker.phases(candidate.swap_id)).values()):
        await asyncio.sleep(0.02)
    phases = list((await broker.phases(candidate.swap_id)).values())
    begin_s = min(phase.at_ms / 1000 - sum(phase.seconds.values()) for phase in phases)
    window = Window(begin_s, max(phase.at_ms for phase in phases) / 1000)
    control_begin_s = time.time() + 0.3  # what the swap left behind has settled
    control = Window(control_begin_s, control_begin_s + window.end_s - window.begin_s)
    await asyncio.sleep(control.end_s + 0.1 - time.time())
    seconds = {name: max(phase.seconds.get(name, 0.0) for phase in phases) for name in phases[0].seconds}
    return Swap(outcome, window, control, live_s - asked_s, seconds)


# --- figures ------------------------------------------------------------------------------------


def measured(
    swaps: Sequence[Swap], records: Sequence[Record], log: Sequence[Step], verdict: "Verdict"
) -> dict[str, Any]:
    good = [one for one in records if one.status == 200]
    live = [one for one in log if one.stage]
    inside = [one.seconds for swap in swaps for one in good if swap.window.has(one.sent_s)]
    outside = [one.seconds for swap in swaps for one in good if swap.control.has(one.sent_s)]
    return {
        "swaps": len(swaps),
        "requests": len(records),
        "failed": len(records) - len(good),
        "wrong": sum(not verdict.right(one) for one in good),
        "stall_ms_max": round(1000 * max(stall_s(live, swap.window) for swap in swaps), 2),
        "control_ms_max": round(1000 * max(stall_s(live, swap.control) for swap in swaps), 2),
        "step_ms_p95": round(1000 * quantile([one.seconds for one in live if one.stage == "denoise"], 0.95), 2),
        "p95_ms_in_swap": round(1000 * quantile(inside, 0.95), 2),
        "p95_ms_control": round(1000 * quantile(outside, 0.95), 2),
        "requests_in_swap": len(inside),
        "requests_in_control": len(outside),
        "window_s_median": round(statistics.median(s.window.end_s - s.window.begin_s for s in swaps), 3),
        "publish_to_live_s": round(statistics.median(swap.publish_to_live_s for swap in swaps), 4),
        "phases": {
            name: round(statistics.median(swap.phases.get(name, 0.0) for swap in swaps), 4) for name in swaps[0].phases
        },
        "errors": sorted({one.error for one in records if one.status != 200})[:5],
    }


def stall_s(live: Sequence[Step], window: Window) -> float:
    """The longest part inside the window of a gap before a live call's end, while a row waited."""
    gaps = (min(one.at_s, window.end_s) - max(one.at_s - one.gap_s, window.begin_s) for one in live)
    return max((gap for gap in gaps if gap > 0), default=0.0)


def steps(log: Path, since_s: float) -> list[Step]:
    decode = msgspec.json.Decoder(Step).decode
    lines = (decode(line) for line in log.read_bytes().splitlines())
    return [step for step in lines if step.at_s >= since_s]


class Verdict:
    """Whether a picture is that of the version that it names, and of no other."""

    def __init__(self, references: Mapping[str, torch.Tensor], allowed: Tolerance) -> None:
        self._references, self._allowed = references, allowed
        for version, mine in references.items():
            for other, theirs in references.items():
                same = [i for i in range(len(mine)) if allowed.fault(mine[i], theirs[i]) is None]
                if version != other and same:
                    raise SystemExit(f"{version} and {other} make the same pictures {same}: nothing would be proved")

    def right(self, record: Record) -> bool:
        reference = self._references.get(record.version)
        if reference is None:
            return False
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(record.picture)).convert("RGB"))).permute(2, 0, 1)
        return self._allowed.fault(pixels, reference[record.body]) is None


def pictures(up: System, ring: Sequence[str], given: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What every version answers to every body, in the order of `system.bodies`; by the version as it is shown."""
    found = choose(given.backend)
    profile = Profile(_BATCHES, found.precision, given.threads, device=device_of(found.backend))
    loader = Loader(up.registry, found, profile, GraphStore(DiskCache(CACHE)))
    asked = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    made = {}
    for version in ring:
        student = loader.load(up.registry.student(version))
        with torch.inference_mode():
            made[shown(version)] = sample(student, [p for p, _ in asked], [s for _, s in asked], given.steps)
        loader.release(student)
    return made


if __name__ == "__main__":
    main()
