"""What a launcher is: whoever gives a job's trainer a place to run. One file each; the keeper holds the rules.

A trainer finds everything in its job's folder and leaves everything there, so a launcher starts it, says with which
code it ended, and ends it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from distill_jobs.settings import DistillerSettings
from engines import plugins

_PACKAGE = "distill_jobs.launchers"

LOG = "log.txt"
Phase = Literal["prepare", "train"]


@dataclass(frozen=True, slots=True)
class Order:
    """One life of a trainer: `processes` that have `threads` between those on one machine. What they say goes to
    `log`."""

    job_id: str
    folder: Path
    phase: Phase
    fence: int
    threads: int = 1
    nice: int = 0
    processes: int = 1

    @property
    def log(self) -> Path:
        return self.folder / LOG


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all processes of one life that are there now."""

    cpu_s: float = 0.0
    memory_bytes: int = 0


class Life(Protocol):
    """A trainer that was started, or is about to be. Its methods are called from one thread, but for `usage`."""

    def wait(self, timeout_s: float) -> int | None:
        """The exit code (`exit_codes`), negative or above 128 for a signal; None if it still runs after `timeout_s`."""

    def usage(self) -> Usage:
        """Zero where nobody here can tell."""

    def checkpoint(self, grace_s: float) -> None:
        """Asks it to finish its step, save and go, and waits for that for `grace_s` at most."""

    def leave(self, grace_s: float) -> None:
        """Its distiller goes: a trainer that cannot live without one is told to `checkpoint`, another one is left to
        the distiller that comes next. No other method does anything any more."""

    def kill(self) -> None:
        """Ends it, if it has not ended, and takes away what it occupied."""


@dataclass(frozen=True, slots=True)
class Hearing:
    """Who is told of a life: `begins` before a trainer is made (not for one that is found), and it may refuse by an
    error; `note` hears what people want to know of the place where it runs."""

    begins: Callable[[], None] = lambda: None
    note: Callable[[str], None] = lambda message: None


class Launcher(Protocol):
    """One place for trainers."""

    def start(self, order: Order, hearing: Hearing) -> Life:
        """A new life, or the one that an earlier distiller has left."""

    def sweep(self, over: Callable[[str], bool]) -> None:
        """Ends what is left of jobs that are `over`, by their ids."""


def open_launcher(settings: DistillerSettings) -> Launcher:
    """
    Raises:
        UnknownPlugin: no file has a launcher of that name; the message lists those there are.
    """
    made: Launcher = plugins.load(_PACKAGE, settings.launcher, "LAUNCHER")(settings)
    return made


def command(order: Order, *, machines: int = 1, python: str = sys.executable, **more: object) -> list[str]:
    """The command line of a trainer, with `more` options; of several processes that of who starts those of one of
    `machines`."""
    options = {"phase": order.phase, "fence": order.fence, "threads": order.threads, "nice": order.nice}
    together = {"processes": order.processes // machines} if order.processes > 1 else {}
    told = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, **together, **more}.items()]
    program = "distill_jobs.launch" if together else "distill_jobs.train"
    return [python, "-m", program, str(order.folder), *told]
