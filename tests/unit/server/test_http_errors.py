import json

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from engines import errors
from server.http_errors import answer_to, respond


def every(cls: type[errors.FewstepError]) -> list[type[errors.FewstepError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in every(child))]


@pytest.mark.parametrize("cls", every(errors.FewstepError), ids=lambda cls: cls.__name__)
def test_every_error_has_a_body_with_its_own_code(cls: type[errors.FewstepError]) -> None:
    response = respond(cls("what went wrong", param="size"))
    body = json.loads(response.body)
    assert body == {
        "error": {"message": "what went wrong", "type": answer_to(cls("")).type, "param": "size", "code": cls.code}
    }
    assert response.status_code == answer_to(cls("")).status


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.StepsNotAllowed, 400),
        (errors.AuthenticationFailed, 401),
        (errors.PermissionDenied, 403),
        (errors.ModelNotFound, 404),
        (errors.AlreadyEnded, 409),
        (errors.Gone, 410),
        (errors.Overloaded, 429),
        (errors.RequestPoisoned, 500),
        (errors.NotBuilt, 501),
        (errors.Unavailable, 503),
        (errors.DeadlineExceeded, 504),
    ],
)
def test_statuses_are_those_that_clients_know(cls: type[errors.FewstepError], status: int) -> None:
    assert respond(cls("x")).status_code == status


def test_waiting_is_said_in_whole_seconds_and_in_milliseconds() -> None:
    headers = respond(errors.Overloaded("x", retry_after_s=1.2)).headers
    assert (headers["retry-after"], headers["retry-after-ms"], headers["x-should-retry"]) == ("2", "1200", "true")


@pytest.mark.parametrize("cls", [errors.AlreadyEnded, errors.RequestPoisoned, errors.NotBuilt, errors.DeadlineExceeded])
def test_a_retry_that_cannot_help_is_advised_against(cls: type[errors.FewstepError]) -> None:
    assert respond(cls("x")).headers["x-should-retry"] == "false"


def test_an_unknown_key_is_told_the_scheme() -> None:
    assert respond(errors.AuthenticationFailed("x")).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (405, "method_not_allowed"), (413, "body_too_large")])
def test_what_starlette_raises_has_the_same_body(status: int, code: str) -> None:
    response = respond(HTTPException(status, headers={"Allow": "GET"}))
    assert response.status_code == status
    assert json.loads(response.body)["error"]["code"] == code


def test_validation_is_a_400_that_names_the_field() -> None:
    fault = {"type": "int_parsing", "loc": ("body", "train", "batch"), "msg": "not an integer", "input": "x"}
    response = respond(RequestValidationError([fault]))
    body = json.loads(response.body)["error"]
    assert (response.status_code, body["param"]) == (400, "train.batch")


def test_the_unforeseen_says_nothing_about_our_insides() -> None:
    response = respond(ZeroDivisionError("/secret/path"))
    assert response.status_code == 500
    assert b"secret" not in response.body
