// Side by side: the same question to a base and what was made of it, streamed, with one seed; blind if wanted.
import { call, confirmed, notice, Refused } from "./app.js";
import { Tally } from "./blind.js";
import { duration, make } from "./dom.js";
import { haveLoaded, inMemory, wasGivenUp } from "./loading.js";
import { Questions } from "./questions.js";
import { postStream } from "./stream.js";

const LETTERS = ["A", "B", "C", "D"];
const page = document.getElementById("playground");
const at = (id) => document.getElementById(id);

/** One conversation: who takes part in which order, and what each has said. */
class Conversation {
  constructor(those, isBlind) {
    this.isBlind = isBlind;
    this.those = isBlind ? shuffled(those) : those;
    this.said = new Map(those.map((one) => [one.key, []]));
  }

  fits(those, isBlind) {
    const keys = (list) => list.map((one) => one.key).sort().join();
    return isBlind === this.isBlind && keys(those) === keys(this.those);
  }
}

function shuffled(list) {
  const mixed = [...list];
  for (let last = mixed.length - 1; last > 0; last--) {
    const other = crypto.getRandomValues(new Uint32Array(1))[0] % (last + 1);
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}

if (page) {
  const base = page.dataset.base;
  const most = Number(page.dataset.most);
  const boxes = [...document.querySelectorAll("input[name=answers]")];
  const tally = new Tally(at("count"), base);
  const questions = new Questions();
  let conversation = null;
  let running = null; // an AbortController while answers come
  let voting = null; // what a key does to the newest answers while they wait for a judgement

  const chosen = () =>
    boxes
      .filter((box) => box.checked)
      .map(({ value, dataset }) => ({ key: value, ...dataset, revision: dataset.revision || null }));

  /** Keep what is chosen in the address, so that it can be sent to somebody and comes back with the page. */
  function rememberInAddress() {
    const asked = new URLSearchParams({ model: base });
    for (const one of chosen()) if (one.kind !== "base") asked.append(one.kind, one.key);
    if (!boxes.find((box) => box.dataset.kind === "base").checked) asked.set("without", "base");
    if (at("dataset").value) {
      asked.set("dataset", at("dataset").value);
      asked.set("row", at("row").value - 1);
    }
    if (at("blind").checked) asked.set("blind", "1");
    history.replaceState(null, "", `?${asked}`);
  }

  function limitChoices() {
    const others = boxes.filter((box) => box.dataset.kind !== "base");
    const full = others.filter((box) => box.checked).length >= most;
    for (const box of others) box.disabled = full && !box.checked;
  }

  function sampling() {
    const figure = (id) => (at(id).value === "" ? null : Number(at(id).value));
    return {
      max_new_tokens: figure("tokens") ?? 256,
      temperature: figure("temperature") ?? 0.7,
      top_p: figure("top-p") ?? 1,
      seed: figure("seed"),
      stop: at("stops").value.split("\n").filter((line) => line !== ""),
    };
  }

  // A turn

  function turnCard(turns, reference, those) {
    const cards = those.map((one, index) => answerCard(one, index));
    const grid = make("div", { class: "answers" }, ...cards.map((card) => card.place));
    const place = make("article", { class: "turn" });
    for (const { role, content } of turns) {
      place.append(make("div", { class: `said said-${role}` }, make("span", { class: "sr" }, `${role}: `), content));
    }
    place.append(grid);
    if (reference) place.append(make("details", { class: "reference" }, make("summary", {}, "What the dataset answers"), make("p", { class: "text" }, reference)));
    at("hint")?.remove();
    place.classList.toggle("first", [...conversation.said.values()].every((said) => said.length === 0));
    at("turns").append(place);
    place.scrollIntoView({ block: "nearest" });
    return { place, cards };
  }

  function answerCard(one, index) {
    const title = make("h2", {}, conversation.isBlind ? LETTERS[index] : one.name);
    const text = make("div", { class: "text" });
    const foot = make("div", { class: "row between muted small foot" }, make("span", {}, "waits"));
    const stop = make("button", { type: "button", class: "plain" }, "Stop");
    const place = make("div", { class: "card answer", role: "group", "aria-label": title.textContent, "aria-busy": "true" });
    place.append(make("div", { class: "row between" }, title, stop), text, foot);
    return { one, index, place, title, text, foot, stop, words: "", done: null };
  }

  function finish(card, words, asked) {
    card.stop.remove();
    card.place.setAttribute("aria-busy", "false");
    card.foot.firstChild.textContent = conversation.isBlind ? (card.done ? "" : words) : words;
    card.told = words;
    card.asked = asked;
    if (!conversation.isBlind) offerRequest(card);
  }

  function offerRequest(card) {
    const body = { model: card.one.served, ...card.asked };
    const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
    const key = document.querySelector("meta[name=csrf]") ? ' -H "Authorization: Bearer $PEFT_STUDIO_API_KEY"' : "";
    const line = `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d '${quoted}'`;
    card.foot.append(make("button", { type: "button", class: "plain copy", "data-copy": line, title: "The same request for the shell" }, "Copy as curl"));
  }

  async function answer(card, loaded, messages, signal) {
    const own = new AbortController();
    const stop = () => own.abort();
    signal.addEventListener("abort", stop);
    card.stop.addEventListener("click", stop);
    const settings = sampling();
    const asked = { messages, max_tokens: settings.max_new_tokens, temperature: settings.temperature, top_p: settings.top_p };
    if (settings.seed !== null) asked.seed = settings.seed;
    if (settings.stop.length) asked.stop = settings.stop;
    let words = "";
    try {
      if (signal.aborted) throw new DOMException("stopped", "AbortError");
      await handedOut(card, own.signal);
      const body = { ...settings, messages, adapter_id: card.one.adapter || null, stream: true };
      const address = `/api/peft/loaded-models/${loaded.id}/generate`;
      await postStream(address, body, (kind, data) => take(card, kind, data), own.signal);
      const { completion_tokens: tokens, elapsed_s: seconds, finish_reason: why } = card.done;
      words = `${tokens} tokens · ${(tokens / seconds).toFixed(1)} tokens/s · ${duration(seconds)}`;
      if (why === "length") words += ` · cut off at ${settings.max_new_tokens} tokens`;
    } catch (error) {
      if (error.name === "AbortError") words = "stopped";
      else {
        words = "no answer";
        card.text.append(make("p", { class: "refusal", role: "alert" }, error.message));
      }
    } finally {
      signal.removeEventListener("abort", stop);
      finish(card, words, asked);
    }
  }

  function take(card, kind, data) {
    if (kind === "token") {
      card.words += data.text;
      card.text.append(data.text);
      card.foot.firstChild.textContent = "answers";
    } else if (kind === "done") {
      card.done = data;
      if (data.text !== card.words) card.text.textContent = card.words = data.text;
    } else if (kind === "error") throw new Refused(data);
  }

  /** A checkpoint becomes an adapter when it is first asked by its name. */
  async function handedOut(card, signal) {
    if (card.one.there === "1") return;
    card.foot.firstChild.textContent = "the checkpoint becomes an adapter";
    const body = { model: card.one.served, messages: [{ role: "user", content: "." }], max_tokens: 1 };
    await call("POST", "/v1/chat/completions", body, { signal });
    boxes.find((box) => box.value === card.one.key).dataset.there = card.one.there = "1";
  }

  /** Put the turns of a question to everybody, once the base is loaded. Returns whether all have answered. */
  async function put(turns, reference = "") {
    const those = chosen();
    if (those.length === 0) {
      notice("Choose who is to answer.", true);
      return false;
    }
    if (!conversation?.fits(those, at("blind").checked)) conversation = new Conversation(those, at("blind").checked);
    const first = those.find((one) => one.kind !== "base");
    busy(true);
    try {
      const wanted = { model_id: base, algorithm: first?.algorithm || "lora", revision: those.find((one) => one.revision)?.revision ?? null, overrides: {} };
      const loaded = await haveLoaded(at("loading"), wanted, running.signal);
      if (running.signal.aborted) return false;
      at("status").textContent = "Answers come …";
      if (!at("dataset").value && at("question").value.trim() === turns.at(-1).content) at("question").value = "";
      const { place, cards } = turnCard(turns, reference, conversation.those);
      await Promise.all(cards.map((card) => ask(card, loaded, turns)));
      remember(cards, turns);
      if (conversation.isBlind) judge(place, cards);
      return cards.every((card) => card.done);
    } catch (error) {
      if (!wasGivenUp(error)) notice(error.message, true);
      return false;
    } finally {
      busy(false);
    }
  }

  function ask(card, loaded, turns) {
    const system = at("system").value.trim();
    const hasOwn = turns.some((turn) => turn.role === "system");
    const before = system && !hasOwn ? [{ role: "system", content: system }] : [];
    return answer(card, loaded, [...before, ...conversation.said.get(card.one.key), ...turns], running.signal);
  }

  function remember(cards, turns) {
    for (const { one, words } of cards) {
      conversation.said.get(one.key).push(...turns.filter((turn) => turn.role !== "system"), { role: "assistant", content: words });
    }
  }

  function begin() {
    voting = conversation = null;
    at("turns").replaceChildren();
    busy(false);
  }

  function busy(isBusy) {
    running = isBusy ? new AbortController() : null;
    at("send").disabled = isBusy;
    at("stop").hidden = !isBusy;
    at("status").textContent = isBusy ? "The model is made ready …" : voting ? "Which is best? A key: its letter, or 0" : "Ctrl+Enter asks · Esc stops";
  }

  // Blind

  function judge(place, cards) {
    const buttons = cards.map((card) => button(`${LETTERS[card.index]} is best`, LETTERS[card.index], () => vote(card)));
    const row = make("div", { class: "row votes", role: "group", "aria-label": "Which answer is best?" }, ...buttons, button("All alike", "0", () => vote(null)));
    place.append(row);
    const keys = new Map([...cards.map((card) => [LETTERS[card.index].toLowerCase(), card]), ["0", null]]);
    let decided;
    voting = { keys, vote, judged: new Promise((resolve) => (decided = resolve)) };

    function button(words, key, act) {
      return make("button", { type: "button", onclick: act }, `${words} `, make("kbd", {}, key));
    }

    function vote(best) {
      voting = null;
      row.remove();
      tally.add(cards.map((card) => card.one), best?.one ?? null);
      for (const card of cards) {
        card.title.textContent = `${LETTERS[card.index]}: ${card.one.name}`;
        card.place.classList.toggle("best", card === best);
        card.foot.firstChild.textContent = card.told;
        offerRequest(card);
      }
      conversation = null; // the next question has another order
      busy(false);
      decided();
    }
  }
  // Questions of a dataset

  async function showRow() {
    const there = Boolean(at("dataset").value);
    at("row-bar").hidden = at("row-field").hidden = !there;
    if (!there) return;
    const source = at("dataset").value;
    const option = at("dataset").selectedOptions[0];
    const isHeldOut = option.dataset.heldOut !== undefined;
    try {
      option.dataset.rows ??= (await questions.get(source, 0)).of; // how many a run holds out, it says itself
      const rows = Number(option.dataset.rows);
      const row = Math.min(Math.max(1, Math.round(at("row").value) || 1), rows);
      at("row").max = rows;
      at("row").value = row;
      at("row-back").disabled = row <= 1;
      at("row-next").disabled = row >= rows;
      const { turns, place } = await questions.get(source, row - 1);
      if (at("dataset").value !== source || Number(at("row").value) !== row) return; // another was chosen meanwhile
      at("row-words").textContent = isHeldOut ? `Held-out row ${row} of ${rows}: row ${place + 1} of the dataset` : `Row ${row} of ${rows}`;
      at("question").value = turns.at(-1)?.content ?? "";
    } catch (error) {
      notice(error.message, true);
    }
  }

  async function step(by) {
    at("row").value = Number(at("row").value) + by;
    rememberInAddress();
    await showRow();
  }

  /** Put the question as it stands; one of a row that was not changed goes with the turns before it. */
  async function send() {
    const text = at("question").value.trim();
    if (voting) notice("Say which answer is best first.");
    if (!text || running || voting) return false;
    if (!at("dataset").value) return put([{ role: "user", content: text }]);
    const row = await questions.get(at("dataset").value, at("row").value - 1);
    conversation = null; // each row begins anew
    const same = row.turns.at(-1)?.content.trim() === text;
    return put(same ? row.turns : [{ role: "user", content: text }], row.reference);
  }

  /** Ask row after row until the last, a stop or a refusal. Blind, each waits for its judgement. */
  async function askAll() {
    while (await send()) {
      await voting?.judged;
      if (at("row-next").disabled) return;
      await step(1);
    }
  }

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("row-all").addEventListener("click", askAll);
  at("row-back").addEventListener("click", () => step(-1));
  at("row-next").addEventListener("click", () => step(1));
  at("stop").addEventListener("click", () => running?.abort());
  at("fresh").addEventListener("click", () => {
    running?.abort();
    begin();
    at("question").focus();
  });
  at("model").addEventListener("change", () => location.assign(`/playground?${new URLSearchParams({ model: at("model").value })}`));
  at("setup").addEventListener("change", (event) => {
    limitChoices();
    rememberInAddress();
    if (event.target === at("dataset")) at("row").value = 1;
    if (event.target === at("dataset") || event.target === at("row")) showRow();
  });
  at("setup").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === at("question")) send();
    else if (event.key === "Escape" && running) running.abort();
    else if (voting && !event.target.closest("input, textarea, select") && voting.keys.has(event.key.toLowerCase())) {
      voting.vote(voting.keys.get(event.key.toLowerCase()));
    }
  });
  at("count").addEventListener("click", async (event) => {
    if (event.target.dataset.begin !== undefined && (await confirmed("The count so far is lost.", "Begin anew"))) tally.clear();
  });

  const address = new URLSearchParams(location.search);
  at("blind").checked = address.get("blind") === "1";
  if (address.get("without") === "base") boxes.find((box) => box.dataset.kind === "base").checked = false;
  limitChoices();
  showRow();
  inMemory(base).then(
    (there) => {
      if (!there) at("status").textContent = `${base} is loaded at the first question · Ctrl+Enter asks`;
    },
    (error) => notice(error.message, true),
  );
}
