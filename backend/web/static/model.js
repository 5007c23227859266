// A model into memory, with its download, its progress and its refusals.
import { notice } from "./app.js";
import { haveLoaded, wasGivenUp } from "./loading.js";

const button = document.getElementById("load");
const place = document.getElementById("loading");

async function load() {
  const offer = document.getElementById("not-loaded");
  offer.hidden = true;
  try {
    await haveLoaded(place, { model_id: button.dataset.model });
    location.reload();
  } catch (error) {
    if (!wasGivenUp(error)) notice(error.message, true);
    offer.hidden = false;
  }
}

button?.addEventListener("click", load);
