"""Whether a request may join the queue: pure, from what waits and what workers measured.

An honest 429 beats a queue that answers everybody late. A wait is predicted in seconds of engine
time, never in numbers of requests: a 1-step and a 50-step request are not the same thing.
"""

from dataclasses import dataclass

from engines.errors import Overloaded, Unavailable

# Where no worker ever measured anything, nobody is refused for it.
_RESTART_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """What stands before a request. `wait_s`: when an engine will be free for it; `service_s`: what it takes alone."""

    num_workers: int
    wait_s: float
    service_s: float
    worker_seen_s_ago: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    max_wait_s: float
    worker_grace_s: float


def admit(load: Load, limits: Limits, *, budget_s: float) -> float:
    """The predicted wait in seconds of a request that may join.

    Raises:
        Unavailable: no worker serves this deployment, and none has for longer than a restart takes.
        Overloaded: it would wait too long or miss its own deadline; `retry_after_s` is when it would not.
    """
    if load.num_workers == 0 and load.worker_seen_s_ago > limits.worker_grace_s:
        raise Unavailable("no worker serves this model at the moment: try again soon", retry_after_s=_RESTART_RETRY_S)
    allowed_s = min(limits.max_wait_s, max(0.0, budget_s - load.service_s))
    excess_s = load.wait_s - allowed_s
    if excess_s > 0:
        raise Overloaded(
            f"the queue is {load.wait_s:.1f} s long and this request may wait {allowed_s:.1f} s: "
            f"try again in {excess_s:.1f} s, or allow it more time",
            retry_after_s=excess_s,
        )
    return load.wait_s
