"""Trainers as processes of their distiller, on its machine: they die with it."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from distill_jobs.launchers.base import Hearing, Launcher, Order, Usage, command
from distill_jobs.settings import DistillerSettings


class ProcessLauncher:
    def __init__(self, settings: DistillerSettings) -> None:
        pass

    def start(self, order: Order, hearing: Hearing) -> "TrainerProcess":
        hearing.begins()
        return TrainerProcess(command(order, parent=os.getpid()), order.log)

    def sweep(self, over: Callable[[str], bool]) -> None:
        """Nothing is left: they die with their distiller."""


class TrainerProcess:
    """One life. In a session of its own, so that a Ctrl-C meant for the service lets it checkpoint first."""

    def __init__(self, told: Sequence[str], log: Path) -> None:
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                told, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def usage(self) -> Usage:
        """Zero once it has ended."""
        cpu_s, memory_bytes = 0.0, 0
        if self._process.returncode is not None:  # its id may be another process' by now
            return Usage(cpu_s, memory_bytes)
        with suppress(psutil.NoSuchProcess):
            trainer = psutil.Process(self.pid)
            for process in (trainer, *trainer.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    cpu_s += times.user + times.system
                    memory_bytes += process.memory_info().rss
        return Usage(cpu_s, memory_bytes)

    def checkpoint(self, grace_s: float) -> None:
        """Asks it to finish its step, save and go; kills it if that takes longer than `grace_s`."""
        self._process.send_signal(signal.SIGTERM)
        if self.wait(grace_s) is None:
            self.kill()

    def leave(self, grace_s: float) -> None:
        self.checkpoint(grace_s)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


LAUNCHER: type[Launcher] = ProcessLauncher
