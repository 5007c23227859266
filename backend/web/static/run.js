// A run, live: every point there is, then the stream from there on.
import { call, connection, follow, notice, refresher, showTimes } from "./app.js";
import { bytes, Charts, colour, figure, smoothed } from "./charts.js";

const root = document.getElementById("run");
const id = root.dataset.id;
const place = document.getElementById("charts");
const smoothing = document.getElementById("smoothing");
const logScale = document.getElementById("log-scale");
const unzoom = document.getElementById("unzoom");
const ENDED = ["succeeded", "failed", "cancelled"];

const SHOWN = [
  ["loss", "Loss", figure],
  ["token_accuracy", "Token accuracy", figure],
  ["learning_rate", "Learning rate", figure],
  ["grad_norm", "Gradient norm", figure],
  ["tokens_per_s", "Tokens per second", figure],
  ["memory_bytes", "Memory", bytes],
  ["preference.margin", "Margin of preferences", figure],
  ["preference.accuracy", "Accuracy of preferences", figure],
];
const field = (data, name) => name.split(".").reduce((found, part) => found?.[part], data) ?? null;

// Step to its figures. A step that comes again, after a run was cut off, is the same step.
const steps = new Map();
const evaluations = new Map();
// The last event that the page, as the server rendered it, knows of: the stream goes on from there. What is taken of
// the curves, which come later, may be sent once more.
let sequence = Number(root.dataset.sequence);
let waiting = null;

const charts = new Charts((range) => (unzoom.disabled = range === null));
unzoom.addEventListener("click", () => charts.zoom(null));

function card(name, title) {
  let found = document.getElementById(`chart-${name}`);
  if (!found) {
    found = document.createElement("figure");
    found.className = "card chart";
    found.id = `chart-${name}`;
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    const body = document.createElement("div");
    found.append(caption, body);
    place.append(found);
  }
  return found;
}

function draw() {
  waiting = null;
  if (steps.size === 0 && evaluations.size === 0) return;
  document.getElementById("no-points")?.remove();
  const order = [...new Set([...steps.keys(), ...evaluations.keys()])].sort((a, b) => a - b);
  const weight = Number(smoothing.value);
  document.getElementById("smoothed").textContent =
    weight > 0 ? `exponential mean, weight ${weight.toFixed(2)}; the thin curve is as measured` : "off: as measured";
  for (const [name, title, format] of SHOWN) {
    const values = order.map((step) => field(steps.get(step), name));
    const evaluated = { loss: "eval_loss", token_accuracy: "token_accuracy" }[name];
    const checked = order.map((step) => (evaluated ? field(evaluations.get(step), evaluated) : null));
    const isThere = (value) => value !== null;
    if (!values.some(isThere) && !checked.some(isThere)) continue;
    const columns = [order];
    const series = [];
    if (name === "loss" || name === "grad_norm" || name === "token_accuracy") {
      columns.push(values);
      series.push({ label: weight > 0 ? "as measured" : title.toLowerCase(), stroke: weight > 0 ? colour("--line-strong") : colour("--accent"), width: weight > 0 ? 1 : 1.75, alpha: weight > 0 ? 0.55 : 1, points: { show: order.length < 40 } });
      if (weight > 0) {
        columns.push(smoothed(values, weight));
        series.push({ label: "smoothed", stroke: colour("--accent"), width: 2, points: { show: false } });
      }
    } else {
      columns.push(values);
      series.push({ label: title.toLowerCase(), stroke: colour("--accent"), points: { show: order.length < 40 } });
    }
    if (checked.some(isThere)) {
      columns.push(checked);
      series.push({ label: "evaluation", stroke: colour("--info"), width: 1.75, points: { show: true, size: 6 } });
    }
    const figureCard = card(name, title);
    charts.draw(name, figureCard.lastElementChild, columns, series, { format, logarithmic: name === "loss" && logScale.checked });
  }
}
const drawSoon = () => (waiting ??= requestAnimationFrame(draw));
smoothing.addEventListener("input", drawSoon);
logScale.addEventListener("change", drawSoon);
const redraw = () => {
  charts.forget();
  drawSoon();
};
document.addEventListener("themed", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

/** Take over columns as they come from the server. */
function take(columns, into) {
  const names = Object.keys(columns).filter((name) => name !== "step");
  columns.step.forEach((step, place) => {
    const data = {};
    for (const name of names) {
      const [first, second] = name.split(".");
      if (second) (data[first] ??= {})[second] = columns[name][place];
      else data[name] = columns[name][place];
    }
    into.set(step, data);
  });
}

const head = document.getElementById("head");
const refreshHead = refresher(head, `/runs/${id}/head`, () => head.querySelector("dialog[open]") !== null);
head.addEventListener("close", refreshHead, true); // of the dialog, which does not bubble
const refreshCheckpoints = refresher(document.getElementById("checkpoints"), `/runs/${id}/checkpoints`);

function put(name, text) {
  const found = document.getElementById(name);
  if (found) found.textContent = text;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  const whole = Math.round(value);
  if (whole >= 3600) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return whole >= 60 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${whole} s`;
}

function stepped(data) {
  put("step", data.step.toLocaleString());
  put("loss", figure(data.loss));
  put("tokens-per-s", Math.round(data.tokens_per_s).toLocaleString());
  put("eta", seconds(data.eta_s));
  const bar = document.getElementById("fraction");
  if (bar) bar.value = data.step / data.total_steps;
}

const told = { state: (data) => data.state, evaluation: (data) => `step ${data.step}: loss ${figure(data.eval_loss)}`, checkpoint: (data) => `step ${data.step}` };
function addEvent(kind, data, number) {
  const list = document.getElementById("events");
  if (list.querySelector(`[data-sequence="${number}"]`)) return;
  const line = document.createElement("li");
  line.dataset.sequence = number;
  const time = document.createElement("time");
  time.dateTime = data.created_at;
  const name = document.createElement("strong");
  name.textContent = kind;
  line.append(time, " ", name, " ");
  if (told[kind]) {
    line.append(told[kind](data));
  } else {
    const more = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "details";
    const text = document.createElement("pre");
    text.textContent = JSON.stringify(data, null, 1);
    more.append(summary, text);
    line.append(more);
  }
  list.append(line);
  list.scrollTop = list.scrollHeight;
  showTimes(line);
}

async function readLog() {
  if (document.hidden) return;
  try {
    const { lines } = await call("GET", `/api/training/jobs/${id}/log?tail=300`);
    const log = document.getElementById("log");
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    // A line that was written over, as a bar of progress is, is what stands there at last.
    const shown = lines.map((line) => line.split("\r").filter(Boolean).at(-1) ?? "");
    log.textContent = shown.join("\n") || "The engine has written nothing.";
    if (atEnd) log.scrollTop = log.scrollHeight;
  } catch {
    // The head of the page says that the server does not answer; the log stays as it was.
  }
}

document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-opens]");
  if (opener) document.getElementById(opener.dataset.opens).showModal();
});
document.addEventListener("acted", (event) => {
  event.target.closest("dialog")?.close();
  refreshHead();
});

/** Read every point there is; a server that is away is asked again until it is there. */
async function readCurves() {
  for (;;) {
    try {
      return await call("GET", `/runs/${id}/curves`);
    } catch (error) {
      if (error.problem?.status !== 0) throw error;
      connection(false);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

try {
  const first = await readCurves();
  connection(true);
  take(first.steps, steps);
  take(first.evaluations, evaluations);
  draw();
} catch (error) {
  notice(error.message, true);
}
const logTimer = setInterval(readLog, 4000);
readLog();
document.getElementById("events").scrollTop = 1e9;
root.dataset.ready = "yes"; // the curves are drawn, the stream is followed

const heard = (kind) => (text, number) => {
  const data = JSON.parse(text);
  sequence = Math.max(sequence, Number(number));
  if (kind === "metrics") {
    steps.set(data.step, data);
    stepped(data);
    drawSoon();
    return undefined;
  }
  if (kind === "evaluation") {
    evaluations.set(data.step, data);
    drawSoon();
  }
  if (kind === "checkpoint") refreshCheckpoints();
  if (kind !== "progress") addEvent(kind, data, number);
  if (kind === "state") {
    root.dataset.state = data.state;
    refreshHead();
    if (ENDED.includes(data.state)) {
      clearInterval(logTimer);
      readLog();
      refreshCheckpoints();
      return "end";
    }
  }
  return undefined;
};

if (!ENDED.includes(root.dataset.state)) {
  follow(
    () => `/api/training/jobs/${id}/events?after=${sequence}`,
    Object.fromEntries(["state", "progress", "started", "built", "metrics", "evaluation", "checkpoint"].map((kind) => [kind, heard(kind)])),
  );
} else {
  clearInterval(logTimer);
}

// For tests, and for whoever looks from the console.
window.run = { steps, evaluations, charts };
