"""A whole serving system under load for fault tests: real processes, a tiny model, clients that never give up.

Clients do what the documentation asks of them: a request whose connection broke, or that was refused for now, is
repeated with its `Idempotency-Key`. Afterwards the books are read in Redis itself.
"""

import asyncio
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import redis
import torch
from PIL import Image

from engines.artefact import import_diffusers
from engines.backends.base import tolerance
from engines.loader import load_student
from engines.registry.base import Revision, TierTarget
from engines.registry.files import FilesRegistry
from engines.student import sample
from server.client import Client
from server.embedded import Stack, StackOptions
from server.messages import ENDINGS
from tests import tiny_sd
from tests.eventually import eventually

MODEL = "shapes"
STEPS = 4
PROMPTS = ("a red circle", "two blue shapes")
ALLOWED_ERRORS = frozenset({"deadline_exceeded", "request_poisoned"})
_CLIENTS = 6
_GIVE_UP_S = 90.0


class Books(Protocol):
    """Where it stands what became of requests."""

    redis_url: str
    registry_url: str


def published(data: Path) -> str:
    """The tiny teacher as the whole deployment."""
    registry = FilesRegistry(data / "registry")
    directory = tiny_sd.write(data / "pipeline")
    version = import_diffusers(directory, registry, name="tiny", schedules=tiny_sd.SCHEDULES, guidance=tiny_sd.GUIDANCE)
    registry.commit(
        Revision(
            deployment=MODEL,
            number=1,
            tiers={"medium": TierTarget(student=version, steps=STEPS)},
            default_tier="medium",
            allowed={version: [1, STEPS]},
            created_at="2026-01-01T00:00:00Z",
        )
    )
    return version


@contextmanager
def serving(data: Path, **env: str) -> Iterator[tuple[Stack, str]]:
    """Redis with AOF, one gateway, two workers on the reference backend."""
    version = published(data)
    with Stack(options(data, workers=2, **env)) as stack:
        yield stack, version


def options(data: Path, *, workers: int, gateways: int = 1, **env: str) -> StackOptions:
    chosen = {
        "WORKER_BACKEND": "eager",
        "WORKER_LEASE_S": "2",
        "WORKER_BATCH_SIZES": "[1, 2, 4]",
        "GATEWAY_DEFAULT_TIMEOUT_MS": "60000",
    }
    return StackOptions(
        data=data, port=0, workers=workers, gateways=gateways, distiller=False, threads=1, env=chosen | env
    )


def num_workers(stack: Books) -> int:
    """How many have a lease."""
    with redis.Redis.from_url(stack.redis_url) as client:
        return client.exists(*[name for name in client.scan_iter("fewstep:v1:worker:*")] or ["none"])


def restarted(stack: Stack, name: str, before: int) -> None:
    """The supervisor has started it again, and all gateways can serve."""
    eventually(lambda: stack.supervisor.pids().get(name, before) != before, 60)
    for port in stack.ports.values():
        client = Client(f"http://127.0.0.1:{port}")
        eventually(client.ready, 120)
        client.close()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and its final answer, after how many tries."""

    key: str
    prompt: str
    seed: int
    tries: int
    status: int
    version: str
    request_id: str
    body: bytes
    code: str


@dataclass
class Clients:
    """Clients in a thread of their own, each asking again as soon as it is answered, by turns at each of `urls`."""

    urls: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    patience_s: float = 60.0  # with one try
    answers: list[Asked] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Clients":
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(2 * _GIVE_UP_S)
        assert not self._thread.is_alive()

    def further(self, count: int, within_s: float = 60.0) -> None:
        """Waits for so many more answers."""
        wanted = len(self.answers) + count
        eventually(lambda: len(self.answers) >= wanted, within_s)

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=httpx.Timeout(self.patience_s, connect=2.0)) as http:
            await asyncio.gather(*[self._client(http, number) for number in range(_CLIENTS)])

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        count = 0
        while not self._stopped.is_set():
            await self._ask(http, f"{number}-{count}", PROMPTS[count % 2], 100 * number + count % 4)
            count += 1

    async def _ask(self, http: httpx.AsyncClient, key: str, prompt: str, seed: int) -> None:
        asked = {"model": MODEL, "prompt": prompt, "seed": seed}
        headers = {**self.headers, "idempotency-key": key, "accept": "image/png"}
        tries = 0
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                while True:
                    url = self.urls[(seed + tries) % len(self.urls)]
                    tries += 1
                    try:
                        response = await http.post(f"{url}/v1/generations", json=asked, headers=headers)
                    except httpx.TransportError:
                        await asyncio.sleep(0.1)
                        continue
                    if response.status_code not in (429, 503):
                        break
                    await asyncio.sleep(min(1.0, float(response.headers.get("retry-after-ms", 100)) / 1000))
        except TimeoutError:
            self.unanswered.append(key)
            return
        self.answers.append(_answered(response, key=key, prompt=prompt, seed=seed, tries=tries))


def _answered(response: httpx.Response, **asked: Any) -> Asked:
    code = "" if response.is_success else response.json()["error"]["code"]
    return Asked(
        status=response.status_code,
        version=response.headers.get("x-model-version", ""),
        request_id=response.headers.get("x-generation-id", ""),
        body=response.content,
        code=code,
        **asked,
    )


def check(clients: Clients, stack: Books, version: str) -> None:
    """None unanswered, none twice, each picture right, and no request left anywhere."""
    assert clients.unanswered == []
    errors = [(one.key, one.code) for one in clients.answers if one.status != 200]
    assert {code for _, code in errors} <= ALLOWED_ERRORS, errors
    assert len({one.key for one in clients.answers}) == len(clients.answers)
    good = [one for one in clients.answers if one.status == 200]
    assert len({one.request_id for one in good}) == len(good)
    check_pictures(good, stack, version)
    with redis.Redis.from_url(stack.redis_url, decode_responses=True) as client:
        eventually(lambda: not unfinished(client), 30)
        states = {one.request_id: client.hget(f"fewstep:v1:req:{one.request_id}", "status") for one in good}
        assert set(states.values()) <= {"succeeded"}, states
        for name in client.scan_iter("fewstep:v1:queue:*"):
            assert client.xlen(name) == 0, name
        assert client.hgetall(f"fewstep:v1:pins:{MODEL}") == {}


def unfinished(client: Any) -> list[str]:
    """Requests without a terminal state."""
    names = list(client.scan_iter("fewstep:v1:req:*", count=1000))
    return [name for name in names if client.type(name) == "hash" and client.hget(name, "status") not in ENDINGS]


def check_pictures(good: list[Asked], stack: Books, version: str) -> None:
    registry = FilesRegistry(Path(stack.registry_url))
    student = load_student(registry, registry.student(version))
    allowed = tolerance("eager", "fp32")
    references: dict[tuple[str, int], torch.Tensor] = {}
    for one in good:
        key = (one.prompt, one.seed)
        if key not in references:
            references[key] = sample(student, [one.prompt], [one.seed], STEPS)[0]
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(one.body)).convert("RGB"))).permute(2, 0, 1)
        assert allowed.fault(pixels, references[key]) is None, one.key
