// An adapter's exports, looked at while one is under way.
import { showPart } from "./app.js";

const LOOK_AGAIN_MS = 1000;
const place = document.getElementById("exports");
const ENDED = ["succeeded", "failed", "cancelled"];

async function look() {
  const open = [...place.querySelectorAll("details")].some((details) => details.open);
  if (document.hidden || open || place.contains(document.activeElement)) return;
  await showPart(place, place.dataset.address).catch(() => null); // the next look may find the server again
}

setInterval(() => {
  const underWay = [...place.querySelectorAll("[data-state]")].some((each) => !ENDED.includes(each.dataset.state));
  if (underWay) look();
}, LOOK_AGAIN_MS);
document.addEventListener("acted", () => {
  if (place.contains(document.activeElement)) document.activeElement.blur();
  look();
});
