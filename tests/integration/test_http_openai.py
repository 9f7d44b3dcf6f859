"""What the OpenAI dialect does beyond what its SDK shows: precedence, refusals, raw events."""

import json
from collections.abc import Iterator

import pytest

from engines.registry.memory import MemoryRegistry
from tests.gateway_stack import GatewayStack, running
from tests.unit.server.manifests import CFG, manifest, publish, revision

TEACHER = manifest("shapes", 8, mark=1, guidance=CFG)
STUDENT = manifest("shapes-fast", 1, 2, 4, mark=2)
NOW = revision(1, {"low": (STUDENT, 1), "medium": (STUDENT, 4), "high": (TEACHER, 8)})
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def stack() -> Iterator[GatewayStack]:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry) as made:
        yield made


def test_the_answer_has_openai_s_shape_and_what_made_it(stack: GatewayStack) -> None:
    response = stack.client.post(PATH, json={"prompt": "one two three", "seed": 7, "quality": "low"})
    body = response.json()
    assert isinstance(body.pop("created"), int)
    data = body.pop("data")
    assert (data[0]["url"], data[0]["revised_prompt"]) == (None, None)
    assert body == {
        "background": "opaque",
        "output_format": "png",
        "quality": "low",
        "size": "32x32",
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 3},
            "output_tokens": 16,
            "output_tokens_details": {"image_tokens": 16, "text_tokens": 0},
            "total_tokens": 19,
        },
        "x_fewstep": {
            "model_version": f"shapes-fast@{STUDENT.digest[:12]}",
            "tier": "low",
            "steps": 1,
            "seeds": [7],
            "backend": "painter",
            "queue_ms": 1.0,
            "encode_ms": 0.5,
            "denoise_ms": 4.0,
            "decode_ms": 0.5,
            "image_ms": 0.25,
            "ignored_words": [],
            "downgraded_from": None,
            "refined": None,
        },
    }


@pytest.mark.parametrize(
    ("quality", "tier"), [("standard", "medium"), ("hd", "high"), ("auto", "medium"), (None, "medium"), ("low", "low")]
)
def test_quality_names_the_tier(stack: GatewayStack, quality: str | None, tier: str) -> None:
    assert stack.client.post(PATH, json={"prompt": "x", "quality": quality}).json()["quality"] == tier


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        ({"quality": "low", "num_inference_steps": 4}, "num_inference_steps", "contradictory_fields", "quality=low"),
        ({"num_inference_steps": 3}, "num_inference_steps", "steps_not_allowed", "1, 2, 4, 8"),
        ({"quality": "ultra"}, "quality", "invalid_request", "low, medium, high"),
        ({"size": "48x64"}, "size", "invalid_size", "32x32, 64x48"),
        ({"size": "large"}, "size", "invalid_size", "'auto'"),
        ({"background": "transparent"}, "background", "invalid_request", "opaque"),
        ({"stream": True, "n": 2}, "n", "invalid_request", "one picture"),
        ({"partial_images": 2}, "partial_images", "invalid_request", "stream=true"),
        ({"sead": 3}, "sead", "invalid_request", "not known"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    stack: GatewayStack, body: dict[str, object], param: str, code: str, says: str
) -> None:
    response = stack.client.post(PATH, json={"prompt": "x", **body})
    found = response.json()["error"]
    assert (response.status_code, found["param"], found["code"]) == (400, param, code)
    assert says in found["message"]


def test_fields_that_openai_defines_and_we_do_not_use_are_accepted(stack: GatewayStack) -> None:
    body = {"prompt": "x", "user": "u", "style": "vivid", "moderation": "low", "background": "auto", "n": None}
    assert stack.client.post(PATH, json=body).status_code == 200


def test_an_event_has_its_type_twice_and_the_stream_ends_as_openai_s_do(stack: GatewayStack) -> None:
    text = stack.client.post(PATH, json={"prompt": "x", "stream": True, "partial_images": 1}).text
    *events, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    for event in events:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def test_a_failure_in_mid_stream_is_an_error_in_the_data(stack: GatewayStack) -> None:
    text = stack.client.post(PATH, json={"prompt": "fail", "stream": True}).text
    assert json.loads(text.split("\n\n")[0].removeprefix("data: "))["error"]["param"] == "prompt"


def test_a_repeat_under_its_key_is_the_same_answer(stack: GatewayStack) -> None:
    headers = {"idempotency-key": "once"}
    one, two = (stack.client.post(PATH, json={"prompt": "x"}, headers=headers).json() for _ in range(2))
    assert one["x_fewstep"]["seeds"] == two["x_fewstep"]["seeds"]
    assert (one["data"], one["size"], one["usage"]) == (two["data"], two["size"], two["usage"])


def queue(stack: GatewayStack, seconds: float) -> None:
    """Shows the gateway a queue that long until its next look."""
    stack.app.state.gateway.catalog.view.published_s[("shapes", "normal")] = seconds


def test_auto_gives_way_to_load_and_says_so_where_a_named_quality_does_not() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, poll_s=60.0) as stack:
        queue(stack, 1.5)
        for quality in ("auto", None):
            response = stack.client.post(PATH, json={"prompt": "x", "quality": quality})
            made = response.json()
            assert (made["quality"], made["x_fewstep"]["steps"]) == ("low", 2)
            assert made["x_fewstep"]["downgraded_from"] == {"tier": "medium", "steps": 4}
            assert response.headers["x-downgraded-from"] == "medium;steps=4"
        assert stack.metric("fewstep_tier_downgraded_total", **{"from": "medium", "to": "low"}) == 2
        assert stack.metric("fewstep_degraded", model="shapes", **{"class": "normal"}) == 1
        named = stack.client.post(PATH, json={"prompt": "x", "quality": "medium"})
        assert (named.json()["x_fewstep"]["steps"], "x-downgraded-from" in named.headers) == (4, False)
        assert stack.metric("fewstep_tier_downgraded_total", **{"from": "medium", "to": "low"}) == 2


def test_a_stream_says_at_its_head_that_it_was_downgraded() -> None:
    registry = MemoryRegistry()
    publish(registry, TEACHER, STUDENT)
    with running(NOW, registry=registry, poll_s=60.0) as stack:
        queue(stack, 5.0)
        response = stack.client.post(PATH, json={"prompt": "x", "stream": True})
        assert response.headers["x-downgraded-from"] == "medium;steps=4"
        completed = json.loads(response.text.split("data: ")[1].split("\n")[0])
        assert completed["x_fewstep"]["downgraded_from"] == {"tier": "medium", "steps": 4}
