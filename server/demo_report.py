"""What the demo says at its end: `report.json`, one table, one line on the swap."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.table import Table

from server.client import Client
from server.stream import Tally

Json = dict[str, Any]
_QUALITY = (
    "fd",
    "fd_floor",
    "fd_ratio",
    "alignment",
    "alignment_heldout",
    "diversity",
    "grain",
    "fd_ci",
    "fd_to_teacher",
)
_RATIOS = ("fd_ratio_ci", "alignment_ratio", "diversity_ratio", "grain_ratio")
_SPEED = ("latency_ms_p50", "latency_ms_p95", "images_per_s")


@dataclass(frozen=True, slots=True)
class Speed:
    """Over HTTP, PNG included: one request at a time, then eight at once."""

    latency_ms_p50: float
    latency_ms_p95: float
    images_per_s: float
    gateway_ms_p50: float


class Report:
    """Gathers what the job measured on the engine with what the demo measured over HTTP."""

    def __init__(self, client: Client, job: Json) -> None:
        self._client, self._job = client, job

    def whole(self, tally: Tally, teacher: Speed, students: Mapping[int, Speed], worker: Client) -> Json:
        """`report.json`. `measured_on` says whether a row's latencies are over HTTP or of the engine alone."""
        schedule, trained = self._of(self._job.get("schedule_student")), self._of(self._job.get("student"))
        teacher_row = (trained or schedule).get("teacher", {})
        return {
            "job": {key: self._job[key] for key in ("id", "status", "started_at", "finished_at", "gates", "spec")},
            "teacher": _row({**teacher_row, "fd_ratio": 1.0}, teacher),
            "teacher_at": {steps: _row(row, None) for steps, row in teacher_row.get("at", {}).items()},
            "schedule": {steps: _row(row, None) for steps, row in schedule.get("metrics", {}).items()},
            "students": {
                steps: _row(row, students.get(int(steps))) for steps, row in trained.get("metrics", {}).items()
            },
            "swap": self._swap(tally, worker),
            "overhead": {"gateway_ms_p50": min(speed.gateway_ms_p50 for speed in (teacher, *students.values()))},
        }

    def _of(self, version: str | None) -> Json:
        report: Json = (self._client.get(f"/v1/students/{version}")["report"] or {}) if version else {}
        return report

    def _swap(self, tally: Tally, worker: Client) -> Json:
        swaps = [
            e
            for e in self._client.get(f"/v1/distillation/jobs/{self._job['id']}/events")["data"]
            if e["event"] == "swap"
        ]
        stall_ms, step_ms = _stall_and_step_ms(worker.text("/metrics"))
        return {
            "requests": tally.sent,
            "failed": tally.failed,
            "errors": tally.errors[:5],
            "swaps": len(swaps),
            "stall_ms": stall_ms,
            "step_ms": step_ms,
            "phases": swaps[-1].get("phases", {}) if swaps else {},
            "p95_ms": sorted(tally.latencies_ms)[int(0.95 * (len(tally.latencies_ms) - 1))]
            if tally.latencies_ms
            else None,
            "by_version": dict(tally.by_version),
        }


def _row(quality: Json, speed: Speed | None) -> Json:
    row = {name: quality.get(name) for name in (*_QUALITY, *_RATIOS)}
    source = asdict(speed) if speed else quality
    return {**row, **{name: source.get(name) for name in _SPEED}, "measured_on": "http" if speed else "engine"}


def _stall_and_step_ms(metrics: str) -> tuple[float | None, float | None]:
    """The mean longest gap of a swap and the mean step, from the worker's own histograms."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name.endswith(("_sum", "_count")):
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return tuple(_mean_ms(totals, name) for name in ("fewstep_swap_stall_seconds", "fewstep_step_seconds"))  # type: ignore[return-value]


def _mean_ms(totals: Mapping[str, float], name: str) -> float | None:
    count = totals.get(f"{name}_count", 0.0)
    return 1000 * totals[f"{name}_sum"] / count if count else None


# --- for people --------------------------------------------------------------------------------------

_CAPTION = (
    "ratio: fd / the guided teacher's at its own steps; align: attributes as the caption says, unseen: of combinations "
    "never trained on; schedule: the teacher at its best few times. Times: the teacher's first row and the student "
    "over HTTP, PNG included; the others are the engine's alone."
)


def table(report: Json) -> Table:
    """Quality by who drew, beside what it costs."""
    title = f"{_n(report)} pictures each; fd floor {_show(report['teacher'].get('fd_floor'))}"
    columns = ("steps", "fd", "ratio", "align", "unseen", "divers", "grain", "p50 ms", "p95 ms", "img/s")
    made = Table(
        *columns, title=title, caption=_CAPTION, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption_justify="left"
    )
    for name, row in _rows(report):
        figures = ("fd", "fd_ratio", "alignment", "alignment_heldout", "diversity", "grain", *_SPEED)
        made.add_row(name, *(_show(row.get(figure)) for figure in figures))
    return made


def swap_line(swap: Json) -> str:
    """One line: was anybody hurt, and what did each phase cost?"""
    phases = " · ".join(f"{phase} {seconds:.2f} s" for phase, seconds in swap["phases"].items())
    gap = f"longest gap between engine steps {_show(swap['stall_ms'])} ms (a step takes {_show(swap['step_ms'])} ms)"
    return f"Swaps: {swap['swaps']} under {swap['requests']} requests, {swap['failed']} failed · {gap} · {phases}"


def _rows(report: Json) -> list[tuple[str, Json]]:
    groups = (("teacher", "teacher_at"), ("schedule", "schedule"), ("student", "students"))
    rows = [("teacher", report["teacher"])]  # at its own steps
    for label, key in groups:
        rows += [(f"{label} {steps}", report[key][steps]) for steps in sorted(report[key], key=int, reverse=True)]
    return rows


def _n(report: Json) -> int:
    samples: int = report["job"]["spec"]["eval"]["samples"]
    return samples


def _show(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "–"
