"""A steady stream of requests, as a user population would send it: open loop, so that a slow answer delays nobody else.

Used by the demo while students change underneath, and by nothing in production.
"""

import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from engines.errors import FewstepError
from server.client import Client


@dataclass(slots=True)
class Tally:
    """What came of the requests so far."""

    sent: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    by_version: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)


class Stream:
    """Sends `body` with a new seed `rate` times a second from `start` until `stop`."""

    def __init__(self, client: Client, body: dict[str, Any], prompts: list[str], rate: float) -> None:
        self._client, self._body, self._prompts = client, body, prompts
        self._period_s = 1 / rate
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="stream")
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._pending: list[Future[None]] = []
        self.tally = Tally()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> Tally:
        """Ends the stream and waits for every answer."""
        self._stopping.set()
        self._thread.join()
        for future in self._pending:
            future.result()
        self._pool.shutdown()
        return self.tally

    def wait_for(self, answers: int) -> None:
        """Returns when so many answers are in."""
        while len(self.tally.latencies_ms) + self.tally.failed < answers:
            self._stopping.wait(self._period_s)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._pending.append(self._pool.submit(self._send, self.tally.sent))
            self.tally.sent += 1
            due_s += self._period_s

    def _send(self, index: int) -> None:
        body = {**self._body, "prompt": self._prompts[index % len(self._prompts)], "seed": index}
        began_s = time.perf_counter()
        try:
            picture = self._client.generate(body)
        except FewstepError as error:
            with self._lock:
                self.tally.failed += 1
                self.tally.errors.append(f"{error.code}: {error.message}")
            return
        with self._lock:
            self.tally.by_version[picture.version] += 1
            self.tally.latencies_ms.append((time.perf_counter() - began_s) * 1000)
