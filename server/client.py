"""A small HTTP client of Fewstep's own API, for the command line and the demo.

Applications use the OpenAI SDK or plain HTTP; this one exists so that the commands share one way to call,
one way to wait and one sentence per error.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from engines.errors import FewstepError, Unavailable, by_code

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """Image bytes as they came, with what the response said about them."""

    content: bytes
    version: str
    headers: dict[str, str]


class Client:
    """Calls one gateway. Every method raises the `FewstepError` that the gateway answered with."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Json:
        return self._json("GET", path, params=params)

    def text(self, path: str) -> str:
        return self._request("GET", path).text

    def post(self, path: str, body: Json | None = None, headers: dict[str, str] | None = None) -> Json:
        return self._json("POST", path, json=body or {}, headers=headers)

    def generate(self, body: Json, mime: str = "image/png") -> Picture:
        """One picture by the native dialect."""
        response = self._request("POST", "/v1/generations", json=body, headers={"accept": mime})
        headers = dict(response.headers)
        return Picture(response.content, headers.get("x-model-version", ""), headers)

    def ready(self) -> bool:
        """Whether the gateway can serve now."""
        return self._answers("/readyz")

    def alive(self) -> bool:
        return self._answers("/healthz")

    def metrics(self) -> bool:
        """Whether a process other than the gateway answers at its metrics port."""
        return self._answers("/metrics")

    def events(self, path: str) -> Iterator[Json]:
        """Server-sent events as they come, each as the JSON of its data."""
        with self._connected(), self._http.stream("GET", path, headers={"accept": "text/event-stream"}) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[len("data: ") :])

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(path, timeout=2.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _json(self, method: str, path: str, **kwargs: Any) -> Json:
        body: Json = self._request(method, path, **kwargs).json()
        return body

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        with self._connected():
            response = self._http.request(method, path, **kwargs)
        if response.is_error:
            raise _error(response)
        return response

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise Unavailable(
                f"no answer from {self._url} ({type(error).__name__}): is it up? Start it with `fewstep up` "
                "or set FEWSTEP_URL to where it runs"
            ) from error


def _error(response: httpx.Response) -> FewstepError:
    try:
        body = response.json()["error"]
        return by_code(body.get("code") or "")(body["message"], param=body.get("param"))
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{response.request.url} answered {response.status_code}: {response.text[:200]}")
