"""Runs a module of ours in a process of its own: niced, and gone at once when the process that asked for it is.

For what holds the GIL for seconds or works for minutes: an orphan would go on writing into the folder that the next
process builds in.
"""

import os
import runpy
import subprocess
import sys

from engines import priority
from engines.lifetime import die_with

_NICE = 10


def run(module: str, *given: str) -> "subprocess.CompletedProcess[str]":
    """`python -m module given…`, waited for, with all that it said."""
    command = [sys.executable, "-m", "engines.elsewhere", str(os.getpid()), module, *given]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def main(argv: list[str]) -> None:
    parent, module, given = int(argv[0]), argv[1], argv[2:]
    die_with(parent)
    priority.lower(_NICE)
    sys.argv[1:] = given
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
