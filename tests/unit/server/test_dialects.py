from typing import Any

import msgspec
import pytest

from engines import plugins
from engines.errors import ContradictoryFields, InvalidRequest
from server.dialects import base
from server.dialects._native_request import (
    GenerationRequest,
    Preference,
    accepted_formats,
    intent_of,
    preference,
    repeated,
    wants_bytes,
)
from server.media import Media, OutputFormat


@pytest.mark.parametrize(
    ("accept", "formats"),
    [
        ("*/*", ""),
        ("application/json", ""),
        ("", ""),
        ("image/png", "png"),
        ("image/webp;q=0.9, image/png;q=0.5", "webp png"),
        ("application/json, image/png;q=0.5", ""),
        ("application/json;q=0.7, image/png;q=0.5, image/webp", "webp"),
        ("image/*", "png webp jpeg"),
        ("image/*, image/png;q=0", "webp jpeg"),
        ("IMAGE/JPEG", "jpeg"),
        ("video/mp4", "mp4"),
        ("image/png, video/mp4", "png mp4"),
        ("video/*, image/*;q=0.5", "mp4 png webp jpeg"),
        ("image/png;q=0", ""),
        ("image/png;q=x", ""),
        ("text/html", ""),
    ],
)
def test_accept_prefers_bytes_or_json(accept: str, formats: str) -> None:
    assert accepted_formats(accept) == tuple(formats.split())


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", Preference()),
        ("respond-async", Preference(later=True)),
        ("Respond-Async, wait=10", Preference(wait_s=10)),
        ("wait=5", Preference(wait_s=5)),
        ("wait=soon, handling=lenient", Preference()),
    ],
)
def test_prefer_is_read_as_its_rfc_says(header: str, expected: Preference) -> None:
    assert preference(header) == expected


def test_a_request_becomes_an_intent_without_a_loss() -> None:
    body = GenerationRequest(prompt="x", model="m", steps=2, width=64, height=48, guidance_scale=2.5, n=2, seed=3)
    intent = intent_of(body, (), "00-trace")
    assert (intent.wanted.model, intent.wanted.steps, intent.wanted.guidance) == ("m", 2, 2.5)
    assert (intent.wanted.size, intent.n, intent.seed, intent.traceparent) == ((64, 48), 2, 3, "00-trace")


def test_the_format_is_the_body_s_or_one_of_the_accepted_or_left_to_the_student() -> None:
    def media(*accepted: OutputFormat, **body: Any) -> Media:
        return intent_of(GenerationRequest(prompt="x", **body), accepted, None).wanted.media

    assert media(output_format="webp", num_frames=9, fps=8) == Media("webp", 9, 8)
    assert media("jpeg", "mp4") == Media(accepted=("jpeg", "mp4"))
    assert media() == Media()


def test_bytes_are_of_one_picture_in_an_accepted_format() -> None:
    assert wants_bytes(GenerationRequest(prompt="x"), ["png"])
    assert wants_bytes(GenerationRequest(prompt="x", output_format="webp"), ["png", "webp"])
    assert not wants_bytes(GenerationRequest(prompt="x", stream=True), ["png"])
    with pytest.raises(ContradictoryFields, match="image/png or video/mp4"):
        wants_bytes(GenerationRequest(prompt="x", output_format="webp"), ["png", "mp4"])
    with pytest.raises(InvalidRequest):
        wants_bytes(GenerationRequest(prompt="x", n=2), ["png"])


def test_a_repeat_wants_the_same_format_whether_as_bytes_or_in_json() -> None:
    def said(*accepted: OutputFormat, **body: Any) -> bytes:
        return repeated(GenerationRequest(prompt="x", **body), b"{}", accepted)

    assert said() == said("png") == said("png", "webp", "jpeg")
    assert len({said(), said("webp"), said("mp4"), said(output_format="jpeg")}) == 4


def test_an_event_says_its_name_beside_its_data() -> None:
    assert base.Event("step", b"{}", "3").encode() == b"id: 3\nevent: step\ndata: {}\n\n"
    assert base.Event(None, b"[DONE]").encode() == b"data: [DONE]\n\n"


def test_every_dialect_documents_the_records_it_names() -> None:
    for name in plugins.names("server.dialects"):
        dialect: base.Dialect = plugins.load("server.dialects", name, "DIALECT")
        _, schemas = msgspec.json.schema_components(dialect.schemas, ref_template="{name}")
        assert {record.__name__ for record in dialect.schemas} <= set(schemas)
