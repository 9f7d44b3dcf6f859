import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bench.load import Record
from bench.peers import window
from bench.peers.pictures import Ask, Config, png
from bench.peers.window import Sample, Taken

ASKED = [Ask("1", "a", 1), Ask("4", "b", 2)]
SLO_MS = {"1": 30.0, "4": 120.0}
STEPS = {"1": 1, "4": 4}


def record(body: int, sent_s: float, ms: float, status: int = 200, picture: bytes = b"") -> Record:
    return Record(body=body, sent_s=sent_s, seconds=ms / 1000, status=status, head=picture[:24], picture=picture)


def taken(records: Sequence[Record], load_cpu: float = 0.1) -> Taken:
    """A window from 10 s to 14 s; the server takes 1.5 cores, the generator `load_cpu`."""
    samples = [Sample(at, 1.5 * at, load_cpu * at, 100 + at) for at in (9.0, 10.0, 12.0, 13.0, 15.0)]
    return Taken(ASKED, records, samples, 10.0, 14.0)


def test_throughput_counts_answers_inside_the_window_and_latency_those_sent_inside() -> None:
    records = [
        record(0, 9.95, 100),  # sent before, answered inside
        record(0, 10.5, 20),
        record(1, 11.0, 100),
        record(0, 13.98, 50),  # sent inside, answered after, and too late for its SLO
    ]
    made = window.figures(taken(records), SLO_MS, STEPS)
    assert made["images_per_s"] == 3 / 4
    assert made["requests"] == 3
    assert made["p50_ms"] == 50
    assert made["p95_1step_ms"] == 50
    assert made["by_steps"]["4"] == {"requests": 1, "p50_ms": 100, "p95_ms": 100, "p99_ms": 100}
    assert made["slo_attainment"] == pytest.approx(2 / 3, abs=1e-4)
    assert made["goodput_per_s"] == 2 / 4


def test_a_request_that_failed_has_missed_its_slo_and_is_told() -> None:
    made = window.figures(taken([record(0, 11.0, 5), record(0, 11.5, 5, status=503)]), SLO_MS, STEPS)
    assert (made["failed"], made["slo_attainment"], made["images_per_s"]) == (1, 0.5, 0.25)


def test_cost_is_a_rate_over_the_samples_inside() -> None:
    made = window.figures(taken([record(0, 11.0, 5)]), SLO_MS, STEPS)
    assert made["cpu_s"] == pytest.approx(1.5 * 4)
    assert made["rss_mb"] == 113
    assert (made["load_cpu_share"], made["load_is_limit"]) == (0.1, False)
    assert window.figures(taken([record(0, 11.0, 5)], 0.9), SLO_MS, STEPS)["load_is_limit"]


def test_a_window_too_short_for_two_samples_costs_as_the_whole_load_did() -> None:
    short = Taken(ASKED, [record(0, 10.1, 5)], taken([]).samples, 10.1, 10.6)
    assert window.figures(short, SLO_MS, STEPS)["cpu_s"] == pytest.approx(1.5 * 0.5)


class _Painter:
    """Draws a ramp that begins at its seed."""

    config = Config(
        registry="", cache="", kinds={}, backend="eager", precision="fp32", batches=(1,), threads=1
    )  # fmt: skip

    def paint(self, asked: Sequence[Ask]) -> list[Tensor]:
        return [(torch.arange(3 * 8 * 8).view(3, 8, 8) + 40 * one.seed).to(torch.uint8) for one in asked]


def wrong(*records: Record, size: int = 8) -> int:
    return window.wrong(taken(records), _Painter(), {"1": (size, size), "4": (size, size)})  # type: ignore[arg-type]


def picture(seed: int) -> bytes:
    return png(_Painter().paint([Ask("1", "", seed)])[0])


def test_the_picture_of_the_seed_is_right_and_another_seeds_is_wrong() -> None:
    assert wrong(record(0, 11.0, 5, picture=picture(1)), record(1, 11.0, 5, picture=picture(2))) == 0
    assert wrong(record(0, 11.0, 5, picture=picture(2)), record(1, 11.0, 5, picture=picture(2))) == 1


def test_an_answer_of_another_size_or_of_no_png_is_wrong() -> None:
    assert wrong(record(0, 11.0, 5, picture=picture(1)), size=9) == 1
    head = b"GIF89a" + struct.pack(">18x")
    assert wrong(Record(body=0, sent_s=11.0, seconds=0.1, status=200, head=head)) == 1
