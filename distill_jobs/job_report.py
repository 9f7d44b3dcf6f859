"""A job's report: one HTML file with its figures, its curves and its pictures, complete in itself.

Made from the files of the job alone, at any time, and without torch: the gateway answers with it while a job runs and
the distiller leaves it beside the other files when the job ends. Nothing in it is fetched and no script runs; whatever
people wrote (names, prompts, messages) is escaped by the template engine.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from distill_jobs.chart import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Point, Series, chart
from distill_jobs.jobs import DistillJob
from distill_jobs.needs import Needs
from distill_jobs.plan import expected
from distill_jobs.records import PLAN, RESULT, JobRecords
from engines.manifest import shown

REPORT = "report.html"
SAMPLES = "samples.png"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A column of the table. `ci` names the interval that stands beside the value. One that `forgets` is of jobs that
    do: there all others are of the prompts that name nothing to forget."""

    key: str
    label: str
    what: str
    digits: int = 3
    ci: str | None = None
    forgets: bool = False


FIGURES = (
    Figure("fd", "fd", "Fréchet distance to real pictures, with its 95 % interval; less is better", 3, "fd_ci"),
    Figure("fd_ratio", "fd ratio", "fd over the guided teacher's at its own steps; less is better", 3, "fd_ratio_ci"),
    Figure("precision", "precision", "share of its pictures that lie among real ones"),
    Figure("recall", "recall", "share of real pictures that lie among its own"),
    Figure("density", "density", "how densely real pictures lie round its own; about 1 for real ones"),
    Figure("coverage", "coverage", "share of real pictures with one of its own nearby"),
    Figure("alignment", "alignment", "share of what captions state that is found in its pictures"),
    Figure("alignment_heldout", "unseen", "alignment on combinations that no training picture had"),
    Figure("alignment_forgotten", "forgotten", "share of what is to be forgotten that is still drawn", forgets=True),
    Figure("alignment_instead", "instead", "share of it that is drawn as its replacement", forgets=True),
    Figure("diversity", "diversity", "distance between pictures of one caption, over that of real ones"),
    Figure("grain", "grain", "roughness of flat areas in 8-bit levels"),
    Figure("saturation", "saturation", "mean chroma in 8-bit levels", 1),
    Figure("clipped", "clipped", "share of values at an end of the range", 5),
    Figure("latency_ms_p50", "ms", "median milliseconds of one picture on the engine", 1),
)
_MEASURED_ANYWHERE = ("fd", "fd_ratio", "precision", "recall", "density", "coverage")
OF_ANY_NETWORK = tuple(figure for figure in FIGURES if figure.key in _MEASURED_ANYWHERE)


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    interval: str


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    steps: int
    ours: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in the task's own feature network, or in `network`. `floor` is the fd that real pictures reach."""

    network: str | None
    figures: Sequence[Figure]
    rows: list[Row]
    floor: float
    n: int


def render(job: DistillJob, records: JobRecords) -> str:
    """The whole HTML document of a job as it stands now."""
    result: Json = records.read(job.id, RESULT) or {}
    events = records.events(job.id)
    sheet = records.registry.read_job_file(job.id, SAMPLES)
    figures = tuple(figure for figure in FIGURES if not figure.forgets or job.spec["student"].get("forget"))
    document: str = _template().render(
        job=job,
        spec=job.spec,
        spec_text=json.dumps(job.spec, indent=2, ensure_ascii=False),
        student=shown(result["student"]) if "student" in result else None,
        methods=_methods(job.spec),
        gates=result.get("gates"),
        judged=judged(result.get("gates")),
        error=job.log[-1].error,
        tables=tables(result, figures),
        charts=charts(events, result),
        sheet=base64.b64encode(sheet).decode() if sheet else None,
        periods=periods(events),
        needs=needs(records.read(job.id, PLAN), result),
        said=_said(events),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )
    return document


def tables(result: Mapping[str, Any], figures: Sequence[Figure] = FIGURES) -> list[Table]:
    """One of these figures, and for each further network one of those that any has; none before there are figures."""
    teacher = _teacher(result)
    if not teacher:
        return []
    found = [Table(None, figures, rows(result, figures), teacher["fd_floor"], teacher["n"])]
    for name, seen in teacher.get("networks", {}).items():
        found.append(Table(name, OF_ANY_NETWORK, rows(result, OF_ANY_NETWORK, name), seen["fd_floor"], teacher["n"]))
    return found


def rows(result: Mapping[str, Any], figures: Sequence[Figure] = FIGURES, network: str | None = None) -> list[Row]:
    """The teacher at its own steps, then for each count the student, the teacher and the schedule-only student; in the
    task's own feature network or in another."""
    teacher = _teacher(result)
    if not teacher:
        return []
    sources = (
        ("student", result.get("metrics") or {}),
        ("teacher", result.get("teacher_at") or {}),
        ("teacher, best times", (result.get("schedule") or {}).get("metrics") or {}),
    )
    counts = sorted({int(k) for _, found in sources for k in found}, reverse=True)
    asked = [("teacher", int(teacher["steps"]), teacher)]
    asked += [(name, k, one[str(k)]) for k in counts for name, one in sources if str(k) in one]
    return [
        Row(name, k, name == "student", tuple(_cell(figure, _seen_in(values, network)) for figure in figures))
        for name, k, values in asked
    ]


@dataclass(frozen=True, slots=True)
class Judged:
    """One rule of the gate, with its result at each step count; None where it has no limit there."""

    rule: str
    results: tuple[Json | None, ...]


@dataclass(frozen=True, slots=True)
class Verdicts:
    steps: tuple[int, ...]
    missed: tuple[int, ...]
    rules: tuple[Judged, ...]


def judged(gates: Mapping[str, Any] | None) -> Verdicts | None:
    """The gate's results as a table of rules by step counts."""
    if gates is None:
        return None
    found = {(one["rule"], one["steps"]): one for one in gates["results"]}
    steps = tuple(sorted({k for _, k in found} | set(gates["passed_steps"])))
    table = (Judged(rule, tuple(found.get((rule, k)) for k in steps)) for rule in dict.fromkeys(r for r, _ in found))
    return Verdicts(steps, tuple(k for k in steps if k not in gates["passed_steps"]), tuple(table))


def charts(events: Sequence[Json], result: Mapping[str, Any]) -> list[Chart]:
    """Losses by role, what the small evaluations saw, and fd by sample count; those that have something to show."""
    progress = [event for event in events if event["event"] == "progress"]
    metrics = [event for event in events if event["event"] == "metric"]
    made = [_losses(progress, role) for role in _keys(event["losses"] for event in progress)]
    names = [name for name in _keys(event["metrics"] for event in metrics) if "@" not in name]
    made += [_metric(metrics, name) for name in names]
    made.append(_by_size(result))
    return [one for one in made if one is not None]


def periods(events: Iterable[Json]) -> list[tuple[str, float]]:
    """States and the seconds that each lasted."""
    entered = [(event["status"], _seconds(event["at"])) for event in events if event["event"] == "status"]
    ends = [at for _, at in entered[1:]]
    return [(state, end - at) for (state, at), end in zip(entered, ends, strict=False)]


def needs(plan: Mapping[str, Any] | None, result: Mapping[str, Any]) -> list[tuple[str, Needs]]:
    """What training should need and what it needed, as far as it is known."""
    measured = result.get("measured")
    found = {
        "estimated": None if plan is None else expected(plan),
        "measured": None if measured is None else Needs(**measured),
    }
    return [(which, need) for which, need in found.items() if need is not None]


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("distill_jobs").joinpath("job_report.html").read_text())


def _seen_in(values: Mapping[str, Any], network: str | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = values if network is None else values.get("networks", {}).get(network, {})
    return found


def _cell(figure: Figure, figures: Mapping[str, Any]) -> Cell:
    value, ends = figures.get(figure.key), figures.get(figure.ci or "")
    text = "–" if value is None else f"{value:.{figure.digits}f}"
    return Cell(text, f"{ends[0]:.{figure.digits}f} – {ends[1]:.{figure.digits}f}" if ends else "")


def _teacher(result: Mapping[str, Any]) -> Json | None:
    found: Json | None = result.get("teacher") or (result.get("schedule") or {}).get("teacher")
    return found


def _losses(progress: Sequence[Json], role: str) -> Chart | None:
    points = tuple(_point(event["step"], event["losses"].get(role)) for event in progress)
    return chart(f"loss of {role}", "update", [Series(role, points, COLOURS[0])])


def _metric(metrics: Sequence[Json], name: str) -> Chart | None:
    """One figure while training: the mean over the step counts, and each count."""
    alone = sorted(
        (key for key in _keys(event["metrics"] for event in metrics) if key.startswith(f"{name}@")), key=_count
    )
    title = "fd ratio to the teacher" if name == "fd" else name
    lines = [Series("mean", _points(metrics, name), dashed=True, marked=True)]
    lines += [
        Series(_steps(_count(key)), _points(metrics, key), COLOURS[i % len(COLOURS)], marked=True)
        for i, key in enumerate(alone)
    ]
    return chart(f"{title}, small evaluations", "update", lines)


def _by_size(result: Mapping[str, Any]) -> Chart | None:
    """Only where some sampler was judged at several counts: one point each is in the table."""
    own = sorted((result.get("metrics") or {}).items(), key=lambda item: int(item[0]))
    named = [(f"student, {_steps(int(k))}", one, COLOURS[i % len(COLOURS)]) for i, (k, one) in enumerate(own)]
    lines = [Series(name, _sizes(one), colour, marked=True) for name, one, colour in named]
    if teacher := result.get("teacher"):
        lines.append(Series(f"teacher, {_steps(teacher['steps'])}", _sizes(teacher), dashed=True, marked=True))
    if all(len(line.points) < 2 for line in lines):
        return None
    return chart("fd by number of pictures", "pictures", lines, log_x=True)


def _sizes(figures: Mapping[str, Any]) -> tuple[Point, ...]:
    whole = {name: figures[name] for name in ("n", "fd", "fd_ci")}
    measured = (*figures.get("fd_at", ()), whole)
    return tuple(Point(one["n"], one["fd"], *(one["fd_ci"] or (None, None))) for one in measured)


def _points(metrics: Sequence[Json], key: str) -> tuple[Point, ...]:
    return tuple(_point(event["step"], event["metrics"].get(key)) for event in metrics)


def _point(x: float, y: float | None) -> Point:
    return Point(x, float("nan") if y is None else y)


def _said(events: Iterable[Json]) -> list[tuple[str, str]]:
    """What happened besides training: swaps, alarms, notes, stages."""
    words = {
        "swap": lambda e: f"{shown(e['student'])} is live: {_tiers(e['tiers'])}",
        "alarm": lambda e: f"alarm: {e['what']} is {e['value']}, not within {e['low']} to {e['high']}",
        "note": lambda e: str(e["message"]),
        "stage": lambda e: f"stage {e['stage'] + 1}: {e['method']}",
    }
    return [(event["at"], words[event["event"]](event)) for event in events if event["event"] in words]


def _tiers(tiers: Mapping[str, int]) -> str:
    return ", ".join(f"{tier} at {_steps(count)}" for tier, count in tiers.items())


def _methods(spec: Mapping[str, Any]) -> list[str]:
    method = spec["method"]
    return [str(stage["name"]) for stage in (method if isinstance(method, list) else [method])]


def _keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """In the order in which they were first seen."""
    return list(dict.fromkeys(key for record in records for key in record))


def _count(key: str) -> int:
    return int(key.rpartition("@")[2])


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
