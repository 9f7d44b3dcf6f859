"""Idempotency keys: the same key with the same body is the same request, and gets the same answer.

A repeat after a broken connection must neither make a second picture nor a second swap. The broker
remembers key → (body hash, id); this file says what counts as the same.
"""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from engines.errors import IdempotencyConflict, InvalidRequest
from server.brokers.base import Broker

_MAX_CHARS = 255
_LOCK_S = 30.0
_CLAIM = "claim_"


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A key scoped by owner and path, with the fingerprint of what came with it."""

    key: str
    body_hash: str


def read(header: str | None, owner: str, path: str, body: bytes) -> Idempotency | None:
    """What an `Idempotency-Key` header means for this request, None without one.

    Raises:
        InvalidRequest: the key is empty or too long.
    """
    if header is None:
        return None
    if not 1 <= len(header) <= _MAX_CHARS:
        raise InvalidRequest(
            f"an Idempotency-Key has 1 to {_MAX_CHARS} characters, not {len(header)}", param="Idempotency-Key"
        )
    scoped = hashlib.sha256("\0".join((owner, path, header)).encode()).hexdigest()
    return Idempotency(key=scoped, body_hash=hashlib.sha256(body).hexdigest())


async def remember(broker: Broker, idempotency: Idempotency, new_id: str, ttl_s: float, *, owner: str) -> str | None:
    """The id that this key stands for already; None if from now on it stands for `new_id`.

    Raises:
        IdempotencyConflict: the key came before with another body or format.
    """
    earlier = await broker.remember(idempotency.key, idempotency.body_hash, new_id, ttl_s, owner=owner)
    if earlier is None:
        return None
    if earlier.body_hash != idempotency.body_hash:
        raise IdempotencyConflict(
            "this Idempotency-Key came before with another body or format: use a new key for a new request",
            param="Idempotency-Key",
        )
    return earlier.request_id


async def once(
    broker: Broker, idempotency: Idempotency, make: Callable[[], Awaitable[str]], ttl_s: float, *, owner: str
) -> str:
    """The id of what `make` makes, made once per key even if a gateway dies in between.

    The key stands for a claim and the claim for what was made under it. A claim that stands for nothing
    belonged to somebody who died, so the next one claims in its place.

    Raises:
        IdempotencyConflict: the key came before with another body, or its first request is still at work.
    """
    lock, me = f"idempotency:{owner}:{idempotency.key}", secrets.token_hex(8)
    if await broker.acquire(lock, me, _LOCK_S) is None:
        raise IdempotencyConflict("the first request with this Idempotency-Key is still at work: ask again")
    try:
        slot = idempotency
        while True:
            claim = _CLAIM + secrets.token_hex(8)
            earlier = await remember(broker, slot, claim, ttl_s, owner=owner)
            if earlier is None:
                made = await make()
                await remember(broker, replace(slot, key=claim), made, ttl_s, owner=owner)
                return made
            if not earlier.startswith(_CLAIM):
                return earlier
            slot = replace(slot, key=earlier)
    finally:
        await broker.release(lock, me)
