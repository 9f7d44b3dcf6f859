"""The one table from our errors to HTTP, and the one shape of an error body.

Everything that goes wrong leaves through `respond`: our own errors, Starlette's 404 and 405,
validation, and what nobody foresaw. So a client needs one parser, and SDKs that read `code`,
`param` and `x-should-retry` work unchanged.
"""

import math
from dataclasses import dataclass

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engines import errors


@dataclass(frozen=True, slots=True)
class Answer:
    """How one error class is answered. `retry` None leaves the SDK its own rule for the status."""

    status: int
    type: str
    retry: bool | None = None


_INVALID = Answer(400, "invalid_request_error")
_CONFLICT = Answer(409, "invalid_request_error", retry=False)
_SERVER = Answer(500, "server_error")

# An error is answered by the first of its classes that stands here.
TABLE: dict[type[errors.FewstepError], Answer] = {
    errors.UnsupportedImage: Answer(415, "invalid_request_error", retry=False),
    errors.ImageTooLarge: Answer(413, "invalid_request_error", retry=False),
    errors.InvalidRequest: _INVALID,
    errors.AuthenticationFailed: Answer(401, "authentication_error"),
    errors.PermissionDenied: Answer(403, "permission_error"),
    errors.NotFound: Answer(404, "not_found_error"),
    errors.Gone: Answer(410, "not_found_error"),
    errors.Conflict: _CONFLICT,
    errors.RequestCanceled: _CONFLICT,
    errors.GateFailed: _CONFLICT,
    errors.ArtefactRejected: _CONFLICT,
    errors.SwapRejected: _CONFLICT,
    errors.LeaseLost: _CONFLICT,
    errors.Overloaded: Answer(429, "rate_limit_error", retry=True),
    errors.Unavailable: Answer(503, "overloaded_error", retry=True),
    errors.MemoryExceeded: Answer(503, "server_error", retry=False),
    errors.DeadlineExceeded: Answer(504, "timeout_error", retry=False),
    errors.StorageFull: Answer(507, "server_error", retry=False),
    errors.NotBuilt: Answer(501, "server_error", retry=False),
    errors.RequestPoisoned: Answer(500, "server_error", retry=False),
    errors.FewstepError: _SERVER,
}

# What Starlette itself raises, and what our ASGI layer does.
_PLAIN: dict[int, tuple[str, str]] = {
    404: ("not_found", "not_found_error"),
    405: ("method_not_allowed", "invalid_request_error"),
    413: ("body_too_large", "invalid_request_error"),
    415: ("unsupported_media_type", "invalid_request_error"),
}


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorInfo


_encode = msgspec.json.Encoder().encode


def answer_to(error: errors.FewstepError) -> Answer:
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def info(error: errors.FewstepError) -> ErrorInfo:
    """The inside of an error body, for event streams too."""
    return ErrorInfo(message=error.message, type=answer_to(error).type, param=error.param, code=error.code)


def respond(error: Exception) -> Response:
    """The whole answer to any exception. What we do not know says nothing about our insides."""
    if isinstance(error, errors.FewstepError):
        return _respond_known(error)
    if isinstance(error, RequestValidationError):
        return _respond_known(_from_validation(error))
    if isinstance(error, HTTPException):
        return _respond_plain(error)
    return _respond_known(errors.InternalError("something unforeseen went wrong here; it is logged under x-request-id"))


def _respond_known(error: errors.FewstepError) -> Response:
    answer = answer_to(error)
    headers: dict[str, str] = {}
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if answer.retry is not None:
        headers["x-should-retry"] = "true" if answer.retry else "false"
    return _json(answer.status, info(error), headers)


def _respond_plain(error: HTTPException) -> Response:
    code, kind = _PLAIN.get(error.status_code, ("http_error", "invalid_request_error"))
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = "there is nothing at this path: see /openapi.json for what there is"
    if error.status_code == 405 and message == "Method Not Allowed":
        allowed = (error.headers or {}).get("Allow", "another one")
        message = f"this path does not take this method: use {allowed}"
    return _json(
        error.status_code, ErrorInfo(message=message, type=kind, param=None, code=code), dict(error.headers or {})
    )


def _from_validation(error: RequestValidationError) -> errors.InvalidRequest:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")) or None
    what = "unknown field, remove it" if first["type"] == "extra_forbidden" else first["msg"]
    return errors.InvalidRequest(f"{field}: {what}" if field else str(what), param=field)


def _json(status: int, body: ErrorInfo, headers: dict[str, str]) -> Response:
    return Response(_encode(ErrorResponse(error=body)), status, headers, media_type="application/json")
