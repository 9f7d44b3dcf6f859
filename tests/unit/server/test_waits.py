import pytest

from server.waits import Waits


def test_bookings_are_of_those_who_have_yet_to_come() -> None:
    waits = Waits()
    waits.book(5.0, 0.2)
    waits.book(6.0, 0.3)
    assert [waits.booked_s(now_s) for now_s in (0.0, 5.0, 6.0)] == [0.5, 0.3, 0.0]


def test_waits_that_are_longer_than_predicted_stretch_what_the_next_is_told() -> None:
    waits = Waits()
    waits.waited(1.0, 2.0)
    assert waits.stretch == pytest.approx(1.2)
    for _ in range(50):
        waits.waited(1.0, 2.0)
    assert waits.stretch == pytest.approx(2.0, abs=0.001)
    for _ in range(50):
        waits.waited(1.0, 0.1)
    assert waits.stretch == pytest.approx(1.0, abs=0.001)


def test_short_predictions_say_nothing_and_one_long_wait_not_too_much() -> None:
    waits = Waits()
    waits.waited(0.04, 1.0)
    assert waits.stretch == 1.0
    waits.waited(0.05, 100.0)
    assert waits.stretch == pytest.approx(1.6)
