"""kill -9 and SIGSTOP of what serves, under load: every request gets exactly one answer, and the right picture."""

import os
import signal
from collections.abc import Iterator

import pytest

from server.embedded import Stack
from tests.eventually import eventually
from tests.faults.serving import Clients, check, num_workers, restarted, serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    with serving(tmp_path_factory.mktemp("serving")) as made:
        stack, _ = made
        eventually(lambda: num_workers(stack) == 2, 120)
        yield made


def kill(stack: Stack, name: str) -> int:
    pid = stack.supervisor.pid(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_worker_loses_no_request(up: tuple[Stack, str]) -> None:
    stack, version = up
    with Clients((stack.url,)) as clients:
        clients.further(10)
        for name in ("worker-0", "worker-1"):
            before = kill(stack, name)
            clients.further(10)
            restarted(stack, name, before)
            eventually(lambda: num_workers(stack) == 2, 120)
    check(clients, stack, version)


def test_a_killed_gateway_loses_no_request_of_a_client_that_asks_again(up: tuple[Stack, str]) -> None:
    stack, version = up
    with Clients((stack.url,)) as clients:
        for _ in range(2):
            clients.further(10)
            before = kill(stack, "gateway")
            restarted(stack, "gateway", before)
        clients.further(10)
    check(clients, stack, version)
    assert any(one.tries > 1 for one in clients.answers)


def test_a_killed_redis_loses_no_request(up: tuple[Stack, str]) -> None:
    stack, version = up
    with Clients((stack.url,)) as clients:
        for _ in range(2):
            clients.further(10)
            before = kill(stack, "redis")
            restarted(stack, "redis", before)
        clients.further(10, 120)
    check(clients, stack, version)


def test_a_worker_that_stands_still_past_its_lease_loses_no_request_and_answers_none_twice(
    up: tuple[Stack, str],
) -> None:
    stack, version = up
    with Clients((stack.url,)) as clients:
        clients.further(10)
        pid = stack.supervisor.pid("worker-0")
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: num_workers(stack) == 1, 30)
            clients.further(10)
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: num_workers(stack) == 2, 60)
        clients.further(10)
    check(clients, stack, version)
    assert stack.supervisor.pid("worker-0") == pid
