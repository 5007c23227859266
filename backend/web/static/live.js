// The home page, live: each part comes as HTML when it has changed.
import { call, follow, notice, released, show } from "./app.js";

const parts = [...document.querySelectorAll("[data-part]")];
const newest = new Map(); // what has come of a part and is not shown yet

/** Show what has come of a part. One with the keyboard's focus in it is left alone until the focus has moved on. */
async function settle(place) {
  await released(place);
  if (!newest.has(place) || place.contains(document.activeElement)) return;
  const html = newest.get(place);
  newest.delete(place);
  show(place, html);
}

for (const place of parts) place.addEventListener("focusout", () => setTimeout(() => settle(place)));
document.addEventListener("acted", (event) => event.target.blur()); // what it has done is to be seen
follow(
  () => "/home/stream",
  Object.fromEntries(
    parts.map((place) => [
      place.dataset.part,
      (html) => {
        newest.set(place, html);
        settle(place);
      },
    ]),
  ),
);

// The button comes and goes with its part, so the page listens.
document.addEventListener("click", async (event) => {
  const first = event.target.closest("#first-run");
  if (!first) return;
  first.disabled = true;
  try {
    const rows = await (await fetch(first.dataset.rows)).blob();
    const form = new FormData();
    form.append("file", rows, "pip_the_parrot.jsonl");
    form.append("name", "Pip the parrot");
    const dataset = await call("POST", "/api/datasets", form);
    const job = await call("POST", "/api/training/jobs", { ...JSON.parse(first.dataset.job), dataset_id: dataset.id });
    location.assign(`/runs/${job.id}`);
  } catch (error) {
    notice(error.message, true);
    first.disabled = false;
  }
});
