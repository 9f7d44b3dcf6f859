"""Writes the Grafana dashboard from code: `python docker/grafana/dashboard.py`.

Panels are data here, so that a test can run each of their queries against a live Prometheus and a metric
that is renamed is noticed before an operator does.
"""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

OUTPUT = Path(__file__).parent / "dashboards" / "fewstep.json"
MODEL = 'model=~"$model"'
WINDOW = "$__rate_interval"
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it answers is in `text`, which Grafana shows behind the title's mark."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    stacked: bool = False


def quantile(q: float, metric: str, by: str, window: str = WINDOW) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate(fewstep_{metric}_bucket{{{MODEL}}}[{window}])))"


def mean(metric: str, by: str, window: str = WINDOW) -> str:
    total, count = (f"sum by ({by}) (rate(fewstep_{metric}_{part}{{{MODEL}}}[{window}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def hits() -> str:
    found = f'sum(rate(fewstep_embedding_cache_total{{result="hit"}}[{WINDOW}]))'
    return f"{found} / sum(rate(fewstep_embedding_cache_total[{WINDOW}]))"


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate(fewstep_{metric}{{{MODEL}}}[{WINDOW}]))"


def p50_p95(metric: str, by: str, label: str = "") -> tuple[Query, ...]:
    shown = f"{label} " if label else ""
    return tuple(Query(quantile(q, metric, by), f"{shown}p{round(q * 100)}") for q in (0.5, 0.95))


SERVING = (
    Panel(
        "Requests",
        "Answers per second by status; anything but succeeded wants a look.",
        "reqps",
        (Query(rate("requests_total", "tier, status"), "{{tier}} {{status}}"),),
        stacked=True,
    ),
    Panel(
        "Latency by tier",
        "From HTTP request to answer, as the gateway saw it.",
        "s",
        p50_p95("request_seconds", "tier", "{{tier}}"),
    ),
    Panel(
        "Latency by stage",
        "Engine time of one batch: encode, denoise, decode, image bytes.",
        "s",
        p50_p95("stage_seconds", "stage", "{{stage}}"),
    ),
    Panel(
        "Queue",
        "Requests that no worker has claimed, rows inside workers, and how far below its tier auto serves for it.",
        "short",
        (
            Query(f"sum by (class) (fewstep_waiting{{{MODEL}}})", "waiting {{class}}"),
            Query(f"sum(fewstep_running{{{MODEL}}})", "running rows"),
            Query(f"max by (class) (fewstep_degraded{{{MODEL}}})", "auto down {{class}}"),
        ),
    ),
    Panel("Queue time", "From queue entry to the first engine call.", "s", p50_p95("queue_seconds", "model")),
    Panel(
        "Batch occupancy",
        "Network rows in one evaluation; above 1 the batcher earns its keep.",
        "short",
        (Query(mean("batch_rows", "model"), "mean rows"), Query(quantile(0.95, "batch_rows", "model"), "p95 rows")),
    ),
    Panel(
        "Steps",
        "Row steps per second by version: who does the work now.",
        "short",
        (Query(rate("steps_total", "version"), "{{version}}"),),
        stacked=True,
    ),
    Panel(
        "Step time",
        "One network evaluation of one batch.",
        "s",
        (Query(quantile(0.95, "step_seconds", "version, backend"), "{{version}} {{backend}} p95"),),
    ),
    Panel(
        "Prompt cache",
        "Share of prompt embeddings that were there already.",
        "percentunit",
        (Query(hits(), "hits"),),
    ),
)
SWAPS = (
    Panel(
        "Live versions",
        "1 for each version that serves; the lines change hands in a swap.",
        "short",
        (Query(f"max by (model, version) (fewstep_model_info{{{MODEL}}})", "{{version}}"),),
    ),
    Panel(
        "Swaps",
        "Swaps ended since the workers started, by how.",
        "short",
        (Query(f"sum by (result) (fewstep_swaps_total{{{MODEL}}})", "{{result}}"),),
        kind="stat",
    ),
    Panel(
        "Swap phases",
        "Mean seconds of each phase of a swap in the last hour.",
        "s",
        (Query(mean("swap_seconds", "phase", "1h"), "{{phase}}"),),
    ),
    Panel(
        "Swap stall",
        "Longest time in a swap with a live row waiting and no step done.",
        "s",
        (Query(quantile(1, "swap_stall_seconds", "model", "1h"), "{{model}} worst"),),
    ),
    Panel(
        "Quality by version",
        "From each version's report: Fréchet ratio to the guided teacher, alignment, diversity, grain.",
        "short",
        (Query(f"max by (version, metric) (fewstep_student_quality{{{MODEL}}})", "{{version}} {{metric}}"),),
    ),
)
DISTILLATION = (
    Panel("Jobs", "Jobs by state.", "short", (Query("sum by (state) (fewstep_distill_jobs)", "{{state}}"),), "stat"),
    Panel("Step", "How far each job is.", "short", (Query("max by (job) (fewstep_distill_step)", "{{job}}"),)),
    Panel(
        "Loss by role",
        "Not a result: look at the metric beside it.",
        "short",
        (Query("max by (job, role) (fewstep_distill_loss)", "{{job}} {{role}}"),),
    ),
    Panel(
        "Metric",
        "What the student reaches so far, beside the teacher.",
        "short",
        (Query("max by (job, metric, who) (fewstep_distill_metric)", "{{job}} {{metric}} {{who}}"),),
    ),
)
ROWS = {"Serving": SERVING, "Swaps and students": SWAPS, "Distillation": DISTILLATION}


def build() -> str:
    """The dashboard as JSON text."""
    board = (
        dashboard.Dashboard("Fewstep")
        .uid("fewstep")
        .tags(["fewstep"])
        .refresh("5s")
        .time("now-15m", "now")
        .editable()
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Data source"))
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .query("label_values(fewstep_model_info, model)")
            .datasource(source())
            .include_all(True)
            .multi(True)
            .all_value(".*")
        )
    )
    y = 0
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title).grid_pos(GridPos(h=1, w=_COLUMNS, x=0, y=y)))
        y += 1
        for index, panel in enumerate(panels):
            x = index * _WIDTH % _COLUMNS
            board = board.with_panel(
                draw(panel, GridPos(h=_HEIGHT, w=_WIDTH, x=x, y=y + index * _WIDTH // _COLUMNS * _HEIGHT))
            )
        y += -(-len(panels) * _WIDTH // _COLUMNS) * _HEIGHT
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def draw(panel: Panel, at: GridPos) -> timeseries.Panel | stat.Panel:
    made = stat.Panel() if panel.kind == "stat" else timeseries.Panel()
    made = made.title(panel.title).description(panel.text).unit(panel.unit).datasource(source()).grid_pos(at)
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(25)
    for query in panel.queries:
        made = made.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend))
    return made


def source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid="${datasource}")


if __name__ == "__main__":
    OUTPUT.write_text(build())
