import hashlib

import pytest
from pydantic import ValidationError

from engines.errors import AuthenticationFailed, PermissionDenied
from server.auth import ANYBODY, ApiKey, Keys, Principal, Scope

SECRET = "a-long-enough-secret"


def keys() -> Keys:
    hashed = hashlib.sha256(b"another-secret-text").hexdigest()
    return Keys(
        [
            ApiKey.model_validate({"name": "web", "key": SECRET}),
            ApiKey.model_validate({"name": "ops", "sha256": hashed, "scopes": ["admin"]}),
        ]
    )


def test_without_keys_everybody_may_do_everything() -> None:
    assert Keys([]).authorise(None, "admin") == ANYBODY


def test_a_key_is_known_by_its_text_and_by_its_hash() -> None:
    assert keys().authorise(f"Bearer {SECRET}", "generate").owner == "web"
    assert keys().authorise("bearer another-secret-text", "generate").owner == "ops"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {SECRET}", SECRET, "Bearer \udcff"])
def test_anything_else_is_nobody(header: str | None) -> None:
    with pytest.raises(AuthenticationFailed):
        keys().authorise(header, "generate")


@pytest.mark.parametrize("scope", ["distill", "admin"])
def test_a_key_without_the_scope_is_told_what_it_has(scope: Scope) -> None:
    with pytest.raises(PermissionDenied, match=r"'web' lacks the scope .*it has generate"):
        keys().authorise(f"Bearer {SECRET}", scope)


def test_admin_has_every_scope_and_sees_everything() -> None:
    admin = keys().authorise("Bearer another-secret-text", "distill")
    assert admin.sees("web")
    assert not Principal("web", frozenset({"generate"})).sees("ops")


@pytest.mark.parametrize(
    "fault", [{}, {"key": SECRET, "sha256": "0" * 64}, {"key": "short"}, {"sha256": "xyz"}, {"kee": 1}]
)
def test_a_key_that_is_no_key_is_refused(fault: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ApiKey.model_validate({"name": "web", **fault})
