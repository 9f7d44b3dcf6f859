"""One real system for all tests that need one: Redis, gateway, worker and distiller as `fewstep up` starts them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.client import Client
from server.embedded import Stack, StackOptions


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data: Path = tmp_path_factory.mktemp("stack")
    with Stack(StackOptions(data=data, port=0)) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    connected = Client(stack.url)
    yield connected
    connected.close()
