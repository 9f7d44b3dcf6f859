"""Giving way, in a process of its own."""

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
    assert (own, session) == ("7", "7")


def test_another_process_lowers_only_itself() -> None:
    program = "from engines.priority import lower; import os; lower(3); print(os.nice(0))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
