// A time series panel, by the library that Grafana's own is made with.

const GRID = "rgba(204, 204, 220, 0.07)", TEXT = "#9d9fb0", FONT = '11px Inter, "DejaVu Sans", sans-serif';
const THRESHOLD = { green: "#73bf69", yellow: "#fade2a", orange: "#ff9830", red: "#f2495c", text: "#ccccdc", transparent: "#0000", blue: "#5794f2", purple: "#b877d9" };
const PALETTE = [
  "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a",
  "#447ebc", "#c15c17", "#890f02", "#0a437c", "#6d1f62", "#584477", "#b7dbab", "#f4d598", "#70dbed", "#f9ba8f",
];

function colored(name) {
  const found = THRESHOLD[name] ?? (name.startsWith("#") ? name : undefined);
  if (found === undefined) throw new Error(`no such color here: ${name}`);
  return found;
}

function clock(seconds) {
  return new Date(seconds * 1000).toISOString().slice(11, 16);
}

function plotTimeseries(element, panel, told, times, marks) {
  const { defaults } = panel.fieldConfig, custom = defaults.custom ?? {};
  const stacked = custom.stacking?.mode === "normal";
  const values = told.series.map((one) => one.values);
  const drawn = stacked ? sums(values) : values;
  const top = [custom.axisSoftMax ?? -Infinity, ...told.exemplars.map((one) => one.value)];
  const options = {
    width: element.clientWidth,
    height: element.clientHeight,
    cursor: { show: false },
    legend: { show: false },
    padding: [8, 10, 0, 0],
    tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "UTC"),
    scales: { x: { range: [times[0], times.at(-1)] }, y: { range: (_, low, high) => span(low, high, custom, top, defaults) } },
    axes: [axis({ values: (_, at) => at.map(clock), space: 70, size: 22 }), axis({ values: (_, at, __, ___, step) => ticks(at, step, defaults.unit), size: widest, space: 30 })],
    series: [{}, ...drawn.map((_, index) => line(index, drawn, custom, stacked))],
    bands: stacked ? drawn.slice(1).map((_, index) => ({ series: [index + 2, index + 1] })) : [],
    hooks: {
      drawClear: [(plot) => limits(plot, defaults, custom)],
      draw: [(plot) => { for (const mark of marks) swap(plot, mark); }, (plot) => { for (const one of told.exemplars) diamond(plot, one); }],
    },
  };
  new uPlot(options, [times, ...drawn], element);
}

function sums(values) {
  const total = new Array(values[0]?.length ?? 0).fill(0);
  return values.map((one) => one.map((value, at) => (value === null ? null : (total[at] += value))));
}

function span(low, high, custom, top, defaults) {
  if (low === null) return [0, 1];
  const least = defaults.min ?? Math.min(custom.axisSoftMin ?? Infinity, low);
  const most = defaults.max ?? Math.max(high, ...top);
  const room = most > least ? (most - least) * 0.08 : 1;
  return [least === (custom.axisSoftMin ?? least - 1) ? least : least - room, most === custom.axisSoftMax ? most : most + room];
}

function axis(given) {
  return { stroke: TEXT, font: FONT, grid: { stroke: GRID, width: 1 }, ticks: { show: false }, gap: 4, ...given };
}

// Room for the longest label.
function widest(plot, labels) {
  if (labels === null) return 40;
  plot.ctx.font = FONT;
  return 10 + Math.max(...labels.map((label) => plot.ctx.measureText(label).width / devicePixelRatio));
}

function line(index, drawn, custom, stacked) {
  const color = PALETTE[index % PALETTE.length], opacity = custom.fillOpacity ?? 0;
  return {
    stroke: color,
    width: custom.lineWidth ?? 1,
    fill: opacity > 0 ? color + Math.round(opacity * 2.55).toString(16).padStart(2, "0") : undefined,
    points: { show: true, size: 5, fill: color, filter: () => lonely(drawn[index]) },
  };
}

// A value between two gaps makes no line: it is drawn as a point.
function lonely(values) {
  const alone = (at) => values[at] !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null;
  return values.flatMap((_, at) => (alone(at) ? [at] : []));
}

function limits(plot, defaults, custom) {
  const style = custom.thresholdsStyle?.mode ?? "off";
  if (style === "off") return;
  const { ctx, bbox } = plot, steps = defaults.thresholds.steps.filter((step) => step.value !== null);
  ctx.save();
  for (const step of steps) {
    const y = plot.valToPos(step.value, "y", true);
    if (y < bbox.top || y > bbox.top + bbox.height) continue;
    ctx.strokeStyle = colored(step.color);
    if (style.startsWith("dashed")) ctx.setLineDash([10, 10]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
  }
  ctx.restore();
}

function swap(plot, mark) {
  const { ctx, bbox } = plot, x = plot.valToPos(mark.at, "x", true), low = bbox.top + bbox.height;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colored(mark.color);
  ctx.setLineDash([3, 3]);
  ctx.beginPath();
  ctx.moveTo(x, bbox.top);
  ctx.lineTo(x, low);
  ctx.stroke();
  ctx.beginPath();
  ctx.moveTo(x - 4, low + 6);
  ctx.lineTo(x + 4, low + 6);
  ctx.lineTo(x, low);
  ctx.fill();
  ctx.restore();
}

function diamond(plot, one) {
  const { ctx } = plot, x = plot.valToPos(one.at, "x", true), y = plot.valToPos(one.value, "y", true);
  ctx.save();
  ctx.translate(x, y);
  ctx.rotate(Math.PI / 4);
  ctx.fillStyle = "#6ed0e0";
  ctx.fillRect(-2.5, -2.5, 5, 5);
  ctx.restore();
}
