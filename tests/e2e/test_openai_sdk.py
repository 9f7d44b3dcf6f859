"""OpenAI's own Python SDK against the gateway.

With FEWSTEP_TEST_URL (and FEWSTEP_TEST_KEY) set it runs against that stack; otherwise against one that
paints. What it asks for holds for every deployment of the embedded teacher's kind.
"""

import base64
import io
import os
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image

from engines.registry.memory import MemoryRegistry
from tests.gateway_stack import running
from tests.unit.server.manifests import CFG, manifest, publish, revision

KEY = "key-of-the-web-site"


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    if url := os.environ.get("FEWSTEP_TEST_URL"):
        yield url
        return
    registry = MemoryRegistry()
    teacher, student = manifest("shapes", 8, mark=1, guidance=CFG), manifest("shapes-fast", 1, 2, 4, mark=2)
    publish(registry, teacher, student)
    tiers = {"low": (student, 1), "medium": (student, 4), "high": (teacher, 8)}
    keys = f'[{{"name": "web", "key": "{KEY}"}}]'
    with running(revision(1, tiers), registry=registry, api_keys=keys) as stack:
        yield stack.url


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    key = os.environ.get("FEWSTEP_TEST_KEY", KEY)
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def opened(b64: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64 or "")))


def test_generate(client: openai.OpenAI, model: str) -> None:
    made = client.images.generate(model=model, prompt="a red circle")
    image = opened((made.data or [])[0].b64_json)
    assert (image.format, f"{image.width}x{image.height}") == ("PNG", made.size)
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens > 0


def test_two_pictures_of_one_prompt_are_two(client: openai.OpenAI, model: str) -> None:
    made = client.images.generate(model=model, prompt="a red circle", n=2, extra_body={"seed": 7})
    first, second = (image.b64_json for image in made.data or [])
    assert first != second
    again = client.images.generate(model=model, prompt="a red circle", extra_body={"seed": 8})
    assert opened((again.data or [])[0].b64_json).tobytes() == opened(second).tobytes()


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_formats(client: openai.OpenAI, model: str, image_format: str) -> None:
    made = client.images.generate(model=model, prompt="x", output_format=image_format)  # type: ignore[call-overload]
    assert opened(made.data[0].b64_json).format == image_format.upper()


def test_quality_is_the_tier(client: openai.OpenAI, model: str) -> None:
    low = client.images.generate(model=model, prompt="x", quality="high")
    assert low.quality == "high"
    assert low.x_fewstep["steps"] > 1  # type: ignore[attr-defined]


def test_a_url_can_be_fetched_bare(client: openai.OpenAI, model: str) -> None:
    made = client.images.generate(model=model, prompt="x", response_format="url")
    url = (made.data or [])[0].url
    assert url is not None
    assert httpx.get(url).headers["content-type"] == "image/png"


def test_a_stream_with_partial_images(client: openai.OpenAI, model: str) -> None:
    with client.images.generate(
        model=model, prompt="x", stream=True, partial_images=2, extra_body={"num_inference_steps": 4}
    ) as stream:
        events = list(stream)
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * (len(events) - 1)
    assert 1 <= len(events) - 1 <= 2
    assert events[-1].type == "image_generation.completed"
    assert all(opened(event.b64_json).format == "PNG" for event in events)
    assert events[-1].usage.total_tokens > 0


def test_a_stream_without_partial_images_is_only_the_end(client: openai.OpenAI, model: str) -> None:
    with client.images.generate(model=model, prompt="x", stream=True) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"]


def picture(size: str | None, *, clear: bool = False) -> tuple[str, bytes, str]:
    """A picture of that size as clients send it; or a mask of it whose left half may change."""
    width, height = map(int, (size or "16x16").split("x"))
    made = Image.new("RGBA", (width, height), (40, 90, 200, 255))
    if clear:
        made.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    buffer = io.BytesIO()
    made.save(buffer, "PNG")
    return "picture.png", buffer.getvalue(), "image/png"


def test_edit(client: openai.OpenAI, model: str) -> None:
    size = client.images.generate(model=model, prompt="x").size
    made = client.images.edit(model=model, image=picture(size), prompt="a red circle", n=2, extra_body={"seed": 7})
    assert [opened(image.b64_json).format for image in made.data or []] == ["PNG", "PNG"]
    assert made.usage is not None
    assert made.usage.input_tokens_details.image_tokens > 0


def test_edit_what_a_mask_leaves_open(client: openai.OpenAI, model: str) -> None:
    size = client.images.generate(model=model, prompt="x").size
    made = client.images.edit(
        model=model,
        image=[picture(size)],
        mask=picture(size, clear=True),
        prompt="a red circle",
        output_format="webp",
        extra_body={"strength": 0.5, "num_inference_steps": 4},
    )
    assert opened((made.data or [])[0].b64_json).format == "WEBP"


def test_a_streamed_edit(client: openai.OpenAI, model: str) -> None:
    size = client.images.generate(model=model, prompt="x").size
    with client.images.edit(model=model, image=picture(size), prompt="x", stream=True) as stream:
        assert [event.type for event in stream] == ["image_edit.completed"]


def test_a_variation(client: openai.OpenAI, model: str) -> None:
    size = client.images.generate(model=model, prompt="x").size
    with pytest.deprecated_call():  # by OpenAI, whose newer models have no variations
        made = client.images.create_variation(image=picture(size), model=model, response_format="b64_json")
    assert opened((made.data or [])[0].b64_json).format == "PNG"


def test_models(client: openai.OpenAI, model: str) -> None:
    assert model in [found.id for found in client.models.list()]
    assert client.models.retrieve(model).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_errors_are_typed(client: openai.OpenAI, model: str, base_url: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad_size:
        client.images.generate(model=model, prompt="x", size="1023x1x7")  # type: ignore[call-overload]
    assert (bad_size.value.param, bad_size.value.code) == ("size", "invalid_size")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(model="nothing", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="choose from"):
        client.images.generate(model=model, prompt="x", extra_body={"num_inference_steps": 999})


@pytest.mark.skipif("FEWSTEP_TEST_URL" in os.environ and "FEWSTEP_TEST_KEY" not in os.environ, reason="open stack")
def test_a_bad_key_is_an_authentication_error(base_url: str, model: str) -> None:
    stranger = openai.OpenAI(base_url=f"{base_url}/v1", api_key="not-a-key-at-all", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.images.generate(model=model, prompt="x")


async def test_the_async_client_too(base_url: str, model: str) -> None:
    key = os.environ.get("FEWSTEP_TEST_KEY", KEY)
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0) as client:
        made = await client.images.generate(model=model, prompt="x")
    assert opened((made.data or [])[0].b64_json).format == "PNG"
