"""JSON logs, one object a line, each with the request or job it belongs to.

The ids travel in context variables, so that code deep below needs no logger argument and no
message repeats them.
"""

import logging
from contextvars import ContextVar
from typing import TextIO

from pydantic_settings import BaseSettings
from pythonjsonlogger.json import JsonFormatter

from server.settings import redacted

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

_QUIET = ("uvicorn.access",)  # one line a request costs more than the request


class _Context(logging.Filter):
    """Adds the ids of the context, where there are any."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, variable in (("request_id", request_id), ("job_id", job_id)):
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


def log_settings(settings: BaseSettings) -> None:
    logging.getLogger(__name__).info("started", extra={"settings": redacted(settings)})
