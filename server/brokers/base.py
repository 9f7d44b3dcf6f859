"""The broker: queues, single terminal transitions, leases and announcements between gateways and workers.

One broker object belongs to one process and has one `identity`: `replies:<identity>` is where a gateway
hears of its requests, `worker:<identity>` is a worker's lease. An identity is never used twice (see
`new_identity`): a restarted worker must not revive the lease of the one whose claims have to return.

What holds for every implementation:
* every published request reaches exactly one of succeeded, failed, canceled, expired, and whoever asks
  for that transition is told whether it was theirs; with it, once, the version's pin is released;
* a claim returns to the others only when its worker's lease is gone, never because time has passed;
* every operation may be repeated after a broken connection; what cannot be done within the retries
  raises `engines.errors.Unavailable`;
* `timeout_s=0` does not wait and `None` waits for ever.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from server.messages import GenerateRequest, GenerateResult, RequestClass, State, StepEvent

NOWHERE: Mapping[str, int] = MappingProxyType({})
POISONED_AT = 3  # the delivery at which a request is given up, because two workers died with it


class StaleVersion(Exception):
    """The version that a request names is no longer servable: resolve it again and publish anew."""

    def __init__(self, deployment: str, version: str) -> None:
        super().__init__(f"{version} is no longer servable in deployment {deployment!r}: resolve again")
        self.deployment = deployment
        self.version = version


def new_identity(role: str) -> str:
    """A name for this process that no other process has or had, such as `worker-9f2c41d0b7a8`."""
    return f"{role}-{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A request in its queue. `created` is False when this id had been published before."""

    id: str
    entry_id: str
    enqueued_ms: int  # broker's clock
    deadline_ms: int  # broker's clock: enqueued_ms + budget_ms
    created: bool = True


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that this worker answers. `deliveries` counts the workers that had it, this one included."""

    request: GenerateRequest
    stream: str
    entry_id: str
    enqueued_ms: int
    deliveries: int = 1

    @property
    def deadline_ms(self) -> int:
        return self.enqueued_ms + self.request.budget_ms

    @property
    def returned(self) -> bool:
        """A worker died with it: run it alone."""
        return self.deliveries > 1

    @property
    def poisoned(self) -> bool:
        return self.deliveries >= POISONED_AT


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a request; times are milliseconds of the broker's clock."""

    id: str
    state: State
    deployment: str
    version: str
    owner: str
    enqueued_ms: int
    deadline_ms: int
    started_ms: int | None = None
    ended_ms: int | None = None
    worker: str | None = None
    position: int | None = None  # requests of its class that may go before it; only when asked for, only while queued
    result: GenerateResult | None = None  # once ended


@dataclass(frozen=True, slots=True)
class Emitted:
    """One progress event, with the encoded picture of a partial image."""

    event: StepEvent
    data: bytes | None = None


OWNERS = 64
"""Of how many at most a class says what each has waiting: every gateway asks, and often."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """The load of a deployment. `cost_s` sums `GenerateRequest.cost_s` of everything unfinished, per class.

    `owed_s` is the same by owner; empty where these are more than `OWNERS`.
    """

    waiting: dict[RequestClass, int]
    running: int
    cost_s: dict[RequestClass, float]
    owed_s: dict[RequestClass, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker whose lease lives, and what it last said of itself (deployments, versions, costs …)."""

    id: str
    renewed_ms: int
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """How far one worker is with a swap."""

    worker: str
    phase: str
    reason: str | None
    at_ms: int  # when it entered this phase
    seconds: dict[str, float] = field(default_factory=dict)  # time spent in the phases before


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an idempotency key stands for."""

    body_hash: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """One answer for `finish_many`."""

    claim: Claim
    result: GenerateResult
    images: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """An end and its pictures, None for each that has expired."""

    result: GenerateResult
    images: Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class Store:
    """How the server keeps what it was given. `limit_bytes` is the memory of its machine where it has no own limit."""

    memory_bytes: int
    limit_bytes: int
    durable: bool  # appends to a file, and the last writes succeeded


class Broker(Protocol):
    """One process's view of the queues. All coroutines belong to one event loop."""

    identity: str

    async def start(self) -> None:
        """Connects and checks the server.

        Raises:
            Unavailable: it cannot be reached.
            NotBuilt: it is one that is not supported (Redis Cluster); the message says what is.
        """

    async def close(self) -> None:
        """Ends background tasks and connections. Claims stay claimed: `release_lease` gives them back."""

    def now_ms(self) -> int:
        """The broker's clock, on which deadlines are; costs no round trip."""

    async def ping(self) -> bool:
        """Whether the server answers now, without retries."""

    async def store(self) -> Store | None:
        """None where that is the memory of this process."""

    # --- gateway ---------------------------------------------------------------------------------

    async def publish(self, request: GenerateRequest, source: bytes | None = None) -> Entry:
        """Queues a request and pins its version, in one step. The same id again returns the first entry.

        `source` is the picture that it changes, which is kept until the request ends.

        Raises:
            StaleVersion: the version is not servable (any more); nothing was queued.
        """

    async def wait(self, request_id: str, timeout_s: float | None) -> GenerateResult | None:
        """The answer, as soon as there is one; None after `timeout_s`, and for an id that nobody knows.

        Works for requests of other gateways and of earlier lives of this one. A request that this
        gateway published and that the server lost in a crash is published again under its id.
        """

    async def answer(self, request_id: str, timeout_s: float | None) -> Answered | None:
        """`wait`, and the pictures with it: small ones take no round trip of their own."""

    def events(self, request_id: str, *, after: int = 0) -> AsyncIterator[Emitted]:
        """Progress from the first event on (or after the first `after` ones), until and with `ended`.

        Ends at once for an id that nobody knows. Close it (`aclose`) when the client has gone.
        """

    async def result(self, request_id: str) -> GenerateResult | None:
        """The answer if there is one now."""

    async def image(self, request_id: str, index: int) -> bytes | None:
        """An encoded picture of a succeeded request; None when it has expired."""

    async def images(self, request_id: str, count: int) -> list[bytes | None]:
        """The first `count` pictures in one round trip."""

    async def status(self, request_id: str, *, with_position: bool = False) -> Status | None: ...

    async def cancel(self, request_id: str) -> bool:
        """Ends a request as canceled and tells the workers; whether this was the one that ended it."""

    async def expire(self, request_id: str) -> bool:
        """Ends a request as expired with `deadline_exceeded`; whether this was the one that ended it."""

    async def queue_state(self, deployment: str) -> QueueState: ...

    async def remember(
        self, key: str, body_hash: str, request_id: str, ttl_s: float, *, owner: str = ""
    ) -> Remembered | None:
        """Binds an idempotency key of an owner to a request. None: done. Otherwise what it is bound to already."""

    # --- worker ----------------------------------------------------------------------------------

    async def claim(
        self,
        deployments: Sequence[str],
        max_rows: int,
        block_s: float | None,
        *,
        max_rows_below_high: int | None = None,
        slack_below_ms: int | None = None,
        elsewhere_ms: Mapping[str, int] = NOWHERE,
    ) -> list[Claim]:
        """Takes requests of at most `max_rows` rows in all, high before normal before low; waits for the first.

        Within a class, owners take turns by the engine time they were handed out, and of an owner's requests the
        most due goes first (`server.fair_queue`). Now and then normal or low goes first, so that neither starves.
        `max_rows_below_high` caps the rows of class normal and low, but for those whose `due_after_s` is below
        `slack_below_ms`. A request with more rows than `max_rows` is handed out alone. Requests of the versions in
        `elsewhere_ms` are left to other workers until so long after they came; what is behind them is not. Messages
        that cannot be read are answered `unsupported_message` here. A lapsed lease is renewed first.
        """

    async def source(self, request_id: str) -> bytes | None:
        """The picture that a request changes; None when it has none, or has ended."""

    async def running(self, claims: Sequence[Claim]) -> list[Claim]:
        """Marks claims as running and returns those still wanted; the others have ended (canceled, expired)."""

    async def emit(self, event: StepEvent, data: bytes | None = None) -> None:
        """Sends progress. Best effort: what cannot be sent is dropped, the picture is what counts."""

    async def finish(self, claim: Claim, result: GenerateResult, images: Sequence[bytes] = ()) -> bool:
        """Ends a claim with its answer; False: somebody else ended it first, and the images were dropped.

        After `Unavailable` the claim is no longer held: finish it again, or `reclaim` hands it out again.
        """

    async def finish_many(self, answers: Sequence[Finished]) -> list[bool]:
        """`finish` for several in one round trip."""

    async def poison(self, claim: Claim) -> bool:
        """Ends a claim as failed with `request_poisoned` and keeps it in the deployment's dead-letter stream."""

    async def dead_letters(self, deployment: str) -> list[GenerateRequest]:
        """The poisoned requests that are kept, oldest first."""

    async def reclaim(self, deployments: Sequence[str], *, max_requests: int = 32) -> list[Claim]:
        """Takes over claims whose worker's lease is gone, and own ones that were lost on the way here.

        Call it about once a second. Run what `returned` alone and `poison` what is `poisoned`.
        """

    async def renew_lease(self, info: Mapping[str, Any]) -> None:
        """Says that this worker lives, for the lease time (5 s), and what it holds."""

    async def release_lease(self) -> None:
        """Ends the lease now: what is still claimed goes to the others."""

    def keep_lease(self, info: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Renews the lease from a thread of its own while the context is open, and releases it at its end.

        The event loop may be busy for longer than a lease; the thread is not. `info` is called in it. Over Redis a loop
        that hangs for a minute loses its lease.
        """

    async def workers(self) -> list[WorkerInfo]:
        """Workers whose lease lives."""

    def cancels(self) -> AsyncIterator[str]:
        """Ids of requests that were canceled or expired while claimed, from now on. Never ends."""

    # --- swaps -----------------------------------------------------------------------------------

    async def report_phase(
        self,
        swap_id: str,
        worker_id: str,
        phase: str,
        reason: str | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Writes how far a worker is with a swap; reporting the same phase again keeps its first time."""

    async def phases(self, swap_id: str) -> dict[str, Phase]:
        """The last phase of each worker that reported one."""

    async def acquire(self, name: str, owner: str, ttl_s: float) -> int | None:
        """A named lease: its fencing number, higher than any before; None while another owner has it.

        The owner that has it already gets the same number again, and the full time.
        """

    async def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        """False: it is not (any more) this owner's. Stop writing."""

    async def release(self, name: str, owner: str) -> None: ...

    async def set_servable(self, deployment: str, versions: Iterable[str]) -> None:
        """The versions that `publish` accepts from now on; until this was called it accepts all."""

    async def servable(self, deployment: str) -> frozenset[str] | None:
        """None: never set."""

    async def retire(self, deployment: str, version: str) -> bool:
        """Removes a version from the servable ones if no unfinished request pins it; whether it is gone."""

    async def pins(self, deployment: str) -> dict[str, int]:
        """Unfinished requests per version; versions without any are absent."""

    async def announce(self, topic: str) -> None:
        """Wakes everybody who listens; nothing is stored and nothing depends on it."""

    def announcements(self) -> AsyncIterator[str]:
        """Topics announced from now on. Never ends."""


def open_broker(url: str, identity: str, **options: Any) -> Broker:
    """The broker at `redis://`, `rediss://` or `unix://`, or `memory:` for one of this process alone.

    `options` are those of `RedisBroker` and `MemoryBroker`: `lease_s`, `result_ttl_s`.
    """
    if url in ("memory:", "memory://"):
        from server.brokers.memory import MemoryBroker, MemoryServer

        return MemoryBroker(MemoryServer(), identity, **options)
    from server.brokers.redis import RedisBroker

    return RedisBroker(url, identity, **options)
