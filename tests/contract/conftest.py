"""Implementations of each seam that has a contract suite, as parametrised fixtures."""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.registry._keyed import KeyedRegistry
from engines.registry.files import FilesRegistry
from engines.registry.memory import MemoryRegistry
from server.brokers.base import Broker
from server.brokers.memory import MemoryBroker, MemoryServer
from server.brokers.redis import RedisBroker
from tests.redis_server import RedisServer, fresh_namespace


@pytest.fixture(params=["files", "memory", "fsspec", pytest.param("s3", marks=pytest.mark.s3)])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> KeyedRegistry:
    """Each registry, empty. `fsspec` and `s3` are the one for object stores, over fsspec's in-memory file system and a
    real server."""
    if request.param == "s3":
        return FilesRegistry(request.getfixturevalue("s3_server").url(), cache=tmp_path)
    if request.param == "memory":
        return MemoryRegistry()
    if request.param == "files":
        return FilesRegistry(tmp_path / "registry")
    return FilesRegistry(f"memory://{secrets.token_hex(6)}", cache=tmp_path)


class Hub:
    """Brokers of several processes on one server, each made on first use and closed with the test."""

    def __init__(self, make: Callable[[str, dict[str, Any]], Broker]) -> None:
        self._make = make
        self._brokers: dict[str, Broker] = {}

    async def __call__(self, identity: str, **options: Any) -> Broker:
        if identity not in self._brokers:
            broker = self._make(identity, {"lease_s": 60.0} | options)
            await broker.start()
            self._brokers[identity] = broker
        return self._brokers[identity]

    async def restart(self, identity: str) -> None:
        """Ends a process without a word to anybody; `hub(identity)` then makes a new one."""
        await self._brokers.pop(identity).close()

    async def close(self) -> None:
        for broker in self._brokers.values():
            await broker.close()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One real server for all contract tests; each test has a namespace of its own."""
    server = RedisServer().start()
    yield server
    denied = server.denied()
    server.close()
    assert denied == [], "the rights in docs/security.md are too few"


@pytest.fixture(params=["redis", "memory"])
async def hub(request: pytest.FixtureRequest) -> AsyncIterator[Hub]:
    """The brokers of one test, on each implementation."""
    if request.param == "memory":
        server = MemoryServer()
        hub = Hub(lambda identity, options: MemoryBroker(server, identity, **options))
    else:
        url, namespace = request.getfixturevalue("redis_server").url, fresh_namespace()
        calm = {"namespace": namespace, "restart_grace_s": 0.0}
        hub = Hub(lambda identity, options: RedisBroker(url, identity, **(calm | options)))
    yield hub
    await hub.close()
