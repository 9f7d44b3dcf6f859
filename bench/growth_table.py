"""What `bench.growth` found as tables, for the console and as bench/growth.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_FLAT = 1.2  # of a request beside a short queue, what one beside a long one may cost


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report: how it was measured, and a table for each part that there is."""
    machine = report["machine"]
    lines = [
        "# What a request costs as systems grow",
        "",
        f"`{report['command']}` on {machine['cpu']}, {machine['cores']} cores, {report['date']}, load before "
        f"{machine['load_1min_before']}. Medians; spreads are in `growth.json`.",
    ]
    for name, part in _PARTS.items():
        if name in report:
            lines += ["", *part(report[name])]
    return "\n".join(lines) + "\n"


def _redis(found: Mapping[str, Any]) -> Iterable[str]:
    yield "Claim and finish of a request in a real Redis, beside queued ones; `fresh` are queues that have just come."
    yield ""
    columns = ("us_per_request", "server_us_per_request")
    yield from _table(
        ["queued", *(f"µs, {state}{of}" for state in ("settled", "fresh") for of in ("", ", in Redis"))],
        (
            [f"{cell['queued']:,}", *(_of(cell[state], name) for state in ("settled", "fresh") for name in columns)]
            for cell in found["claim_and_finish"]
        ),
    )
    ratios = {name: found[name] for name in ("ratio", "server_ratio", "fresh_ratio", "fresh_server_ratio")}
    flat = "flat" if max(found["ratio"], found["server_ratio"]) <= _FLAT else "NOT flat"
    yield ""
    yield f"Long against short: {', '.join(f'{name} {value}' for name, value in ratios.items())}: {flat} within 20 %."


def _batcher(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "One decision of a worker's batcher."
    yield ""
    rows = ([f"{cell['waiting']:,}", _of(cell, "us_per_decision")] for cell in found)
    yield from _table(["rows waiting", "µs of processor time"], rows)


def _simulation(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "An engine call in the simulated scheduler, with all that is decided for it: admission, queue, claim, batch."
    yield ""
    rows = ([f"{cell['workers']:,}", str(cell["streams"]), _of(cell, "us_per_call")] for cell in found)
    yield from _table(["workers", "streams of each", "µs of processor time"], rows)


def _processes(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    kinds = list(found[0]["cpu_ms_per_picture"])
    yield "Processes on one Redis, with the paced engine; CPU in ms a picture, of all processes of a kind together."
    yield ""
    heads = ["workers", "gateways", "engines' pictures/s", "pictures/s", "p95 ms", *(f"CPU {kind}" for kind in kinds)]
    yield from _table([*heads, "CPU in all", "cores of load generators", "failed"], (_row(cell) for cell in found))


def _row(cell: Mapping[str, Any]) -> list[str]:
    spent = {kind: each["median"] for kind, each in cell["cpu_ms_per_picture"].items()}
    return [
        *(str(cell[name]) for name in ("workers", "gateways", "engines_per_s")),
        *(_of(cell, name) for name in ("pictures_per_s", "p95_ms")),
        *(f"{ms:.2f}" for ms in (*spent.values(), sum(spent.values()))),
        _of(cell, "load_cores"),
        str(cell["failed"]),
    ]


_PARTS: Mapping[str, Any] = {"redis": _redis, "batcher": _batcher, "simulation": _simulation, "processes": _processes}


def _of(cell: Mapping[str, Any], name: str) -> str:
    return str(cell[name]["median"])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---:|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
