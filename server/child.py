"""Runs a command that dies with the process that started it.

A supervisor that is killed outright cannot stop its children; the kernel does it here. This is its own tiny
program because code between fork and exec of a threaded process is not safe.
"""

import ctypes
import os
import signal
import sys

from engines import priority

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """`python -m server.child PARENT_PID NICE COMMAND …`: asks for SIGTERM at the parent's death, becomes COMMAND."""
    parent, nice, command = int(argv[0]), int(argv[1]), argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent died before its child began")
    if nice:
        priority.lower(nice)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
