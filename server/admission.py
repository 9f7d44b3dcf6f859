"""Whether a request may join the queue: pure, from what waits and what workers measured.

An honest 429 beats a queue that answers everybody late. A wait is predicted in seconds of engine
time, never in numbers of requests: a 1-step and a 50-step request are not the same thing.
"""

from dataclasses import dataclass

from engines.errors import Overloaded, Unavailable

_RESTART_RETRY_S = 2.0
_LOADING_RETRY_S = 30.0  # at most


@dataclass(frozen=True, slots=True)
class Loading:
    """What a worker does before it can serve, and for how long it has been at it."""

    phase: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What stands before a request. `wait_s`: when an engine will be free for it; `service_s`: what it takes alone.

    `ready_in_s`: when its version is in memory, where it is not. `lump_s`, `booked_s` and `stretch` are those of
    `waits`. Where no worker ever measured anything all seconds are 0, and nobody is refused for it.
    """

    num_workers: int
    wait_s: float
    service_s: float
    worker_seen_s_ago: float = 0.0
    loading: Loading | None = None
    lump_s: float = 0.0
    booked_s: float = 0.0
    stretch: float = 1.0
    ready_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """`look_s`: how old what a gateway knows of the queue may be."""

    max_wait_s: float
    worker_grace_s: float
    look_s: float = 0.0


def admit(load: Load, limits: Limits, *, budget_s: float) -> None:
    """Nothing where a request may join.

    Raises:
        Unavailable: no worker serves this deployment, and none has for longer than a restart takes.
        Overloaded: it would wait too long or miss its own deadline; `retry_after_s` is when it would not.
    """
    if load.num_workers == 0 and load.worker_seen_s_ago > limits.worker_grace_s:
        raise unserved(load.loading)
    allowed_s = min(limits.max_wait_s, max(0.0, budget_s - load.service_s))
    if load.ready_in_s > max(allowed_s, load.wait_s):
        again_s = load.ready_in_s - allowed_s + limits.look_s
        raise Overloaded(
            f"the version that this request is for will be in memory in {load.ready_in_s:.1f} s and it may wait "
            f"{_told(allowed_s)}: try again in {again_s:.1f} s, or allow it more time",
            retry_after_s=again_s,
        )
    excess_s = load.wait_s - allowed_s
    if excess_s > 0:
        # A queue shrinks only when requests end, a whole batch at a time, and is seen to have shrunk at the next look.
        again_s = load.stretch * (min(load.wait_s, excess_s + load.lump_s) + load.booked_s) + limits.look_s
        raise Overloaded(
            f"the queue is {_told(load.wait_s)} long and this request may wait {_told(allowed_s)}: "
            f"try again in {again_s:.1f} s, or allow it more time",
            retry_after_s=again_s,
        )


def _told(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def unserved(loading: Loading | None) -> Unavailable:
    """No worker serves a model. How long loading takes nobody knows: what took so long may well take as long again."""
    if loading is None:
        return Unavailable("no worker serves this model at the moment: try again soon", retry_after_s=_RESTART_RETRY_S)
    again_s = min(_LOADING_RETRY_S, max(_RESTART_RETRY_S, loading.for_s))
    return Unavailable(
        f"a worker has been loading this model for {loading.for_s:.0f} s ({loading.phase}): "
        f"try again in {again_s:.0f} s",
        retry_after_s=again_s,
    )
