// The home page, live: each part comes as HTML when it has changed.
import { call, follow, notice, show } from "./app.js";

const parts = [...document.querySelectorAll("[data-part]")];
follow(
  () => "/home/stream",
  Object.fromEntries(
    parts.map((place) => [
      place.dataset.part,
      (html) => {
        // A part with the keyboard's focus in it is left alone until the focus has moved on.
        if (place.contains(document.activeElement)) return;
        show(place, html);
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
