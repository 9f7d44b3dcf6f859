"""A running system for a bench: a ring of students with different weights in a registry, and the real processes.

The processes are those of `fewstep up` without a distiller, with `WORKER_*` settings of the bench's choice.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load

from bench import load as load_generator
from bench.load import Record
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers import publish
from engines.artefact import import_diffusers, make_student
from engines.manifest import Guidance
from engines.registry.base import Registry, Revision, TierTarget
from engines.registry.files import FilesRegistry
from server.embedded import Stack, StackOptions

MODEL = "shapes"
PROMPTS = (
    "a small red circle above a large blue square on a white background",
    "a large green ring",
    "a yellow triangle left of a purple cross on a black background",
    "a pink square on a grey background",
)
SEEDS = (1, 2)
CACHE = Path(".fewstep/bench-engines")
"""Kept between runs: graphs are exported once."""


def ring(registry: Registry, pipeline: Path, count: int, steps: Sequence[int]) -> list[str]:
    """Publishes `count` students of the teacher for each of `steps`, whose weights and pictures differ plainly."""
    base = import_diffusers(
        pipeline,
        registry,
        name=TASK.teacher.name,
        schedules=[publish.uniform(TASK.teacher.steps)],
        guidance=TASK.teacher.guidance,
        solver=TASK.teacher.solver,
    )
    weights = load(registry.read_blob(registry.student(base).components["denoiser"].weights))
    return [
        make_student(
            registry,
            base,
            f"ring-{index}",
            denoiser_weights={name: _moved(value, index, name) for name, value in weights.items()},
            schedules=[publish.uniform(each) for each in steps],
            solver="ddim",
            guidance=Guidance(mode="baked", default=2.0, minimum=2.0, maximum=2.0),
        )
        for index in range(count)
    ]


def _moved(value: torch.Tensor, index: int, name: str) -> torch.Tensor:
    """A tenth of the tensor's deviation as noise of its own."""
    generator = torch.Generator().manual_seed(1000 * index + len(name))
    if value.dim() < 2:
        return value
    return value + 0.1 * value.float().std() * torch.randn(value.shape, generator=generator)


def deploy(registry: Registry, version: str, steps: int) -> None:
    """Makes `version` the whole first revision."""
    registry.commit(
        Revision(
            deployment=MODEL,
            number=1,
            tiers={"low": TierTarget(student=version, steps=steps)},
            default_tier="low",
            allowed={version: [steps]},
            created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
    )


def bodies() -> list[str]:
    """Every prompt with every seed, as request bodies."""
    return [json.dumps({"model": MODEL, "prompt": prompt, "seed": seed}) for prompt in PROMPTS for seed in SEEDS]


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds of a system's processes since their start."""

    seconds: dict[str, float]

    def since(self, before: "Cpu") -> dict[str, float]:
        return {name: self.seconds[name] - before.seconds[name] for name in self.seconds}


class System:
    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.registry = FilesRegistry(folder / "data" / "registry")
        self._loads = 0

    def cpu(self) -> Cpu:
        times = {name: psutil.Process(pid).cpu_times() for name, pid in self.stack.supervisor.pids().items()}
        return Cpu({name: one.user + one.system for name, one in times.items()})

    @contextlib.contextmanager
    def load(self, **plan: Any) -> Iterator["Load"]:
        """A load generator that runs beside the block; stopped at its end if it has no `seconds`."""
        self._loads += 1
        place = self.folder / f"load-{self._loads}"
        given = {"port": self.stack.port, "bodies": bodies(), **plan}
        place.with_suffix(".json").write_text(json.dumps(given))
        out = place.with_suffix(".msgpack")
        command = [sys.executable, "-m", "bench.load", str(place.with_suffix(".json")), str(out)]
        with subprocess.Popen(command) as process:
            made = Load(process, out)
            try:
                yield made
            finally:
                made.stop(wait=given.get("seconds") is not None)

    def loaded(self, **plan: Any) -> list[Record]:
        """The records of a load of some `seconds`."""
        with self.load(**plan) as load:
            load.stop(wait=True)
        return load.records


class Load:
    def __init__(self, process: "subprocess.Popen[bytes]", out: Path) -> None:
        self._process, self._out = process, out

    def stop(self, *, wait: bool) -> None:
        """Ends it; with `wait` it is given the time that it was to run."""
        if not wait and self._process.poll() is None:
            self._process.terminate()
        self._process.wait(300)

    @property
    def cpu_s(self) -> float:
        """CPU seconds since its start, while it runs."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    @property
    def records(self) -> list[Record]:
        return load_generator.read(self._out)


@contextlib.contextmanager
def system(
    folder: Path,
    pipeline: Path,
    *,
    versions: int,
    steps: int,
    threads: int,
    env: Mapping[str, str],
    workers: int = 1,
    gateways: int = 1,
) -> Iterator[tuple[System, list[str]]]:
    """Everything up and serving the first of the ring."""
    data = folder / "data"
    registry = FilesRegistry(data / "registry")
    made = ring(registry, pipeline, versions, [steps])
    deploy(registry, made[0], steps)
    env = {"WORKER_CACHE_DIR": str(CACHE.resolve()), **env}
    options = StackOptions(
        data=data, port=0, workers=workers, gateways=gateways, distiller=False, threads=threads, env=env
    )
    with Stack(options) as stack:
        yield System(stack, folder), made
