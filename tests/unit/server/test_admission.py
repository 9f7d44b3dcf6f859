import pytest

from engines.errors import Overloaded, Unavailable
from server.admission import Limits, Load, admit

LIMITS = Limits(max_wait_s=10.0, worker_grace_s=15.0)


def test_an_idle_queue_admits_at_once() -> None:
    assert admit(Load(1, 0.0, 0.02), LIMITS, budget_s=1.0) == 0.0


def test_a_request_that_would_miss_its_own_deadline_is_refused_with_the_time_after_which_it_would_not() -> None:
    with pytest.raises(Overloaded) as caught:
        admit(Load(1, 4.0, 0.5), LIMITS, budget_s=2.0)
    assert caught.value.retry_after_s == pytest.approx(4.0 - (2.0 - 0.5))
    assert admit(Load(1, 1.5, 0.5), LIMITS, budget_s=2.0) == 1.5


def test_a_patient_request_is_still_refused_where_the_queue_is_longer_than_the_server_allows() -> None:
    with pytest.raises(Overloaded) as caught:
        admit(Load(1, 25.0, 0.5), LIMITS, budget_s=600.0)
    assert caught.value.retry_after_s == pytest.approx(15.0)


def test_a_request_waits_for_a_worker_that_restarts_but_not_for_one_that_is_gone() -> None:
    admit(Load(0, 0.0, 0.0, worker_seen_s_ago=14.0), LIMITS, budget_s=1.0)
    with pytest.raises(Unavailable) as caught:
        admit(Load(0, 0.0, 0.0, worker_seen_s_ago=16.0), LIMITS, budget_s=1.0)
    assert caught.value.retry_after_s is not None
