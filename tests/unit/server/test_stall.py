"""The stall meter counts the time in which rows wait, and no other."""

import io
import json

import pytest

from server.stall import StallMeter


def test_the_longest_gap_between_live_steps_counts() -> None:
    meter = StallMeter()
    meter.open("swap", 0.0)
    meter.waiting(1.0)
    for at_s in (1.1, 1.4, 1.5):
        meter.stepped(at_s, still_waiting=True)
    assert meter.close("swap", 1.5) == pytest.approx(0.3)


def test_time_without_rows_is_no_stall() -> None:
    meter = StallMeter()
    meter.open("swap", 0.0)
    meter.waiting(1.0)
    meter.stepped(1.1, still_waiting=False)
    meter.waiting(50.0)
    meter.waiting(50.05)
    meter.stepped(50.1, still_waiting=False)
    assert meter.close("swap", 99.0) == pytest.approx(0.1)


def test_rows_that_left_without_a_step_end_the_gap() -> None:
    meter = StallMeter()
    meter.open("swap", 0.0)
    meter.waiting(1.0)
    meter.idle()
    assert meter.close("swap", 60.0) == 0.0


def test_a_gap_that_lasts_at_the_end_counts() -> None:
    meter = StallMeter()
    meter.open("swap", 0.0)
    meter.waiting(1.0)
    assert meter.close("swap", 3.0) == pytest.approx(2.0)


def test_what_was_before_the_window_does_not() -> None:
    meter = StallMeter()
    meter.waiting(0.0)
    meter.open("swap", 9.9)
    meter.stepped(10.0, still_waiting=True)
    assert meter.close("swap", 10.0) == pytest.approx(0.1)


def test_windows_are_apart() -> None:
    meter = StallMeter()
    meter.open("a", 0.0)
    meter.waiting(0.0)
    meter.stepped(1.0, still_waiting=True)
    meter.open("b", 1.0)
    meter.stepped(1.2, still_waiting=False)
    assert meter.close("b", 2.0) == pytest.approx(0.2)
    assert meter.close("a", 2.0) == pytest.approx(1.0)


def test_every_step_and_note_is_a_line_of_the_log() -> None:
    text = io.StringIO()
    meter = StallMeter(text)
    meter.waiting(1.0)
    meter.stepped(1.5, still_waiting=False, stage="denoise", rows=3)
    meter.note(swap="s1", phase="ready", at_s=2.0)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert lines == [
        {"at_s": 1.5, "gap_s": 0.5, "stage": "denoise", "rows": 3},
        {"swap": "s1", "phase": "ready", "at_s": 2.0},
    ]
