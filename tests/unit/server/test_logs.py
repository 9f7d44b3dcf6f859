import io
import json
import logging
from collections.abc import Iterator

import pytest

from server import logs
from server.settings import GatewaySettings


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_an_object_with_the_ids_it_belongs_to() -> None:
    stream = io.StringIO()
    logs.configure("gateway", "info", stream)
    token = logs.request_id.set("req-1")
    logging.getLogger("x").info("done", extra={"rows": 3})
    logs.request_id.reset(token)
    logging.getLogger("x").warning("later")
    first, second = lines(stream)
    assert (first["message"], first["rows"], first["request_id"], first["process"]) == ("done", 3, "req-1", "gateway")
    assert "request_id" not in second
    assert second["level"] == "WARNING"


def test_the_start_logs_settings_without_their_secrets() -> None:
    stream = io.StringIO()
    logs.configure("gateway", "info", stream)
    logs.log_settings(GatewaySettings(redis_url="redis://:hunter2@db", registry_url="r"))
    assert lines(stream)[0]["settings"]["registry_url"] == "r"  # type: ignore[index]
    assert "hunter2" not in stream.getvalue()
