"""Changing a picture over HTTP: forms, what they may say, and what reaches a worker of them."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.registry.memory import MemoryRegistry
from tests.gateway_stack import GatewayStack, running
from tests.unit.server.manifests import CFG, manifest, publish, revision

TEACHER = manifest("shapes", 8, mark=1, guidance=CFG)
STUDENT = manifest("shapes-fast", 1, 2, 4, mark=2)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 8)})
OPENAI, VARY, NATIVE = "/v1/images/edits", "/v1/images/variations", "/v1/generations"


@pytest.fixture(scope="module")
def stack() -> Iterator[GatewayStack]:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, max_upload_bytes=1_500_000, max_image_pixels=10_000) as made:
        yield made


def png(width: int = 32, height: int = 32, colour: Any = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if isinstance(colour, tuple) else "RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


CLEAR = png(colour=(0, 0, 0, 0))


def send(stack: GatewayStack, path: str, files: dict[str, bytes] | None = None, **fields: str) -> httpx.Response:
    given = {"image": png()} if files is None else files
    return stack.client.post(path, data={"prompt": "a blue square", **fields}, files=given)


def last(stack: GatewayStack) -> Any:
    """The request that reached the worker last, and the picture that came with it."""
    return stack.painter.edits[-1]


def test_an_edit_begins_where_its_strength_says_and_its_picture_travels_beside_it(stack: GatewayStack) -> None:
    response = send(stack, OPENAI, num_inference_steps="4", strength="0.5", seed="7", n="2")
    assert response.status_code == 200
    request, source = last(stack)
    assert (request.prompt, request.steps, request.edits_from, request.seed, request.n) == ("a blue square", 4, 2, 7, 2)
    assert request.cost_s == pytest.approx(2 * (0.001 + 2 * 0.002 + 0.001))  # of the two steps that each picture takes
    assert (np.frombuffer(source, np.uint8).reshape(32, 32, 3) == (255, 0, 0)).all()
    assert response.json()["usage"]["input_tokens_details"] == {"image_tokens": 16, "text_tokens": 3}
    assert response.json()["usage"]["total_tokens"] == 3 + 16 + 2 * 16
    assert len(response.json()["data"]) == 2


@pytest.mark.parametrize(
    ("path", "files", "steps"),
    [(OPENAI, {"image": png()}, 1), (OPENAI, {"image[]": png(), "mask": CLEAR}, 0), (VARY, {"image": png()}, 1)],
)
def test_without_a_strength_a_picture_keeps_a_quarter_of_its_steps_and_under_a_mask_none(
    stack: GatewayStack, path: str, files: dict[str, bytes], steps: int
) -> None:
    assert send(stack, path, files).status_code == 200
    request, source = last(stack)
    assert (request.steps, request.edits_from, len(source)) == (4, steps, 32 * 32 * (4 if "mask" in files else 3))


def test_a_variation_needs_no_words(stack: GatewayStack) -> None:
    assert stack.client.post(VARY, files={"image": png()}).status_code == 200
    assert last(stack)[0].prompt == ""


def test_the_native_dialect_takes_the_same_form_and_answers_in_bytes(stack: GatewayStack) -> None:
    response = stack.client.post(
        NATIVE,
        data={"prompt": "x", "tier": "medium", "strength": "0.75", "seed": "300"},
        files={"image": png()},
        headers={"accept": "image/png"},
    )
    assert response.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)
    assert last(stack)[0].edits_from == 1


def test_a_tier_that_would_leave_no_step_is_passed_over_unless_it_is_named(stack: GatewayStack) -> None:
    only_fast = manifest("fast", 1, 2, mark=3)
    registry = MemoryRegistry()
    publish(registry, only_fast)
    tiers = {"low": (only_fast, 1), "medium": (only_fast, 2)}
    with running(revision(1, tiers, default="low"), registry=registry) as fast:
        made = send(fast, OPENAI).json()
        assert (made["quality"], made["x_fewstep"]["steps"], last(fast)[0].edits_from) == ("medium", 2, 1)
        named = send(fast, OPENAI, quality="low")
        assert (named.status_code, named.json()["error"]["param"]) == (400, "strength")
        assert "1 steps" in named.json()["error"]["message"]


def test_an_edit_is_streamed_under_its_own_name(stack: GatewayStack) -> None:
    text = send(stack, OPENAI, stream="true", partial_images="1").text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == ["image_edit.partial_image", "image_edit.completed"]


def test_a_repeat_of_a_form_is_the_same_request_whatever_its_boundary(stack: GatewayStack) -> None:
    headers = {"idempotency-key": "one-form"}
    one, two = (
        stack.client.post(OPENAI, data={"prompt": "x"}, files={"image": png()}, headers=headers) for _ in range(2)
    )
    assert one.request.headers["content-type"] != two.request.headers["content-type"]
    assert one.json()["x_fewstep"]["seeds"] == two.json()["x_fewstep"]["seeds"]
    other = stack.client.post(OPENAI, data={"prompt": "x"}, files={"image": png(colour="blue")}, headers=headers)
    assert other.status_code == 409


@pytest.mark.parametrize("path", [OPENAI, NATIVE])
@pytest.mark.parametrize(
    ("files", "fields", "status", "param", "code"),
    [
        ({}, {}, 400, "image", "invalid_request"),
        ({"image": b"GIF89a and so on"}, {}, 415, "image", "unsupported_image"),
        ({"image": png(101, 100)}, {}, 413, "image", "image_too_large"),
        ({"image": png()[:60]}, {}, 400, "image", "invalid_request"),
        ({"image": png(), "mask": png()}, {}, 400, "mask", "invalid_request"),
        ({"image": png(), "mask": png(16, 16, (0, 0, 0, 0))}, {}, 400, "mask", "invalid_request"),
        ({"image": png()}, {"strength": "0"}, 400, "strength", "invalid_request"),
        ({"image": png()}, {"strength": "1.5"}, 400, "strength", "invalid_request"),
        ({"image": png()}, {"strength": "nan"}, 400, "strength", "invalid_request"),
        ({"image": png()}, {"n": "many"}, 400, "n", "invalid_request"),
        ({"image": png()}, {"sead": "3"}, 400, "sead", "invalid_request"),
        ({"image": png()}, {"refine": "first_step"}, 400, "refine", "contradictory_fields"),
        ({"image": png(), "prompt": b"words"}, {}, 400, "prompt", "invalid_request"),
    ],
)
def test_what_cannot_be_changed_is_refused(
    stack: GatewayStack,
    path: str,
    files: dict[str, bytes],
    fields: dict[str, str],
    status: int,
    param: str,
    code: str,
) -> None:
    texts = {name: (None, value) for name, value in ({"prompt": "x"} | fields).items() if name not in files}
    response = stack.client.post(path, files={**texts, **files})
    found = response.json()["error"]
    assert (response.status_code, found["param"], found["code"]) == (status, param, code), found


def test_two_pictures_are_one_too_many(stack: GatewayStack) -> None:
    files = [("image[]", png()), ("image[]", png())]
    response = stack.client.post(OPENAI, data={"prompt": "x"}, files=files)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "image")
    assert "twice" in response.json()["error"]["message"]


def test_a_form_may_be_larger_than_other_bodies_and_not_without_end(stack: GatewayStack) -> None:
    large = {"image": png() + bytes(1_200_000)}
    assert send(stack, OPENAI, large).status_code == 200
    assert send(stack, OPENAI, {"image": png() + bytes(1_600_000)}).status_code == 413
    body = b'{"prompt": "' + b"x" * 1_200_000 + b'"}'
    response = stack.client.post(NATIVE, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("content_type", "content", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nnothing", 400),
    ],
)
def test_what_is_no_form_is_refused(stack: GatewayStack, content_type: str, content: bytes, status: int) -> None:
    response = stack.client.post(OPENAI, content=content, headers={"content-type": content_type})
    assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_strength_without_a_picture_is_refused(stack: GatewayStack) -> None:
    response = stack.client.post(NATIVE, json={"prompt": "x", "strength": 0.5})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "strength")


def test_forms_are_documented_with_their_files(stack: GatewayStack) -> None:
    paths = stack.client.get("/openapi.json").json()["paths"]
    for path, files in ((OPENAI, {"image", "mask"}), (VARY, {"image"}), (NATIVE, {"image", "mask"})):
        schema = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        binary = {name for name, field in schema["properties"].items() if field.get("format") == "binary"}
        assert (binary, "image" in schema["required"]) == (files, True)
        assert {"400", "413", "415"} <= set(paths[path]["post"]["responses"])
    assert "application/json" in paths[NATIVE]["post"]["requestBody"]["content"]
