"""How long a process lives that another started for itself: no longer than that one."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """This process gets the signal `by` at the death of `parent`, who started it; 0 is nobody.

    The kernel sends it: who is killed outright cannot stop its children.
    """
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that started this one died before it began")
