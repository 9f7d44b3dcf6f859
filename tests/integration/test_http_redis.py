"""The gateway over a real Redis-protocol server: what in-memory queues cannot show."""

import concurrent.futures
from collections.abc import Iterator

import httpx
import pytest

from engines.registry.memory import MemoryRegistry
from server.brokers.base import new_identity
from server.brokers.redis import RedisBroker
from tests.eventually import eventually
from tests.gateway_stack import GatewayStack, picture, running
from tests.redis_server import RedisServer
from tests.unit.server.manifests import manifest, publish, revision

STUDENT, NEWER = manifest("shapes-fast", 1, 2, 4, mark=2), manifest("shapes-fast", 1, 4, mark=3)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4)})
PATH = "/v1/generations"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer().start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def registry() -> MemoryRegistry:
    made = MemoryRegistry()
    publish(made, STUDENT, NEWER)
    return made


@pytest.fixture(scope="module")
def stack(server: RedisServer, registry: MemoryRegistry) -> Iterator[GatewayStack]:
    sides = RedisBroker(server.url, new_identity("gateway")), RedisBroker(server.url, new_identity("worker"))
    with running(NOW, registry=registry, brokers=sides) as made:
        yield made


def test_many_requests_at_once_each_get_their_own_picture(stack: GatewayStack) -> None:
    def one(seed: int) -> bool:
        body = {"prompt": "x", "tier": "low", "seed": seed}
        response = stack.client.post(PATH, json=body, headers={"accept": "image/png"})
        return response.content == picture(seed, 32, 32, "png")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(100)))


def test_a_stream_comes_through(stack: GatewayStack) -> None:
    text = stack.client.post(PATH, json={"prompt": "x", "stream": True, "partial_images": 1, "tier": "low"}).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-2], names[-1]) == ("queued", "partial_image", "completed")


def test_a_client_that_leaves_takes_its_request_with_it(stack: GatewayStack) -> None:
    before = len(stack.painter.canceled)
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(PATH, json={"prompt": "wait"}, timeout=0.3)
    eventually(lambda: len(stack.painter.canceled) > before, 5)


def test_a_repeat_under_its_key_gets_the_same_answer_even_while_the_first_is_at_work(stack: GatewayStack) -> None:
    def one(_: int) -> bytes:
        headers = {"accept": "image/png", "idempotency-key": "together"}
        return stack.client.post(PATH, json={"prompt": "x"}, headers=headers).content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(8)))) == 1


def test_a_version_retired_since_the_last_look_is_resolved_again(stack: GatewayStack, registry: MemoryRegistry) -> None:
    """The gateway's view is held back, so that only the broker's refusal can tell it."""
    catalog = stack.app.state.gateway.catalog
    stale = catalog.view
    stack.painter.deployments["shapes"].append(NEWER.version)
    registry.commit(revision(2, {"low": (NEWER, 1), "medium": (NEWER, 4)}))
    eventually(lambda: catalog.view.deployments["shapes"].current.number == 2, 5)
    stack.call(stack.app.state.gateway.broker.set_servable("shapes", [NEWER.version]))
    catalog.view = stale
    response = stack.client.post(PATH, json={"prompt": "x"}, headers={"accept": "image/png"})
    assert response.headers["x-model-version"] == f"shapes-fast@{NEWER.digest[:12]}"
