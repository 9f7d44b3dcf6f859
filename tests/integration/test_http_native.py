import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from engines.manifest import Judge
from engines.registry.memory import MemoryRegistry
from tests.eventually import eventually
from tests.gateway_stack import GatewayStack, running
from tests.unit.server.manifests import CFG, manifest, publish, revision

TEACHER = manifest("shapes", 8, mark=1, guidance=CFG)
STUDENT = manifest("shapes-fast", 1, 2, 4, mark=2)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 8)})
PATH = "/v1/generations"
KEYS = (
    '[{"name": "web", "key": "key-of-the-web-site"}, {"name": "other", "key": "key-of-somebody-else"},'
    ' {"name": "ops", "key": "key-of-the-operator", "scopes": ["admin"]},'
    ' {"name": "trainer", "key": "key-of-the-trainer", "scopes": ["distill"]}]'
)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def registry() -> MemoryRegistry:
    made = MemoryRegistry()
    publish(made, TEACHER, STUDENT)
    return made


@pytest.fixture(scope="module")
def stack(registry: MemoryRegistry) -> Iterator[GatewayStack]:
    with running(NOW, registry=registry) as made:
        yield made


@pytest.fixture(scope="module")
def guarded() -> Iterator[GatewayStack]:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, api_keys=KEYS) as made:
        yield made


def error(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    found: dict[str, str] = body["error"]
    return found


def size(data: bytes) -> tuple[int, int]:
    width, height = Image.open(io.BytesIO(data)).size
    return width, height


# --- bytes and JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind"),
    [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/jpeg", "JPEG"), ("image/*", "PNG")],
)
def test_accept_chooses_the_bytes(stack: GatewayStack, accept: str, kind: str) -> None:
    response = stack.client.post(PATH, json={"prompt": "a red circle"}, headers={"accept": accept})
    assert Image.open(io.BytesIO(response.content)).format == kind
    assert response.headers["content-type"] == f"image/{kind.lower()}"
    assert response.headers["x-model-version"] == f"shapes-fast@{STUDENT.digest[:12]}"
    assert "denoise;dur=4.00" in response.headers["server-timing"]


def test_json_says_what_made_the_pictures_and_where_they_are(stack: GatewayStack) -> None:
    body = stack.client.post(PATH, json={"prompt": "a xyzzy", "n": 2, "seed": 7, "tier": "low"}).json()
    assert (body["status"], body["tier"], body["steps"], body["backend"]) == ("succeeded", "low", 1, "painter")
    assert (body["timing"]["denoise_ms"], body["ignored_words"]) == (4.0, ["xyzzy"])
    assert [image["seed"] for image in body["images"]] == [7, 8]
    assert body["images"][0]["content_url"].startswith(stack.url.rsplit(":", 1)[0])


def test_without_store_the_pictures_are_in_the_answer(stack: GatewayStack) -> None:
    body = stack.client.post(PATH, json={"prompt": "x", "store": False}).json()
    assert body["images"][0]["b64"].startswith("iVBOR")
    assert body["images"][0]["content_url"] is None


def test_a_size_is_made_as_asked(stack: GatewayStack) -> None:
    asked = {"prompt": "x", "width": 64, "height": 48}
    assert size(stack.client.post(PATH, json=asked, headers={"accept": "image/png"}).content) == (64, 48)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "prompt", "invalid_request"),
        ({"prompt": 3}, 400, "prompt", "invalid_request"),
        ({"prompt": "x", "colour": 1}, 400, "colour", "invalid_request"),
        ({"prompt": "x", "n": 0}, 400, "n", "invalid_request"),
        ({"prompt": "x", "n": 11}, 400, "n", "invalid_request"),
        ({"prompt": "x", "seed": -1}, 400, "seed", "invalid_request"),
        ({"prompt": "x", "width": 64}, 400, "width", "invalid_request"),
        ({"prompt": "x", "width": 48, "height": 64}, 400, "size", "invalid_size"),
        ({"prompt": "x", "steps": 3}, 400, "steps", "steps_not_allowed"),
        ({"prompt": "x", "steps": 2, "tier": "high"}, 400, "steps", "contradictory_fields"),
        ({"prompt": "x", "tier": "ultra"}, 400, "tier", "invalid_request"),
        ({"prompt": "x", "guidance_scale": 3.0}, 400, "guidance_scale", "invalid_request"),
        ({"prompt": "x", "model": "nothing"}, 404, "model", "model_not_found"),
        ({"prompt": "x", "model": "shapes@" + "0" * 64}, 404, "model", "model_not_found"),
        ({"prompt": "please fail"}, 400, "prompt", "invalid_request"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_field(
    stack: GatewayStack, body: dict[str, object], status: int, param: str, code: str
) -> None:
    response = stack.client.post(PATH, json=body)
    found = error(response)
    assert (response.status_code, found["param"], found["code"]) == (status, param, code)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_is_a_400(stack: GatewayStack, data: bytes) -> None:
    response = stack.client.post(PATH, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error(response)


def test_two_pictures_do_not_fit_into_one_png(stack: GatewayStack) -> None:
    response = stack.client.post(PATH, json={"prompt": "x", "n": 2}, headers={"accept": "image/png"})
    assert (response.status_code, error(response)["param"]) == (400, "n")


def test_accept_and_output_format_may_not_contradict(stack: GatewayStack) -> None:
    body = {"prompt": "x", "output_format": "webp"}
    response = stack.client.post(PATH, json=body, headers={"accept": "image/png"})
    assert error(response)["code"] == "contradictory_fields"


# --- the edges --------------------------------------------------------------------------------------


def test_404_405_and_415_have_our_body(stack: GatewayStack) -> None:
    assert error(stack.client.get("/nowhere"))["code"] == "not_found"
    assert error(stack.client.put(PATH))["code"] == "method_not_allowed"
    response = stack.client.post(PATH, data={"prompt": "x"})
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")


def test_a_body_too_large_is_refused_whether_or_not_it_says_its_length() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, max_body_bytes=2048) as stack:
        large = b'{"prompt": "' + b"x" * 4000 + b'"}'
        headers = {"content-type": "application/json"}
        said = stack.client.post(PATH, content=large, headers=headers)
        unsaid = stack.client.post(PATH, content=iter([large[:2000], large[2000:]]), headers=headers)
        assert (said.status_code, unsaid.status_code) == (413, 413)
        assert error(said)["code"] == error(unsaid)["code"] == "body_too_large"


def test_a_sane_request_id_is_kept_and_another_is_replaced(stack: GatewayStack) -> None:
    assert stack.client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert stack.client.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_what_nobody_foresaw_is_a_500_with_our_body(stack: GatewayStack, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("/secret")

    monkeypatch.setattr(stack.app.state.gateway.catalog, "choices", broken)
    response = stack.client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, error(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text


# --- later ------------------------------------------------------------------------------------------


def test_a_job_is_answered_at_once_and_read_later(stack: GatewayStack) -> None:
    response = stack.client.post(PATH, json={"prompt": "x", "seed": 5}, headers={"prefer": "respond-async"})
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")
    where = response.headers["location"]
    done = eventually(lambda: (body := stack.client.get(where).json())["status"] == "succeeded" and body, 5)
    assert done["created_at"] <= done["completed_at"]
    image = stack.client.get(f"{where}/images/0")
    assert image.headers["content-type"] == "image/png"
    assert stack.client.get(f"{where}/images/1").status_code == 410
    assert error(stack.client.get(f"{where}/images/x"))["param"] == "index"


def test_prefer_wait_waits_that_long_and_no_longer(stack: GatewayStack) -> None:
    quick = stack.client.post(PATH, json={"prompt": "x"}, headers={"prefer": "wait=5"})
    slow = stack.client.post(PATH, json={"prompt": "wait"}, headers={"prefer": "wait=0"})
    assert (quick.status_code, slow.status_code) == (200, 202)
    assert slow.headers["preference-applied"] == "wait=0"
    stack.client.delete(slow.headers["location"])


def test_cancel_ends_a_request_once_and_reaches_the_worker(stack: GatewayStack) -> None:
    where = stack.client.post(PATH, json={"prompt": "wait"}, headers={"prefer": "respond-async"}).headers["location"]
    eventually(lambda: stack.client.get(where).json()["status"] == "running", 5)
    first, again = stack.client.delete(where), stack.client.delete(where)
    assert (first.status_code, first.json()["status"]) == (200, "canceled")
    assert (again.status_code, error(again)["code"]) == (409, "already_ended")
    eventually(lambda: where.rsplit("/", 1)[1] in stack.painter.canceled, 5)
    assert stack.metric("fewstep_cancelled_total", where="gateway") >= 1


def test_what_nobody_answers_in_time_ends_as_a_504(stack: GatewayStack) -> None:
    response = stack.client.post(PATH, json={"prompt": "wait", "timeout_ms": 300})
    assert (response.status_code, error(response)["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    assert stack.metric("fewstep_deadline_missed_total", model="shapes") >= 1


def test_a_job_that_nobody_waits_for_ends_too(stack: GatewayStack) -> None:
    body = {"prompt": "wait", "timeout_ms": 300}
    where = stack.client.post(PATH, json=body, headers={"prefer": "respond-async"}).headers["location"]
    eventually(lambda: stack.client.get(where).json()["status"] == "expired", 5)


def test_an_unknown_generation_is_a_404_and_one_of_long_ago_a_410(stack: GatewayStack) -> None:
    assert stack.client.get(f"{PATH}/gen_unknown").status_code == 404
    assert stack.client.get(f"{PATH}/gen_00000001{'0' * 20}").status_code == 410


# --- disconnects ------------------------------------------------------------------------------------


def test_a_client_that_leaves_takes_its_request_with_it(stack: GatewayStack) -> None:
    before = len(stack.painter.canceled)
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(PATH, json={"prompt": "wait"}, timeout=0.3)
    eventually(lambda: len(stack.painter.canceled) > before, 5)


@pytest.mark.parametrize("path", [PATH, "/v1/images/generations"])
def test_a_client_that_leaves_a_stream_takes_its_request_with_it(stack: GatewayStack, path: str) -> None:
    before = len(stack.painter.canceled)
    with stack.client.stream("POST", path, json={"prompt": "wait", "stream": True, "partial_images": 1}) as response:
        assert response.status_code == 200
    eventually(lambda: len(stack.painter.canceled) > before, 5)


@pytest.mark.parametrize("how", ["on_disconnect", "idempotency"])
def test_a_client_may_leave_and_have_it_finished(stack: GatewayStack, how: str) -> None:
    before, started = len(stack.painter.canceled), len(stack.painter.started)
    body = {"prompt": "wait", "timeout_ms": 700, **({"on_disconnect": "finish"} if how == "on_disconnect" else {})}
    headers = {"idempotency-key": "leaving"} if how == "idempotency" else {}
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(PATH, json=body, headers=headers, timeout=0.2)
    request_id = eventually(lambda: stack.painter.started[started:], 5)[0]
    status = eventually(lambda: (s := stack.call(stack.app.state.gateway.broker.status(request_id))).result and s, 5)
    assert status.state == "expired"
    assert request_id not in stack.painter.canceled[:before]


# --- events -----------------------------------------------------------------------------------------


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]


def test_a_stream_shows_steps_and_partial_images_and_then_the_answer(stack: GatewayStack) -> None:
    body = {"prompt": "x", "stream": True, "partial_images": 2, "tier": "medium"}
    response = stack.client.post(PATH, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events(response) == ["queued", *["step"] * 4, "partial_image", "partial_image", "completed"]


def test_a_failure_in_a_stream_is_its_last_event(stack: GatewayStack) -> None:
    response = stack.client.post(PATH, json={"prompt": "fail", "stream": True})
    assert events(response)[-1] == "error"
    assert '"param":"prompt"' in response.text


def test_events_of_a_job_can_be_followed_from_any_point(stack: GatewayStack) -> None:
    body = {"prompt": "x", "tier": "low", "partial_images": 1}
    where = stack.client.post(PATH, json=body, headers={"prefer": "respond-async"}).headers["location"]
    whole = stack.client.get(f"{where}/events")
    assert events(whole) == ["queued", "step", "partial_image", "completed"]
    ids = [line.removeprefix("id: ") for line in whole.text.splitlines() if line.startswith("id: ")]
    rest = stack.client.get(f"{where}/events", headers={"last-event-id": ids[1]})
    assert events(rest) == ["partial_image", "completed"]
    assert stack.client.get(f"{where}/events", headers={"last-event-id": "x"}).status_code == 400


# --- keys, owners, signatures, idempotency ----------------------------------------------------------


def test_a_request_needs_a_known_key_with_the_scope(guarded: GatewayStack) -> None:
    body = {"prompt": "x"}
    nobody = guarded.client.post(PATH, json=body)
    assert (nobody.status_code, error(nobody)["type"]) == (401, "authentication_error")
    wrong = guarded.client.post(PATH, json=body, headers=bearer("key-of-the-trainer"))
    assert (wrong.status_code, error(wrong)["type"]) == (403, "permission_error")
    assert guarded.client.post(PATH, json=body, headers=bearer("key-of-the-web-site")).status_code == 200


def test_what_one_key_made_another_does_not_see_but_the_operator_does(guarded: GatewayStack) -> None:
    mine = bearer("key-of-the-web-site")
    where = guarded.client.post(PATH, json={"prompt": "x"}, headers={**mine, "prefer": "respond-async"}).headers[
        "location"
    ]
    for path in (where, f"{where}/images/0", f"{where}/events"):
        assert guarded.client.get(path, headers=bearer("key-of-somebody-else")).status_code == 404
    assert guarded.client.delete(where, headers=bearer("key-of-somebody-else")).status_code == 404
    assert guarded.client.get(where, headers=bearer("key-of-the-operator")).status_code == 200
    assert guarded.client.get(where, headers=mine).status_code == 200


def test_a_signed_address_needs_no_key_and_only_opens_its_own_picture(guarded: GatewayStack) -> None:
    body = guarded.client.post(PATH, json={"prompt": "x", "n": 2}, headers=bearer("key-of-the-web-site")).json()
    url = httpx.URL(body["images"][0]["content_url"]).raw_path.decode()
    assert guarded.client.get(url).headers["content-type"] == "image/png"
    assert guarded.client.get(url.replace("/images/0", "/images/1")).status_code == 403
    assert guarded.client.get(url.partition("?")[0]).status_code == 401


def test_an_idempotency_key_gets_the_same_answer_and_never_another_body_s(guarded: GatewayStack) -> None:
    headers = {**bearer("key-of-the-web-site"), "idempotency-key": "k1"}
    first, again = (guarded.client.post(PATH, json={"prompt": "x"}, headers=headers).json() for _ in range(2))
    assert (first["id"], first["images"][0]["seed"]) == (again["id"], again["images"][0]["seed"])
    other = guarded.client.post(PATH, json={"prompt": "y"}, headers=headers)
    assert (other.status_code, error(other)["code"]) == (409, "idempotency_conflict")
    as_bytes = guarded.client.post(PATH, json={"prompt": "x"}, headers={**headers, "accept": "image/webp"})
    assert as_bytes.status_code == 409
    elsewhere = {**bearer("key-of-somebody-else"), "idempotency-key": "k1"}
    assert guarded.client.post(PATH, json={"prompt": "x"}, headers=elsewhere).json()["id"] != first["id"]


# --- load -------------------------------------------------------------------------------------------


def test_a_model_without_a_worker_is_a_503_that_says_when_to_come_back() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, worker=False, worker_grace_s=0) as stack:
        response = stack.client.post(PATH, json={"prompt": "x"})
        assert (response.status_code, error(response)["code"]) == (503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert stack.client.get("/readyz").status_code == 503
        assert stack.client.get("/healthz").status_code == 200


def test_a_queue_too_long_is_a_429_with_the_wait_until_it_is_not() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, max_wait_s=0.001) as stack:
        for _ in range(3):
            stack.client.post(PATH, json={"prompt": "wait", "n": 10}, headers={"prefer": "respond-async"})
        response = stack.client.post(PATH, json={"prompt": "x", "n": 10})
        assert (response.status_code, error(response)["type"]) == (429, "rate_limit_error")
        assert int(response.headers["retry-after-ms"]) >= 1
        assert stack.metric("fewstep_shed_total", reason="overloaded") >= 1


def test_a_gateway_that_stops_refuses_what_is_new(stack: GatewayStack) -> None:
    stack.app.state.gateway.draining = True
    try:
        assert stack.client.post(PATH, json={"prompt": "x"}).status_code == 503
        assert stack.client.get("/readyz").status_code == 503
    finally:
        stack.app.state.gateway.draining = False


def test_tier_auto_gives_way_to_load_and_no_word_means_the_default_tier() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, poll_s=60.0) as stack:
        stack.app.state.gateway.catalog.view.published_s[("shapes", "normal")] = 5.0
        told = stack.client.post(PATH, json={"prompt": "x", "tier": "auto"})
        assert (told.json()["tier"], told.json()["downgraded_from"]) == ("low", {"tier": "medium", "steps": 4})
        assert told.headers["x-downgraded-from"] == "medium;steps=4"
        later = stack.client.post(PATH, json={"prompt": "x", "tier": "auto"}, headers={"prefer": "respond-async"})
        assert later.headers["x-downgraded-from"] == "medium;steps=4"
        assert stack.client.post(PATH, json={"prompt": "x"}).json()["downgraded_from"] is None


def test_what_the_teacher_adds_is_asked_for_told_and_offered() -> None:
    made = manifest("shapes-fast", 1, 2, 4, mark=2, base=TEACHER)
    judged = made.judged(Judge(steps=8, doubts={1: (0.5,) * 10}))
    registry = MemoryRegistry()
    publish(registry, TEACHER, made)
    registry.publish(judged)
    now = revision(1, {"low": (judged, 1), "medium": (made, 4), "high": (TEACHER, 8)})
    teacher = f"shapes@{TEACHER.digest[:12]}"
    with running(now, registry=registry) as stack:
        tiers = stack.client.get("/v1/capabilities").json()["data"][0]["tiers"]
        offered = {"low": ["redo"], "medium": ["first_step", "correction"], "high": []}
        assert {tier: one["refine"] for tier, one in tiers.items()} == offered

        def ask(path: str = PATH, **fields: Any) -> httpx.Response:
            return stack.client.post(path, json={"prompt": "x", **fields})

        told = ask(refine="first_step")
        assert told.json()["refined"] == {"refine": "first_step", "teacher": teacher, "redone": []}
        assert told.headers["x-refined"] == f'first_step;teacher="{teacher}"'
        told = ask(tier="low", refine="redo", redo_share=0.1)
        assert told.json()["refined"] == {"refine": "redo", "teacher": teacher, "redone": [0]}
        assert told.headers["x-refined"] == f'redo;teacher="{teacher}";redone="0"'
        openai = ask("/v1/images/generations", refine="correction")
        assert openai.json()["x_fewstep"]["refined"] == {"refine": "correction", "teacher": teacher, "redone": []}
        for fields, param in (
            ({"tier": "low", "refine": "first_step"}, "refine"),
            ({"refine": "redo"}, "refine"),
            ({"refine": "correction", "redo_share": 0.1}, "redo_share"),
            ({"tier": "low", "refine": "redo", "redo_share": 0.6}, "redo_share"),
        ):
            refused = ask(**fields)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), fields
        assert ask(refine="more").status_code == 400
