"""The clients of a soak: each asks one request to its end and says what was wrong with the answer, if anything was.

They do what the documentation asks: a request that is refused for now, or whose connection breaks, is repeated with
its `Idempotency-Key`. Everything else that is not what was asked for is a failure.
"""

import asyncio
import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import numpy as np
import torch
from PIL import Image

from bench.soak_requests import Asked, Shot
from engines.backends.base import Tolerance

GIVE_UP_S = 90.0
_PATH = "/v1/generations"
_POLL_S = 0.05
_AGAIN = (429, 503)
_REFUSED = (400, 404, 413)
_PNG = {"accept": "image/png", "content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Failure:
    """`--seed` and the number make the request again; `request_id` finds it in the logs."""

    number: int
    kind: str
    what: str
    request_id: str = ""


class Wrong(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, what: str, request_id: str = "") -> None:
        super().__init__(what)
        self.what, self.request_id = what, request_id


@dataclass(slots=True)
class Judge:
    """Whether a picture (PNG) is that of its version and shot. Equal bytes are looked at once."""

    references: Mapping[tuple[str, Shot], torch.Tensor]  # by the version as it is shown; uint8 [3, H, W]
    allowed: Tolerance
    _known: dict[tuple[str, Shot, bytes], str | None] = field(default_factory=dict)

    def fault(self, version: str, shot: Shot, picture: bytes) -> str | None:
        key = version, shot, hashlib.sha256(picture).digest()
        if key not in self._known:
            self._known[key] = self._fault(version, shot, picture)
        return self._known[key]

    def _fault(self, version: str, shot: Shot, picture: bytes) -> str | None:
        reference = self.references.get((version, shot))
        if reference is None:
            return f"{version or 'no version'} was never promoted"
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(picture)).convert("RGB"))).permute(2, 0, 1)
        return self.allowed.fault(pixels, reference)


@dataclass(slots=True)
class Clients:
    http: httpx.AsyncClient
    judge: Judge
    run: str  # begins every idempotency key
    counts: "Counter[str]" = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of pictures that were waited for
    failures: list[Failure] = field(default_factory=list)

    async def ask(self, asked: Asked) -> None:
        try:
            async with asyncio.timeout(GIVE_UP_S):
                how = await {
                    "picture": self._picture,
                    "canceled": self._canceled,
                    "left": self._left,
                    "bad": self._bad,
                }[asked.kind](asked)
        except TimeoutError:
            self._failed(asked, f"not answered within {GIVE_UP_S:g} s")
        except Wrong as error:
            self._failed(asked, error.what, error.request_id)
        else:
            self.counts[how] += 1

    def _failed(self, asked: Asked, what: str, request_id: str = "") -> None:
        self.counts["failed"] += 1
        self.failures.append(Failure(asked.number, asked.kind, f"{asked.fault}: {what}".strip(": "), request_id))

    # --- kinds -----------------------------------------------------------------------------------

    async def _picture(self, asked: Asked) -> str:
        begun_s = asyncio.get_running_loop().time()
        response = await self._send("POST", asked, headers=self._keyed(asked) | _PNG)
        self._check(asked, response)
        self.seconds.append(asyncio.get_running_loop().time() - begun_s)
        return "pictures"

    async def _canceled(self, asked: Asked) -> str:
        headers = self._keyed(asked) | {"content-type": "application/json", "prefer": "respond-async"}
        queued = await self._send("POST", asked, headers=headers)
        request_id = queued.headers.get("x-generation-id", "")
        if queued.status_code != 202 or not request_id:
            raise Wrong(f"{queued.status_code} instead of 202: {queued.text[:300]}", request_id)
        await asyncio.sleep(asked.after_s)
        path = f"{_PATH}/{request_id}"
        canceled = await self._send("DELETE", asked, path)
        if canceled.status_code not in (200, 409):
            raise Wrong(f"DELETE is answered {canceled.status_code}: {canceled.text[:300]}", request_id)
        told = (await self._send("GET", asked, path)).json()
        if canceled.status_code == 200:
            if told["status"] != "canceled":
                raise Wrong(f"canceled, and then {told['status']}", request_id)
            return "canceled"
        if told["status"] != "succeeded":
            raise Wrong(f"too late to cancel, and then {told['status']}: {told.get('error')}", request_id)
        picture = await self._send("GET", asked, f"{path}/images/0")
        self._judged(asked, told["model_version"], picture, request_id)
        return "ended before it was canceled"

    async def _left(self, asked: Asked) -> str:
        """The connection breaks in the middle; what becomes of the request is seen in the books."""
        try:
            async with asyncio.timeout(asked.after_s):
                response = await self._send("POST", asked, headers=_PNG)
        except TimeoutError:
            return "left"
        self._check(asked, response)
        return "answered before the client left"

    async def _bad(self, asked: Asked) -> str:
        response = await self._send("POST", asked, headers=_PNG)
        if response.status_code not in _REFUSED:
            raise Wrong(f"{response.status_code} instead of a refusal: {response.text[:300]}")
        error = response.json().get("error", {})
        if not (error.get("code") and error.get("message") and error.get("type")):
            raise Wrong(f"{response.status_code} without code and message: {response.text[:300]}")
        return "refused"

    # --- inside ----------------------------------------------------------------------------------

    def _keyed(self, asked: Asked) -> dict[str, str]:
        return {"idempotency-key": f"{self.run}-{asked.number}"}

    async def _send(
        self, method: str, asked: Asked, path: str = _PATH, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        while True:
            try:
                content = asked.body() if method == "POST" else None
                response = await self.http.request(method, path, content=content, headers=headers)
            except httpx.TransportError:
                self.counts["connections broken"] += 1
                await asyncio.sleep(_POLL_S)
                continue
            if response.status_code not in _AGAIN:
                return response
            self.counts["refused for now"] += 1
            await asyncio.sleep(min(1.0, float(response.headers.get("retry-after-ms", 100)) / 1000))

    def _check(self, asked: Asked, response: httpx.Response) -> None:
        request_id = response.headers.get("x-generation-id", "")
        if response.status_code != 200:
            raise Wrong(f"{response.status_code}: {response.text[:300]}", request_id)
        self._judged(asked, response.headers.get("x-model-version", ""), response, request_id)

    def _judged(self, asked: Asked, version: str, response: httpx.Response, request_id: str) -> None:
        if fault := self.judge.fault(version, asked.shot, response.content):
            raise Wrong(f"{version} at {asked.shot}: {fault}", request_id)
