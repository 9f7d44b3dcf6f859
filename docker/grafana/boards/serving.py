"""Serving: how long requests take, whether the objective holds, and what is queued, refused and given up."""

from boards.board import MODEL, WINDOW, Board, Limit, Panel, Query, mean, p50_p95, quantile, rate

ERROR_BUDGET = 0.005
"""Of requests that may fail, expire or be refused; docker/prometheus/rules says the same."""


def burn(window: str) -> str:
    """How many times faster than allowed the error budget is used up."""
    parts = (f"(sum(rate(fewstep_{name}_total[{window}])) or vector(0))" for name in ("requests", "shed"))
    asked = f"({' + '.join(parts)})"
    good = f'sum(rate(fewstep_requests_total{{status=~"succeeded|canceled"}}[{window}]))'
    return f"(1 - ({good} or vector(0)) / {asked}) / {ERROR_BUDGET}"


BOARD = Board(
    "fewstep-serving",
    "Fewstep: serving",
    (
        Panel(
            "Requests",
            "Answers per second by status; anything but succeeded wants a look.",
            "reqps",
            (Query(rate("requests_total", "tier, status"), "{{tier}} {{status}}"),),
            stacked=True,
        ),
        Panel(
            "Latency by tier",
            "From HTTP request to answer at the gateway; the objective is 5 s. Dots are traces of single requests.",
            "s",
            p50_p95("request_seconds", "tier", "{{tier}}", exemplars=True),
            limits=(Limit(5, "red"),),
        ),
        Panel(
            "Latency by version",
            "The same by the version that answered: both sides of a swap.",
            "s",
            p50_p95("request_seconds", "version", "{{version}}", exemplars=True),
        ),
        Panel(
            "Latency by stage",
            "Engine time of one batch: encode, denoise, decode.",
            "s",
            p50_p95("stage_seconds", "stage", "{{stage}}"),
        ),
        Panel(
            "Error budget burn",
            "1 uses the budget up just in time; above 6 for hours somebody gets a ticket, above 14.4 a page.",
            "none",
            tuple(Query(burn(window), f"over {window}") for window in ("5m", "1h", "6h")),
            limits=(Limit(6, "orange"), Limit(14.4, "red")),
        ),
        Panel(
            "Queue",
            "Requests that no worker has claimed, and rows inside workers.",
            "short",
            (
                Query(f"sum by (class) (fewstep_waiting{{{MODEL}}})", "waiting {{class}}"),
                Query(f"sum(fewstep_running{{{MODEL}}})", "running rows"),
            ),
        ),
        Panel(
            "Queue time",
            "From queue entry to the first engine call.",
            "s",
            p50_p95("queue_seconds", "model", "{{model}}"),
        ),
        Panel(
            "Batch occupancy",
            "Network rows in one evaluation; above 1 the batcher earns its keep.",
            "short",
            (
                Query(mean("batch_rows", "model"), "{{model}} mean rows"),
                Query(quantile(0.95, "batch_rows", "model"), "{{model}} p95 rows"),
            ),
        ),
        Panel(
            "Shed",
            "Requests per second that were refused before they were queued, by reason.",
            "reqps",
            (Query(f"sum by (reason) (rate(fewstep_shed_total[{WINDOW}]))", "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "Downgrades",
            "Requests served below the default tier, and how far below it auto serves now.",
            "short",
            (
                Query(f"sum by (from, to) (rate(fewstep_tier_downgraded_total[{WINDOW}]))", "{{from}} to {{to}} per s"),
                Query(f"max by (class) (fewstep_degraded{{{MODEL}}})", "auto down {{class}}"),
            ),
        ),
        Panel(
            "Cancellations and missed deadlines",
            "Per second: canceled by whoever asked, at the gateway or on a worker; out of time.",
            "reqps",
            (
                Query(f"sum by (where) (rate(fewstep_cancelled_total[{WINDOW}]))", "canceled at {{where}}"),
                Query(rate("deadline_missed_total", "model"), "{{model}} too late"),
            ),
        ),
        Panel(
            "Steps",
            "Row steps per second by version: who does the work now.",
            "short",
            (Query(rate("steps_total", "version"), "{{version}}"),),
            stacked=True,
        ),
    ),
)
