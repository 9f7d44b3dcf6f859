import asyncio

import pytest

from engines.errors import IdempotencyConflict, InvalidRequest
from server.brokers.memory import MemoryBroker, MemoryServer
from server.idempotency import Idempotency, once, read

KEY = Idempotency(key="k", body_hash="h")


class Maker:
    """Makes ids; `fails` times it dies first."""

    def __init__(self, fails: int = 0) -> None:
        self.made, self._fails = 0, fails

    async def __call__(self) -> str:
        await asyncio.sleep(0)
        if self._fails:
            self._fails -= 1
            raise ConnectionError("died")
        self.made += 1
        return f"swap-{self.made}"


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(MemoryServer(), "gateway-1")


async def ask(broker: MemoryBroker, maker: Maker, key: Idempotency = KEY) -> str:
    return await once(broker, key, maker, 60.0, owner="web")


def test_a_key_is_of_its_owner_and_path() -> None:
    same = read("k", "web", "/a", b"x")
    assert same == read("k", "web", "/a", b"x")
    others = [read("k", "ops", "/a", b"x"), read("k", "web", "/b", b"x"), read("j", "web", "/a", b"x")]
    assert all(other is not None and same is not None and other.key != same.key for other in others)
    assert read(None, "web", "/a", b"x") is None


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest):
        read(key, "web", "/a", b"")


async def test_a_thing_is_made_once_per_key(broker: MemoryBroker) -> None:
    maker = Maker()
    assert [await ask(broker, maker) for _ in range(3)] == ["swap-1"] * 3
    assert await ask(broker, maker, Idempotency("other", "h")) == "swap-2"


async def test_another_body_under_the_key_is_refused(broker: MemoryBroker) -> None:
    await ask(broker, Maker())
    with pytest.raises(IdempotencyConflict, match="another body"):
        await ask(broker, Maker(), Idempotency("k", "other"))


async def test_what_died_before_it_made_anything_is_made_by_the_repeat(broker: MemoryBroker) -> None:
    maker = Maker(fails=2)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await ask(broker, maker)
    assert [await ask(broker, maker) for _ in range(2)] == ["swap-1"] * 2


async def test_two_at_once_make_one(broker: MemoryBroker) -> None:
    maker = Maker()
    answers = await asyncio.gather(ask(broker, maker), ask(broker, maker), return_exceptions=True)
    assert answers[0] == "swap-1"
    assert isinstance(answers[1], IdempotencyConflict)
    assert maker.made == 1
