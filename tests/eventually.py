"""Waits for something that another process will make true, without a bare sleep in any test."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 3  # times are those of a quiet machine; a host that others use too may be this much slower
_PAUSE_S = 0.02


def eventually(check: Callable[[], T], within_s: float = 5.0, *, pause_s: float = _PAUSE_S) -> T:
    """The first truthy answer of `check`; fails with its last answer after `within_s` seconds times `PATIENCE`."""
    deadline = time.monotonic() + within_s * PATIENCE
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {within_s} s × {PATIENCE}: {check} last said {answer!r}"
        time.sleep(pause_s)
    return answer


async def aeventually(check: Callable[[], Awaitable[T]], within_s: float = 5.0) -> T:
    """`eventually` for a coroutine function."""
    deadline = time.monotonic() + within_s * PATIENCE
    while not (answer := await check()):
        assert time.monotonic() < deadline, f"not within {within_s} s × {PATIENCE}: {check} last said {answer!r}"
        await asyncio.sleep(_PAUSE_S)
    return answer
