// Numbers as Grafana writes them, of the units that the dashboards use.

const SCALES = {
  s: [[1e-6, "µs"], [1e-3, "ms"], [1, "s"], [60, "min"], [3600, "hour"], [86400, "day"]],
  short: [[1, ""], [1e3, "K"], [1e6, "Mil"], [1e9, "Bil"]],
  reqps: [[1, "req/s"], [1e3, "K req/s"]],
  bytes: [[1, "B"], [2 ** 10, "KiB"], [2 ** 20, "MiB"], [2 ** 30, "GiB"], [2 ** 40, "TiB"]],
  percentunit: [[0.01, "%"]],
  none: [[1, ""]],
};

function scaleOf(unit, magnitude) {
  const scales = SCALES[unit];
  if (scales === undefined) throw new Error(`no such unit here: ${unit}`);
  return scales.findLast(([size]) => magnitude >= size) ?? scales[0];
}

// A single number, to about three digits.
function shown(value, unit) {
  if (value === null || value === undefined) return "-";
  const [size, name] = value === 0 ? SCALES[unit].find(([one]) => one >= 1) ?? SCALES[unit][0] : scaleOf(unit, Math.abs(value));
  const scaled = value / size;
  const digits = Number.isInteger(scaled) ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(scaled))));
  return joined(scaled.toFixed(Math.min(digits, 3)), name);
}

// The labels of an axis: each in its own scale, digits by the distance between them.
function ticks(values, increment, unit) {
  return values.map((value) => {
    const [size, name] = value === 0 ? SCALES[unit].find(([one]) => one >= 1) ?? SCALES[unit][0] : scaleOf(unit, Math.abs(value));
    const step = increment / size;
    const digits = value === 0 ? 0 : Math.max(0, Math.min(3, Math.ceil(-Math.log10(step) - 1e-9)));
    const text = (value / size).toFixed(digits);
    return joined(Number((value / size).toFixed(digits + 2)) === Number(text) ? text : (value / size).toFixed(digits + 1), name);
  });
}

function joined(text, name) {
  if (name === "") return text;
  return name === "%" ? `${text}%` : `${text} ${name}`;
}
