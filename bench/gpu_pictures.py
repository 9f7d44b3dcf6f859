"""A cell of `bench.gpu`: whole pictures of a student with random weights, from prompt to answer.

    diffusers, diffusers compiled   its modules in our loop, to pixels in the host's memory
    engine      our engines in the same loop, which is the time that a server cannot go below
    gateway     a client over HTTP, to PNG: Redis, gateway and worker as `fewstep up` starts them, nothing cached
Alone is one picture after the other; a second's pictures are those of full batches, of the server at more clients than
its batches hold.
"""

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu_networks import SHAPES
from bench.gpu_steps import Module
from bench.gpu_students import ROLES, STEPS, even, network, prompts, student
from bench.load import Record
from bench.machine import quantile, spread
from bench.serve import engine_ms
from bench.system import System
from engines import plugins, process
from engines.backends.base import Profile, choose
from engines.cache import DiskCache
from engines.errors import FewstepError, Unavailable
from engines.graph import GraphStore, spec
from engines.loader import Loader
from engines.manifest import StudentManifest
from engines.parts import reader
from engines.registry.base import Revision, TierTarget
from engines.registry.files import FilesRegistry
from engines.student import LoadedStudent, sample
from server.client import Client
from server.embedded import Stack, StackOptions

FORMS = ("diffusers", "engine", "gateway", "diffusers compiled")
MODEL = "random"
_BODIES = 400
_WARM_UPS = 2
_SETTLED = 0.25  # of a window
_SERVING_S = 240.0


def measured(cell: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    begun_s = time.perf_counter()
    registry, manifest = published(cell, given)
    if cell["form"] == "gateway":
        try:
            return served(cell, given, begun_s)
        finally:
            shutil.rmtree(folder(cell, given), ignore_errors=True)  # gigabytes
    if cell["form"] == "engine":
        made = _engines(registry, manifest, given)
    else:
        made = _diffusers(registry, manifest, cell, given)
    ready_s = round(time.perf_counter() - begun_s, 1)
    return {"ready_s": ready_s, "pictures": {str(n): looped(made, n, given) for n in STEPS}}


def folder(cell: dict[str, Any], given: argparse.Namespace) -> Path:
    """Of the system that serves a network at a size."""
    home: Path = given.cache / f"{cell['network']}-{cell['pixels']}"
    return home


def published(cell: dict[str, Any], given: argparse.Namespace) -> tuple[FilesRegistry, StudentManifest]:
    """The student, made if it is not there, and the registry that has it deployed."""
    registry = FilesRegistry(folder(cell, given) / "data" / "registry")
    if MODEL not in registry.deployments():
        version = student(SHAPES[cell["network"]], cell["pixels"], registry, given.device)
        registry.commit(
            Revision(
                deployment=MODEL,
                number=1,
                tiers={f"of-{n}": TierTarget(student=version, steps=n) for n in STEPS},
                default_tier="of-1",
                allowed={version: list(STEPS)},
                created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            )
        )
    revision = registry.current(MODEL)
    assert revision is not None, "committed above, or before"
    [version] = revision.versions
    return registry, registry.student(version)


# --- in this process ----------------------------------------------------------------------------


def _engines(registry: FilesRegistry, manifest: StudentManifest, given: argparse.Namespace) -> LoadedStudent:
    choice = choose(given.backend, device=given.device)
    profile = Profile(tuple(given.rows), choice.precision, given.threads, device=given.device)
    return Loader(registry, choice, profile, GraphStore(DiskCache(given.cache))).load(manifest)


def _diffusers(
    registry: FilesRegistry, manifest: StudentManifest, cell: dict[str, Any], given: argparse.Namespace
) -> LoadedStudent:
    read = reader(registry, manifest)
    parts = {role: network(spec(manifest, role, read), given.device) for role in ROLES}
    even(parts["decoder"], SHAPES[cell["network"]].latent(cell["pixels"]), given.device)
    compiled = cell["form"].endswith("compiled")
    engines = {
        role: Module(part, given.device, compiled=compiled and role != "encoder") for role, part in parts.items()
    }
    family = plugins.load("engines.families", manifest.family, "FAMILY")
    tokenizer = family.tokenizer(read, sorted(manifest.components["encoder"].files))
    made = family(*(engines[role] for role in ROLES), tokenizer=tokenizer)
    return LoadedStudent(manifest, made, process.make(manifest.process), "diffusers", "bf16")


def looped(made: LoadedStudent, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    asked, rows = prompts(), max(given.rows)
    alone_s = []
    for seed in range(given.calls + _WARM_UPS):
        begun_s = time.perf_counter()
        sample(made, [next(asked)], [seed], steps)
        alone_s.append(time.perf_counter() - begun_s)
    sample(made, list(itertools.islice(asked, rows)), range(rows), steps, batch=rows)
    number, begun_s = 0, time.perf_counter()
    while time.perf_counter() - begun_s < given.seconds:
        sample(made, list(itertools.islice(asked, rows)), range(rows), steps, batch=rows)
        number += rows
    per_s = number / (time.perf_counter() - begun_s)
    return {"alone_ms": spread([1000 * one for one in alone_s[_WARM_UPS:]], 2), "per_s": round(per_s, 2)}


# --- through the gateway ------------------------------------------------------------------------


def served(cell: dict[str, Any], given: argparse.Namespace, begun_s: float) -> dict[str, Any]:
    choice = choose(given.backend, device=given.device)
    env = {
        "WORKER_BACKEND": choice.backend,
        "WORKER_PRECISION": choice.precision,
        "WORKER_DEVICE": given.device,
        "WORKER_DEPLOYMENTS": json.dumps([MODEL]),
        "WORKER_BATCH_SIZES": json.dumps(given.rows),
        "WORKER_PROMPT_CACHE_BYTES": "0",
        "WORKER_CACHE_DIR": str(given.cache.resolve()),
    }
    home = folder(cell, given)
    with Stack(StackOptions(home / "data", port=0, distiller=False, threads=given.threads, env=env)) as stack:
        up = System(stack, home)
        _serving(stack)
        ready_s = round(time.perf_counter() - begun_s, 1)
        return {"ready_s": ready_s, "pictures": {str(n): _asked(up, n, given) for n in STEPS}}


def _serving(stack: Stack) -> None:
    """Waits until the student has made a picture.

    Raises:
        Unavailable: it has not in time, with what the worker says of that.
    """
    client, until_s = Client(stack.url), time.monotonic() + _SERVING_S
    try:
        while True:
            try:
                client.generate({"model": MODEL, "prompt": next(prompts()), "seed": 0})
                return
            except FewstepError as error:
                if time.monotonic() > until_s:
                    raise Unavailable(f"{error}; the worker: {stack.supervisor.tail('worker-0')}") from error
                time.sleep(0.2)
    finally:
        client.close()


def _asked(up: System, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    bodies = [
        json.dumps({"model": MODEL, "prompt": prompt, "seed": seed, "steps": steps})
        for seed, prompt in enumerate(itertools.islice(prompts(), _BODIES))
    ]
    load = {"mode": "closed", "seconds": given.seconds, "timeout_s": 120.0, "bodies": bodies}
    alone = _good(up.loaded(concurrency=1, **load))
    settled = alone[min(_WARM_UPS, len(alone) - 1) :]
    full = _good(up.loaded(concurrency=4 * max(given.rows), **load))
    first_s = min(one.sent_s for one in full)
    from_s, to_s = first_s + _SETTLED * given.seconds, first_s + given.seconds
    number = sum(from_s <= one.sent_s + one.seconds < to_s for one in full)
    return {
        "alone_ms": spread([1000 * one.seconds for one in settled], 2),
        "alone_in_engines_ms": round(quantile([engine_ms(one.timing) for one in settled], 0.5), 2),
        "per_s": round(number / (to_s - from_s), 2),
    }


def _good(records: Sequence[Record]) -> list[Record]:
    good = [one for one in records if one.status == 200]
    if len(good) < len(records):
        bad = next(one for one in records if one.status != 200)
        raise Unavailable(f"{len(records) - len(good)} of {len(records)} requests failed: {bad.status} {bad.error}")
    return good
