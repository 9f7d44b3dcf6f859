"""What a dashboard is made of, and how it becomes Grafana's JSON.

Panels are data here, so that a test can run each of their queries against a live Prometheus and a metric
that is renamed is noticed before an operator does.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

MODEL = 'model=~"$model"'
WINDOW = "$__rate_interval"
SWAPS = f"sum by (model, result) (changes(fewstep_swaps_total{{{MODEL}}}[1m])) > 0"
"""Where every dashboard draws a mark."""
_SWAPS_STEP = "30s"  # half of the window, so that no change falls between two of them
_WIDTH, _HEIGHT, _COLUMNS = 8, 9, 24
_CALCULATED = ["lastNotNull", "max"]


@dataclass(frozen=True, slots=True)
class Query:
    """`exemplars` asks for the traces behind a histogram too; where it has none, nothing is drawn."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """From this value on, in the panel's unit, a figure has this color; of a time series it is a dashed line."""

    value: float
    color: Literal["yellow", "orange", "red"]


@dataclass(frozen=True, slots=True)
class State:
    """What a value of a timeline means."""

    text: str
    color: Literal["green", "red"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it answers is in `text`, which Grafana shows behind the title's mark.

    `alarming` names the figures of a stat that are orange above zero. A table has a row for each set of labels, and a
    column for each query, under its legend. `empty` is said where there is no series.
    """

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "timeline", "table"] = "timeseries"
    stacked: bool = False
    limits: tuple[Limit, ...] = ()
    states: Mapping[int, State] = field(default_factory=dict)
    alarming: tuple[str, ...] = ()
    empty: str = "No data"


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
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .link(dashboard.DashboardLink("Fewstep").type("dashboards").tags(["fewstep"]).as_dropdown(True))
            .annotation(_swaps())
            .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Data source"))
            .with_variable(
                dashboard.QueryVariable("model")
                .label("Model")
                .query("label_values(fewstep_model_info, model)")
                .datasource(_source())
                .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
                .sort(VariableSort.ALPHABETICAL_ASC)
                .include_all(True)
                .multi(True)
                .all_value(".*")
            )
        )
        for index, panel in enumerate(self.panels):
            row, x = divmod(index * _WIDTH, _COLUMNS)
            at = GridPos(h=_HEIGHT, w=_WIDTH, x=x, y=row * _HEIGHT)
            made = made.with_panel(_draw(panel, at).id(index + 1))
        told = json.loads(JSONEncoder().encode(made.build()))
        return json.dumps(_cleaned(told), sort_keys=True, indent=1) + "\n"


def concrete(expr: str, rate_interval: str) -> str:
    """The query as Grafana sends it when every model is chosen."""
    return expr.replace("$model", ".*").replace("$__rate_interval", rate_interval)


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
    made = _KINDS[panel.kind](panel).title(panel.title).description(panel.text).unit(panel.unit)
    made = made.datasource(_source()).grid_pos(at).no_value(panel.empty)
    if panel.states:
        results = {str(value): ValueMappingResult(state.text, state.color) for value, state in panel.states.items()}
        made = made.mappings([ValueMap(results)])
    for name in panel.alarming:
        steps = _thresholds((Limit(1, "orange"),)).build()
        made = made.override_by_name(name, [DynamicConfigValue("thresholds", steps)])
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(_ref(number))
        target = target.instant().format(PromQueryFormat.TABLE) if panel.kind == "table" else target.range()
        made = made.with_target(target.exemplar(query.exemplars))
    return made


def _ref(number: int) -> str:
    return chr(ord("A") + number)


def _timeseries(panel: Panel) -> Any:
    """From zero on: what looks like a doubling is one."""
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.TABLE).show_legend(True)
    made = (
        timeseries.Panel()
        .legend(legend.placement(shapes.LegendPlacement.BOTTOM).calcs(_CALCULATED))
        .tooltip(_tooltip())
        .thresholds(_thresholds(panel.limits))
        .axis_soft_min(0)
    )
    if panel.limits:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED))
    if panel.unit == "percentunit":
        made = made.axis_soft_max(1)
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A")).fill_opacity(25)
    return made


def _stat(panel: Panel) -> Any:
    return (
        stat.Panel()
        .thresholds(_thresholds(panel.limits))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _timeline(panel: Panel) -> Any:
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST).show_legend(False)
    return (
        statetimeline.Panel()
        .legend(legend.placement(shapes.LegendPlacement.BOTTOM).calcs([]))
        .tooltip(_tooltip())
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(panel.limits))
    )


def _table(panel: Panel) -> Any:
    """Grafana calls the value of query A `Value #A`."""
    names = {f"Value #{_ref(number)}": query.legend for number, query in enumerate(panel.queries)}
    columns = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}
    return (
        table.Panel()
        .show_header(True)
        .cell_height(shapes.TableCellHeight.SM)
        .decimals(3)
        .with_transformation(DataTransformerConfig("merge", options={}))
        .with_transformation(DataTransformerConfig("organize", options=columns))
    )


_KINDS: Mapping[str, Callable[[Panel], Any]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "timeline": _timeline,
    "table": _table,
}


def _thresholds(limits: tuple[Limit, ...]) -> Any:
    """Green below all of them; Grafana's own default is red from 80 on."""
    steps = [Threshold(None, "green"), *(Threshold(limit.value, limit.color) for limit in limits)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _tooltip() -> Any:
    return common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)


def _swaps() -> Any:
    target = prometheus.Dataquery().expr(SWAPS).legend_format("{{model}} {{result}}").ref_id("Swaps")
    mark = dashboard.AnnotationQuery().name("Swaps").datasource(_source()).enable(True).icon_color("purple")
    return mark.target(target.range().interval(_SWAPS_STEP))


def _cleaned(told: dict[str, Any]) -> dict[str, Any]:
    """Without what the library fills in and Grafana's own schema does not have."""
    for variable in told["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):
            del variable[name]
    for panel in told["panels"]:
        if panel["type"] == "table":
            del panel["options"]["footer"]
    return told


def _source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid="${datasource}")
