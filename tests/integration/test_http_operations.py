"""Probes, metrics, the KServe shapes and the OpenAPI document."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from pydantic import BaseModel

from engines.registry.memory import MemoryRegistry
from server.app import Authorise
from tests.eventually import eventually
from tests.gateway_stack import GatewayStack, running
from tests.unit.server.manifests import CFG, manifest, publish, revision

TEACHER = manifest("shapes", 8, mark=1, guidance=CFG)
STUDENT = manifest("shapes-fast", 1, 2, 4, mark=2)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 8)})


class Job(BaseModel):
    steps: int


def jobs(authorise: Authorise) -> APIRouter:
    """A router as another package would give."""
    routes = APIRouter()

    @routes.post("/v1/distillation/jobs")
    def submit(body: Job, authorization: str | None = None) -> Job:
        authorise(authorization, "distill")
        return body

    return routes


@pytest.fixture(scope="module")
def stack() -> Iterator[GatewayStack]:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, jobs_router=jobs) as made:
        yield made


@pytest.fixture(scope="module")
def document(stack: GatewayStack) -> dict[str, Any]:
    found: dict[str, Any] = stack.client.get("/openapi.json").json()
    return found


def test_probes(stack: GatewayStack) -> None:
    assert stack.client.get("/healthz").json() == {"status": "alive"}
    assert stack.client.get("/readyz").json() == {"status": "ready", "workers": 1, "models": ["shapes"]}
    assert stack.client.get("/v2/health/live").status_code == 200
    assert stack.client.get("/v2/health/ready").status_code == 200


def test_kserve_shapes(stack: GatewayStack) -> None:
    found = stack.client.get("/v2/models/shapes").json()
    assert set(found) == {"name", "versions", "platform", "inputs", "outputs"}
    assert f"shapes-fast@{STUDENT.digest[:12]}" in found["versions"]
    assert found["outputs"][0]["shape"] == [-1, 32, 32, 3]
    version = STUDENT.digest[:12]
    assert stack.client.get(f"/v2/models/shapes/versions/{version}").json()["versions"] == [f"shapes-fast@{version}"]
    assert stack.client.get(f"/v2/models/shapes/versions/{version}/ready").json()["ready"] is True
    assert stack.client.get("/v2/models/shapes/versions/7").status_code == 404
    assert stack.client.get("/v2/models/none/ready").status_code == 404
    assert stack.client.get("/v2").json()["name"] == "fewstep"


def test_metrics_count_what_was_answered(stack: GatewayStack) -> None:
    def count() -> float:
        return stack.metric("fewstep_requests_total", model="shapes", tier="low", status="succeeded")

    before = count()
    stack.client.post("/v1/generations", json={"prompt": "x", "tier": "low"})
    assert count() == before + 1
    text = stack.client.get("/metrics").text
    assert 'fewstep_request_seconds_bucket{le="0.001",model="shapes",tier="low",version=' in text
    assert "process_cpu_seconds_total" in text


def test_the_waiting_gauge_rises_and_falls_with_the_queue(stack: GatewayStack) -> None:
    def waiting() -> float:
        return stack.metric("fewstep_waiting", model="shapes", **{"class": "normal"})

    eventually(lambda: waiting() == 0, 5)


def test_capabilities_say_what_can_be_asked_for(stack: GatewayStack) -> None:
    stack.client.post("/v1/generations", json={"prompt": "x", "tier": "low"})
    found = stack.client.get("/v1/capabilities").json()["data"][0]
    assert (found["model"], found["sizes"], found["default_tier"]) == ("shapes", ["32x32", "64x48"], "medium")
    assert (found["tiers"]["low"]["steps"], found["tiers"]["high"]["steps"]) == (1, 8)
    assert found["tiers"]["low"]["p50_ms"] > 0
    assert found["tiers"]["high"]["guidance"] == {"mode": "cfg", "default": 2.0, "minimum": 1.0, "maximum": 8.0}


def test_another_package_s_routes_have_our_errors_too(stack: GatewayStack) -> None:
    assert stack.client.post("/v1/distillation/jobs", json={"steps": 1}).json() == {"steps": 1}
    response = stack.client.post("/v1/distillation/jobs", json={"steps": "many"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "steps")


# --- the document -----------------------------------------------------------------------------------


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_has_no_422_and_every_error_has_the_one_body(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert "422" not in operation["responses"], (path, method)
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and not path.startswith("/v1/distillation"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, method, status)


def test_every_reference_of_the_document_is_in_it(document: dict[str, Any]) -> None:
    known = set(document["components"]["schemas"])
    assert set(re.findall(r'#/components/schemas/([^"\'}]+)', str(document))) <= known


def test_every_parameter_of_a_path_is_documented(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        named = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path)), path


def test_every_route_answers_only_with_statuses_of_the_document(stack: GatewayStack, document: dict[str, Any]) -> None:
    bodies = (b"", b"{", b"[]", b"{}", b'{"prompt": 1}', b'{"prompt": "x", "n": 1e9}', b'{"tiers": {"a": 1}}')
    for path, method, operation in operations(document):
        url = re.sub(r"{\w+}", "x", path)
        for body in bodies if method == "post" else (None,):
            for kind in ("application/json", "text/plain"):
                response = stack.client.request(method, url, content=body, headers={"content-type": kind})
                assert str(response.status_code) in operation["responses"], (method, url, body, response.text)
                assert_documented(response, operation)


def assert_documented(response: httpx.Response, operation: dict[str, Any]) -> None:
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in operation["responses"][str(response.status_code)]["content"]
