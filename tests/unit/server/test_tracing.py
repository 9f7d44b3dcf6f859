"""When tracing is on, what it refuses, and that without it OpenTelemetry's SDK is not even imported."""

import subprocess
import sys

import pytest

from engines.errors import InvalidRequest
from server import tracing

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environ", "is_on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_an_endpoint_turns_it_on(environ: dict[str, str], is_on: bool) -> None:
    assert tracing.wanted(environ) is is_on


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf only"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "http/protobuf only"),
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "set otlp"),
    ],
)
def test_what_it_cannot_do_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        tracing.wanted(ENDPOINT | given)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    said = r"^OTEL_EXPORTER_OTLP_ENDPOINT is set and OpenTelemetry is missing .*pip install 'fewstep\[tracing\]'"
    with pytest.raises(InvalidRequest, match=said), tracing.opened("gateway"):
        pass


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    check = (
        "import sys, server.app\nfrom server import tracing\n"
        "with tracing.opened('gateway') as made: assert made is None\n"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    environ = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", check], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
