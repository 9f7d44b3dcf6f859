"""The floor under the overhead: the same hops with nothing in them, `python -m bench.floor gateway|echo …`.

A FastAPI process takes the same HTTP request and issues the gateway's Redis commands with the same bytes; an echo
process issues the worker's and answers at once with a picture of the same size. No routing, no admission, no
batching, no engine: what is left is what FastAPI, Redis and the loopback cost on this machine.
"""

import argparse
import asyncio
import json
import secrets

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response

from server.brokers.base import Broker, Claim, Finished, new_identity, open_broker
from server.messages import GenerateRequest, GenerateResult, Timing

MODEL = "floor"
VERSION = f"floor@{'0' * 64}"


def app(redis_url: str) -> FastAPI:
    broker = open_broker(redis_url, new_identity("floor"))
    made = FastAPI(docs_url=None, redoc_url=None)

    @made.post("/v1/generations")
    async def generate(request: Request) -> Response:
        asked = json.loads(await request.body())
        message = _request(asked["prompt"], asked["seed"], broker.identity)
        await broker.publish(message)
        answered = await broker.answer(message.id, 10)
        assert answered is not None
        [image] = answered.images
        assert image is not None
        return Response(image, media_type="image/png")

    @made.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    made.router.on_startup.append(broker.start)
    return made


def _request(prompt: str, seed: int, reply_to: str) -> GenerateRequest:
    return GenerateRequest(
        id=f"gen_00000000{secrets.token_hex(10)}",
        model=MODEL,
        version=VERSION,
        tier="low",
        steps=1,
        prompt=prompt,
        width=64,
        height=64,
        seed=seed,
        budget_ms=60_000,
        reply_to=reply_to,
        created_at=1e9 + 0.5,
        cost_s=0.0123,
    )


async def echo(redis_url: str, image_bytes: int) -> None:
    broker = open_broker(redis_url, new_identity("echo"))
    await broker.start()
    picture = secrets.token_bytes(image_bytes)
    with broker.keep_lease(lambda: {"deployments": {MODEL: [VERSION]}}):
        while True:
            claims = await broker.claim([MODEL], 16, 1.0, max_rows_below_high=12)
            if claims:
                running = asyncio.create_task(_running(broker, claims))
                await broker.finish_many([Finished(claim, _result(claim.request), [picture]) for claim in claims])
                await running


async def _running(broker: Broker, claims: list[Claim]) -> None:
    await broker.running(claims)


def _result(request: GenerateRequest) -> GenerateResult:
    timing = Timing(queue_ms=1.234, encode_ms=0.123, denoise_ms=1.234, decode_ms=1.234, image_ms=0.123, total_ms=3.456)
    return GenerateResult(
        id=request.id,
        status="succeeded",
        version=request.version,
        tier=request.tier,
        steps=request.steps,
        backend="openvino",
        worker="worker-000000000000",
        seeds=[request.seed],
        timing=timing,
        text_tokens=14,
        num_images=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("gateway", "echo"))
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--image-bytes", type=int, default=5000)
    given = parser.parse_args()
    if given.role == "echo":
        asyncio.run(echo(given.redis_url, given.image_bytes))
    else:
        uvicorn.run(app(given.redis_url), host="127.0.0.1", port=given.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
