"""Gateways and workers on several hosts: one is cut off while requests run, and no request is lost."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.brokers.redis import RedisBroker
from server.client import Client
from tests.eventually import eventually
from tests.faults.serving import Clients, check, num_workers, published
from tests.hosts import Hosts
from tests.redis_server import RedisServer, login, start_child

pytestmark = [pytest.mark.faults, pytest.mark.netns, pytest.mark.timeout(900)]
KEY = "a-key-of-these-tests"
_PORT = 8000


@dataclass(frozen=True)
class Place:
    """Where the books are read afterwards."""

    redis_url: str
    registry_url: str


class ClientsOn(Clients):
    """Clients on one of the hosts."""

    def __init__(self, hosts: Hosts, name: str, urls: tuple[str, ...]) -> None:
        # A connection to a host that went is silent: whoever waits there asks the other one, with the same key.
        super().__init__(urls, headers={"authorization": f"Bearer {KEY}"}, patience_s=3.0)
        self._hosts, self._name = hosts, name

    async def _run(self) -> None:
        self._hosts.enter(self._name)
        await super()._run()


@contextmanager
def serving(hosts: Hosts, data: Path) -> Iterator[Place]:
    """Redis on the first host; on each other one a gateway and a worker. The registry is a folder that all see."""
    listen = ("--bind", hosts.addresses["store"], "--protected-mode", "no")
    redis = RedisServer(aof=True, port=6379, args=listen, prefix=hosts.on("store")).start()
    url = f"redis://{login('fewstep')}@{hosts.addresses['store']}:6379/0"
    shared = {"REDIS_URL": url, "REGISTRY_URL": str(data / "registry")}
    gateway = {"HOST": "0.0.0.0", "PORT": str(_PORT), "URL_SECRET": "x" * 32}
    gateway["API_KEYS"] = json.dumps([{"name": "tests", "key": KEY, "scopes": ["generate"]}])
    worker = {"BACKEND": "eager", "BATCH_SIZES": "[1, 2, 4]", "LEASE_S": "2", "THREADS": "1"}
    worker["CACHE_DIR"] = str(data / "engines")
    with ExitStack() as stack:
        stack.callback(redis.close)
        for name in ("one", "two"):
            for program, told in (("gateway", gateway), ("worker", worker)):
                mine = {f"{program.upper()}_{key}": value for key, value in {**shared, **told}.items()}
                command = [*hosts.on(name), sys.executable, "-m", "server.cli", program]
                process = start_child(command, {**os.environ, **mine}, str(data / f"{program}-{name}.log"))
                stack.callback(process.wait)
                stack.callback(process.kill)
        yield Place(redis.admin_url, shared["REGISTRY_URL"])


def answers(url: str) -> bool:
    client = Client(url)
    try:
        return eventually(client.ready, 300)
    finally:
        client.close()


def test_a_host_that_is_cut_off_and_comes_back_loses_no_request(tmp_path: Path) -> None:
    version = published(tmp_path)
    with Hosts("store", "one", "two") as hosts, serving(hosts, tmp_path) as place:
        urls = tuple(f"http://{hosts.addresses[name]}:{_PORT}" for name in ("one", "two"))
        eventually(lambda: num_workers(place) == 2, 300)
        for url in urls:
            assert hosts.asked_from("store", lambda url=url: answers(url)), url
        with ClientsOn(hosts, "store", urls) as clients:
            clients.further(20, 120)
            hosts.cut_off("one")
            eventually(lambda: num_workers(place) == 1, 60)
            clients.further(20, 120)
            hosts.join("one")
            eventually(lambda: num_workers(place) == 2, 60)
            clients.further(20, 120)
        check(clients, place, version)
        assert {one.status for one in clients.answers} == {200}
        assert any(one.tries > 1 for one in clients.answers), "nobody noticed that a host was away"


def _give_up_soon(address: str) -> None:
    """The kernel ends silent connections to this address within three seconds; by itself it waits longer."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            connection = socket.socket(fileno=os.dup(fd))
        except OSError:  # no socket
            continue
        with connection, suppress(OSError):
            if connection.family == socket.AF_INET and connection.getpeername()[0] == address:
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
                    connection.setsockopt(socket.IPPROTO_TCP, option, 1)


def test_who_listens_hears_again_after_the_kernel_gave_up_the_connection() -> None:
    with Hosts("store", "one") as hosts:
        listen = ("--bind", hosts.addresses["store"], "--protected-mode", "no")
        redis = RedisServer(port=6379, args=listen, prefix=hosts.on("store")).start()
        url = f"redis://{login('fewstep')}@{hosts.addresses['store']}:6379/0"
        listening, heard = threading.Event(), threading.Event()

        async def hear() -> None:
            broker = RedisBroker(url, "one")
            await broker.start()
            async for topic in broker.announcements():
                if topic == "first":
                    _give_up_soon(hosts.addresses["store"])
                    listening.set()
                elif topic == "last":
                    break
            await broker.close()
            heard.set()

        async def announce(topic: str, until: threading.Event) -> None:
            broker = RedisBroker(url, "store")
            await broker.start()
            while not until.is_set():
                await broker.announce(topic)
                await asyncio.sleep(0.1)
            await broker.close()

        def on(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> threading.Thread:
            thread = threading.Thread(target=hosts.asked_from, args=(name, lambda: asyncio.run(work())), daemon=True)
            thread.start()
            return thread

        try:
            on("one", hear)
            on("store", lambda: announce("first", listening)).join(30)
            assert listening.is_set()
            hosts.cut_off("one")
            eventually(lambda: not connected(hosts, "one"), 30)
            hosts.join("one")
            on("store", lambda: announce("last", heard)).join(30)
            assert heard.is_set()
        finally:
            heard.set()
            redis.close()


def connected(hosts: Hosts, name: str) -> bool:
    """Whether a connection to Redis is left on this host."""
    command = (*hosts.on(name), "ss", "-tnH", "state", "established", "dport", "=", ":6379")
    return bool(subprocess.run(command, capture_output=True, check=True).stdout)
