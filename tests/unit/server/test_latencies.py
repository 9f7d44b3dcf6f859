import pytest

from server.latencies import Latencies, Work

ONE, FOUR = Work("shapes", "s@1", 1, (32, 32)), Work("shapes", "s@1", 4, (32, 32))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def latencies(clock: Clock) -> Latencies:
    return Latencies(clock)


def test_the_95th_percentile_of_what_came_to_such_a_queue(latencies: Latencies) -> None:
    for ms in range(1, 101):
        latencies.add(ONE, 0.0, ms)
        latencies.add(ONE, 1.0, 1000.0 + ms)
    assert latencies.p95_ms(ONE, 0.005) == 96.0
    assert latencies.p95_ms(ONE, 1.1) == 1096.0
    assert latencies.p95_ms(ONE, 3.0) is None
    assert latencies.p95_ms(FOUR, 0.0) is None


def test_too_few_say_nothing(latencies: Latencies) -> None:
    for _ in range(7):
        latencies.add(ONE, 0.0, 5.0)
    assert latencies.p95_ms(ONE, 0.0) is None
    latencies.add(ONE, 0.0, 5.0)
    assert latencies.p95_ms(ONE, 0.0) == 5.0


def test_what_is_older_than_a_minute_says_nothing_of_now(latencies: Latencies, clock: Clock) -> None:
    for _ in range(20):
        latencies.add(ONE, 0.0, 900.0)
    clock.now_s = 59.0
    for _ in range(10):
        latencies.add(ONE, 0.0, 5.0)
    assert latencies.p95_ms(ONE, 0.0) == 900.0
    clock.now_s = 61.0
    assert latencies.p95_ms(ONE, 0.0) == 5.0
    clock.now_s = 120.0
    assert latencies.p95_ms(ONE, 0.0) is None


def test_only_the_latest_are_kept(latencies: Latencies) -> None:
    for _ in range(128):
        latencies.add(ONE, 0.0, 900.0)
    for _ in range(128):
        latencies.add(ONE, 0.0, 5.0)
    assert latencies.p95_ms(ONE, 0.0) == 5.0


def test_quantiles_are_of_all_queues_and_go_with_their_version(latencies: Latencies) -> None:
    assert latencies.quantiles(ONE) is None
    for ms in (1.0, 2.0):
        latencies.add(ONE, 0.0, ms)
    latencies.add(ONE, 9.0, 3.0)
    found = latencies.quantiles(ONE)
    assert found is not None
    assert (found.num_requests, found.p50_ms, found.p95_ms) == (3, 2.0, 3.0)
    latencies.forget("shapes", "s@1")
    assert latencies.quantiles(ONE) is None
