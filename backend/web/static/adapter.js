// An adapter's exports, looked at while one is under way.
import { refresher } from "./app.js";

const LOOK_AGAIN_MS = 1000;
const place = document.getElementById("exports");
const ENDED = ["succeeded", "failed", "cancelled"];
const isUsed = () =>
  document.hidden || place.querySelector("details[open]") !== null || place.contains(document.activeElement);
const look = refresher(place, place.dataset.address, isUsed);

setInterval(() => {
  const underWay = [...place.querySelectorAll("[data-state]")].some((each) => !ENDED.includes(each.dataset.state));
  if (underWay) look();
}, LOOK_AGAIN_MS);
document.addEventListener("acted", () => {
  if (place.contains(document.activeElement)) document.activeElement.blur();
  look();
});
