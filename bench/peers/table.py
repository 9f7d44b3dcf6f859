"""The cells as a table, for the console and as bench/peers.md."""

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    ("peer", "peer"),
    ("images/s", "images_per_s"),
    ("of ceiling", ""),
    ("p50 ms", "p50_ms"),
    ("p95 ms", "p95_ms"),
    ("p99 ms", "p99_ms"),
    ("p95 1-step ms", "p95_1step_ms"),
    ("overhead ms", "overhead_ms"),
    ("SLO", "slo_attainment"),
    ("goodput/s", "goodput_per_s"),
    ("CPU s", "cpu_s"),
    ("RSS MB", "rss_mb"),
    ("failed", "failed"),
    ("wrong", "wrong"),
)
_HEADLINES = (
    "throughput_ratio_min",
    "goodput_ratio_overload",
    "goodput_ratio_overload_told",
    "p95_1step_ratio_90_10",
    "slo_attainment_90",
    "lone_latency_extra_ms",
)


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report: how it was measured, a table per cell with the fastest first, the summary, what was given."""
    machine = report["machine"]
    lines = [
        "# Fewstep beside its peers",
        "",
        f"`{report['command']}` on {machine['cpu']}, {machine['cores']} cores, {report['date']}, load before "
        f"{machine['load_1min_before']}. Engine: {report['engine']}. {report['runs']} runs, medians; spreads are in "
        f"`peers.json`.",
        "",
        f"SLO: {report['slo']}.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {report['summary'][name]} |" for name in _HEADLINES),
        "",
    ]
    if report["summary"]["failing"]:
        lines += ["Cells that miss a goal:", "", *(f"- {one}" for one in report["summary"]["failing"]), ""]
    for place in dict.fromkeys((one["workload"], one["load"]) for one in report["cells"]):
        mine = [one for one in report["cells"] if (one["workload"], one["load"]) == place]
        lines += [f"## {place[0]}, {place[1]}", "", *_table(mine), ""]
    if report.get("left_out"):
        lines += ["## Not measured", "", *(f"- {one}" for one in report["left_out"]), ""]
    lines += ["## What each was given", "", *(f"- **{name}**: {text}" for name, text in report["given"].items()), ""]
    return "\n".join(lines)


def _table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = sorted(cells, key=lambda one: -one["images_per_s"])
    limited = [f"The load generator was the limit beside {one['peer']}." for one in rows if one["load_is_limit"]]
    return [
        f"Ceiling of the bare engine loop: {rows[0]['ceiling_images_per_s']} images/s.",
        "",
        f"| {' | '.join(title for title, _ in _COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(f"| {' | '.join(_value(one, name) for _, name in _COLUMNS)} |" for one in rows),
        *(["", *limited] if limited else []),
    ]


def _value(one: Mapping[str, Any], name: str) -> str:
    if not name:
        return f"{100 * one['images_per_s'] / one['ceiling_images_per_s']:.0f} %"
    return "" if one[name] is None else str(one[name])
