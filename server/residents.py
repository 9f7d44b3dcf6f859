"""The students of one deployment on this worker: brings them in beside live traffic and lets them go.

`EngineSlot` says what there is to do, piece by piece; here each piece gets its place: engine calls go to an engine
thread behind live rows, what is heavy goes to a niced thread, and what only reads files to any thread.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from engines import aside
from engines.errors import StudentNotFound
from engines.manifest import shown
from engines.slot import EngineSlot, Piece, Staging
from engines.student import LoadedStudent
from server.engine_loop import EngineLoop

log = logging.getLogger(__name__)
OnPhase = Callable[[str], Awaitable[None]]
OnGone = Callable[[str, frozenset[str]], None]
"""A version, and the blobs that no engine of this worker holds any more."""
_NICE = 10


class Residents:
    """One event loop; stagings one after the other."""

    def __init__(self, slot: EngineSlot, engine: EngineLoop, uses: Callable[[str], bool], gone: OnGone) -> None:
        """`uses` says whether a request on this worker still needs a version; `gone` hears of each that is unloaded."""
        self._slot, self._engine, self._uses, self._gone = slot, engine, uses, gone
        self._lock = asyncio.Lock()
        self._wanted = 0  # how many loads wait or run
        self._settled: set[str] = set()  # versions that are specialised, or cannot be

    @property
    def backend(self) -> str:
        return self._slot.loader.choice.backend

    @property
    def held(self) -> frozenset[str]:
        return self._slot.versions

    def student(self, version: str) -> LoadedStudent | None:
        try:
            return self._slot.family(version)
        except StudentNotFound:
            return None

    def serve(self, versions: Iterable[str]) -> None:
        """From now on these are served, what was drains."""
        self._slot.switch(versions)

    async def load(self, versions: Sequence[str], phase: OnPhase | None = None, *, beside: bool = False) -> None:
        self._wanted += 1
        try:
            async with self._lock:
                missing = [version for version in versions if version not in self._slot.versions]
                if missing:
                    await self._bring(self._slot.stage(missing), phase, beside=beside)
        finally:
            self._wanted -= 1

    async def specialise(self, versions: Iterable[str]) -> None:
        """Has loaded versions answer faster where their backend can, beside live traffic; gives way to every load."""
        for version in sorted(set(versions) - self._settled):
            async with self._lock:
                if self._wanted or version not in self._slot.versions:
                    continue
                try:
                    await self._bring(self._slot.specialise(version), None, beside=True, gives_way=True)
                except _GaveWay:
                    continue
                except Exception as error:  # libraries raise what they like, and the version serves on as it was
                    log.warning("serves with weights set", extra={"version": shown(version), "error": str(error)})
                self._settled.add(version)

    async def unload(self, version: str) -> bool:
        """After what is in the engine threads now: a row of a request that was canceled may still be there."""
        self._wanted += 1
        try:
            async with self._lock:
                await asyncio.wrap_future(self._engine.landed())
                if self._uses(version) or version in self._slot.serving:
                    return False
                self._gone(version, await asyncio.to_thread(self._slot.retire, version))
                self._settled.discard(version)
                return True
        finally:
            self._wanted -= 1

    async def _bring(self, staging: Staging, phase: OnPhase | None, *, beside: bool, gives_way: bool = False) -> None:
        pieces = iter(staging)
        said = ""
        running: Future[Any] = aside.run(lambda: next(pieces, None), "slot-next")
        try:
            while (piece := await _result(running)) is not None:
                if phase is not None and piece.phase != said:
                    said = piece.phase
                    await phase(said)
                running = self._begun(piece, beside=beside)
                await _result(running)
                if gives_way and self._wanted:
                    raise _GaveWay
                running = aside.run(lambda: next(pieces, None), "slot-next")
        except asyncio.CancelledError as error:
            # What runs goes on: only when it has ended, all that it loads can be let go of.
            reject = partial(staging.reject, error)
            running.add_done_callback(lambda _: self._engine.background(reject))
            raise
        except Exception as error:
            await asyncio.to_thread(staging.reject, error)
            raise

    def _begun(self, piece: Piece, *, beside: bool) -> "Future[Any]":
        """`beside` live traffic, what is heavy is niced; a worker that has nothing to serve yet hurries."""
        if piece.on_engine:
            return self._engine.background(piece.call)
        return aside.run(piece.call, f"slot-{piece.phase}", nice=_NICE if beside else 0)


async def _result(running: "Future[Any]") -> Any:
    """Waits, and where that is cancelled, what runs is not."""
    return await asyncio.shield(asyncio.wrap_future(running))


class _GaveWay(Exception):
    """A load waits; what was begun is begun again later."""
