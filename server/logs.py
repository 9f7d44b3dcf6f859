"""JSON logs, one object a line, each with the request or job it belongs to.

The ids travel in context variables, so that code deep below needs no logger argument and no
message repeats them.
"""

import logging
from contextvars import ContextVar
from typing import TextIO

from pydantic_settings import BaseSettings
from pythonjsonlogger.json import JsonFormatter

from engines import traceparent
from server.messages import GenerateRequest
from server.settings import redacted

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)

_IDS = (("request_id", request_id), ("job_id", job_id), ("trace_id", trace_id))
_QUIET = ("uvicorn.access",)  # one line a request costs more than the request


class _Context(logging.Filter):
    """Adds the ids of the context, where there are any."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, variable in _IDS:
            value = variable.get()
            if value is not None and not hasattr(record, name):
                setattr(record, name, value)
        return True


def configure(process: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Sends every logger of this process to `stream` (stderr) as JSON. Called once, by a composition root."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        JsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            static_fields={"process": process},
            timestamp="time",
        )
    )
    handler.addFilter(_Context())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = name not in _QUIET


def about(request: GenerateRequest) -> dict[str, str]:
    """The ids that a line has of a request in a worker, which has many of them at once: `extra=about(request)`."""
    ids = {"request_id": request.id}
    if (carried := traceparent.trace_id(request.traceparent)) is not None:
        ids["trace_id"] = carried
    return ids


def log_settings(settings: BaseSettings) -> None:
    logging.getLogger(__name__).info("started", extra={"settings": redacted(settings)})
