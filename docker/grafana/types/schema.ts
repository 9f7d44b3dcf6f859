// What the dashboards' JSON has to be: Grafana's own types, with each kind of panel's options and Prometheus' queries.
import type * as grafana from "@grafana/schema";
import type { Options as StatOptions } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type { FieldConfig as TimelineField, Options as TimelineOptions } from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type { FieldConfig as TableField, Options as TableOptions } from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type { FieldConfig as SeriesField, Options as SeriesOptions } from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has the values of enumerations, not their names.
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

interface PrometheusQuery extends grafana.DataQuery {
  expr: string;
  legendFormat: string;
  exemplar?: boolean;
  format?: "time_series" | "table" | "heatmap";
  instant?: boolean;
  interval?: string;
  range?: boolean;
}

interface Drawn<Type extends string, Options, Field> extends Omit<grafana.Panel, "fieldConfig" | "options" | "targets" | "type"> {
  type: Type;
  id: number;
  options: Options;
  fieldConfig: Omit<grafana.FieldConfigSource, "defaults"> & { defaults: Omit<grafana.FieldConfig, "custom"> & { custom?: Field } };
  targets: PrometheusQuery[];
}

type Panel =
  | Drawn<"timeseries", SeriesOptions, SeriesField>
  | Drawn<"stat", Omit<StatOptions, "text">, Record<string, never>>
  | Drawn<"state-timeline", TimelineOptions, TimelineField>
  | Drawn<"table", TableOptions, TableField>;

export type Dashboard = Plain<
  Omit<grafana.Dashboard, "annotations" | "panels"> & {
    annotations: { list: grafana.AnnotationQuery<PrometheusQuery>[] };
    panels: Panel[];
  }
>;
