import asyncio
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bench.peers.adapters._peer import Grouped
from bench.peers.pictures import Ask


class _Engine:
    """Remembers its batches; asked for seed 13 it fails."""

    def __init__(self) -> None:
        self.batches: list[list[Ask]] = []

    async def paint(self, asked: Sequence[Ask]) -> list[Tensor]:
        self.batches.append(list(asked))
        if any(one.seed == 13 for one in asked):
            raise ValueError("thirteen")
        return [torch.tensor(one.seed) for one in asked]


async def _served(asked: Sequence[Ask], engine: _Engine, rows: int = 2) -> list[Tensor | BaseException]:
    queue = Grouped(rows, engine.paint)
    waiting = [asyncio.create_task(queue.ask(one)) for one in asked]
    await asyncio.sleep(0)  # all of them wait before the first batch
    running = asyncio.create_task(queue.run())
    try:
        return await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        running.cancel()


async def test_batches_are_of_one_kind_the_oldest_first_and_no_larger_than_allowed() -> None:
    engine = _Engine()
    asked = [Ask("1", "", 0), Ask("4", "", 1), Ask("1", "", 2), Ask("1", "", 3)]
    answers = await _served(asked, engine)
    assert [int(one) for one in answers if isinstance(one, Tensor)] == [0, 1, 2, 3]
    assert [[one.seed for one in batch] for batch in engine.batches] == [[0, 2], [1], [3]]


async def test_a_batch_that_fails_fails_its_requests_and_no_others() -> None:
    engine = _Engine()
    answers = await _served([Ask("1", "", 13), Ask("1", "", 1), Ask("1", "", 2)], engine)
    assert [isinstance(one, ValueError) for one in answers] == [True, True, False]


async def test_nothing_is_painted_while_nobody_asks() -> None:
    engine = _Engine()
    queue = Grouped(2, engine.paint)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.run(), 0.01)
    assert engine.batches == []
