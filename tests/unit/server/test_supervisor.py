"""The supervisor on real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engines.errors import Unavailable
from server.supervisor import Child, Supervisor
from tests.eventually import eventually

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.stop()


def test_a_killed_child_is_started_again_with_another_pid(supervisor: Supervisor) -> None:
    supervisor.start(Child("sleeper", SLEEPER, ready=lambda: True))
    first = supervisor.pid("sleeper")

    os.kill(first, signal.SIGKILL)

    eventually(lambda: supervisor.pids().get("sleeper", first) != first)
    assert supervisor.deaths("sleeper") == 1


def test_a_child_that_ends_at_its_start_is_an_error_with_the_end_of_its_log(supervisor: Supervisor) -> None:
    child = Child("broken", (sys.executable, "-c", "raise SystemExit('no such thing')"), ready=lambda: False)
    with pytest.raises(Unavailable, match="no such thing"):
        supervisor.start(child)


def test_stopping_leaves_no_process_and_restarts_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.start(Child("sleeper", SLEEPER, ready=lambda: True))
    pid = supervisor.pid("sleeper")

    supervisor.stop()

    assert not psutil.pid_exists(pid)


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from server.supervisor import Child, Supervisor;"
        f"s = Supervisor(pathlib.Path({str(tmp_path)!r}));"
        f"s.start(Child('sleeper', {SLEEPER!r}, ready=lambda: True));"
        "print(s.pid('sleeper'), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        # The child is ours only after the launcher became it.
        eventually(lambda: "time.sleep" in " ".join(psutil.Process(child).cmdline()))
        parent.kill()
        parent.wait()
        eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
