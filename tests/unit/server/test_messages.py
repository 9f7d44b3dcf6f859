"""Messages survive the way, and releases that are neighbours read each other."""

import msgspec
import pytest

from engines.errors import FewstepError, InvalidSize, Overloaded, UnsupportedMessage
from server.messages import ErrorBody, GenerateRequest, GenerateResult, StepEvent, class_of, decode, encode, ended_by
from tests.contract.test_broker import request_of


@pytest.mark.parametrize(
    ("priority", "expected"),
    [(10, "high"), (5, "high"), (4, "normal"), (0, "normal"), (-4, "normal"), (-5, "low"), (-10, "low")],
)
def test_the_priority_chooses_the_class(priority: int, expected: str) -> None:
    assert class_of(priority) == expected


@pytest.mark.parametrize(
    "message",
    [
        request_of("r1", negative_prompt="blur", guidance=1.5, priority=-5, seed=2**63 - 1),
        GenerateResult(id="r1", status="failed", error=ErrorBody(code="x", message="y", retry_after_s=0.5)),
        StepEvent(id="r1", kind="step", step=1, total=4),
    ],
)
def test_a_message_comes_back_as_it_went(message: GenerateRequest | GenerateResult | StepEvent) -> None:
    assert decode(encode(message), type(message)) == message


def test_a_field_of_a_newer_release_is_ignored() -> None:
    newer = msgspec.to_builtins(request_of("r1")) | {"invented_later": [1, 2]}
    assert decode(msgspec.msgpack.encode(newer), GenerateRequest) == request_of("r1")


def test_a_field_of_an_older_release_has_its_default() -> None:
    older = msgspec.to_builtins(request_of("r1"))
    del older["cost_s"], older["events"]
    assert decode(msgspec.msgpack.encode(older), GenerateRequest) == request_of("r1")


@pytest.mark.parametrize("data", [b"", b"\x00", b"not msgpack", msgspec.msgpack.encode({"id": "r1"})])
def test_what_cannot_be_read_is_an_unsupported_message(data: bytes) -> None:
    with pytest.raises(UnsupportedMessage, match="GenerateRequest"):
        decode(data, GenerateRequest)


@pytest.mark.parametrize("error", [InvalidSize("no", param="size"), Overloaded("later", retry_after_s=1.5)])
def test_an_error_is_raised_in_its_own_class_on_the_other_side(error: FewstepError) -> None:
    raised = ErrorBody.of(error).exception()
    assert type(raised) is type(error)
    assert (raised.message, raised.param, raised.retry_after_s) == (error.message, error.param, error.retry_after_s)


def test_an_ending_names_what_had_been_chosen() -> None:
    result = ended_by("r1", "failed", Overloaded("later"), request_of("r1", steps=4, tier="medium"))
    assert (result.version, result.tier, result.steps) == (request_of("r1").version, "medium", 4)
    assert result.error == ErrorBody(code="overloaded", message="later")
