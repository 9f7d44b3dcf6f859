"""What Grafana would ask Prometheus for a dashboard, and the answers in the shape that `drawing.js` reads."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import httpx
from boards.board import concrete

from pictures.recording import Span

_STEP_S = 2.0
_RATE_WINDOW = "20s"
"""Grafana's `$__rate_interval` at the shipped scrape interval of 5 s."""
_EXEMPLARS = 60
_LABEL = re.compile(r"{{(\w+)}}")


def asked(board: Mapping[str, Any], url: str, span: Span) -> dict[str, Any]:
    """The dashboard with what a Prometheus says in this span."""
    num = math.floor((span.end_s - span.begin_s) / _STEP_S) + 1
    return {
        "board": board,
        "times": [span.begin_s + index * _STEP_S for index in range(num)],
        "panels": [_panel(panel, url, span, num) for panel in board["panels"]],
        "marks": [mark for one in board["annotations"]["list"] for mark in _marks(one, url, span)],
    }


def _panel(panel: Mapping[str, Any], url: str, span: Span, num: int) -> dict[str, Any]:
    series, exemplars = [], []
    for target in panel["targets"]:
        expr = concrete(target["expr"], _RATE_WINDOW)
        for found in _range(url, expr, span, _STEP_S):
            labels: dict[str, str] = found["metric"]
            name = _LABEL.sub(partial(_label, labels), target["legendFormat"])
            told = {"ref": target["refId"], "name": name, "labels": labels}
            series.append({**told, "values": _values(found["values"], span, num)})
        if target["exemplar"]:
            exemplars += _exemplars(url, expr, span)
    return {"series": sorted(series, key=lambda one: one["name"]), "exemplars": exemplars}


def _label(labels: Mapping[str, str], found: re.Match[str]) -> str:
    return labels.get(found[1], "")


def _range(url: str, expr: str, span: Span, step_s: float) -> list[dict[str, Any]]:
    given = {"query": expr, "start": span.begin_s, "end": span.end_s, "step": step_s}
    answer = httpx.post(f"{url}/api/v1/query_range", data=given, timeout=60).json()
    if answer["status"] != "success":
        raise SystemExit(f"{expr}: {answer['error']}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def _values(pairs: Sequence[tuple[float, str]], span: Span, num: int) -> list[float | None]:
    """One for each time, None where the series has nothing to say."""
    made: list[float | None] = [None] * num
    for at_s, text in pairs:
        value = float(text)
        made[round((at_s - span.begin_s) / _STEP_S)] = value if math.isfinite(value) else None
    return made


def _exemplars(url: str, expr: str, span: Span) -> list[dict[str, float]]:
    """The slowest ones, spread over the span as Grafana thins them out too."""
    given = {"query": expr, "start": span.begin_s, "end": span.end_s}
    answer = httpx.get(f"{url}/api/v1/query_exemplars", params=given, timeout=60).json()
    found = [one for series in answer["data"] for one in series["exemplars"]]
    slowest: dict[int, dict[str, float]] = {}
    for one in found:
        slot = int((one["timestamp"] - span.begin_s) / (span.end_s - span.begin_s) * _EXEMPLARS)
        made = {"at": one["timestamp"], "value": float(one["value"])}
        slowest[slot] = max(slowest.get(slot, made), made, key=lambda each: each["value"])
    return list(slowest.values())


def _marks(annotation: Mapping[str, Any], url: str, span: Span) -> list[dict[str, Any]]:
    """When each began: what holds at several steps on end is one mark."""
    target = annotation["target"]
    step_s = float(target["interval"].removesuffix("s"))
    marks = []
    for found in _range(url, concrete(target["expr"], _RATE_WINDOW), span, step_s):
        times = [at_s for at_s, _ in found["values"]]
        for before, at_s in zip([-math.inf, *times], times, strict=False):
            if at_s - before > 1.5 * step_s:
                marks.append({"at": at_s, "color": annotation["iconColor"]})
    return marks
