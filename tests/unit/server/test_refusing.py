"""A server that is told to stop refuses first, finishes what it began, and then is gone."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from server.refusing import RefusingServer
from tests.eventually import eventually


class Door:
    """An application that answers 200 until it is told to refuse, and holds `/slow` until it is let go."""

    def __init__(self) -> None:
        self.refusing, self.reached, self.let_go = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] != "http":
            return
        refused = self.refusing.is_set()
        if scope["path"] == "/slow":
            self.reached.set()
            await asyncio.to_thread(self.let_go.wait, 10)
        await send({"type": "http.response.start", "status": 503 if refused else 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def served(door: Door) -> Iterator[tuple[RefusingServer, str, threading.Thread]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(door, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    server = RefusingServer(config, door.refusing.set, drain_s=1.0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield server, f"http://127.0.0.1:{listener.getsockname()[1]}", thread
    door.let_go.set()
    server.should_exit = server.force_exit = True
    thread.join(10)


def test_new_requests_are_refused_before_the_port_closes(
    door: Door, served: tuple[RefusingServer, str, threading.Thread]
) -> None:
    server, url, thread = served
    assert httpx.get(url).status_code == 200
    server.should_exit = True
    eventually(door.refusing.is_set)
    assert httpx.get(url).status_code == 503
    thread.join(10)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_request_that_was_under_way_is_answered(
    door: Door, served: tuple[RefusingServer, str, threading.Thread]
) -> None:
    server, url, thread = served
    seen: list[int] = []
    asking = threading.Thread(target=lambda: seen.append(httpx.get(f"{url}/slow", timeout=20).status_code))
    asking.start()
    assert door.reached.wait(10)
    server.should_exit = True
    eventually(door.refusing.is_set)
    door.let_go.set()
    asking.join(10)
    thread.join(10)
    assert seen == [200]
