"""API keys: who asks, and what that key may do.

Only hashes of keys are kept. No keys configured means open to everybody, which the settings allow
on a loopback address alone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from engines.errors import AuthenticationFailed, PermissionDenied

Scope = Literal["generate", "distill", "admin"]
ALL_SCOPES: frozenset[Scope] = frozenset({"generate", "distill", "admin"})


class ApiKey(BaseModel):
    """One key as configured: its text (`key`) or the hexadecimal sha256 of it, and its scopes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the owner of what this key makes")
    key: SecretStr | None = Field(None, min_length=16)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(frozenset({"generate"}), min_length=1)

    @model_validator(mode="after")
    def _one_secret(self) -> "ApiKey":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"key {self.name!r} needs exactly one of 'key' and 'sha256'")
        return self

    @property
    def hashed(self) -> str:
        return self.sha256 or _hash((self.key or SecretStr("")).get_secret_value())


@dataclass(frozen=True, slots=True)
class Principal:
    """Who made a request. Objects belong to `owner`; `admin` sees everybody's."""

    owner: str
    scopes: frozenset[Scope]

    def sees(self, owner: str) -> bool:
        return owner == self.owner or "admin" in self.scopes


ANYBODY = Principal(owner="anonymous", scopes=ALL_SCOPES)


class Keys:
    """The configured keys, by hash."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_hash = {key.hashed: Principal(owner=key.name, scopes=key.scopes) for key in keys}

    def authorise(self, authorization: str | None, scope: Scope) -> Principal:
        """The principal behind an `Authorization` header.

        Raises:
            AuthenticationFailed: no such key.
            PermissionDenied: the key lacks the scope; `admin` has every scope.
        """
        principal = self._authenticate(authorization)
        if scope not in principal.scopes and "admin" not in principal.scopes:
            has = ", ".join(sorted(principal.scopes))
            raise PermissionDenied(f"key {principal.owner!r} lacks the scope {scope!r}; it has {has}")
        return principal

    def _authenticate(self, authorization: str | None) -> Principal:
        if not self._by_hash:
            return ANYBODY
        if not authorization:
            raise AuthenticationFailed("no API key: send 'Authorization: Bearer KEY'")
        kind, _, presented = authorization.partition(" ")
        # A lookup by hash compares no secret byte by byte.
        found = self._by_hash.get(_hash(presented.strip())) if kind.lower() == "bearer" else None
        if found is None:
            raise AuthenticationFailed("this API key is not known here: check it, or ask the operator for one")
        return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
