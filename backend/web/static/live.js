// The home page, live: each part comes as HTML when it has changed.
import { follow, show } from "./app.js";

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

const first = document.getElementById("first-run");
if (first) {
  const { call, notice, Refused } = await import("./app.js");
  first.addEventListener("click", async () => {
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
      notice(error instanceof Refused ? error.message : String(error), true);
      first.disabled = false;
    }
  });
}
