"""What serving costs around an engine: `python -m bench.serve` writes bench/serve.json.

(a) throughput over the paced engine, which takes a known time and no processor, against a bare loop that calls it, at
the usual pace of 200 pictures a second and at faster ones;
(b) the same over the real engine; (c) what one request alone takes beyond its engine calls, against a floor of the
same HTTP and Redis hops with nothing in them. Each is measured several times; the figures are medians with spread.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.load import Record
from bench.machine import described, quantile, spread
from bench.system import CACHE, MODEL, PROMPTS, System, system
from distill_jobs.tasks import shapes
from engines.backends.base import BATCHES, Profile, choose, device_of
from engines.backends.paced import MAX_ROWS, PACE_PER_S, call_s
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.noise import noise
from engines.student import LoadedStudent
from server.client import Client
from server.embedded import free_port

out = Console(stderr=True)
_OUT = Path(__file__).parent / "serve.json"
_SETTLE_S = 2.0
_ALONE = 400  # requests of one run of (c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=shapes.TASK.pipeline, help="a diffusers directory")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a throughput window")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the real engine")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--backend", default="auto", help="the real engine's")
    parser.add_argument("--parts", default="abc")
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    report = described("bench.serve")
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        if "a" in given.parts:
            report["paced"] = paced(Path(folder) / "paced", PACE_PER_S, given)
            report["faster"] = {str(pace): paced(Path(folder) / f"paced-{pace}", pace, given) for pace in _PACES}
        if "b" in given.parts or "c" in given.parts:
            report |= real(Path(folder) / "real", given)
    report |= {name: report["paced"][name]["median"] for name in _HEADLINES if name in report.get("paced", {})}
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    out.print_json(json.dumps(report))


_PACES = (400, 800)
_HEADLINES = ("paced_ratio", "cpu_ms_per_image_outside_engine")


# --- (a) and (b): throughput --------------------------------------------------------------------


def paced(folder: Path, pace: float, given: argparse.Namespace) -> dict[str, Any]:
    os.environ["PACED_IMAGES_PER_S"] = str(pace)  # of the bare loop here, and of the worker
    env = {"WORKER_BACKEND": "paced", "WORKER_BATCH_SIZES": json.dumps(BATCHES)}
    with system(folder, given.pipeline, versions=1, steps=1, threads=1, env=env) as (up, [version]):
        engine = loaded(up, version, "paced", "fp32", BATCHES, 1)
        runs = [throughput(up, engine, BATCHES[-1], given) for _ in range(given.runs)]
        named = (
            f"paced: {1000 * call_s(0):g} ms + {1000 * (call_s(1) - call_s(0)):.3g} ms a row, at most {MAX_ROWS} rows"
        )
    return summary(runs) | {"engine": named, "runs": runs}


def real(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    found = choose(given.backend)
    env = {"WORKER_BACKEND": found.backend, "WORKER_BATCH_SIZES": json.dumps(BATCHES)}
    report: dict[str, Any] = {}
    with system(folder, given.pipeline, versions=1, steps=1, threads=given.threads, env=env) as (up, [version]):
        if "b" in given.parts:
            engine = loaded(up, version, found.backend, found.precision, BATCHES, given.threads)
            runs = [throughput(up, engine, BATCHES[-1], given) for _ in range(given.runs)]
            named = f"{found.backend} {found.precision}, {given.threads} threads in {engine.streams} streams"
            report["real"] = summary(runs) | {"engine": named, "runs": runs}
            report["ratio"] = report["real"]["paced_ratio"]["median"]
            report["real"]["ratio"] = report["real"].pop("paced_ratio")
            report["real"]["cpu_ms_per_image_engine_included"] = report["real"].pop("cpu_ms_per_image_outside_engine")
        if "c" in given.parts:
            report |= overhead(up, given)
    return report


def throughput(up: System, engine: "Bare", rows: int, given: argparse.Namespace) -> dict[str, Any]:
    bare = engine.images_per_s(rows, min(given.seconds, 8.0))
    with up.load(mode="closed", concurrency=given.concurrency, seconds=given.seconds + 2 * _SETTLE_S) as load:
        _wait_for(lambda: _answering(up), 60)
        time.sleep(_SETTLE_S)
        before, load_s, begun_s = up.cpu(), load.cpu_s, time.time()
        time.sleep(given.seconds)
        after, load_s, ended_s = up.cpu(), load.cpu_s - load_s, time.time()
        load.stop(wait=True)
    records = load.records
    served = [one for one in records if one.status == 200 and begun_s <= one.sent_s + one.seconds < ended_s]
    spent = after.since(before)
    images_per_s = len(served) / (ended_s - begun_s)
    made = {
        "images_per_s": round(images_per_s, 2),
        "bare_images_per_s": round(bare, 2),
        "paced_ratio": round(images_per_s / bare, 4),
        "cpu_ms_per_image_outside_engine": round(1000 * sum(spent.values()) / max(1, len(served)), 3),
        "cpu_ms_per_image": {name: round(1000 * s / max(1, len(served)), 3) for name, s in spent.items()},
        "load_cores": round(load_s / (ended_s - begun_s), 2),
        "latency_ms_p50": round(1000 * quantile([one.seconds for one in served], 0.5), 1),
        "latency_ms_p95": round(1000 * quantile([one.seconds for one in served], 0.95), 1),
        "failed": sum(one.status != 200 for one in records),
    }
    out.print(made)
    return made


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("paced_ratio", "images_per_s", "bare_images_per_s", "cpu_ms_per_image_outside_engine", "latency_ms_p50")
    return {name: spread([run[name] for run in runs]) for name in names}


@dataclass(frozen=True, slots=True)
class Bare:
    """The engine with nothing around it, called from as many threads at once as it has streams."""

    student: LoadedStudent
    streams: int

    def images_per_s(self, rows: int, seconds: float) -> float:
        with ThreadPoolExecutor(self.streams) as pool:
            return sum(pool.map(lambda _: bare_loop(self.student, rows, seconds), range(self.streams)))


def loaded(up: System, version: str, backend: str, precision: str, batches: tuple[int, ...], threads: int) -> Bare:
    """The student as the worker has it, in this process."""
    choice = choose(backend, precision)
    profile = Profile(batches, choice.precision, threads, device=device_of(choice.backend))
    loader = Loader(up.registry, choice, profile, GraphStore(DiskCache(CACHE)), tune=True)
    manifest = up.registry.student(version)
    loader.tune(loader.graphs(manifest)["denoiser"])
    return Bare(loader.load(manifest), loader.profile.streams)


def bare_loop(student: LoadedStudent, rows: int, seconds: float) -> float:
    """Images a second of one stream at its largest batch; its prompts are encoded, as those of the load are."""
    import torch

    family, solver = student.family, student.solver(1)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    x = torch.stack([noise(seed, 0, student.latent_shape) for seed in range(rows)])
    with torch.inference_mode():
        cond = family.encode(prompts)
        images, begun_s = 0, time.perf_counter()
        while time.perf_counter() - begun_s < seconds:
            state = solver.start(x)
            times = student.times(solver, state)
            t, s = torch.full((rows,), times.t), torch.full((rows,), times.s)
            pred = family.denoise(state.x * times.scale, t, cond, s, [solver.plan[0].w] * rows)
            family.decode(solver.advance(state, pred).x)
            images += rows
    return images / (time.perf_counter() - begun_s)


# --- (c): one request alone ---------------------------------------------------------------------


def overhead(up: System, given: argparse.Namespace) -> dict[str, Any]:
    body = json.dumps({"model": MODEL, "prompt": PROMPTS[0], "seed": 1})
    size = len(Client(up.stack.url).generate(json.loads(body)).content)
    runs = []
    with floor(up.stack.redis_url, size) as port:
        for _ in range(given.runs):
            served = alone(up, port=up.stack.port, bodies=[body])
            bare = alone(up, port=port, bodies=[body])
            beyond = [1000 * one.seconds - engine_ms(one.timing) for one in served]
            run = {
                "overhead_ms_p50": round(quantile(beyond, 0.5), 3),
                "overhead_ms_p99": round(quantile(beyond, 0.99), 3),
                "floor_ms_p50": round(1000 * quantile([one.seconds for one in bare], 0.5), 3),
                "engine_ms_p50": round(quantile([engine_ms(one.timing) for one in served], 0.5), 3),
                "requests": len(served),
            }
            out.print(run)
            runs.append(run)
    names = ("overhead_ms_p50", "overhead_ms_p99", "floor_ms_p50")
    report: dict[str, Any] = {name: spread([run[name] for run in runs])["median"] for name in names}
    report["alone"] = {name: spread([run[name] for run in runs]) for name in names} | {"runs": runs}
    report["alone"]["floor"] = "FastAPI and an echo process over the broker's own client: the same commands and bytes"
    return report


def alone(up: System, *, port: int, bodies: list[str]) -> list[Record]:
    """Requests one after the other; the first tenth warms up."""
    records = up.loaded(mode="closed", concurrency=1, seconds=_alone_s(up, port, bodies), port=port, bodies=bodies)
    good = [one for one in records if one.status == 200]
    if len(good) < len(records):
        raise SystemExit(f"{len(records) - len(good)} of {len(records)} requests failed: {records[-1].error}")
    return good[len(good) // 10 :]


def _alone_s(up: System, port: int, bodies: list[str]) -> float:
    probe = up.loaded(mode="closed", concurrency=1, seconds=1.0, port=port, bodies=bodies)
    return min(60.0, max(3.0, _ALONE * quantile([one.seconds for one in probe], 0.5)))


def engine_ms(timing: str) -> float:
    """encode + denoise + decode of a `server-timing` header."""
    parts = dict(part.strip().split(";dur=") for part in timing.split(",") if ";dur=" in part)
    return sum(float(parts[name]) for name in ("encode", "denoise", "decode"))


@contextlib.contextmanager
def floor(redis_url: str, image_bytes: int) -> Iterator[int]:
    port = free_port()
    program = [sys.executable, "-m", "bench.floor"]
    gateway = [*program, "gateway", "--redis-url", redis_url, "--port", str(port)]
    echo = [*program, "echo", "--redis-url", redis_url, "--image-bytes", str(image_bytes)]
    with subprocess.Popen(gateway) as one, subprocess.Popen(echo) as two:
        try:
            _wait_for(Client(f"http://127.0.0.1:{port}").alive, 60)
            yield port
        finally:
            one.terminate()
            two.terminate()


def _answering(up: System) -> bool:
    return Client(up.stack.url).ready()


def _wait_for(check: Any, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not check():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {within_s} s: {check}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
