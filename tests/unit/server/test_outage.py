import logging

import pytest

from server.brokers._outage import Outage


class Clock:
    def __init__(self) -> None:
        self.at_s = 100.0

    def __call__(self) -> float:
        return self.at_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_fails_ten_times_a_second_is_said_at_first_and_every_ten_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Outage("lease", clock)
    for tick in range(250):
        clock.at_s = 100.0 + tick / 10
        outage.failed(ConnectionError("refused"))
    assert said(caplog) == ["lease_interrupted"] * 3
    assert [vars(record)["for_s"] for record in caplog.records] == [0.0, 10.0, 20.0]
    assert {vars(record)["error"] for record in caplog.records} == {"refused"}


def test_its_end_is_said_once_with_how_long_it_was(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outage = Outage("lease", clock)
    outage.worked()
    outage.failed(ConnectionError("refused"))
    clock.at_s += 3
    outage.worked()
    outage.worked()
    assert said(caplog) == ["lease_interrupted", "lease_resumed"]
    assert vars(caplog.records[-1])["after_s"] == 3.0


def test_another_outage_is_said_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("lease", clock)
    for _ in range(2):
        outage.failed(ConnectionError("refused"))
        outage.worked()
    assert said(caplog) == ["lease_interrupted"] * 2
