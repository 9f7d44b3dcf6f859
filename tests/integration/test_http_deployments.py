from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engines.registry.base import Outcome
from engines.registry.memory import MemoryRegistry
from tests.eventually import eventually
from tests.gateway_stack import GatewayStack, running
from tests.unit.server.manifests import CFG, manifest, publish, revision

TEACHER = manifest("shapes", 8, mark=1, guidance=CFG)
STUDENT = manifest("shapes-fast", 1, 2, 4, mark=2)
NEWER = manifest("shapes-fast", 1, 2, 4, mark=3)
JUDGED = manifest("shapes-fast", 1, 2, 4, mark=4)
FIRST = revision(1, {"high": (TEACHER, 8)}, default="high")
NOW = revision(2, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 8)})
KEYS = (
    '[{"name": "web", "key": "key-of-the-web-site"},'
    ' {"name": "ops", "key": "key-of-the-operator", "scopes": ["admin"]}]'
)
WEB = {"authorization": "Bearer key-of-the-web-site"}
OPS = {"authorization": "Bearer key-of-the-operator"}
SHAPES = "/v1/deployments/shapes"


@pytest.fixture
def registry() -> MemoryRegistry:
    made = MemoryRegistry()
    publish(made, TEACHER, STUDENT, NEWER, JUDGED)
    made.put_report(JUDGED.version, {"gates": {"passed": False, "passed_steps": [4]}})
    return made


@pytest.fixture
def stack(registry: MemoryRegistry) -> Iterator[GatewayStack]:
    with running(FIRST, NOW, registry=registry, api_keys=KEYS) as made:
        yield made


def promote(stack: GatewayStack, body: dict[str, Any], **headers: str) -> httpx.Response:
    return stack.client.post(f"{SHAPES}/promote", json=body, headers={**OPS, **headers})


def low(student: str, steps: int = 1) -> dict[str, Any]:
    return {"tiers": {"low": {"student": student, "steps": steps}}}


def test_students_are_listed_page_by_page_with_their_manifest(stack: GatewayStack) -> None:
    first = stack.client.get("/v1/students", params={"limit": 3}, headers=WEB).json()
    rest = stack.client.get("/v1/students", params={"after": first["last_id"]}, headers=WEB).json()
    versions = [student["version"] for page in (first, rest) for student in page["data"]]
    assert versions == sorted(one.version for one in (TEACHER, STUDENT, NEWER, JUDGED))
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert first["data"][0]["steps"] in ([8], [1, 2, 4])


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "x"}, {"limit": "101"}, {"after": "nobody"}])
def test_a_page_that_is_none_is_refused(stack: GatewayStack, query: dict[str, str]) -> None:
    response = stack.client.get("/v1/students", params=query, headers=WEB)
    assert (response.status_code, response.json()["error"]["param"]) == (400, None or response.json()["error"]["param"])


def test_a_student_is_found_by_twelve_digits_with_its_report_and_samples(
    stack: GatewayStack, registry: MemoryRegistry
) -> None:
    path = f"/v1/students/shapes-fast@{JUDGED.digest[:12]}"
    found = stack.client.get(path, headers=WEB).json()
    assert (found["version"], found["report"]["gates"]["passed_steps"]) == (JUDGED.version, [4])
    assert stack.client.get(found["samples_url"], headers=WEB).status_code == 404
    registry.put_file(JUDGED.version, "samples.png", b"\x89PNG")
    assert stack.client.get(found["samples_url"], headers=WEB).headers["content-type"] == "image/png"
    assert stack.client.get("/v1/students/shapes-fast@000000000000", headers=WEB).status_code == 404


def test_a_deployment_shows_what_is_live_before_and_who_serves_it(stack: GatewayStack) -> None:
    found = stack.client.get(SHAPES, headers=WEB).json()
    assert (found["revision"], found["previous"], found["history"]) == (2, 1, [1, 2])
    assert found["tiers"]["low"] == {"student": STUDENT.version, "steps": 1}
    assert [worker["id"] for worker in found["workers"]] == ["worker-1"]
    listed = stack.client.get("/v1/deployments", headers=WEB).json()["data"]
    assert [one["name"] for one in listed] == ["shapes"]
    assert stack.client.get("/v1/deployments/other", headers=WEB).status_code == 404


def test_a_promotion_is_proposed_and_can_be_watched_until_it_is_live(
    stack: GatewayStack, registry: MemoryRegistry
) -> None:
    response = promote(stack, low(f"shapes-fast@{NEWER.digest[:12]}"))
    swap_id = response.json()["swap_id"]
    assert (response.status_code, response.headers["location"]) == (202, f"{SHAPES}/swaps/{swap_id}")
    candidate = registry.pending("shapes")[0]
    assert candidate.tiers["low"].student == NEWER.version
    assert candidate.tiers["medium"] == NOW.tiers["medium"]

    stack.call(stack.painter.broker.report_phase(swap_id, "worker-1", "warming", seconds={"building": 0.5}))
    shown = stack.client.get(response.headers["location"], headers=WEB).json()
    assert (shown["state"], shown["workers"]["worker-1"]["phase"]) == ("pending", "warming")
    assert stack.client.get(SHAPES, headers=WEB).json()["pending_swap"] == swap_id

    registry.commit(candidate.revision(3, created_at=candidate.created_at))
    outcome = Outcome(swap_id=swap_id, state="live", revision=3, phases={"warming": 0.1}, at=candidate.created_at)
    registry.settle("shapes", swap_id, outcome)
    shown = stack.client.get(response.headers["location"], headers=WEB).json()
    assert (shown["state"], shown["revision"], shown["phases"]) == ("live", 3, {"warming": 0.1})


def test_new_requests_follow_a_new_revision(stack: GatewayStack, registry: MemoryRegistry) -> None:
    registry.commit(revision(3, {"low": (NEWER, 1), "medium": (NEWER, 4)}))
    stack.painter.deployments["shapes"].append(NEWER.version)

    def version() -> bool:
        made = stack.client.post("/v1/generations", json={"prompt": "x"}, headers={**WEB, "accept": "image/png"})
        return made.headers["x-model-version"] == f"shapes-fast@{NEWER.digest[:12]}"

    eventually(version, 5)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (low("shapes-fast@000000000000"), 404, "student_not_found"),
        (low(NEWER.version, 3), 400, "steps_not_allowed"),
        (low(JUDGED.version, 1), 409, "gate_failed"),
        ({**low(NEWER.version), "if_revision": 1}, 409, "revision_conflict"),
        ({**low(NEWER.version), "default_tier": "ultra"}, 400, "invalid_request"),
        ({"tiers": {}}, 400, "invalid_request"),
        ({"tiers": {"low": {"student": NEWER.version}}}, 400, "invalid_request"),
    ],
)
def test_what_may_not_serve_is_not_proposed(
    stack: GatewayStack, registry: MemoryRegistry, body: dict[str, Any], status: int, code: str
) -> None:
    response = promote(stack, body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert registry.pending("shapes") == []


def test_a_student_serves_only_in_the_counts_that_passed(stack: GatewayStack, registry: MemoryRegistry) -> None:
    body = {"tiers": {"medium": {"student": JUDGED.version, "steps": 4}}, "if_revision": 2}
    assert promote(stack, body).status_code == 202
    assert registry.pending("shapes")[0].allowed[JUDGED.version] == [4]


def test_a_repeated_promotion_is_one(stack: GatewayStack, registry: MemoryRegistry) -> None:
    headers = {"idempotency-key": "k"}
    first, again = (promote(stack, low(NEWER.version), **headers).json()["swap_id"] for _ in range(2))
    assert first == again
    assert promote(stack, low(STUDENT.version), **headers).status_code == 409
    assert len(registry.pending("shapes")) == 1


def test_a_rollback_proposes_the_tiers_before(stack: GatewayStack, registry: MemoryRegistry) -> None:
    assert stack.client.post(f"{SHAPES}/rollback", json={}, headers=OPS).status_code == 202
    candidate = registry.pending("shapes")[0]
    assert (candidate.tiers, candidate.default_tier, candidate.base_revision) == (FIRST.tiers, "high", 2)
    unknown = stack.client.post("/v1/deployments/other/rollback", json={}, headers=OPS)
    assert unknown.status_code == 404


def test_the_first_revision_has_nothing_to_go_back_to(registry: MemoryRegistry) -> None:
    with running(FIRST, registry=registry) as stack:
        response = stack.client.post(f"{SHAPES}/rollback", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize("what", ["promote", "rollback"])
def test_only_an_operator_changes_what_serves(stack: GatewayStack, what: str) -> None:
    assert stack.client.post(f"{SHAPES}/{what}", json=low(NEWER.version), headers=WEB).status_code == 403


def test_quality_of_what_is_offered_is_a_series_until_it_no_longer_is(registry: MemoryRegistry) -> None:
    registry.put_report(STUDENT.version, {"steps": {"1": {"fd": 3.5}}})
    labels = {"model": "shapes", "version": f"shapes-fast@{STUDENT.digest[:12]}", "metric": "fd@1"}
    with running(NOW.model_copy(update={"number": 1}), registry=registry) as stack:
        eventually(lambda: stack.metric("fewstep_student_quality", **labels) == 3.5, 5)
        registry.commit(revision(2, {"medium": (NEWER, 4)}))
        eventually(lambda: labels["version"] not in stack.client.get("/metrics").text, 5)
