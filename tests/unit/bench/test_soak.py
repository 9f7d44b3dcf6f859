from collections import Counter

import pytest

from bench.soak_memory import Held, Sample, held, slope
from bench.soak_requests import FAULTS, SHARES, asked

MIB = 2**20


def test_a_request_of_a_soak_is_the_same_each_time_and_another_by_seed_and_number() -> None:
    assert asked(0, 7) == asked(0, 7)
    assert len({(one.shot, one.kind) for one in (asked(seed, k) for seed in (0, 1) for k in range(20))}) > 10


def test_the_kinds_come_in_their_shares_and_every_fault_comes() -> None:
    drawn = [asked(0, number) for number in range(4000)]
    kinds = Counter(one.kind for one in drawn)
    assert {kind: kinds[kind] / 4000 for kind in SHARES} == pytest.approx(dict(SHARES), abs=0.02)
    assert {one.fault for one in drawn if one.kind == "bad"} == set(FAULTS)
    assert {one.fault for one in drawn if one.kind != "bad"} == {""}


def test_the_slope_is_that_of_the_nearest_line() -> None:
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2.0)
    assert slope([0, 1, 2], [1, 4, 1]) == pytest.approx(0.0)


def test_what_a_process_holds_is_told_of_its_last_life_once_it_has_settled() -> None:
    before = [Sample(at_s, 1, 900 * MIB, 90) for at_s in range(10)]
    filling = [Sample(10 + at_s, 2, (10 + at_s) * MIB, 9) for at_s in range(100)]
    settled = [Sample(110 + at_s, 2, 200 * MIB, 10) for at_s in range(300)]
    assert held(before + filling + settled) == Held(299.0, 200.0, 200.0, 0.0, 10, 10)


@pytest.mark.parametrize(
    ("end", "files", "seconds", "faults"),
    [(203.0, 18, 300.0, 0), (205.0, 10, 300.0, 1), (205.0, 10, 100.0, 0), (200.0, 19, 100.0, 1), (300.0, 99, 300.0, 2)],
)
def test_growth_is_a_fault_beyond_what_caches_and_connections_take(
    end: float, files: int, seconds: float, faults: int
) -> None:
    assert len(Held(seconds, 200.0, end, 0.0, 10, files).faults) == faults
