// Forms that send a file, or their fields as JSON, to the API: progress, cancel, and refusals in the form.
import { call, notice, Refused } from "./app.js";
import { make, size } from "./dom.js";

const MOST_LINES = 10;

/** Say in a form what was refused; of a file, line by line. */
function refuse(form, problem) {
  const place = form.querySelector(".refused");
  const text = (problem.errors ?? []).filter((each) => each.line === undefined).map(({ location = [], message }) => `${location.at(-1)}: ${message}`);
  place.replaceChildren(make("p", { class: "refusal", role: "alert" }, [problem.detail ?? problem.title, ...text].join(" ")));
  const lines = (problem.errors ?? []).filter((each) => each.line !== undefined);
  if (lines.length) place.append(make("ul", { class: "small" }, ...lines.slice(0, MOST_LINES).map(({ line, message }) => make("li", {}, `Line ${line}: ${message}`))));
  if (lines.length > MOST_LINES) place.append(make("p", { class: "muted small" }, `and ${lines.length - MOST_LINES} more`));
  if (problem.good_rows > 0 && form.dataset.upload) {
    const again = make("button", { type: "button", class: "again" }, `Leave those rows out and keep ${problem.good_rows}`);
    again.addEventListener("click", () => {
      form.elements.on_bad_rows.checked = true;
      form.requestSubmit();
    });
    place.append(again);
  }
}

function goOn(form, answer) {
  location.assign(form.dataset.then.replace("{id}", answer.id));
}

/** Send a form with its file. fetch says nothing of an upload's progress. */
function upload(form) {
  const request = new XMLHttpRequest();
  const place = form.querySelector(".progress");
  const bar = make("progress", { max: 1, value: 0, "aria-label": "Upload" });
  const words = make("span", { class: "muted small", role: "status" }, "begins");
  const cancel = make("button", { type: "button", onclick: () => request.abort() }, "Cancel");
  place.replaceChildren(make("div", { class: "row between" }, words, cancel), bar);
  request.open("POST", form.dataset.upload);
  const token = sessionStorage.getItem("csrf");
  if (token) request.setRequestHeader("X-CSRF-Token", token);
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    bar.value = loaded / total;
    words.textContent = loaded < total ? `${size(loaded)} of ${size(total)}` : "Its rows are read";
  });
  request.addEventListener("error", () => refuse(form, { detail: "The server does not answer." }));
  request.addEventListener("abort", () => notice("The upload was cancelled; nothing of it is kept."));
  request.addEventListener("load", () => {
    const answer = JSON.parse(request.responseText);
    if (request.status === 201) goOn(form, answer);
    else refuse(form, answer);
  });
  request.addEventListener("loadend", () => place.replaceChildren());
  const sent = new FormData();
  for (const [name, value] of new FormData(form)) if (value !== "") sent.append(name, value);
  request.send(sent);
}

/** Send the fields of a form as JSON. */
async function send(form) {
  const body = {};
  for (const [name, value] of new FormData(form)) if (value !== "") body[name] = value;
  for (const box of form.querySelectorAll("input[type=checkbox]:not([value])")) body[box.name] = box.checked;
  const button = form.querySelector("button:not([type=button])");
  button.disabled = true;
  form.dispatchEvent(new CustomEvent("sending", { bubbles: true }));
  try {
    goOn(form, await call("POST", form.dataset.send, body));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    refuse(form, error.problem);
  } finally {
    button.disabled = false;
    form.dispatchEvent(new CustomEvent("sent", { bubbles: true }));
  }
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.dataset.upload && !form.dataset.send) return;
  event.preventDefault();
  form.querySelector(".refused").replaceChildren();
  if (form.dataset.upload) upload(form);
  else send(form);
});

// A file that is chosen or dropped is sent at once.
for (const form of document.querySelectorAll("form[data-upload]")) {
  const [drop, field] = [form.querySelector(".drop"), form.querySelector("input[type=file]")];
  field.addEventListener("change", () => field.files.length && form.requestSubmit());
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    field.files = event.dataTransfer.files;
    form.requestSubmit();
  });
}
