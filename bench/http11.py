"""A lean HTTP/1.1 client for load: one request at a time on each connection, nothing but what a bench reads.

A load generator shares the machine with what it measures, so its own cost per request must be small.
"""

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """Keep-alive; `ask` once the last answer has come. A broken connection fails the request that is under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._received = bytearray()
        self._head: tuple[int, dict[str, str], int, int] | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Response:
        """Raises `ConnectionError` where the connection breaks."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = _head(bytes(self._received[:end]), end + 4)
        status, headers, start, length = self._head
        if len(self._received) >= start + length:
            body = bytes(self._received[start : start + length])
            self._received.clear()
            self._head = None
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(Response(status, headers, body))


def _head(text: bytes, start: int) -> tuple[int, dict[str, str], int, int]:
    lines = text.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ", 2)[1])
    pairs = (line.split(":", 1) for line in lines[1:])
    headers = {name.lower(): value.strip() for name, value in pairs}
    return status, headers, start, int(headers.get("content-length", "0"))


async def connect(host: str, port: int) -> Connection:
    _, protocol = await asyncio.get_running_loop().create_connection(Connection, host, port)
    return protocol


def post(path: str, body: bytes, *, host: str, accept: str, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of one request, made once and sent often."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\naccept: {accept}\r\ncontent-type: application/json\r\n"
        f"{extra}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
