// Up to 20 runs over one another: one metric, a colour each.
import { call, notice } from "./app.js";
import { bytes, Charts, figure, lineColour, smoothed } from "./charts.js";

const place = document.getElementById("chart");
const metric = document.getElementById("metric");
const smoothing = document.getElementById("smoothing");
const logScale = document.getElementById("log-scale");
const unzoom = document.getElementById("unzoom");
const rows = [...document.querySelectorAll("#compared tbody tr")];
const charts = new Charts((range) => (unzoom.disabled = range === null));
let curves = null;

function draw() {
  const weight = Number(smoothing.value);
  document.getElementById("smoothed").textContent = weight > 0 ? `exponential mean, weight ${weight.toFixed(2)}` : "off";
  const shown = rows
    .map((row, index) => ({ row, index, of: curves[row.dataset.id] }))
    .filter(({ row }) => row.querySelector(".shown").checked)
    .map(({ row, index, of }) => {
      const source = metric.value === "eval_loss" ? of.evaluations : of.steps;
      return { name: row.dataset.name, index, steps: source.step, values: smoothed(source[metric.value] ?? [], weight) };
    })
    .filter(({ values }) => values.some((value) => value !== null));
  document.getElementById("nothing").hidden = shown.length > 0;
  charts.forget();
  place.replaceChildren();
  if (shown.length === 0) return;
  const data = uPlot.join(shown.map(({ steps, values }) => [steps, values]));
  const series = shown.map(({ name, index }) => ({ label: name, stroke: lineColour(index), points: { show: metric.value === "eval_loss" } }));
  charts.draw("all", place, data, series, { format: metric.value === "memory_bytes" ? bytes : figure, logarithmic: logScale.checked, height: 420 });
}

async function load() {
  const asked = rows.map((row) => `id=${encodeURIComponent(row.dataset.id)}`).join("&");
  try {
    curves = await call("GET", `/runs/compare/curves?metric=${metric.value}&${asked}`);
    draw();
    place.dataset.drawn = metric.value;
  } catch (error) {
    notice(error.message, true);
  }
}

rows.forEach((row, index) => row.querySelector(".swatch rect").setAttribute("fill", lineColour(index)));
metric.addEventListener("change", load);
for (const control of [smoothing, logScale]) control.addEventListener("input", draw);
document.getElementById("compared").addEventListener("change", draw);
document.addEventListener("themed", draw);
unzoom.addEventListener("click", () => charts.zoom(null));
await load();
