import pytest

from engines.errors import Overloaded, Unavailable
from server.admission import Limits, Load, Loading, admit

LIMITS = Limits(max_wait_s=10.0, worker_grace_s=15.0)


def test_an_idle_queue_admits_at_once() -> None:
    admit(Load(1, 0.0, 0.02), LIMITS, budget_s=1.0)


def test_a_request_that_would_miss_its_own_deadline_is_refused_with_the_time_after_which_it_would_not() -> None:
    with pytest.raises(Overloaded) as caught:
        admit(Load(1, 4.0, 0.5), LIMITS, budget_s=2.0)
    assert caught.value.retry_after_s == pytest.approx(4.0 - (2.0 - 0.5))
    admit(Load(1, 1.5, 0.5), LIMITS, budget_s=2.0)


def test_a_patient_request_is_still_refused_where_the_queue_is_longer_than_the_server_allows() -> None:
    with pytest.raises(Overloaded) as caught:
        admit(Load(1, 25.0, 0.5), LIMITS, budget_s=600.0)
    assert caught.value.retry_after_s == pytest.approx(15.0)


def test_a_request_waits_for_a_worker_that_restarts_but_not_for_one_that_is_gone() -> None:
    admit(Load(0, 0.0, 0.0, worker_seen_s_ago=14.0), LIMITS, budget_s=1.0)
    with pytest.raises(Unavailable) as caught:
        admit(Load(0, 0.0, 0.0, worker_seen_s_ago=16.0), LIMITS, budget_s=1.0)
    assert caught.value.retry_after_s is not None


@pytest.mark.parametrize(("for_s", "again_s"), [(0.5, 2.0), (12.0, 12.0), (300.0, 30.0)])
def test_a_worker_that_loads_is_told_of_and_may_take_as_long_again(for_s: float, again_s: float) -> None:
    load = Load(0, 0.0, 0.0, worker_seen_s_ago=16.0, loading=Loading("building", for_s))
    with pytest.raises(Unavailable, match=rf"loading this model for {for_s:.0f} s \(building\)") as caught:
        admit(load, LIMITS, budget_s=60.0)
    assert caught.value.retry_after_s == again_s


def again_s(load: Load, limits: Limits = LIMITS) -> float | None:
    with pytest.raises(Overloaded) as caught:
        admit(load, limits, budget_s=600.0)
    return caught.value.retry_after_s


def test_who_is_refused_waits_for_the_batch_that_holds_the_queue_up() -> None:
    assert again_s(Load(1, 11.0, 0.1, lump_s=3.0)) == pytest.approx(4.0)
    assert again_s(Load(1, 11.0, 0.1, lump_s=100.0)) == pytest.approx(11.0)  # by then all of it is done


def test_who_is_refused_waits_for_those_who_were_refused_before_and_for_the_next_look() -> None:
    assert again_s(Load(1, 11.0, 0.1, booked_s=2.0), Limits(10.0, 15.0, look_s=0.5)) == pytest.approx(3.5)


def test_who_is_refused_waits_longer_where_requests_wait_longer_than_predicted() -> None:
    load = Load(1, 11.0, 0.1, lump_s=3.0, booked_s=2.0, stretch=1.5)
    assert again_s(load, Limits(10.0, 15.0, look_s=0.5)) == pytest.approx(1.5 * 6.0 + 0.5)
