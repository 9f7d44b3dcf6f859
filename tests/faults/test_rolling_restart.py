"""Every process is restarted, one after the other, under load: no request fails."""

import os
import signal
from pathlib import Path

import pytest

from server.embedded import Stack
from tests.eventually import eventually
from tests.faults.serving import Clients, check, num_workers, options, published, restarted

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
_REQUESTS = 2000


def test_a_rolling_restart_of_every_process_fails_no_request(tmp_path: Path) -> None:
    """Each gets SIGTERM, as a container does when it is replaced, and the next one when its successor serves."""
    version = published(tmp_path)
    with Stack(options(tmp_path, workers=2, gateways=2)) as stack:
        urls = tuple(f"http://127.0.0.1:{port}" for port in stack.ports.values())
        with Clients(urls) as clients:
            clients.further(50)
            for name in ("redis", *stack.ports, "worker-0", "worker-1"):
                restart(stack, name)
                clients.further(50)
            clients.further(max(0, _REQUESTS - len(clients.answers)), 300)
        check(clients, stack, version)
        assert {one.status for one in clients.answers} == {200}
        assert len(clients.answers) >= _REQUESTS
        assert all(stack.supervisor.deaths(name) == 1 for name in ("redis", *stack.ports, "worker-0", "worker-1"))


def restart(stack: Stack, name: str) -> None:
    before = stack.supervisor.pid(name)
    os.kill(before, signal.SIGTERM)
    restarted(stack, name, before)
    eventually(lambda: num_workers(stack) == 2, 120)
