// A base model into memory, with its progress, and with its refusals: the numbers, and what to do.
import { call, Refused } from "./app.js";
import { duration, gauge, make, size } from "./dom.js";

const LOOK_AGAIN_MS = 400;
const USABLE = ["ready", "busy"];
const UNDER_WAY = ["queued", "downloading", "loading"];

class GivenUp extends Error {}

/** Whether an error only says that the person gave up. */
export const wasGivenUp = (error) => error instanceof GivenUp || error?.name === "AbortError";

/** Return the newest loaded model of an id that answers or soon will, or undefined. */
export async function inMemory(modelId) {
  const { models } = await call("GET", "/api/peft/loaded-models");
  const there = models.filter((model) => model.model_id === modelId);
  return there.findLast((model) => USABLE.includes(model.state)) ?? there.findLast((model) => UNDER_WAY.includes(model.state));
}

/**
 * Have a model in memory: find it there or load it, and show in `place` how far that is.
 *
 * A refusal stays there with the figures and what can be done, until the person has chosen.
 *
 * @param wanted A body of /api/peft/load-model.
 * @param signal Ends the waiting; the load goes on.
 * @returns The loaded model. Throws Refused, or what `wasGivenUp` knows.
 */
export async function haveLoaded(place, wanted, signal) {
  const there = await inMemory(wanted.model_id);
  let body = wanted;
  let model = there;
  for (;;) {
    try {
      model ??= await call("POST", "/api/peft/load-model", body);
      model = await watch(place, model, signal);
      place.replaceChildren();
      return model;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      body = { ...body, ...(await choice(place, wanted, error.problem)) };
      model = null;
    }
  }
}

async function watch(place, first, signal) {
  let model = first;
  let givenUp = false;
  const words = make("span", { class: "figure" });
  const bar = make("progress", { max: 1, "aria-label": `Loading ${model.model_id}` });
  const cancel = make("button", { type: "button", onclick: () => (givenUp = true) }, "Cancel");
  const card = make(
    "div",
    { class: "card" },
    make("div", { class: "row between" }, make("h2", {}, `Loading ${model.model_id}`), cancel),
    make("div", { class: "gauge-words" }, make("span", { role: "status" }, ""), words),
    bar,
  );
  while (!USABLE.includes(model.state)) {
    if (model.state === "failed" || model.state === "unloading") {
      const said = model.error ?? { message: "It was unloaded." };
      call("DELETE", `/api/peft/loaded-models/${model.id}`).catch(() => null); // it holds nothing any more
      throw new Refused({ title: "The model could not be loaded", detail: said.message, log_tail: said.log_tail });
    }
    if (givenUp) {
      await call("DELETE", `/api/peft/loaded-models/${model.id}`);
      place.replaceChildren();
      throw new GivenUp("The load was cancelled.");
    }
    if (signal?.aborted) throw new GivenUp("Nobody waits for the load any more.");
    if (!card.isConnected) place.replaceChildren(card);
    show(card, words, bar, model);
    await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN_MS));
    model = await call("GET", `/api/peft/loaded-models/${model.id}`);
  }
  return model;
}

function show(card, words, bar, model) {
  const { fraction, downloaded_bytes: got, total_bytes: all, bytes_per_s: speed, eta_s: left } = model.progress;
  const stage = { queued: "waits for its turn", downloading: "is downloaded", loading: "is read into memory" }[model.state];
  const status = card.querySelector("[role=status]");
  if (status.textContent !== stage) status.textContent = stage;
  const parts = [];
  if (model.state === "downloading" && got !== null) parts.push(`${size(got)} of ${size(all)}`);
  if (model.state === "downloading" && speed) parts.push(`${size(speed)}/s`);
  if (left !== null) parts.push(`${duration(left)} left`);
  words.textContent = parts.join(" · ");
  if (fraction === null) bar.removeAttribute("value");
  else bar.value = fraction;
}

/** Show a refusal, and return the fields with which the person wants to try again. */
async function choice(place, wanted, problem) {
  const { models } = problem.suggestions ? await call("GET", "/api/peft/loaded-models") : { models: [] };
  return new Promise((resolve, reject) => {
    const row = make("div", { class: "row" });
    const add = (words, fields, kind = "") =>
      row.append(make("button", { type: "button", class: kind, onclick: () => resolve(fields) }, words));
    const card = make("div", { class: "card need", role: "alert" }, make("h2", {}, problem.title ?? "Refused"));
    if (problem.suggestions) {
      const { estimate_bytes: needed, available_bytes: free } = problem;
      card.append(
        gauge("Needed", size(needed), 1, true),
        gauge("Can be had", size(free), needed ? free / needed : 0),
        make("p", {}, `${wanted.model_id} needs ${size(needed)}, and ${size(free)} can be had. What helps:`),
      );
      for (const item of problem.suggestions) {
        if (Object.keys(item.overrides).length === 0) card.append(make("p", {}, `${item.change}: ${size(item.estimate_bytes)}`));
        else add(`${item.change} (${size(item.estimate_bytes)})`, { overrides: { ...wanted.overrides, ...item.overrides } });
      }
      for (const model of models) {
        row.append(make("button", { type: "button", onclick: (event) => unload(event.target, model, resolve, card) }, `Unload ${model.model_id} (${size(model.memory.measured_bytes)})`));
      }
      add("Load all the same", { force: true }, "danger");
    } else {
      card.append(make("p", {}, problem.detail ?? problem.title));
      if (problem.log_tail?.length) card.append(make("details", {}, make("summary", {}, "The engine's last lines"), make("pre", { tabindex: 0 }, problem.log_tail.join("\n"))));
      add("Try again", {});
    }
    const leave = make("button", { type: "button", class: "plain", onclick: giveUp }, "Leave it");
    row.append(leave);
    card.append(row);
    place.replaceChildren(card);
    leave.focus({ focusVisible: true });
    function giveUp() {
      place.replaceChildren();
      reject(new GivenUp("Not loaded."));
    }
  });
}

async function unload(button, model, resolve, card) {
  button.disabled = true;
  try {
    await call("DELETE", `/api/peft/loaded-models/${model.id}`);
    resolve({});
  } catch (error) {
    card.append(make("p", { class: "refusal" }, error.message));
  }
}
