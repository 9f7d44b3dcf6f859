"""A sweep: many jobs that differ in a few fields, which of them are hopeless, and their leaderboard (pure).

Source of the rule: Golovin et al. 2017, "Google Vizier", section 3.2.2, "Median Stopping Rule".
"""

import copy
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from engines.errors import InvalidRequest

Json = dict[str, Any]
ENOUGH = 3
"""Trials that must have come as far before one is judged by their median."""
_COLUMNS = ("alignment_ratio", "diversity_ratio", "grain_ratio")


@dataclass(frozen=True, slots=True)
class Trial:
    """One job of a sweep: what distinguishes it, and what is submitted."""

    name: str
    spec: Json

    def key(self, tag: str) -> str:
        """The idempotency key: the same spec is the same job, so that a sweep that was left can be taken up again."""
        return f"sweep-{hashlib.sha256(json.dumps([tag, self.spec], sort_keys=True).encode()).hexdigest()[:40]}"


@dataclass(slots=True)
class Curve:
    """What the evaluations while training said: values by the share of the budget that was spent, rising."""

    shares: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, share: float, value: float) -> None:
        """What a trainer says again, having gone back to a checkpoint, takes the place of what it said before."""
        while self.shares and self.shares[-1] >= share:
            self.shares.pop()
            self.values.pop()
        self.shares.append(share)
        self.values.append(value)

    def until(self, share: float) -> list[float]:
        return [value for at, value in zip(self.shares, self.values, strict=True) if at <= share + 1e-9]


def trials(sweep: Any) -> list[Trial]:
    """Of a list of jobs, or of `base`, a job, with `grid`: a list of values for each dotted field, all combined.

    Raises:
        InvalidRequest: it is neither, or names two jobs that are the same.
    """
    if isinstance(sweep, list) and sweep and all(isinstance(spec, dict) for spec in sweep):
        found = [Trial(f"{i}. {_method(spec)}", spec) for i, spec in enumerate(sweep, 1)]
    elif isinstance(sweep, dict) and sweep.keys() == {"base", "grid"}:
        found = _grid(sweep["base"], sweep["grid"])
    else:
        raise InvalidRequest("a sweep is a list of jobs, or `base`, one job, with `grid`, values for its dotted fields")
    try:
        specs = [json.dumps(one.spec, sort_keys=True) for one in found]
    except TypeError as error:
        raise InvalidRequest(f"a job of the sweep is not JSON: {error}; quote dates and the names of fields") from error
    if len(set(specs)) < len(specs):
        twice = next(one.name for i, one in enumerate(found) if specs[i] in specs[:i])
        raise InvalidRequest(f"the sweep names a job twice: {twice}")
    return found


def hopeless(own: Curve, others: Sequence[Curve], *, lower_is_better: bool = True, grace: float = 0.25) -> bool:
    """Vizier's rule: its best value so far is worse than the median of the others' running averages at its share.

    Nothing is hopeless before the share `grace` of its budget, nor at its end, where nothing is left to save, nor while
    fewer than `ENOUGH` others have come as far.
    """
    share = own.shares[-1] if own.shares else 0.0
    if not own.shares or not grace <= share < 1:
        return False
    averages = [statistics.fmean(curve.until(share)) for curve in others if _reached(curve, share)]
    if len(averages) < ENOUGH:
        return False
    median = statistics.median(averages)
    return min(own.values) > median if lower_is_better else max(own.values) < median


def leaderboard(results: Sequence[tuple[Trial, Json]]) -> list[Json]:
    """One entry for each trial and its job, the best first: by the geometric mean of fd_ratio over the step counts."""
    made = [_entry(trial, job) for trial, job in results]
    return sorted(made, key=lambda one: (one["score"] is None, one["score"] or 0.0, one["trial"]))


def markdown(entries: Sequence[Json]) -> str:
    """The leaderboard as a table."""
    counts = sorted({steps for one in entries for steps in one["figures"]}, key=int)
    head = ["trial", "status", *(f"fd ratio at {k}" for k in counts), *(c.replace("_", " ") for c in _COLUMNS)]
    lines = [[*head, "gate", "seconds", "job"], ["---"] * (len(head) + 3)]
    for one in entries:
        ratios = [_show(one["figures"].get(k, {}).get("fd_ratio")) for k in counts]
        means = [_show(_mean([figures.get(column) for figures in one["figures"].values()])) for column in _COLUMNS]
        gate = {True: "passed", False: "missed", None: "–"}[one["passed"]]
        name, seconds = one["trial"].replace("|", "\\|"), _show(one["seconds"], 0)
        lines.append([name, one["status"], *ratios, *means, gate, seconds, one["job"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _grid(base: Any, grid: Any) -> list[Trial]:
    if not isinstance(base, dict) or not isinstance(grid, dict) or not grid:
        raise InvalidRequest("`base` is a job and `grid` maps dotted fields to lists of values")
    for path, values in grid.items():
        if not isinstance(path, str):
            raise InvalidRequest(f"grid.{path} is no field: give dotted names such as train.lr")
        if not isinstance(values, list) or not values:
            raise InvalidRequest(f"grid.{path} is {values!r}: give a list of values")
    found = []
    for values in itertools.product(*grid.values()):
        spec, chosen = copy.deepcopy(base), dict(zip(grid, values, strict=True))
        for path, value in chosen.items():
            _put(spec, path, copy.deepcopy(value))
        found.append(Trial(" ".join(f"{path}={_brief(value)}" for path, value in chosen.items()), spec))
    return found


def _put(spec: Any, path: str, value: Any) -> None:
    """Sets `method.0.lr`, say: keys of mappings, which are made where they miss, and positions of lists."""
    *parents, last = path.split(".")
    place = spec
    for part in parents:
        place = _step(place, part, path, {})
    _step(place, last, path, value)
    place[int(last) if isinstance(place, list) else last] = value


def _step(place: Any, part: str, path: str, missing: Any) -> Any:
    if isinstance(place, dict):
        return place.setdefault(part, missing)
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    raise InvalidRequest(f"grid.{path}: base has no place called {part!r} there")


def _entry(trial: Trial, job: Json) -> Json:
    figures: Json = job["metrics"] if job["status"] == "succeeded" and job.get("metrics") else {}
    ratios = [one["fd_ratio"] for one in figures.values() if one.get("fd_ratio")]
    score = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios)) if ratios else None
    return {
        "trial": trial.name,
        "job": job["id"],
        "status": "stopped" if job["status"] == "canceled" else job["status"],
        "student": job.get("student"),
        "score": score,
        "figures": figures,
        "passed": job["gates"]["passed"] if job.get("gates") else None,
        "seconds": _seconds(job),
        "error": job.get("error"),
        "spec": trial.spec,
    }


def _seconds(job: Json) -> float | None:
    if not (job.get("started_at") and job.get("finished_at")):
        return None
    ends = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    start, end = ends
    return (end - start).total_seconds()


def _reached(curve: Curve, share: float) -> bool:
    return bool(curve.shares) and curve.shares[-1] >= share - 1e-9 and bool(curve.until(share))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _show(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _method(spec: Mapping[str, Any]) -> str:
    method = spec.get("method")
    stages = method if isinstance(method, list) else [method]
    return " + ".join(str(stage.get("name")) for stage in stages if isinstance(stage, dict)) or "no method"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
