"""Runs a command that dies with the process that started it.

A supervisor that is killed outright cannot stop its children; the kernel does it here. This is its own tiny
program because code between fork and exec of a threaded process is not safe.
"""

import os
import signal
import sys

from engines import priority
from engines.lifetime import die_with


def main(argv: list[str]) -> None:
    """`python -m server.child PARENT_PID NICE COMMAND …`: asks for SIGTERM at the parent's death, becomes COMMAND."""
    parent, nice, command = int(argv[0]), int(argv[1]), argv[2:]
    die_with(parent, signal.SIGTERM)
    if nice:
        priority.lower(nice)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
