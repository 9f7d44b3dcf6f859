"""The students of one deployment on this worker: brings them in beside live traffic and lets them go.

`EngineSlot` says what there is to do, piece by piece; here each piece gets its place: engine calls go to the engine
thread behind live rows, what is heavy goes to a niced thread, and what only reads files to any thread.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engines.errors import StudentNotFound
from engines.manifest import shown
from engines.slot import EngineSlot, Piece, Staging
from engines.student import LoadedStudent
from server.engine_loop import EngineLoop

log = logging.getLogger(__name__)
OnPhase = Callable[[str], Awaitable[None]]


class Residents:
    """One event loop; stagings one after the other."""

    def __init__(self, slot: EngineSlot, engine: EngineLoop, uses: Callable[[str], bool]) -> None:
        """`uses` says whether a request on this worker still needs a version."""
        self._slot, self._engine, self._uses = slot, engine, uses
        self._lock = asyncio.Lock()
        self._hurry = ThreadPoolExecutor(1, thread_name_prefix="load")
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
        """After what is in the engine thread now: a row of a request that was canceled may still be there."""
        self._wanted += 1
        try:
            async with self._lock:
                await asyncio.wrap_future(self._engine.background(_nothing))
                if self._uses(version) or version in self._slot.serving:
                    return False
                await asyncio.to_thread(self._slot.retire, version)
                self._settled.discard(version)
                return True
        finally:
            self._wanted -= 1

    async def _bring(self, staging: Staging, phase: OnPhase | None, *, beside: bool, gives_way: bool = False) -> None:
        pieces = iter(staging)
        said = ""
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                if phase is not None and piece.phase != said:
                    said = piece.phase
                    await phase(said)
                await self._do(piece, staging, beside=beside)
                if gives_way and self._wanted:
                    raise _GaveWay
        except Exception as error:
            await asyncio.to_thread(staging.reject, error)
            raise

    async def _do(self, piece: Piece, staging: Staging, *, beside: bool) -> None:
        """`beside` live traffic, what is heavy is niced; a worker that has nothing to serve yet hurries."""
        running: Future[Any]
        if piece.on_engine:
            running = self._engine.background(piece.call)
        else:
            running = piece.aside() if beside else self._hurry.submit(piece.call)
        try:
            await asyncio.shield(asyncio.wrap_future(running))
        except asyncio.CancelledError:
            # It is still running: what it loads can be let go of only when it has ended.
            running.add_done_callback(
                lambda _: self._engine.background(lambda: staging.reject(asyncio.CancelledError()))
            )
            raise


class _GaveWay(Exception):
    """A load waits; what was begun is begun again later."""


def _nothing() -> None:
    """Lets everything that was posted before it go first."""
