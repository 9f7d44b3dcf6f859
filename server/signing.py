"""Signed addresses: whoever holds one may fetch that one picture until it expires, without a key.

OpenAI clients fetch a result's `url` bare, so the address itself has to carry the permission.
"""

import hashlib
import hmac
import math
from collections.abc import Callable

from engines.errors import Gone, PermissionDenied


class Signer:
    """HMAC-SHA256 over path and expiry, under one secret shared by all gateways."""

    def __init__(self, secret: bytes, public_url: str, ttl_s: float, *, now_s: Callable[[], float]) -> None:
        self._secret = secret
        self._public_url = public_url.rstrip("/")
        self._ttl_s = ttl_s
        self._now_s = now_s

    def url(self, path: str) -> str:
        """The absolute, signed address of `path`."""
        expires = math.ceil(self._now_s() + self._ttl_s)
        return f"{self._public_url}{path}?expires={expires}&signature={self._sign(path, expires)}"

    def check(self, path: str, expires: str, signature: str) -> None:
        """
        Raises:
            PermissionDenied: not signed here, or changed since.
            Gone: it expired.
        """
        valid = expires.isascii() and expires.isdigit() and len(expires) <= 12
        if not valid or not hmac.compare_digest(self._sign(path, int(expires)).encode(), signature.encode()):
            raise PermissionDenied(
                "this signature does not belong to this address: use the url exactly as it was given"
            )
        if int(expires) < self._now_s():
            raise Gone("this address expired: ask for the result again, or generate it again with its seed")

    def _sign(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()[:40]
