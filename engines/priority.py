"""Gives way to others on the same processors: what a trainer and a distiller owe to live traffic."""

import contextlib
import os
from pathlib import Path

_AUTOGROUP = Path("/proc/self/autogroup")


def lower(nice: int) -> None:
    """Lowers this process by `nice` (0..19), and its session where the kernel shares time between sessions first.

    With the scheduler's autogroups a process' own niceness only counts inside its session; a session leader
    lowers the whole session instead.
    """
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # no such kernel
            _AUTOGROUP.write_text(str(nice))
