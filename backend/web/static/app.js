// What every page does: times as the reader has them, buttons that call the API, copying, keys, the theme.

const LOOK_AGAIN_MS = 1000; // for a server that is away
const csrf = document.querySelector('meta[name="csrf"]')?.content;
if (csrf) sessionStorage.setItem("csrf", csrf);

/** Show a line at the foot of the page; errors stay until they are closed. */
export function notice(text, isError = false) {
  const place = document.getElementById("notices");
  const line = document.createElement("div");
  line.className = isError ? "notice error" : "notice";
  const words = document.createElement("span");
  words.textContent = text;
  const close = document.createElement("button");
  close.type = "button";
  close.className = "plain";
  close.textContent = "Close";
  close.addEventListener("click", () => line.remove());
  line.append(words, close);
  place.append(line);
  if (!isError) setTimeout(() => line.remove(), 6000);
}

/** What the API refused: its problem document. */
export class Refused extends Error {
  constructor(problem) {
    // /v1 answers in OpenAI's envelope.
    super(problem.detail || problem.error?.message || problem.title || `status ${problem.status}`);
    this.problem = problem;
  }
}

/** Ask the API. Returns the answer as fetch gives it; throws Refused. */
export async function ask(method, address, body, options = {}) {
  const headers = { ...options.headers };
  if (body !== undefined && !(body instanceof FormData)) headers["Content-Type"] = "application/json";
  if (csrf) headers["X-CSRF-Token"] = csrf;
  const sent = body === undefined || body instanceof FormData ? body : JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(address, { ...options, method, headers, body: sent });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ title: "The server does not answer", detail: "The server does not answer.", status: 0 });
  }
  if (!answer.ok) throw new Refused(await problemOf(answer));
  return answer;
}

/** Call the API. Returns the answer's JSON, or null where it has none; throws Refused. */
export async function call(method, address, body, options = {}) {
  const answer = await ask(method, address, body, options);
  const text = await answer.text(); // a 204 says application/json, too
  return text && answer.headers.get("content-type")?.startsWith("application/json") ? JSON.parse(text) : null;
}

/** Read the problem document of a refusal. */
export async function problemOf(answer) {
  try {
    return await answer.json();
  } catch {
    return { title: answer.statusText, detail: `The server answered ${answer.status}.`, status: answer.status };
  }
}

/** Ask before something is lost for good. */
export function confirmed(text, yes = "Go on") {
  const dialog = document.getElementById("confirm");
  document.getElementById("confirm-text").textContent = text;
  document.getElementById("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Show HTML that this server has rendered, with everything in it escaped. */
export function show(place, html) {
  place.replaceChildren(...new DOMParser().parseFromString(html, "text/html").body.childNodes);
  showTimes(place);
  htmx.process(place);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// What the pointer is held down on: a click is lost if its element is replaced before the button is up.
let pressed = null;
addEventListener("pointerdown", (event) => (pressed = event.target), true);
for (const kind of ["pointerup", "pointercancel"]) addEventListener(kind, () => setTimeout(() => (pressed = null)), true);

/** Wait until nobody holds a button of a part down. */
export async function released(place) {
  while (pressed && place.contains(pressed)) await pause(50);
}

/** Fetch a part of a page and show it, unless `unless` says that it is in use; throws Refused. */
export async function showPart(place, address, body, { unless, ...options } = {}) {
  const method = body === undefined ? "GET" : "POST";
  const answer = await ask(method, address, body, { headers: { "HX-Request": "true" }, ...options });
  const text = await answer.text();
  await released(place);
  options.signal?.throwIfAborted();
  if (!unless?.()) show(place, text);
  return answer;
}

/**
 * Return a function that shows a part of a page as it is now. One request is under way at a time, so that what is
 * older never replaces what is newer. A server that is away is asked again until it is there.
 *
 * @param unless Says whether the part is in use: it is left alone then, and the function called again later.
 */
export function refresher(place, address, unless = () => false) {
  let wanted = false;
  let underWay = false;
  let isGone = false;
  return async () => {
    wanted = true;
    if (underWay || isGone) return;
    underWay = true;
    try {
      while (wanted && !unless()) {
        wanted = false;
        await showPart(place, address, undefined, { unless }).catch(refused);
      }
    } finally {
      underWay = false;
    }
  };

  async function refused(error) {
    if (!(error instanceof Refused)) throw error;
    if (error.problem.status === 0 || error.problem.status >= 500) {
      await pause(LOOK_AGAIN_MS);
      wanted = true;
    } else {
      isGone = true;
      notice(error.message, true);
    }
  }
}

const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const absolute = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

function ago(moment) {
  const seconds = (moment - Date.now()) / 1000;
  const size = Math.abs(seconds);
  if (size < 60) return relative.format(Math.round(seconds), "second");
  if (size < 3600) return relative.format(Math.round(seconds / 60), "minute");
  if (size < 86400) return relative.format(Math.round(seconds / 3600), "hour");
  if (size < 86400 * 14) return relative.format(Math.round(seconds / 86400), "day");
  return absolute.format(moment);
}

/** Write the times below an element in the reader's zone and language. */
export function showTimes(root = document) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    time.textContent = ago(moment);
    time.title = absolute.format(moment);
  }
}
showTimes();
setInterval(showTimes, 20000);
document.addEventListener("htmx:afterSwap", (event) => showTimes(event.target));

/** Go on after an action: reload the page, go somewhere, or stay. */
function goOn(then, answer) {
  if (then === "reload") location.reload();
  else if (then.startsWith("/")) location.assign(then.replace("{id}", answer?.id ?? ""));
}

async function act(button) {
  const { method, address, confirm, then = "stay", body, first = "[]" } = button.dataset;
  if (confirm && !(await confirmed(confirm, button.textContent.trim()))) return;
  button.disabled = true;
  try {
    for (const dependent of JSON.parse(first)) await call("DELETE", dependent);
    const answer = await call(method, address, body === undefined ? undefined : JSON.parse(body));
    button.dispatchEvent(new CustomEvent("acted", { bubbles: true, detail: answer }));
    if (then === "stay") notice(`${button.textContent.trim()}: done.`);
    goOn(then, answer);
  } catch (error) {
    notice(error.message, true);
  } finally {
    button.disabled = false;
  }
}

async function copy(button) {
  const source = button.dataset.copyFrom ? document.getElementById(button.dataset.copyFrom).textContent : button.dataset.copy;
  try {
    await navigator.clipboard.writeText(source);
  } catch {
    // A page that is not served from loopback or under TLS has no clipboard.
    const field = document.createElement("textarea");
    field.value = source;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const words = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = words), 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.address) act(button);
  else if (button.dataset.copy !== undefined || button.dataset.copyFrom) copy(button);
  else if (button.id === "keys-button") document.getElementById("keys").showModal();
  else if (button.id === "theme") nextTheme();
});

const THEMES = ["", "light", "dark"];
function showTheme() {
  const theme = document.documentElement.dataset.theme || "";
  document.getElementById("theme").textContent = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" }[theme];
}
function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % THEMES.length];
  if (theme) {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("theme", theme);
  } else {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("theme");
  }
  showTheme();
  document.dispatchEvent(new Event("themed"));
}
showTheme();

// On a narrow screen the menu is wider than the screen.
const menu = document.querySelector(".top nav");
const here = menu?.querySelector("[aria-current]");
if (here && menu.scrollWidth > menu.clientWidth) menu.scrollLeft = here.offsetLeft - menu.offsetLeft - 16;

let afterG = false;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  if (afterG) {
    afterG = false;
    const link = document.querySelector(`nav a[data-key="${CSS.escape(event.key)}"]`);
    if (link) link.click();
  } else if (event.key === "g") {
    afterG = true;
    setTimeout(() => (afterG = false), 1500);
  } else if (event.key === "?") {
    document.getElementById("keys").showModal();
  } else if (event.key === "/") {
    const field = document.querySelector("input[type=search]");
    if (field) {
      event.preventDefault();
      field.focus();
    }
  }
});

/** Say in the head of the page whether the server answers. */
export function connection(isThere) {
  const place = document.getElementById("connection");
  place.textContent = isThere ? "" : "The server does not answer; trying again";
  place.classList.toggle("lost", !isThere);
}

/** Return the problem document with which an address is refused, or null. */
async function whyNoStream(address) {
  const stop = new AbortController();
  try {
    await ask("GET", address, undefined, { cache: "no-store", signal: stop.signal });
    return null;
  } catch (error) {
    if (error instanceof Refused) return error.problem;
    throw error;
  } finally {
    stop.abort(); // it may be a stream
  }
}

/**
 * Follow a stream of events while the page is seen. A tab in the background gives its connection back: a browser
 * has six for a server. A stream that breaks off is opened again until it is there; one that the server refuses is not.
 *
 * @param address A function that returns the stream's address; it is asked at each opening.
 * @param handlers Kind of event to a function that takes the event's data as text, and its id. A handler that
 *   returns "end" closes the stream for good.
 */
export function follow(address, handlers) {
  let source = null;
  let timer = null;
  let ended = false;
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };
  const open = () => {
    if (ended || source || document.hidden) return;
    source = new EventSource(address());
    source.addEventListener("open", () => connection(true));
    source.addEventListener("error", () => {
      if (ended) return;
      const isRefused = source.readyState === EventSource.CLOSED;
      close();
      timer = setTimeout(async () => {
        // The browser's own retry gives up at the first refusal, and says nothing of why.
        const refusal = await whyNoStream(isRefused ? address() : "/health");
        const isFinal = refusal !== null && refusal.status >= 400 && refusal.status < 500;
        connection(refusal === null || isFinal);
        if (isFinal) {
          ended = true;
          if (refusal.status === 401) location.reload(); // the login has ended
          else notice(refusal.detail ?? refusal.title, true);
        }
        open();
      }, LOOK_AGAIN_MS);
    });
    for (const [kind, handle] of Object.entries(handlers)) {
      source.addEventListener(kind, (event) => {
        if (handle(event.data, event.lastEventId) === "end") {
          ended = true;
          close();
        }
      });
    }
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}
