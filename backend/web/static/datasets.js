// Imports under way, looked at while there is one.
import { showPart } from "./app.js";

const LOOK_AGAIN_MS = 1000;
const place = document.getElementById("imports");
let sending = false;

async function look() {
  const before = place.childElementCount;
  if (document.hidden || place.contains(document.activeElement) || !(sending || before)) return;
  await showPart(place, "/datasets/imports").catch(() => null); // the next look may find the server again
  if (before && !place.childElementCount) htmx.ajax("GET", location.href, "#datasets");
}

document.addEventListener("sending", () => (sending = true));
document.addEventListener("sent", () => (sending = false));
setInterval(look, LOOK_AGAIN_MS);
