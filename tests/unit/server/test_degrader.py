"""The ladder alone, and under a queue that is simulated with a clock of its own."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.degrader import Degrader, Thresholds

LIMITS = Thresholds(wait_s=1.0, hold_s=5.0)


def made(depth: int = 2) -> Degrader:
    degrader = Degrader(LIMITS)
    degrader.depth = depth
    return degrader


def test_without_load_nothing_is_taken_away() -> None:
    degrader = made()
    assert {degrader.look(0.99, now_s) for now_s in range(100)} == {0}


@pytest.mark.parametrize(("wait_s", "rung"), [(0.9, 0), (1.0, 1), (1.9, 1), (2.0, 2), (50.0, 2)])
def test_a_longer_wait_goes_down_further_and_never_below_the_last_rung(wait_s: float, rung: int) -> None:
    assert made().look(wait_s, 0.0) == rung


def test_it_rises_a_rung_at_a_time_after_the_load_was_low_for_the_hold() -> None:
    degrader = made()
    degrader.look(2.0, 0.0)
    assert [degrader.look(0.1, float(now_s)) for now_s in range(1, 14)] == [2] * 5 + [1] * 5 + [0] * 3


def test_a_load_between_low_and_high_keeps_the_rung() -> None:
    degrader = made()
    degrader.look(1.0, 0.0)
    assert {degrader.look(0.6, float(now_s)) for now_s in range(1, 100)} == {1}


def test_one_burst_in_the_hold_begins_it_anew() -> None:
    degrader = made()
    degrader.look(1.0, 0.0)
    degrader.look(0.1, 1.0)
    degrader.look(0.7, 5.9)
    assert degrader.look(0.1, 6.0) == 1
    assert degrader.look(0.1, 10.9) == 1
    assert degrader.look(0.1, 11.0) == 0


def test_a_rise_that_load_undoes_doubles_the_hold_and_one_that_stands_restores_it() -> None:
    degrader = made(depth=1)
    assert [_rises_after(degrader, start_s) for start_s in (0.0, 100.0, 200.0)] == [5.0, 5.0, 5.0]
    degrader = made(depth=1)
    degrader.look(1.0, 0.0)
    at_s, holds = 0.0, []
    for _ in range(7):
        hold_s = _rises_after(degrader, at_s)
        holds.append(hold_s)
        at_s += hold_s + 1.0
    assert holds == [5.0, 10.0, 20.0, 40.0, 80.0, 80.0, 80.0]


def _rises_after(degrader: Degrader, start_s: float) -> float:
    """A second of overload at `start_s`, then none: how long until it has risen."""
    degrader.look(1.5, start_s)
    now_s = start_s
    while degrader.look(0.0, now_s):
        now_s += 0.5
    return now_s - start_s


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 3)), max_size=200), st.integers(0, 5))
def test_whatever_the_load_it_rises_only_after_a_low_hold_and_falls_only_where_it_is_high(
    looks: list[tuple[float, float]], depth: int
) -> None:
    degrader, now_s, low_since_s, before = made(depth), 0.0, None, 0
    for wait_s, passed_s in looks:
        now_s += passed_s
        low_since_s = None if wait_s >= 0.5 else (now_s if low_since_s is None else low_since_s)
        rung = degrader.look(wait_s, now_s)
        assert 0 <= rung <= depth
        if rung < before:
            assert rung == before - 1
            assert low_since_s is not None
            assert now_s - low_since_s >= LIMITS.hold_s
            low_since_s = now_s
        if rung > before:
            assert wait_s >= LIMITS.wait_s
        if wait_s >= LIMITS.wait_s and depth:
            assert rung >= 1
        before = rung
    for _ in range(depth + 1):
        now_s += 81.0
        degrader.look(0.0, now_s)
        now_s += 81.0
        degrader.look(0.0, now_s)
    assert degrader.rung == 0


@dataclass
class Queue:
    """One engine of a known speed, fed by Poisson arrivals; it is looked at every tenth of a second."""

    cost_s: tuple[float, ...] = (0.04, 0.02, 0.01)  # 4, 2, 1 steps
    max_wait_s: float = 10.0
    seed: int = 0
    shed: int = 0
    changes: list[tuple[float, int]] = field(default_factory=list)
    served: list[int] = field(default_factory=lambda: [0, 0, 0])

    def run(self, rate: Callable[[float], float], seconds: float, *, degrades: bool = True) -> "Queue":
        draw, degrader, waiting_s, now_s, rung = random.Random(self.seed), made(), 0.0, 0.0, 0
        while now_s < seconds:
            for _ in range(_poisson(draw, 0.1 * rate(now_s))):
                chosen = degrader.look(waiting_s, now_s) if degrades else 0
                if waiting_s > self.max_wait_s:
                    self.shed += 1
                    continue
                waiting_s += self.cost_s[chosen]
                self.served[chosen] += 1
            now_s += 0.1
            waiting_s = max(0.0, waiting_s - 0.1)
            if degrader.look(waiting_s, now_s) != rung:
                rung = degrader.rung
                self.changes.append((now_s, rung))
        return self


def _poisson(draw: random.Random, mean: float) -> int:
    number, product = 0, draw.random()
    limit = 2.718281828459045**-mean
    while product > limit:
        number += 1
        product *= draw.random()
    return number


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [35.0, 60.0, 90.0])
def test_what_fewer_steps_can_carry_is_never_refused_and_the_tier_does_not_flap(rate: float, seed: int) -> None:
    """25 a second is what four steps carry, 50 two, 100 one."""
    queue, plain = (Queue(seed=seed).run(lambda _: rate, 600.0, degrades=yes) for yes in (True, False))
    assert plain.shed > 1000
    assert queue.shed == 0
    rises = sum(
        after < before for (_, before), (_, after) in zip([(0.0, 0), *queue.changes], queue.changes, strict=False)
    )
    assert rises <= 20  # in ten minutes; one each hold of 5 s would be 120


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(5, 60), st.floats(40, 95))
def test_after_bursts_it_comes_back_to_the_default_tier(seed: int, burst_s: float, rate: float) -> None:
    queue = Queue(seed=seed).run(lambda now_s: rate if now_s < burst_s else 5.0, burst_s + 60.0)
    assert queue.shed == 0
    assert queue.changes[0][1] > 0
    assert queue.changes[-1][1] == 0
