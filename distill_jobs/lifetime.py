"""How long a trainer's process lives: no longer than the one that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """SIGKILL at the death of `parent` (0: of nobody): a checkpoint is never older than its interval, and nobody would
    read more."""
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the service died before its trainer began")
