"""A job's report: complete in itself, true to the job's files, and safe to open whatever people wrote."""

import base64
from html.parser import HTMLParser
from typing import Any

import pytest

from distill_jobs import spec as specs
from distill_jobs.job_report import FIGURES, charts, judged, periods, render, rows, tables
from distill_jobs.jobs import JobState
from distill_jobs.plan import Plan, StagePlan
from distill_jobs.records import PLAN, RESULT, JobRecords
from engines.registry.files import FilesRegistry

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would see: tags, links, text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def figures(fd: float, **more: Any) -> dict[str, Any]:
    return {
        "n": 2000, "steps": 32, "fd": fd, "fd_ci": [fd - 0.1, fd + 0.1], "fd_floor": 0.8, "precision": 0.9,
        "fd_ratio": None, "grain": None, **more,
    }  # fmt: skip


def gate(rule: str, steps: int, *, passed: bool) -> dict[str, Any]:
    return {"rule": rule, "steps": steps, "value": 1.25, "limit": 1.1, "at_most": True, "passed": passed}


RESULT_FILE: dict[str, Any] = {
    "student": "small@" + "a" * 64,
    "teacher": figures(1.0),
    "metrics": {
        "1": figures(1.5, fd_ratio=1.5, fd_ratio_ci=[1.4, 1.6]),
        "2": figures(1.2, fd_at=[{"n": 500, "fd": 2.0, "fd_ci": [1.5, 2.5]}]),
    },
    "teacher_at": {"1": figures(5.0), "2": figures(2.0)},
    "schedule": {"metrics": {"2": figures(1.9)}, "teacher": figures(1.0)},
    "gates": {
        "passed": False,
        "passed_steps": [2],
        "results": [gate("fd_ratio", 1, passed=False), gate("fd_ratio", 2, passed=True)],
    },
}


@pytest.fixture
def records(tmp_path: Any) -> JobRecords:
    return JobRecords(FilesRegistry(str(tmp_path)))


def new_job(records: JobRecords, **student: Any) -> str:
    spec = specs.parse(
        {
            "teacher": {"id": EVIL},
            "student": {"name": "small", "steps": [1, 2], **student},
            "method": {"name": "kd"},
            "data": {"prompts": [EVIL]},
            "train": {"iterations": 100},
        }
    )
    return records.create(spec.model_dump(mode="json")).id


def finished(records: JobRecords) -> str:
    job_id = new_job(records)
    for step in (10, 20, 30):
        records.event(job_id, "progress", step=step, losses={"student": 1 / step, "fake": None})
    for step in (10, 30):
        records.event(job_id, "metric", step=step, metrics={"fd": 1.5, "fd@1": 2.0, "fd@2": 1.1, "grain": 0.5})
    records.event(job_id, "note", message=EVIL)
    records.write(job_id, RESULT, RESULT_FILE)
    records.registry.write_job_file(job_id, "samples.png", b"PNG")
    return job_id


def test_a_finished_job_has_pictures_figures_gate_and_curves_in_one_file(records: JobRecords) -> None:
    job_id = finished(records)
    page = Page(render(records.get(job_id), records))
    assert page.words.count("student") == 2  # a row for each count
    assert {"Pictures", "Figures", "Gate", "Curves"} <= set(page.words)
    assert {"passed at 2 steps", "missed at 1 steps"} <= set(page.words)
    assert "1.500" in page.words
    assert "1.400 – 1.600" in page.words
    assert page.tags.count("svg") == 4  # a loss, two metrics, fd by size
    assert page.links == ["data:image/png;base64," + base64.b64encode(b"PNG").decode()]


def test_what_is_left_of_a_concept_has_columns_where_a_job_forgets(records: JobRecords) -> None:
    for student, there in (({}, False), ({"forget": [{"concept": "alert"}]}, True)):
        job_id = new_job(records, **student)
        records.write(job_id, RESULT, RESULT_FILE | {"teacher": figures(1.0, alignment_forgotten=0.876)})
        page = Page(render(records.get(job_id), records))
        assert ({"forgotten", "instead", "0.876"} <= set(page.words)) is there
        assert any("name nothing of alert" in word for word in page.words) is there


def test_what_people_wrote_is_text_and_never_markup(records: JobRecords) -> None:
    job_id = finished(records)
    records.move(job_id, JobState.FAILED, error={"code": "job_failed", "message": EVIL})
    text = render(records.get(job_id), records)
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    assert sum(EVIL in word for word in page.words) == 4  # the teacher, the note, the error, the prompt in the job


@pytest.mark.parametrize("state", [None, JobState.CANCELED])
def test_a_job_that_made_nothing_has_a_report_too(records: JobRecords, state: JobState | None) -> None:
    job_id = new_job(records)
    if state:
        records.move(job_id, state)
    page = Page(render(records.get(job_id), records))
    assert "table" not in page.tags
    assert "svg" not in page.tags
    assert (state or "queued") in page.words


def test_what_training_should_need_stands_beside_what_it_needed(records: JobRecords) -> None:
    job_id = new_job(records)
    plan = Plan((StagePlan("kd", 5, seconds=90.0),), eval_every=5, bf16=False, memory_bytes=600 << 20)
    records.write(job_id, PLAN, plan.as_dict())
    assert "estimated 90 s and 600 MiB" in Page(render(records.get(job_id), records)).words
    records.write(job_id, RESULT, {"measured": {"memory_bytes": 640 << 20, "train_seconds": 99.0}})
    found = Page(render(records.get(job_id), records))
    assert "estimated 90 s and 600 MiB · measured 99 s and 640 MiB" in found.words


def test_a_student_stands_beside_the_teacher_at_its_own_and_at_the_same_steps() -> None:
    found = rows(RESULT_FILE)
    assert [(row.name, row.steps) for row in found] == [
        ("teacher", 32),
        ("student", 2), ("teacher", 2), ("teacher, best times", 2),
        ("student", 1), ("teacher", 1),
    ]  # fmt: skip
    assert [row.ours for row in found] == [False, True, False, False, True, False]
    cells = dict(zip([figure.key for figure in FIGURES], found[4].cells, strict=True))
    assert (cells["fd_ratio"].value, cells["fd_ratio"].interval) == ("1.500", "1.400 – 1.600")
    assert (cells["grain"].value, cells["recall"].value) == ("–", "–")
    assert rows({}) == []


def test_a_further_network_has_a_table_of_its_own(records: JobRecords) -> None:
    def seen(fd: float, **more: Any) -> dict[str, Any]:
        return {"networks": {"dinov2": figures(fd, **more)}}

    result = {
        **RESULT_FILE,
        "teacher": figures(1.0, **seen(30.0)),
        "metrics": {k: one | seen(45.0, fd_ratio=1.5) for k, one in RESULT_FILE["metrics"].items()},
    }
    plain, other = tables(result)
    assert (plain.network, other.network) == (None, "dinov2")
    assert [figure.key for figure in other.figures] == ["fd", "fd_ratio", "precision", "recall", "density", "coverage"]
    assert [row.cells[0].value for row in other.rows] == ["30.000", "45.000", "–", "–", "45.000", "–"]
    job_id = finished(records)
    records.write(job_id, RESULT, result)
    assert "Figures in dinov2" in Page(render(records.get(job_id), records)).words


def test_the_gate_is_a_table_of_rules_by_steps() -> None:
    found = judged(
        {**RESULT_FILE["gates"], "results": [*RESULT_FILE["gates"]["results"], gate("grain_ratio", 2, passed=True)]}
    )
    assert found is not None
    assert (found.steps, found.missed) == ((1, 2), (1,))
    assert [rule.rule for rule in found.rules] == ["fd_ratio", "grain_ratio"]
    assert [one is None for one in found.rules[1].results] == [True, False]
    assert judged(None) is None


def test_a_role_without_a_finite_loss_has_no_chart() -> None:
    progress = [{"event": "progress", "step": 1, "losses": {"student": 0.5, "fake": None}}]
    assert [chart.title for chart in charts(progress, {})] == ["loss of student"]


def test_periods_are_the_seconds_between_states() -> None:
    events = [
        {"event": "status", "at": f"2026-01-01T00:00:{second}.000Z", "status": state}
        for second, state in (("00", "queued"), ("02", "running"), ("45", "succeeded"))
    ]
    assert periods(events) == [("queued", 2.0), ("running", 43.0)]
