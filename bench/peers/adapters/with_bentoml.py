"""BentoML with adaptive batching: a front service that speaks HTTP, and a service whose methods are `batchable`.

Two services, as its documentation draws adaptive batching for inputs of several fields: the front one (an ASGI app, so
that answers are plain bytes) hands single requests on, the dispatcher of the other makes the batches. Naive: one
batchable method, split by step count inside. Grouped: a method, and so a dispatcher, per step count. Given:
`max_batch_size` the largest compiled batch, `max_latency_ms` its default (60 s: above that it sheds load, and its
dispatcher finds the wait by itself), one worker each, so that there is one dispatcher and one engine with all threads;
metrics and access log off.
"""

import os
import sys
from typing import Any

import bentoml
from fastapi import FastAPI, Request
from starlette.responses import Response

from bench.peers.adapters._peer import HOST, PATH, config
from bench.peers.pictures import Ask, Config, Painter, png

_QUIET = {"metrics": {"enabled": False}, "logging": {"access": {"enabled": False}}, "traffic": {"timeout": 60}}


def _batchable(kind: str | None, rows: int) -> Any:
    def paint(self: Any, asked: list[dict[str, Any]]) -> list[bytes]:
        pictures = self.painter.paint_split([Ask(**one) for one in asked])
        return [png(picture) for picture in pictures]

    paint.__name__ = _method(kind)
    return bentoml.api(paint, batchable=True, max_batch_size=rows, route=f"/{_method(kind)}")


def _method(kind: str | None) -> str:
    return f"paint_{kind or 'any'}"


def _painting(told: Config) -> Any:
    def begin(self: Any) -> None:
        self.painter = Painter(told)

    kinds: list[str | None] = list(told.kinds) if told.grouped else [None]
    members = {_method(kind): _batchable(kind, told.rows) for kind in kinds}
    return bentoml.service(type("Painting", (), {"__init__": begin, **members}), name="painting", workers=1, **_QUIET)


told = config()
Painting = _painting(told)
http = FastAPI(docs_url=None, redoc_url=None)


@bentoml.service(name="front", workers=1, **_QUIET)
@bentoml.asgi_app(http)
class Front:
    painting = bentoml.depends(Painting)

    @http.post(PATH)
    async def generate(self, request: Request) -> Response:
        asked = await request.json()
        paint = getattr(self.painting.to_async, _method(asked["kind"] if told.grouped else None))
        [picture] = await paint([asked])
        return Response(picture, media_type="image/png")


def main() -> None:
    """Becomes `bentoml serve`, its own program for production."""
    target = f"{__spec__.name}:Front"
    program = os.path.join(os.path.dirname(sys.executable), "bentoml")
    os.execv(program, [program, "serve", target, "--host", HOST, "--port", str(told.port)])


if __name__ == "__main__":
    main()
