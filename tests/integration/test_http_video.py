"""A tiny Wan behind HTTP: gateway, broker and worker in one event loop, and a file that plays at the end."""

import base64
import contextlib
import importlib.util
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
import torch

from engines.backends.base import tolerance
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from server.app import create_app
from server.brokers.memory import MemoryBroker, MemoryServer
from server.settings import GatewaySettings
from tests import tiny_families
from tests.eventually import aeventually
from tests.integration.worker_stack import MODEL, Running, propose, running
from tests.tiny_families import STEPS
from tests.unit.engines.test_videos import mp4, webp

ASKED = {"model": MODEL, "prompt": "a red circle", "seed": 11}


@dataclass
class Stack:
    worker: Running
    client: httpx.AsyncClient

    async def make(self, accept: str = "application/json", **body: object) -> httpx.Response:
        return await self.client.post("/v1/generations", json=ASKED | body, headers={"accept": accept})

    def expected(self) -> torch.Tensor:
        """uint8 [T, 3, H, W]."""
        return sample(self.worker.student(), [str(ASKED["prompt"])], [11], STEPS)[0]


@contextlib.asynccontextmanager
async def stack() -> AsyncIterator[Stack]:
    own, registry, server = tiny_families.shipped("wan"), MemoryRegistry(), MemoryServer()
    for sha in own.manifest.blobs:
        registry.put_blob(own.registry.read_blob(sha))
    registry.publish(own.manifest)
    registry.commit(propose(registry, own.version, STEPS).revision(1, created_at="2026-01-01T00:00:00Z"))
    front = MemoryBroker(server, "gateway")
    app = create_app(GatewaySettings(redis_url="memory:", registry_url="memory:", poll_s=0.05), front, registry)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway", timeout=60) as client,
        running(MemoryBroker(server, "worker"), front, registry=registry, batch_sizes=(1, 2)) as worker,
    ):
        made = Stack(worker, client)

        async def ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await aeventually(ready, 20)
        yield made


async def test_a_prompt_becomes_a_video_whose_frames_are_the_student_s(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack() as up:
        plays = await up.make("image/webp", fps=8, num_frames=9)
        assert (plays.status_code, plays.headers["content-type"]) == (200, "image/webp")
        frames, shown_ms = webp(plays.content)
        assert frames.shape == (9, 3, 16, 16)
        assert shown_ms == [125] * 9
        assert tolerance("eager", "fp32").fault(torch.from_numpy(frames), up.expected()) is None
        assert len({frame.tobytes() for frame in frames}) == 9, "a video stands still"

        film = await up.make("image/*")
        assert (film.headers["content-type"], film.content[8:12]) == ("image/webp", b"WEBP")

        of_openai = {"model": MODEL, "prompt": "a red circle", "seed": 11}
        answer = (await up.client.post("/v1/images/generations", json=of_openai)).json()
        assert answer["output_format"] == "webp"
        assert webp(base64.b64decode(answer["data"][0]["b64_json"]))[0].tobytes() == frames.tobytes()
        refused = await up.client.post("/v1/images/generations", json=of_openai | {"output_format": "png"})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].endswith("ask for webp")

        stored = (await up.make(n=2)).json()
        one = await up.client.get(stored["images"][0]["content_url"])
        assert one.headers["content-type"] == "image/webp"
        assert webp(one.content)[0].tobytes() == frames.tobytes()

        cost = up.worker.students.lease().costs[up.worker.student().version]
        assert cost.decode.row_s > 0  # of calls with one video, though batches have two rows

        for body, param in (
            ({"num_frames": 5}, "num_frames"),
            ({"output_format": "png"}, "output_format"),
            ({"partial_images": 1}, "partial_images"),
        ):
            refused = await up.make(**body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        edit = await up.client.post("/v1/generations", data={"prompt": "x"}, files={"image": plays.content})
        assert (edit.status_code, edit.json()["error"]["param"]) == (400, "image")

        (told,) = (await up.client.get("/v1/capabilities")).json()["data"]
        assert told["output_formats"] == ["webp", "mp4"] if importlib.util.find_spec("av") else ["webp"]
        assert told["video"] == {"num_frames": 9, "fps": 16, "max_fps": 60}

        if importlib.util.find_spec("av"):
            await as_mp4(up)
        monkeypatch.setitem(sys.modules, "av", None)
        refused = await up.make(output_format="mp4")
        assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_built")


async def as_mp4(up: Stack) -> None:
    film = await up.make("video/mp4")
    assert (film.status_code, film.headers["content-type"]) == (200, "video/mp4")
    frames, stream = mp4(film.content)
    assert (frames.shape, stream.average_rate) == ((9, 3, 16, 16), 16)
    # Chroma has a quarter of the samples, which such small coloured noise shows: brightness is what is kept.
    weights = torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)
    kept, expected = ((weights * each.float()).sum(1) for each in (torch.from_numpy(frames), up.expected()))
    assert (kept - expected).square().mean().sqrt() < 8
