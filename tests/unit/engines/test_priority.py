"""Giving way, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = (
    "from engines.priority import lower; import os; lower(7); print(os.nice(0), open('/proc/self/autogroup').read())"
)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no autogroups")
def test_a_session_leader_lowers_itself_and_its_session() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], start_new_session=True, capture_output=True, text=True, check=True
    )
    own, _, _, session = done.stdout.split()  # 7 /autogroup-1 nice 7
    assert (own, session) == (str(_from_here(7)), "7")


def test_another_process_lowers_only_itself() -> None:
    program = "from engines.priority import lower; import os; lower(3); print(os.nice(0))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(_from_here(3))


def _from_here(nice: int) -> int:
    """Niceness is inherited: the tests themselves may run with some."""
    return min(19, os.nice(0) + nice)
