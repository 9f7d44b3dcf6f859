"""What comes after a request that is more urgent."""

import pytest

from server.urgency import Urgency


@pytest.fixture
def urgency() -> Urgency:
    made = Urgency()
    made.add("quick", 0.2, 1.0, ends_s=60.0)
    made.add("slow", 16.0, 3.0, ends_s=60.0)
    return made


@pytest.mark.parametrize(
    ("slack_s", "share"),
    [(0.001, 1.0), (0.1, 0.75), (0.2, 0.75), (3.9, 0.75), (8.0, 0.0), (16.0, 0.0), (1e6, 0.0), (-5.0, 1.0)],
)
def test_what_has_several_times_as_long_comes_later(urgency: Urgency, slack_s: float, share: float) -> None:
    assert urgency.later_share(slack_s, now_s=0.0) == pytest.approx(share)


def test_what_has_ended_counts_no_more_and_may_be_said_twice(urgency: Urgency) -> None:
    urgency.remove("slow")
    urgency.remove("slow")
    assert urgency.later_share(0.2, now_s=0.0) == 0
    assert urgency.later_share(0.01, now_s=0.0) == 1
    urgency.remove("quick")
    assert urgency.later_share(0.01, now_s=0.0) == 0


def test_what_nobody_says_has_ended_is_over_at_its_end(urgency: Urgency) -> None:
    urgency.add("forgotten", 16.0, 100.0, ends_s=5.0)
    assert urgency.later_share(0.2, now_s=4.9) == pytest.approx(103 / 104)
    assert urgency.later_share(0.2, now_s=5.0) == pytest.approx(0.75)
    urgency.remove("forgotten")
    assert urgency.later_share(0.2, now_s=60.0) == 0
    assert not urgency._known
    assert not urgency._ends


def test_sums_do_not_drift_however_many_come_and_go() -> None:
    urgency = Urgency()
    for number in range(10_000):
        urgency.add(str(number), 0.1 * (1 + number % 7), 0.1 + number % 3, ends_s=1.0 + number)
        urgency.remove(str(number))
    urgency.add("last", 1.0, 1.0, ends_s=1e6)
    assert urgency.later_share(0.01, now_s=0.0) == 1
