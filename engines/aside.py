"""Runs one call in a thread of its own, for what takes longer than whoever asks may wait, such as a compiler.

Nothing can stop such a call in the middle: when the process is to end, it ends over it (`leave`).
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Aside(threading.Thread):
    """A thread that may be in native code when the process is to end."""

    def __init__(self, call: Callable[[], object], name: str) -> None:
        super().__init__(target=call, name=name, daemon=True)


def run(call: Callable[[], T], name: str, *, nice: int = 0) -> "Future[T]":
    """Calls it in a thread that is lowered by `nice` (0..19), which on Linux is the thread's own niceness."""
    future: Future[T] = Future()
    Aside(lambda: _call(call, future, nice), name).start()
    return future


def leave() -> None:
    """Ends the process with exit code 0 if such a thread still runs; to be called when all that matters is done.

    At Python's own end a thread that comes back from native code is torn down inside it, and C++ aborts over that. What
    the thread had built elsewhere dies with the process, and what it was writing into the engine cache is not whole.
    """
    running = [thread.name for thread in threading.enumerate() if isinstance(thread, Aside)]
    if not running:
        return
    log.info("left unfinished", extra={"threads": running})
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _call(call: Callable[[], T], future: "Future[T]", nice: int) -> None:
    if nice and hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
