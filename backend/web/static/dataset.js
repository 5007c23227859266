// What a model would learn of a dataset: the part that a new fine-tune shows of it, too.
import { ask, Refused, show } from "./app.js";
import { make } from "./dom.js";

const form = document.getElementById("analysis-form");
const status = document.getElementById("analysis-status");
const place = document.getElementById("analysis");
const LOOK_AGAIN_MS = 700;

function asked() {
  const body = { model_id: form.elements.model_id.value };
  const [length, row] = [form.elements.max_seq_length.value, form.elements.example_row.value];
  if (length !== "") body.max_seq_length = Number(length);
  if (row !== "") body.example_row = Number(row) - 1;
  return body;
}

async function look() {
  const body = asked();
  for (;;) {
    const answer = await ask("POST", `/new/analysis?dataset_id=${form.dataset.dataset}`, body);
    if (answer.status !== 202) return show(place, await answer.text());
    const { fraction } = await answer.json();
    status.textContent = `Rows are tokenized: ${Math.round(fraction * 100)} %`;
    await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN_MS));
  }
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  status.textContent = "Rows are tokenized";
  try {
    await look();
    status.textContent = "";
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    status.textContent = "";
    place.replaceChildren(make("p", { class: "refusal", role: "alert" }, error.message));
  } finally {
    button.disabled = false;
  }
});
