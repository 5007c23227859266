// Imports under way, looked at while there is one.
import { refresher } from "./app.js";

const LOOK_AGAIN_MS = 1000;
const place = document.getElementById("imports");
let sending = false;
const refresh = refresher(place, "/datasets/imports", () => document.hidden || place.contains(document.activeElement));

async function look() {
  const before = place.childElementCount;
  if (!(sending || before)) return;
  await refresh();
  if (before && !place.childElementCount) htmx.ajax("GET", location.href, "#datasets");
}

document.addEventListener("sending", () => (sending = true));
document.addEventListener("sent", () => (sending = false));
setInterval(look, LOOK_AGAIN_MS);
