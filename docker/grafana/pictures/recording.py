"""A real system that goes through in minutes what a deployment sees in weeks, with a Prometheus that scrapes it.

A job distils a student that goes live under traffic; clients cancel, ask too much or too late; a candidate is
refused, a revision rolled back, a worker killed. So every panel of every dashboard has something to show.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import redis

from engines.errors import FewstepError
from engines.registry.files import FilesRegistry
from server.client import Client
from server.embedded import Stack, StackOptions
from server.stream import Stream
from tests.eventually import eventually
from tests.otlp_receiver import receiving
from tests.prometheus_server import running

SCRAPE_CONFIG = Path(__file__).parents[2] / "prometheus" / "prometheus.yml"
MODEL = "shapes"
PATH = "/v1/generations"
PROMPTS = ["a red circle", "a large blue square", "a green ring on a black background", "a yellow triangle"]
JOB: dict[str, Any] = {
    "teacher": {"id": MODEL},
    "student": {"name": "shapes-fast", "steps": [1, 4]},
    "method": {"name": "kd", "pairs": 256, "batch": 32, "teacher_solver": "dpmpp_2m", "teacher_steps": 8, "eta": 0},
    "schedule": {"name": "optimal_steps", "batch": 8, "fine": 16, "reference_steps": 16},
    "data": {"prompts": MODEL},
    "train": {"iterations": 120, "seed": 0},
    "eval": {"samples": 128, "small_samples": 32, "every": 20, "best_by": "fd"},
    "publish": {"deployment": MODEL, "tiers": {"low": 1, "medium": 4}},
    # The minutes of a picture make no student for production.
    "gates": {"fd_ratio": 1e3, "alignment_ratio": 0.1, "diversity_ratio": 0.1, "grain_ratio": 1e3},
}
_JOB_WITHIN_S, _SWAP_WITHIN_S, _CALM_S = 3600.0, 300.0, 20.0


@dataclass(frozen=True, slots=True)
class Span:
    """What the pictures show. Unix seconds."""

    begin_s: float
    end_s: float

    @classmethod
    def of(cls, folder: Path) -> "Span":
        return cls(**json.loads((folder / "span.json").read_text()))


def record(folder: Path) -> None:
    """Leaves the data of a Prometheus in `folder`, with the span of time to look at."""
    with receiving() as collector:
        # Without traces there would be no exemplars.
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        # The trainer, which yields to all else, would hardly move beside that traffic.
        env = {"WORKER_KEEP_PREVIOUS_S": "5", "DISTILLER_NICE": "0"}
        with Stack(StackOptions(data=folder / "system", port=0, workers=2, threads=1, env=env)) as stack:
            targets = {
                "fewstep-gateway": [f"127.0.0.1:{stack.port}"],
                "fewstep-worker": [f"127.0.0.1:{stack.metrics_ports[f'worker-{index}']}" for index in range(2)],
                "fewstep-distiller": [f"127.0.0.1:{stack.metrics_ports['distiller']}"],
            }
            with running(folder, targets, SCRAPE_CONFIG):
                begin_s = time.time()
                Story(stack).tell()
                (folder / "span.json").write_text(json.dumps(asdict(Span(begin_s, time.time()))))


class Story:
    """What happens, in its order."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._client = Client(stack.url)
        self._over = threading.Event()

    def tell(self) -> None:
        with self._traffic({"tier": "auto"}, rate=1), self._traffic({"tier": "high"}, rate=0.2), self._troubles():
            self._calm()
            job = self._client.post("/v1/distillation/jobs", JOB)["id"]
            student = self._student_of(job)
            self._calm()
            self._crowd()
            self._calm()
            self._swap("rollback", {})
            self._calm()
            with self._damaged(student):
                self._swap("promote", _tiers(student))
            self._calm()
            self._swap("promote", _tiers(student))
            self._calm()
            os.kill(self._stack.supervisor.pid("worker-1"), signal.SIGKILL)
            self._forgetful_redis()
            self._calm()

    @contextmanager
    def _traffic(self, body: dict[str, Any], rate: float) -> Iterator[None]:
        stream = Stream(self._client, {"model": MODEL, **body}, PROMPTS, rate)
        stream.start()
        try:
            yield
        finally:
            stream.stop()

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        """Now and then somebody cancels, cannot wait, or asks for what is out of time at once."""
        thread = threading.Thread(target=self._trouble, name="trouble")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _trouble(self) -> None:
        while not self._over.wait(3.0):
            with suppress(FewstepError):
                asked = self._ask({"tier": "high", "n": 2}, prefer="respond-async")
                httpx.delete(f"{self._stack.url}{PATH}/{asked['id']}", timeout=30)
            for body in ({"max_latency_ms": 60}, {"tier": "high", "n": 4, "timeout_ms": 400}):
                with suppress(FewstepError):
                    self._ask(body)

    def _ask(self, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        return self._client.post(PATH, {"model": MODEL, "prompt": PROMPTS[0], **body}, headers)

    def _student_of(self, job: str) -> str:
        """The version that the job made, once it is live."""

        def ended() -> dict[str, Any] | None:
            record = self._client.get(f"/v1/distillation/jobs/{job}")
            return record if record["status"] in ("succeeded", "failed", "canceled") else None

        record = eventually(ended, _JOB_WITHIN_S, pause_s=1.0)
        assert record["status"] == "succeeded", record
        version: str = record["student"]
        return version

    def _crowd(self) -> None:
        """More than can be done in time: some wait, some are served in fewer steps, some are refused."""

        def impatient(number: int) -> None:
            with suppress(FewstepError):
                self._ask({"tier": ("auto", "high")[number % 2], "n": 4, "seed": number, "timeout_ms": 12_000})

        with ThreadPoolExecutor(96) as pool:
            list(pool.map(impatient, range(240)))

    def _swap(self, verb: str, body: dict[str, Any]) -> None:
        path = f"/v1/deployments/{MODEL}"
        swap = self._client.post(f"{path}/{verb}", body)["swap_id"]
        shown = f"{path}/swaps/{swap}"
        eventually(lambda: self._client.get(shown)["state"] != "pending", _SWAP_WITHIN_S, pause_s=0.2)

    @contextmanager
    def _damaged(self, version: str) -> Iterator[None]:
        """A byte of its weights is another one meanwhile: workers refuse it."""
        registry = FilesRegistry(Path(self._stack.registry_url))
        weights = registry.student(version).components["denoiser"].weights
        path = Path(self._stack.registry_url) / "blobs" / weights
        whole = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        try:
            yield
        finally:
            path.write_bytes(whole)

    def _forgetful_redis(self) -> None:
        with redis.Redis.from_url(self._stack.redis_url) as server:
            server.config_set("appendonly", "no")
            self._calm()
            server.config_set("appendonly", "yes")

    def _calm(self) -> None:
        self._over.wait(_CALM_S)


def _tiers(student: str) -> dict[str, Any]:
    return {"tiers": {"low": {"student": student, "steps": 1}, "medium": {"student": student, "steps": 4}}}
