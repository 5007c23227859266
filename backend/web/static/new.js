// A new fine-tune: what is chosen becomes the body of one request to the API, and what the API says of it is shown.
import { call, notice, problemOf, Refused, show, showPart } from "./app.js";

const form = document.getElementById("new");
const settings = document.getElementById("settings");
const fit = document.getElementById("fit");
const analysis = document.getElementById("analysis");
let overrides = JSON.parse(form.dataset.overrides);
let asked = null; // aborts what was asked for an earlier choice
let postponed = false; // whether the settings come anew once the field that is being written in is left

const checked = (name) => form.querySelector(`[name=${name}]:checked`);

/** The parts of a request that say what to train and how. */
function method() {
  const body = { algorithm: form.algorithm.value };
  if (form.use_case.value) body.use_case = form.use_case.value;
  if (form.dataset.initial) body.initial_adapter_id = form.dataset.initial;
  if (Object.keys(overrides).length) body.overrides = overrides;
  return body;
}

function body() {
  const made = { model_id: checked("model_id")?.value, dataset_id: checked("dataset_id")?.value, ...method() };
  const held = form.validation_fraction.value;
  if (held !== "" && Number(held) !== 0) made.validation_fraction = Number(held);
  if (form.elements.name.value.trim()) made.name = form.elements.name.value.trim();
  if (form.force.checked) made.force = true;
  return made;
}

// Refusals

function clearRefusals() {
  for (const place of form.querySelectorAll(".refusal[data-of]")) place.textContent = "";
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  document.getElementById("suggestions").replaceChildren();
}

function refuse(name, message) {
  const place = form.querySelector(`.refusal[data-of="${CSS.escape(name)}"]`);
  if (!place) return false;
  place.textContent = message;
  const field = document.getElementById(`set-${name}`) ?? form.elements[name];
  if (field instanceof HTMLElement) field.setAttribute("aria-invalid", "true");
  place.closest("details")?.setAttribute("open", "");
  return true;
}

/** Put each error at its field; what has none stands at the start button. */
function showProblem(problem, fallback = "") {
  const rest = [];
  for (const { location = [], message } of problem.errors ?? []) {
    const name = [...location].reverse().find((part) => !/^\d+$/.test(part));
    if (!name || !refuse(name, message)) rest.push(message);
  }
  if (rest.length || !(problem.errors ?? []).length) refuse(fallback, rest.join("; ") || problem.detail || problem.title);
  if (problem.type === "/problems/does-not-fit") document.getElementById("force-label").hidden = false;
  const list = document.getElementById("suggestions");
  for (const each of problem.suggestions ?? []) {
    const line = document.createElement("li");
    if (each.overrides && Object.keys(each.overrides).length) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.apply = JSON.stringify(each.overrides);
      button.textContent = each.change;
      line.append(button);
    } else {
      line.textContent = each.change ?? String(each);
    }
    list.append(line);
  }
}

// What is shown of a choice

async function refresh() {
  clearRefusals();
  showCalls();
  for (const place of form.querySelectorAll("[data-summary-of]")) {
    place.textContent = form.elements[place.dataset.summaryOf].selectedOptions[0].dataset.summary ?? "";
  }
  asked?.abort();
  asked = new AbortController();
  const { signal } = asked;
  // What is shown is of the choice before, until the answer comes.
  for (const part of [fit, analysis]) part.setAttribute("aria-busy", "true");
  await showSettings(signal);
  if (signal.aborted) return;
  fit.removeAttribute("aria-busy");
  await showAnalysis(signal);
  if (!signal.aborted) analysis.removeAttribute("aria-busy");
}

/** Whether a person is in a setting's field and has written something that has not been taken yet. */
function isTyping() {
  const field = document.activeElement;
  if (!field?.dataset?.setting || field.tagName !== "INPUT" || field.value === field.defaultValue) return false;
  const name = field.dataset.setting;
  return !(name in overrides && JSON.stringify(overrides[name]) === JSON.stringify(read(field)));
}

async function showSettings(signal) {
  const model = checked("model_id")?.value;
  let [open, focused] = [false, null];
  // What is open and where the focus is, as the new settings come: a person goes on meanwhile.
  const isInUse = () => {
    open = document.getElementById("all-settings")?.open;
    focused = document.activeElement?.dataset?.setting;
    return isTyping();
  };
  try {
    const choice = { ...method(), ...(model ? { model_id: model } : {}) };
    await showPart(settings, "/new/settings", choice, { signal, unless: isInUse });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    showProblem(error.problem, model ? "model_id" : "");
    return;
  }
  if (isTyping()) {
    postponed = true; // what is being written is not taken away
    return;
  }
  if (open) document.getElementById("all-settings").open = true;
  fit.replaceChildren(document.getElementById("fit-part").content);
  const field = focused ? document.getElementById(`set-${focused}`) : null;
  field?.focus();
  if (field?.tagName === "INPUT") field.select(); // as a field that the Tab key leads to
}

async function showAnalysis(signal) {
  const model = checked("model_id")?.value;
  const dataset = checked("dataset_id")?.value;
  if (!model || !dataset) return;
  try {
    for (;;) {
      const answer = await fetchAnalysis(model, dataset, signal);
      if (answer.status !== 202) return;
      const { fraction } = await answer.json();
      analysis.textContent = `Rows are being tokenized: ${Math.round(fraction * 100)} %`;
      await new Promise((resolve) => setTimeout(resolve, 700));
      if (signal.aborted) return;
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    analysis.replaceChildren();
    showProblem(error.problem, "analysis");
  }
}

async function fetchAnalysis(model, dataset, signal) {
  const address = `/new/analysis?dataset_id=${encodeURIComponent(dataset)}`;
  const holder = document.createElement("div");
  const { initial_adapter_id: _, ...told } = method(); // what is learned from the rows does not depend on it
  const answer = await showPartUnlessWaiting(holder, address, { ...told, model_id: model }, signal);
  if (answer.status !== 202) analysis.replaceChildren(...holder.childNodes);
  return answer;
}

async function showPartUnlessWaiting(place, address, sent, signal) {
  const token = sessionStorage.getItem("csrf");
  const headers = { "Content-Type": "application/json", ...(token ? { "X-CSRF-Token": token } : {}) };
  const answer = await fetch(address, { method: "POST", headers, body: JSON.stringify(sent), signal });
  if (answer.status === 202) return answer;
  if (!answer.ok) throw new Refused(await problemOf(answer));
  show(place, await answer.text());
  return answer;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map((each) => python(each)).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function showCalls() {
  const sent = body();
  document.getElementById("as-curl").textContent =
    `curl ${location.origin}/api/training/jobs \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(sent, null, 1))}`;
  const file = checked("dataset_id")?.dataset.file ?? "file-…";
  const own = { algorithm: sent.algorithm, ...(sent.initial_adapter_id ? { initial_adapter_id: sent.initial_adapter_id } : {}), ...(sent.use_case ? { use_case: sent.use_case } : {}), ...(sent.validation_fraction ? { validation_fraction: sent.validation_fraction } : {}), ...overrides };
  document.getElementById("as-openai").textContent =
    `from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key="not-needed")\n` +
    `job = client.fine_tuning.jobs.create(\n    model=${python(sent.model_id ?? "…")},\n    training_file=${python(file)},\n` +
    `    extra_body={"peft": ${python(own)}},\n)`;
}

// What a person does

/** Read a setting as the API takes it: a number, a truth, a list, or words; null where nothing stands there. */
function read(field) {
  const text = field.value.trim();
  if (text === "") return null;
  if (text === "true" || text === "false") return text === "true";
  if (field.dataset.number && text !== "" && !Number.isNaN(Number(text))) return Number(text);
  if (field.dataset.list && text !== "all-linear") return text.split(/[\s,]+/).filter(Boolean);
  return text;
}

form.addEventListener("change", (event) => {
  const field = event.target;
  if (field.id === "file" || field.id === "q" || field.id === "only-fitting") return;
  if (field.dataset.setting) overrides = { ...overrides, [field.dataset.setting]: read(field) };
  if (field.name === "dataset_id") reloadDatasets(field.value);
  if (field.name === "algorithm") overrides = {};
  refresh();
});
settings.addEventListener("focusout", () => {
  if (!postponed) return;
  postponed = false;
  refresh();
});
form.addEventListener("input", (event) => {
  if (event.target.name === "name") showCalls();
});
form.addEventListener("click", (event) => {
  const button = event.target.closest("[data-apply]");
  if (!button) return;
  const { algorithm, ...changed } = JSON.parse(button.dataset.apply);
  if (algorithm) form.algorithm.value = algorithm;
  overrides = { ...overrides, ...changed };
  refresh();
});
document.getElementById("reset").addEventListener("click", () => {
  overrides = {};
  refresh();
});

let reloading = null; // aborts the list with an earlier choice, which must not come after a newer one

async function reloadDatasets(chosen) {
  reloading?.abort();
  reloading = new AbortController();
  const { signal } = reloading;
  try {
    await showPart(document.getElementById("datasets"), `/new/datasets?chosen=${encodeURIComponent(chosen)}`, undefined, { signal });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    notice(error.message, true);
  }
}

const drop = document.getElementById("drop");
const upload = document.getElementById("upload");
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
});
document.getElementById("file").addEventListener("change", (event) => {
  if (event.target.files.length) send(event.target.files[0]);
});

/** Upload a file, with its progress, and choose the dataset that it became. */
function send(file, skipBad = false) {
  clearRefusals();
  document.getElementById("bad-rows").hidden = true;
  const sent = new FormData();
  sent.append("file", file);
  if (skipBad) sent.append("on_bad_rows", "skip");
  const request = new XMLHttpRequest();
  request.open("POST", "/api/datasets");
  const token = sessionStorage.getItem("csrf");
  if (token) request.setRequestHeader("X-CSRF-Token", token);
  upload.hidden = false;
  upload.value = 0;
  request.upload.addEventListener("progress", (event) => (upload.value = event.loaded / event.total));
  request.addEventListener("error", () => refuse("file", "The server does not answer."));
  request.addEventListener("load", async () => {
    const answer = JSON.parse(request.responseText);
    if (request.status !== 201) {
      refuse("file", answer.detail ?? "The file was refused.");
      showBadRows(file, answer);
      return;
    }
    await reloadDatasets(answer.id);
    refresh();
  });
  request.addEventListener("loadend", () => (upload.hidden = true));
  request.send(sent);
}

/** Show the lines that cannot be used, and offer to keep the others. */
function showBadRows(file, problem) {
  const lines = (problem.errors ?? []).filter((each) => each.line !== undefined).slice(0, 10);
  const shown = lines.map(({ line, message }) => {
    const item = document.createElement("li");
    item.textContent = `Line ${line}: ${message}`;
    return item;
  });
  document.getElementById("bad-lines").replaceChildren(...shown);
  const skip = document.getElementById("skip-bad");
  skip.hidden = !problem.good_rows;
  skip.textContent = `Keep the other ${(problem.good_rows ?? 0).toLocaleString()} rows`;
  skip.onclick = () => send(file, true);
  document.getElementById("bad-rows").hidden = shown.length === 0;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (event.submitter?.id !== "start") return; // Enter in a field takes its value, and starts nothing
  clearRefusals();
  const sent = body();
  if (!sent.model_id) refuse("model_id", "Choose a model.");
  if (!sent.dataset_id) refuse("dataset_id", "Choose a dataset, or drop a file.");
  if (!sent.model_id || !sent.dataset_id) return;
  const button = document.getElementById("start");
  button.disabled = true;
  try {
    const job = await call("POST", "/api/training/jobs", sent);
    location.assign(`/runs/${job.id}`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    showProblem(error.problem);
    notice("It was not started.", true);
    button.disabled = false;
  }
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("input:not([type=submit])")) {
    event.preventDefault();
    event.target.blur();
  }
});

await refresh();
form.dataset.ready = "yes";
