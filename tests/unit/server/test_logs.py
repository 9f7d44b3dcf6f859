import io
import json
import logging
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from server import logs
from server.messages import GenerateRequest
from server.settings import GatewaySettings

REQUEST = GenerateRequest(
    id="r1",
    model="shapes",
    version="shapes@3f",
    tier="low",
    steps=1,
    prompt="x",
    width=32,
    height=32,
    seed=1,
    budget_ms=1000,
    reply_to="gateway",
)


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


def test_a_line_about_a_request_among_many_has_its_ids_and_its_trace() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    carried = f"00-{trace}-b7ad6b7169203331-01"
    assert logs.about(replace(REQUEST, traceparent=carried)) == {"request_id": "r1", "trace_id": trace}
    for nothing in (None, "00-trace"):
        assert logs.about(replace(REQUEST, traceparent=nothing)) == {"request_id": "r1"}


def test_what_is_logged_while_a_request_is_traced_has_its_trace() -> None:
    stream = io.StringIO()
    logs.configure("gateway", "info", stream)
    token = logs.trace_id.set("0af7651916cd43dd8448eb211c80319c")
    logging.getLogger("x").info("done")
    logs.trace_id.reset(token)
    assert lines(stream)[0]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
