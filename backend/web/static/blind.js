// The count of a blind comparison: who was best how often, kept in this browser.
import { make } from "./dom.js";

export class Tally {
  /**
   * @param place Where it is shown.
   * @param base The base model; each has a count of its own.
   */
  constructor(place, base) {
    this.place = place;
    this.key = `blind:${base}`;
    this.counts = JSON.parse(localStorage.getItem(this.key) ?? "{}");
    this.show();
  }

  /** Count a judgement: `best` of `those`, or nobody. */
  add(those, best) {
    for (const one of those) {
      const count = (this.counts[one.key] ??= { name: one.name, best: 0, of: 0 });
      count.of += 1;
      if (one.key === best?.key) count.best += 1;
    }
    localStorage.setItem(this.key, JSON.stringify(this.counts));
    this.show();
  }

  clear() {
    this.counts = {};
    localStorage.removeItem(this.key);
    this.show();
  }

  show() {
    const rows = Object.values(this.counts).sort((one, other) => other.best / other.of - one.best / one.of);
    if (rows.length === 0) return this.place.replaceChildren();
    const head = make("tr", {}, make("th", { scope: "col" }, "Best"), make("th", { scope: "col", class: "figure" }, "Times"), make("th", { scope: "col", class: "figure" }, "Of"));
    const body = rows.map(({ name, best, of }) => make("tr", {}, make("td", {}, name), make("td", { class: "figure" }, String(best)), make("td", { class: "figure" }, String(of))));
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
    const again = make("button", { type: "button", class: "plain", "data-begin": "" }, "Begin the count anew");
    const open = this.place.querySelector("details")?.open ?? false;
    this.place.replaceChildren(make("details", { open }, make("summary", {}, "The blind count"), table, again));
  }
}
