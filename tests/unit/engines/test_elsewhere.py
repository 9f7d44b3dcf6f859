"""Modules in a process of their own: what they say, and how long they live."""

import os
import signal
import subprocess
import sys

import psutil

from engines import elsewhere
from tests.eventually import eventually

# A server that nobody asks anything stands for a compilation of minutes.
_ASKS = "from engines import elsewhere; elsewhere.run('http.server', '--bind', '127.0.0.1', '0')"


def test_a_module_is_given_its_arguments_and_what_it_says_comes_back() -> None:
    done = elsewhere.run("json.tool", "/dev/null")
    assert done.returncode != 0
    assert "Expecting value" in done.stderr
    assert elsewhere.run("platform").stdout.strip()


def test_what_runs_elsewhere_dies_with_the_process_that_asked_for_it() -> None:
    asking = subprocess.Popen([sys.executable, "-c", _ASKS])
    try:
        process = psutil.Process(asking.pid)
        [child] = eventually(process.children)
        eventually(lambda: "http.server" in child.cmdline() and child.net_connections())
    finally:
        os.kill(asking.pid, signal.SIGKILL)
        asking.wait()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert (gone, alive) == ([child], [])
