"""What a dashboard is made of, and how it becomes Grafana's JSON.

Panels are data here, so that a test can run each of their queries against a live Prometheus and a metric
that is renamed is noticed before an operator does.
"""

from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

MODEL = 'model=~"$model"'
WINDOW = "$__rate_interval"
SWAPS = f"sum by (model, result) (changes(fewstep_swaps_total{{{MODEL}}}[1m])) > 0"
"""Where every dashboard draws a mark."""
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24
_KINDS: dict[str, Any] = {"timeseries": timeseries.Panel, "stat": stat.Panel, "timeline": statetimeline.Panel}


@dataclass(frozen=True, slots=True)
class Query:
    """`exemplars` asks for the traces behind a histogram too; where it has none, nothing is drawn."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it answers is in `text`, which Grafana shows behind the title's mark."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "timeline"] = "timeseries"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard; its file is `<uid>.json`."""

    uid: str
    title: str
    panels: tuple[Panel, ...]

    def build(self) -> str:
        """The dashboard as JSON text."""
        made = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .tags(["fewstep"])
            .refresh("5s")
            .time("now-15m", "now")
            .editable()
            .link(dashboard.DashboardLink("Fewstep").type("dashboards").tags(["fewstep"]).as_dropdown(True))
            .annotation(dashboard.AnnotationQuery().name("Swaps").datasource(_source()).enable(True).expr(SWAPS))
            .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Data source"))
            .with_variable(
                dashboard.QueryVariable("model")
                .label("Model")
                .query("label_values(fewstep_model_info, model)")
                .datasource(_source())
                .include_all(True)
                .multi(True)
                .all_value(".*")
            )
        )
        for index, panel in enumerate(self.panels):
            row, x = divmod(index * _WIDTH, _COLUMNS)
            made = made.with_panel(_draw(panel, GridPos(h=_HEIGHT, w=_WIDTH, x=x, y=row * _HEIGHT)))
        return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def quantile(q: float, metric: str, by: str, window: str = WINDOW) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate(fewstep_{metric}_bucket{{{MODEL}}}[{window}])))"


def mean(metric: str, by: str, window: str = WINDOW) -> str:
    total, count = (f"sum by ({by}) (rate(fewstep_{metric}_{part}{{{MODEL}}}[{window}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def rate(metric: str, by: str, where: str = MODEL) -> str:
    return f"sum by ({by}) (rate(fewstep_{metric}{{{where}}}[{WINDOW}]))"


def p50_p95(metric: str, by: str, label: str, *, exemplars: bool = False) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, metric, by), f"{label} p{round(q * 100)}", exemplars) for q in (0.5, 0.95))


def _draw(panel: Panel, at: GridPos) -> Any:
    made = _KINDS[panel.kind]().title(panel.title).description(panel.text).unit(panel.unit)
    made = made.datasource(_source()).grid_pos(at)
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(25)
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number))
        made = made.with_target(target.exemplar(True) if query.exemplars else target)
    return made


def _source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid="${datasource}")
