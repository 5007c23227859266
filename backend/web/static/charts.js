// Curves by uPlot: colours of the theme, one zoom for all, smoothing that keeps gaps.

const styles = () => getComputedStyle(document.documentElement);
export const colour = (name) => styles().getPropertyValue(name).trim();

/** Twenty colours that differ in hue and lightness, readable on both grounds. */
export function lineColour(index) {
  const hue = (index * 137.5 + 172) % 360;
  const light = styles().colorScheme === "dark" ? [68, 58] : [36, 46];
  return `hsl(${hue} 65% ${light[index % 2]}%)`;
}

/**
 * The exponential mean of a curve: each point is `weight` of the mean before it and the rest of its own value, with
 * the beginning corrected as Adam corrects it. Gaps stay gaps.
 */
export function smoothed(values, weight) {
  if (weight <= 0) return values;
  let mean = 0;
  let count = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    mean = mean * weight + value * (1 - weight);
    count += 1;
    return mean / (1 - weight ** count);
  });
}

export function figure(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString();
  return value.toPrecision(4);
}
export function bytes(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (Math.abs(value) >= 1024 && step < names.length - 1) [value, step] = [value / 1024, step + 1];
  return `${value.toFixed(step ? digits : 0)} ${names[step]}`;
}

/** Write the ticks of an axis: bytes with as many digits as it takes to tell them apart. */
function ticksIn(format) {
  const written = (ticks, digits) => ticks.map((tick) => (tick === null ? "" : format(tick, digits)));
  return (_, ticks) => {
    const shown = ticks.filter((tick) => tick !== null);
    const digits = format === bytes ? [1, 2, 3].find((each) => new Set(written(shown, each)).size === shown.length) : undefined;
    return written(ticks, digits);
  };
}

/** Charts that share their steps: a zoom of one is a zoom of all. */
export class Charts {
  constructor(onZoom) {
    this.charts = new Map();
    this.range = null;
    this.onZoom = onZoom;
    this.sync = uPlot.sync("steps");
    addEventListener("resize", () => this.resize());
  }

  zoom(range) {
    this.range = range;
    for (const chart of this.charts.values()) this.#scale(chart);
    this.onZoom?.(range);
  }

  #scale(chart) {
    const steps = chart.data[0];
    const [min, max] = this.range ?? [steps[0], steps.at(-1)];
    if (steps.length) chart.setScale("x", { min, max: max > min ? max : min + 1 });
  }

  resize() {
    for (const chart of this.charts.values()) chart.setSize({ width: chart.root.parentElement.clientWidth, height: chart.height });
  }

  /** Show new values in a chart, which is made at the first call. */
  draw(name, place, data, series, { format = figure, logarithmic = false, height = 190 } = {}) {
    const shape = JSON.stringify([series.map((each) => each.label), logarithmic]);
    let chart = this.charts.get(name);
    if (chart && chart.shape !== shape) {
      chart.destroy();
      chart = undefined;
    }
    if (!chart) {
      chart = new uPlot(this.#options(place, series, format, logarithmic, height), data, place);
      chart.shape = shape;
      this.charts.set(name, chart);
    } else {
      chart.setData(data, false);
    }
    this.#scale(chart);
  }

  #options(place, series, format, logarithmic, height) {
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    return {
      width: place.clientWidth,
      height,
      scales: { x: { time: false, auto: false }, y: logarithmic ? { distr: 3 } : {} },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      legend: { live: true },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")) },
        { ...axis, size: 82, values: ticksIn(format) },
      ],
      series: [
        { label: "step", value: (_, value) => (value === null ? "–" : String(value)) },
        ...series.map((each) => ({
          width: 1.75,
          spanGaps: true,
          ...each,
          value: (_, value) => format(value),
        })),
      ],
      hooks: {
        setSelect: [
          (chart) => {
            const { left, width } = chart.select;
            if (width > 4) this.zoom([Math.round(chart.posToVal(left, "x")), Math.round(chart.posToVal(left + width, "x"))]);
            chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          },
        ],
        ready: [(chart) => chart.over.addEventListener("dblclick", () => this.zoom(null))],
      },
    };
  }

  /** Draw everything anew, in the colours of another theme. */
  forget() {
    for (const chart of this.charts.values()) chart.destroy();
    this.charts.clear();
  }
}
