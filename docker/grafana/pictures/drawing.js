// Draws a dashboard from its own JSON and the answers to its queries: `draw(asked)`, see asking.py.

const CELL = 38, GAP = 8, COLUMNS = 24; // px of Grafana's grid
const REDUCED = {
  lastNotNull: ["Last *", (values) => values.at(-1)],
  last: ["Last", (values) => values.at(-1)],
  max: ["Max", (values) => Math.max(...values)],
  mean: ["Mean", (values) => values.reduce((sum, one) => sum + one, 0) / values.length],
};

function draw({ board, times, panels, marks }) {
  document.body.append(heading(board, times));
  const main = document.body.appendChild(document.createElement("main"));
  const column = (innerWidth - 2 * GAP + GAP) / COLUMNS;
  let bottom = 0;
  board.panels.forEach((panel, index) => {
    const { x, y, w, h } = panel.gridPos, box = made("div", "panel", main);
    Object.assign(box.style, { left: `${x * column}px`, top: `${y * CELL}px`, width: `${w * column - GAP}px`, height: `${h * CELL - GAP}px` });
    const title = made("h2", "", box, panel.title);
    if (panel.description) made("span", "", title, "i");
    fill(box, panel, panels[index], times, panel.type === "timeseries" ? marks : []);
    bottom = Math.max(bottom, (y + h) * CELL);
  });
  main.style.height = `${bottom}px`;
}

function heading(board, times) {
  const header = document.createElement("header");
  made("h1", "", header, board.title);
  for (const variable of board.templating.list) picker(header, variable.label, variable.type === "datasource" ? "Prometheus" : "All");
  for (const mark of board.annotations.list) picker(header, mark.name, "on");
  const day = new Date(times[0] * 1000).toISOString().slice(0, 10);
  picker(header, day, `${clock(times[0])} to ${clock(times.at(-1))} UTC`);
  return header;
}

function picker(header, label, value) {
  const box = made("div", "picker", header);
  made("label", "", box, label);
  made("span", "", box, value);
}

function made(tag, className, parent, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function fill(box, panel, told, times, marks) {
  const plot = made("div", "plot", box);
  if (told.series.length === 0) return made("div", "nodata", plot, panel.fieldConfig.defaults.noValue ?? "No data");
  if (panel.type === "stat") return stats(plot, panel, told);
  if (panel.type === "state-timeline") return timeline(plot, panel, told, times);
  if (panel.type === "table") return table(plot, panel, told);
  if (panel.type !== "timeseries") throw new Error(`no such panel here: ${panel.type}`);
  legend(box, panel, told); // first: it decides what room the plot has
  plotTimeseries(plot, panel, told, times, marks);
}

function reduced(name, values) {
  const present = values.filter((value) => value !== null);
  return present.length ? REDUCED[name][1](present) : null;
}

function legend(box, panel, told) {
  const { displayMode = "list", calcs = [] } = panel.options?.legend ?? {}, { unit } = panel.fieldConfig.defaults;
  const element = made("div", `legend ${displayMode}`, box);
  const swatch = (parent, index) => { made("i", "", parent).style.background = PALETTE[index % PALETTE.length]; };
  if (displayMode === "list") {
    told.series.forEach((one, index) => {
      const entry = made("span", "", element);
      swatch(entry, index);
      const figures = calcs.map((name) => `  ${REDUCED[name][0]}: ${shown(reduced(name, one.values), unit)}`);
      entry.append(one.name + figures.join(""));
    });
    return;
  }
  const table = made("table", "", element), head = made("tr", "", table);
  for (const title of ["Name", ...calcs.map((name) => REDUCED[name][0])]) made("th", "", head, title);
  told.series.forEach((one, index) => {
    const row = made("tr", "", table), name = made("td", "", row);
    swatch(name, index);
    name.append(one.name);
    for (const calc of calcs) made("td", "", row, shown(reduced(calc, one.values), unit));
  });
}

// The color of a value by its mapping, else by the highest threshold that it reaches.
function judged(value, { mappings = [], thresholds }) {
  for (const mapping of mappings) {
    const found = mapping.options[String(value)];
    if (found !== undefined) return { text: found.text, color: colored(found.color) };
  }
  const steps = thresholds?.steps ?? [{ value: null, color: "green" }, { value: 80, color: "red" }];
  return { color: colored(steps.findLast((step) => step.value === null || value >= step.value).color) };
}

function stats(plot, panel, told) {
  const { defaults } = panel.fieldConfig, all = made("div", "stats", plot);
  for (const one of told.series) {
    const value = reduced("lastNotNull", one.values), { text, color } = judged(value, defaults), box = made("div", "", all);
    if (panel.options?.graphMode !== "none") sparkline(box, one.values, color);
    if (told.series.length > 1) made("small", "", box, one.name);
    const number = made("b", "", box, text ?? shown(value, defaults.unit));
    number.style.color = color;
    number.style.fontSize = `${Math.min(48, box.clientWidth / 2.2, plot.clientHeight / (1.6 * Math.ceil(told.series.length / 3)))}px`;
  }
}

function sparkline(box, values, color) {
  const canvas = made("canvas", "", box), pen = canvas.getContext("2d");
  canvas.width = 300;
  canvas.height = 80;
  const most = Math.max(...values, 1e-9);
  pen.fillStyle = color + "33";
  pen.strokeStyle = color;
  pen.beginPath();
  pen.moveTo(0, 80);
  values.forEach((value, at) => pen.lineTo((at / (values.length - 1)) * 300, 80 - ((value ?? 0) / most) * 72));
  pen.lineTo(300, 80);
  pen.fill();
  pen.stroke();
}

function timeline(plot, panel, told, times) {
  const all = made("div", "timeline", plot), from = times[0], length = times.at(-1) - from;
  const labels = told.series.map((one) => {
    const row = made("div", "row", all), label = made("span", "", row, one.name), bars = made("div", "bars", row);
    for (const { begin, end, value } of runs(one.values)) {
      const { text, color } = judged(value, panel.fieldConfig.defaults);
      const bar = made("div", "", bars, panel.options?.showValue === "never" ? "" : text ?? shown(value, panel.fieldConfig.defaults.unit));
      Object.assign(bar.style, { left: `${(begin / (times.length - 1)) * 100}%`, width: `${((end - begin) / (times.length - 1)) * 100}%`, background: color });
    }
    return label;
  });
  const widest = Math.max(...labels.map((label) => label.offsetWidth));
  for (const label of labels) label.style.width = `${widest}px`;
  const ruler = made("div", "axis", all);
  ruler.style.marginLeft = `${widest + 8}px`;
  const every = [60, 120, 300, 600].find((step) => length / step < 6) ?? 1800;
  for (let at = Math.ceil(from / every) * every; at < from + length; at += every) made("span", "", ruler, clock(at)).style.left = `${((at - from) / length) * 100}%`;
}

// Equal values one after the other, as indices of times; nothing where there is none.
function runs(values) {
  const found = [];
  values.forEach((value, at) => {
    const last = found.at(-1);
    if (value === null) return;
    if (last !== undefined && last.end === at && last.value === value) last.end = at + 1;
    else found.push({ begin: at, end: at + 1, value });
  });
  return found;
}

// A row for each set of labels, a column for each query; the transformations of the dashboards' tables do this in Grafana.
function table(plot, panel, told) {
  const rows = new Map(), names = panel.targets.map((target) => target.legendFormat);
  const labels = Object.keys(told.series[0].labels), { decimals } = panel.fieldConfig.defaults;
  for (const one of told.series) {
    const key = Object.values(one.labels).join(" ");
    rows.set(key, { labels: one.labels, ...rows.get(key), [one.ref]: reduced("lastNotNull", one.values) });
  }
  const element = made("table", "", made("div", "cells", plot)), head = made("tr", "", element);
  for (const title of [...labels, ...names]) made("th", "", head, title);
  for (const row of rows.values()) {
    const line = made("tr", "", element);
    for (const label of labels) made("td", "", line, row.labels[label]);
    for (const { refId } of panel.targets) made("td", "number", line, row[refId] === undefined ? "" : row[refId].toFixed(decimals));
  }
}
