"""The trainer as its service sees it: a process to start, to look after, and to bring to its end."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Phase = Literal["prepare", "train"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all processes of one life that are there now."""

    cpu_s: float = 0.0
    memory_bytes: int = 0


class TrainerProcess:
    """One life. In a session of its own, so that a Ctrl-C meant for the service lets it checkpoint first."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
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

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def command(folder: Path, phase: Phase, *, fence: int, threads: int, nice: int, processes: int = 1) -> list[str]:
    """What is prepared is prepared by one process; `processes` train."""
    options = {"phase": phase, "fence": fence, "threads": threads, "nice": nice, "parent": os.getpid()}
    program = "distill_jobs.train"
    if phase == "train" and processes > 1:
        program = "distill_jobs.launch"
        options["processes"] = processes
    told = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", program, str(folder), *told]
