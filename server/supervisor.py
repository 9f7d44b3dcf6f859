"""Starts processes, watches them and starts again what dies, until it is told to stop.

One long-lived thread makes, watches and ends every child: the parent-death signal follows the thread that forked, so
that thread must outlive them.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import Unavailable

log = logging.getLogger(__name__)

_TICK_S = 0.05
_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
_STEADY_S = 30.0  # a child that ran this long starts its backoff anew


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep alive. `ready` is polled before the next child starts; `grace_s` is its time to stop."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    start_within_s: float = 600.0  # a first start compiles every engine, on a slow machine for minutes
    grace_s: float = 20.0


@dataclass(slots=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    since_s: float
    deaths: int = 0
    restart_at_s: float | None = None


class Supervisor:
    """Children in the order they were given; stopped in the same order, so give the broker last to `stop`.

    Logs go to `<logs>/<name>.log`, appended over restarts.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._wanted: list[tuple[Child, threading.Event]] = []
        self._stopping = threading.Event()
        self._order: list[str] = []
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        logs.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def start(self, child: Child) -> None:
        """Starts a child and waits until it is ready.

        Raises:
            Unavailable: it ended or was not ready in time; the message ends with the tail of its log.
        """
        started = threading.Event()
        with self._lock:
            self._wanted.append((child, started))
        started.wait()
        deadline = time.monotonic() + child.start_within_s
        while not child.ready():
            late = time.monotonic() > deadline
            if late or self._stopping.is_set() or self._running[child.name].deaths >= len(_BACKOFF_S):
                why = "was not ready in time" if late else "ended at its start"
                raise Unavailable(f"{child.name} {why}; the end of {self._log(child.name)}:\n{self.tail(child.name)}")
            time.sleep(_TICK_S)

    def pid(self, name: str) -> int:
        return self._running[name].process.pid

    def pids(self) -> dict[str, int]:
        with self._lock:
            return {name: run.process.pid for name, run in self._running.items() if run.process.poll() is None}

    def deaths(self, name: str) -> int:
        """How often this child ended unasked."""
        return self._running[name].deaths

    def tail(self, name: str, lines: int = 12) -> str:
        path = self._log(name)
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"

    def stop(self, order: list[str] | None = None) -> None:
        """SIGTERM one child after the other, each with its grace; what is left after that is killed."""
        self._order = order or []
        self._stopping.set()
        self._thread.join()

    def kill(self) -> None:
        """Ends everything at once."""
        self._stopping.set()
        for run in self._running.values():
            _signal(run.process, signal.SIGKILL)

    def _end(self, run: _Running) -> None:
        _signal(run.process, signal.SIGCONT)
        _signal(run.process, signal.SIGTERM)
        try:
            run.process.wait(run.child.grace_s)
        except subprocess.TimeoutExpired:
            log.warning("child did not stop in time", extra={"child": run.child.name, "grace_s": run.child.grace_s})
            _signal(run.process, signal.SIGKILL)
            run.process.wait()

    def _watch(self) -> None:
        while not self._stopping.wait(_TICK_S):
            with self._lock:
                wanted, self._wanted = self._wanted, []
                for child, started in wanted:
                    self._running[child.name] = _Running(child, self._spawn(child), time.monotonic())
                    started.set()
                for run in self._running.values():
                    self._revive(run, time.monotonic())
        for name in self._order or list(self._running):
            if name in self._running:
                self._end(self._running[name])

    def _revive(self, run: _Running, now_s: float) -> None:
        if run.process.poll() is None:
            return
        if run.restart_at_s is None:
            run.deaths = 1 if now_s - run.since_s > _STEADY_S else run.deaths + 1
            run.restart_at_s = now_s + _BACKOFF_S[min(run.deaths, len(_BACKOFF_S)) - 1]
            log.warning("child ended", extra={"child": run.child.name, "code": run.process.returncode})
        elif now_s >= run.restart_at_s:
            run.process, run.since_s, run.restart_at_s = self._spawn(run.child), now_s, None

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        launcher = (sys.executable, "-m", "server.child", str(os.getpid()), str(child.nice))
        with self._log(child.name).open("ab") as out:
            return subprocess.Popen(
                (*launcher, *child.command),
                env={**os.environ, **child.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
