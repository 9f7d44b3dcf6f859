"""A soak of the whole serving system: `python -m bench.soak` writes bench/soak.json and ends with 1 if anything failed.

A real gateway, a real Redis and two real workers answer requests of a Poisson process, first on the paced engine, then
on the real one, while clients cancel, leave and send nonsense, students are swapped and workers are killed. Every
picture is compared with the one that `engines.student.sample` makes for its version, prompt, seed and steps: by the
reference backend, or by the paced one, whose pictures are no pictures. Afterwards nothing may be left in Redis, and no
process may hold more than at its start. Workers are killed in the first part of the time only, so that the rest shows
what they hold.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import redis
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.load import arrivals
from bench.machine import described, quantile
from bench.soak_clients import GIVE_UP_S, Clients, Failure, Judge
from bench.soak_memory import Watch
from bench.soak_requests import STEPS, Shot, asked, shots
from bench.soak_trouble import TIERS, Trouble
from bench.system import CACHE, MODEL, ring
from distill_jobs.tasks import shapes
from engines.backends.base import Choice, Profile, Tolerance, choose, tolerance
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import shown
from engines.registry.base import Registry, Revision, TierTarget
from engines.registry.files import FilesRegistry
from engines.student import sample
from server.embedded import Stack, StackOptions
from server.messages import ENDINGS

out = Console(stderr=True)
_OUT = Path(__file__).parent / "soak.json"
_BATCHES = (1, 2, 4, 8)
_PACED = Tolerance(levels=1, share=1.0, psnr_db=40.0)  # one colour, of the same sums in another order
_KILLING = 0.5  # of the time
_AT_ONCE = 64  # a slow machine is asked more slowly, not ever more at once
_SETTLED_S = 60.0
_LOOK_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24_000)
    parser.add_argument("--minutes", type=float, default=20.0, help="of load, all engines together")
    parser.add_argument("--quick", action="store_true", help="600 requests in a minute")
    parser.add_argument("--engines", default="paced,auto", help="backends, one after the other")
    parser.add_argument("--versions", type=int, default=3, help="in the ring of swaps")
    parser.add_argument("--swaps", type=int, default=60, help="about so many in all")
    parser.add_argument("--kills", type=int, default=12, help="of workers, about so many in all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()
    if given.quick:
        given.requests, given.minutes, given.swaps, given.kills = 600, 1.0, 6, 2
    report = described("bench.soak") | {"seed": given.seed, "runs": {}}
    engines = given.engines.split(",")
    with tempfile.TemporaryDirectory(prefix="fewstep-soak-") as folder:
        for engine in engines:
            report["runs"][engine] = asyncio.run(one_run(Path(folder) / engine, engine, len(engines), given))
    report["failed"] = sum(len(run["failures"]) for run in report["runs"].values())
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    out.print(table(report))
    for engine, run in report["runs"].items():
        for failure in run["failures"]:
            out.print(f"{engine}, seed {given.seed}: {failure}", highlight=False, markup=False)
    sys.exit(1 if report["failed"] else 0)


async def one_run(folder: Path, engine: str, runs: int, given: argparse.Namespace) -> dict[str, Any]:
    """All of it on one engine, which has its share of the time."""
    seconds, requests = 60 * given.minutes / runs, given.requests // runs
    choice = choose(engine)
    registry = FilesRegistry(folder / "data" / "registry")
    versions = ring(registry, shapes.TASK.pipeline, given.versions, STEPS)
    deploy(registry, versions[0])
    judge = Judge(references(registry, versions, choice), allowed(choice))
    with serving(folder, choice, given.threads) as stack:
        limits = httpx.Limits(max_connections=2 * _AT_ONCE, max_keepalive_connections=_AT_ONCE)
        async with httpx.AsyncClient(base_url=stack.url, timeout=GIVE_UP_S, limits=limits) as http:
            clients = Clients(http, judge, f"{engine}-{given.seed}")
            trouble = Trouble(http, stack, versions, random.Random(f"trouble {given.seed}"))
            watch = Watch(stack.supervisor.pids)
            begun_s = time.monotonic()
            beside = [
                asyncio.create_task(work)
                for work in (
                    looks(watch),
                    trouble.swap(seconds * runs / given.swaps),
                    trouble.kill(_KILLING * seconds * runs / given.kills, begun_s + _KILLING * seconds),
                )
            ]
            try:
                sent = await load(clients, given.seed, requests, seconds, engine)
            finally:
                for task in beside:
                    task.cancel()
                ended = await asyncio.gather(*beside, return_exceptions=True)
            took_s = time.monotonic() - begun_s
            left = await left_over(stack.redis_url)
    held = watch.held()
    failures = [asdict(one) for one in clients.failures]
    failures += [asdict(Failure(-1, "trouble", what)) for what in trouble.failures]
    failures += [asdict(Failure(-1, "books", what)) for what in left]
    failures += [
        asdict(Failure(-1, name, what)) for name, one in held.items() if name != "redis" for what in one.faults
    ]
    failures += [asdict(Failure(-1, "soak", repr(one))) for one in ended if isinstance(one, Exception)]
    return {
        "engine": f"{choice.backend} {choice.precision}",
        "seconds": round(took_s, 1),
        "requests": sent,
        "answers": dict(sorted(clients.counts.items())),
        "p50_ms": round(1000 * quantile(clients.seconds, 0.5), 1),
        "p95_ms": round(1000 * quantile(clients.seconds, 0.95), 1),
        "longest_ms": round(1000 * max(clients.seconds, default=0.0), 1),
        "swaps": len(trouble.swaps),
        "swap_s_median": round(quantile([one["seconds"] for one in trouble.swaps], 0.5), 3),
        "kills": trouble.kills,
        "processes": {name: asdict(one) for name, one in held.items()},
        "failures": failures,
    }


async def load(clients: Clients, seed: int, requests: int, seconds: float, engine: str) -> int:
    """Sends the requests as they are due, for so many seconds; returns how many were sent, when all are answered."""
    gate, tasks, begun_s = asyncio.Semaphore(_AT_ONCE), set[asyncio.Task[None]](), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=out) as progress:
        bar = progress.add_task(engine, total=requests, note="")
        sent = 0
        for number, after_s in zip(range(1, requests + 1), arrivals(requests / seconds, seed), strict=False):
            await asyncio.sleep(max(0.0, begun_s + after_s - time.monotonic()))
            await gate.acquire()
            if time.monotonic() - begun_s > seconds:
                break
            task = asyncio.create_task(clients.ask(asked(seed, number)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _: gate.release())
            sent = number
            progress.update(bar, completed=sent, note=f"{clients.counts['failed']} failed")
        await asyncio.gather(*tasks)
    return sent


async def looks(watch: Watch) -> None:
    while True:
        watch.look(time.monotonic())
        await asyncio.sleep(_LOOK_S)


@contextmanager
def serving(folder: Path, choice: Choice, threads: int) -> Iterator[Stack]:
    """Redis, one gateway and two workers on this engine. Answers are forgotten soon, so that Redis stays small."""
    env = {
        "WORKER_BACKEND": choice.backend,
        "WORKER_PRECISION": choice.precision,
        "WORKER_BATCH_SIZES": json.dumps(_BATCHES),
        "WORKER_CACHE_DIR": str(CACHE.resolve()),
        "WORKER_LEASE_S": "2",
        "WORKER_KEEP_PREVIOUS_S": "0",
        "WORKER_RESULT_TTL_S": "120",
        "GATEWAY_RESULT_TTL_S": "120",
        "GATEWAY_IDEMPOTENCY_TTL_S": "120",
    }
    options = StackOptions(data=folder / "data", port=0, workers=2, distiller=False, threads=threads, env=env)
    with Stack(options) as stack:
        yield stack


def deploy(registry: Registry, version: str) -> None:
    """Makes `version` every tier of the first revision."""
    targets = {tier: TierTarget(student=version, steps=steps) for tier, steps in zip(TIERS, STEPS, strict=True)}
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    registry.commit(
        Revision(
            deployment=MODEL,
            number=1,
            tiers=targets,
            default_tier="medium",
            allowed={version: list(STEPS)},
            created_at=now,
        )
    )


def references(registry: Registry, versions: list[str], choice: Choice) -> dict[tuple[str, Shot], torch.Tensor]:
    """What every version answers to every shot, uint8 [3, H, W], one at a time.

    Raises:
        SystemExit: two versions of the real engine answer alike, so that nothing would be proved.
    """
    by = choice if choice.backend == "paced" else Choice("eager", "fp32")
    loader = Loader(registry, by, Profile(_BATCHES, threads=1), GraphStore(DiskCache(CACHE)))
    made: dict[tuple[str, Shot], torch.Tensor] = {}
    for version in versions:
        student = loader.load(registry.student(version))
        with torch.inference_mode():
            for shot in shots():
                made[shown(version), shot] = sample(student, [shot.prompt], [shot.seed], shot.steps)[0]
        loader.release(student)
    if choice.backend != "paced":
        _check_distinct(made, allowed(choice))
    return made


def _check_distinct(made: Mapping[tuple[str, Shot], torch.Tensor], near: Tolerance) -> None:
    for (version, shot), mine in made.items():
        for (other, same), theirs in made.items():
            if version < other and shot == same and near.fault(mine, theirs) is None:
                raise SystemExit(f"{version} and {other} make the same picture of {shot}")


def allowed(choice: Choice) -> Tolerance:
    return _PACED if choice.backend == "paced" else tolerance(choice.backend, choice.precision)


async def left_over(redis_url: str) -> list[str]:
    """What is still in Redis that should not be, once everybody is answered; what clients left may take a moment."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        deadline_s = time.monotonic() + _SETTLED_S
        while (found := _books(client)) and time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_S)
    return found


def _books(client: Any) -> list[str]:
    names = [name for name in client.scan_iter("fewstep:v1:req:*", count=1000) if client.type(name) == "hash"]
    found = [f"{name} is {state}" for name in names if (state := client.hget(name, "status")) not in (None, *ENDINGS)]
    queues = client.scan_iter("fewstep:v1:queue:*", count=1000)
    found += [f"{name} holds {count}" for name in queues if (count := client.xlen(name))]
    owed = client.scan_iter("fewstep:v1:owed:*", count=1000)
    found += [f"{name} holds {client.hgetall(name)}" for name in owed]
    # Until the last swap has let go of it, a version without requests may still be named: its count is what matters.
    pins = client.hgetall(f"fewstep:v1:pins:{MODEL}")
    return found + [f"{count} requests pin {shown(version)}" for version, count in pins.items() if int(count)]


def table(report: Mapping[str, Any]) -> Table:
    made = Table("", *report["runs"], title=f"soak, seed {report['seed']}: {report['failed']} failures")
    runs = list(report["runs"].values())
    for name in ("engine", "seconds", "requests", "p50_ms", "p95_ms", "longest_ms", "swaps", "swap_s_median", "kills"):
        made.add_row(name, *(str(run[name]) for run in runs))
    for name in sorted({name for run in runs for name in run["answers"]}):
        made.add_row(name, *(str(run["answers"].get(name, 0)) for run in runs))
    for name in sorted({name for run in runs for name in run["processes"]}):
        made.add_row(name, *(_held(run["processes"][name]) for run in runs))
    return made


def _held(one: Mapping[str, Any]) -> str:
    memory = f"{one['mib_begin']} → {one['mib_end']} MiB ({one['mib_per_hour']:+} MiB/h)"
    return f"{memory}, {one['files_begin']} → {one['files_end']} files in {one['seconds']} s"


if __name__ == "__main__":
    main()
