"""What tests of distillation jobs share: a tiny teacher behind a deployment, a Redis, and a distiller to run them."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from distill_jobs import assessment
from distill_jobs.jobs import DistillJob
from distill_jobs.queue import JobQueue, connect
from distill_jobs.records import RESULT, JobRecords
from distill_jobs.service import Service
from distill_jobs.settings import DistillerSettings
from engines.artefact import import_diffusers
from engines.manifest import Schedule
from engines.registry.base import Outcome, Registry, Revision, TierTarget
from engines.registry.files import FilesRegistry
from tests import tiny_sd
from tests.eventually import eventually

DEPLOYMENT = "tiny"
PROMPTS = ["a red circle", "a blue square", "two shapes on white", "the small circle", "a blue circle on the left"]
SEARCH = {"name": "optimal_steps", "batch": 4, "fine": 4, "reference_steps": 4}
LENIENT = {"fd_ratio": 1e6, "alignment_ratio": None, "diversity_ratio": None, "grain_ratio": None}


def spec(**changes: Any) -> dict[str, Any]:
    """A job of some seconds."""
    body: dict[str, Any] = {
        "teacher": {"id": DEPLOYMENT, "steps": 4, "guidance": 2.0},
        "student": {"name": "tiny-fast", "steps": [1, 2]},
        "method": {"name": "kd", "pairs": 64, "batch": 8, "teacher_steps": 4},
        "schedule": SEARCH,
        "data": {"prompts": PROMPTS},
        "train": {"iterations": 12, "precision": "fp32", "checkpoint_every": 4},
        "eval": {"samples": 16, "small_samples": 16, "every": 6},
        "publish": {"deployment": DEPLOYMENT, "tiers": {"low": 1, "medium": 2}},
        "gates": LENIENT,
    }
    return {**body, **changes}


def deploy_teacher(registry: Registry, folder: Path) -> str:
    directory = tiny_sd.write(folder)
    version = import_diffusers(
        directory, registry, name="tiny-teacher", schedules=tiny_sd.SCHEDULES, guidance=tiny_sd.GUIDANCE
    )
    registry.commit(
        Revision(
            deployment=DEPLOYMENT,
            number=1,
            tiers={"high": TierTarget(student=version, steps=4)},
            default_tier="high",
            allowed={version: [4]},
            created_at=_now(),
        )
    )
    return version


@dataclass
class Workshop:
    """A registry with a deployed teacher, a queue, and the settings of its distiller."""

    registry: FilesRegistry
    queue: JobQueue
    settings: DistillerSettings

    @property
    def records(self) -> JobRecords:
        return self.queue.records

    def submit(self, **changes: Any) -> DistillJob:
        return self.queue.submit(spec(**changes))

    def state(self, job_id: str) -> str:
        return str(self.records.get(job_id).state)

    def events(self, job_id: str, kind: str) -> list[Mapping[str, Any]]:
        return [event for event in self.records.events(job_id) if event["event"] == kind]

    def await_state(self, job_id: str, *states: str, within_s: float = 600) -> str:
        def reached() -> str | None:
            state = self.state(job_id)
            return state if state in states or state in ("succeeded", "failed", "canceled") else None

        state = eventually(reached, within_s)
        assert state in states, f"{state}: {self.records.get(job_id).log[-1].error}"
        return state

    @contextmanager
    def distiller(self) -> Iterator[Service]:
        """A service in a thread, stopped on leaving as SIGTERM would. What it says of speeds is from few repeats: all
        of them take longer than the rest of a tiny job."""
        stop = threading.Event()
        service = Service(self.settings, self.registry, self.queue)
        thread = threading.Thread(target=service.run_forever, args=(stop,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assessment, "_REPEATS", 2)
            thread.start()
            try:
                yield service
            finally:
                stop.set()
                thread.join()

    @contextmanager
    def workers(self, deployment: str = DEPLOYMENT, *, refuse: str | None = None) -> Iterator[None]:
        """Settles candidates as workers would: live at once, or dropped for the reason given."""
        stop = threading.Event()

        def settle() -> None:
            while not stop.wait(0.02):
                for candidate in self.registry.pending(deployment):
                    current = self.registry.current(deployment)
                    assert current is not None
                    number = current.number + 1
                    if refuse is None:
                        self.registry.commit(candidate.revision(number, created_at=_now()))
                    outcome = Outcome(
                        swap_id=candidate.swap_id,
                        state="live" if refuse is None else "dropped",
                        reason=refuse,
                        revision=number if refuse is None else None,
                        at=_now(),
                    )
                    self.registry.settle(deployment, candidate.swap_id, outcome)

        thread = threading.Thread(target=settle)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def prepared(path: Path, body: Mapping[str, Any], deploy: Callable[[Registry, Path], str] = deploy_teacher) -> Path:
    """The folder of a job that was prepared, as a trainer alone needs it."""
    registry = FilesRegistry(str(path / "registry"))
    version = deploy(registry, path / "pipeline")
    folder = registry.job_path(JobRecords(registry).create(body).id)
    assert folder is not None
    told = {"registry": str(path / "registry"), "work": str(path / "work"), "teacher": version, "guidance": 2.0}
    (folder / "trainer.json").write_text(json.dumps({**told, "features": None}))
    (folder / "schedule.json").write_text(json.dumps({"schedules": {}, "bf16": False, "spent_s": 0.0}))
    return folder


def plant(
    shop: Workshop,
    job_id: str,
    weights: Mapping[str, Tensor],
    schedules: Mapping[int, Schedule],
    prepared_as: str | None = None,
) -> None:
    """What a trainer would have left, so that the service goes on with these weights: the way in for a bad student.
    `prepared_as` is a job of the same teacher and schedules, whose judged preparation becomes this one's too."""
    if prepared_as:
        done = shop.records.read(prepared_as, RESULT) or {}
        shop.records.write(job_id, RESULT, {key: done[key] for key in ("schedule_student", "schedule", "teacher_at")})
    folder = shop.registry.job_path(job_id)
    assert folder is not None
    (folder / "trained").mkdir()
    written = {str(k): schedule.model_dump(mode="json") for k, schedule in schedules.items()}
    (folder / "schedule.json").write_text(json.dumps({"schedules": written, "seconds": 0.0}))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "trained/weights.safetensors")
    needed = {"memory_bytes": 0, "train_seconds": 0.0}
    said = {"schedules": written, "inputs": [], "measured": needed}
    (folder / "trained/result.json").write_text(json.dumps(said))


def workshop(
    folder: Path, redis_url: str, deploy: Callable[[Registry, Path], str] = deploy_teacher, **settings: Any
) -> Workshop:
    registry = FilesRegistry(str(folder / "registry"))
    deploy(registry, folder / "pipeline")
    told = {"backend": "eager", "nice": 0, "poll_s": 0.05, "lease_s": 2.0, "swap_timeout_s": 20.0}
    made = DistillerSettings(
        redis_url=redis_url,
        registry_url=str(folder / "registry"),
        work_dir=folder / "work",
        **{**told, **settings},  # type: ignore[arg-type]
    )
    return Workshop(registry, JobQueue(connect(redis_url), JobRecords(registry)), made)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
