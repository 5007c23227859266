// Elements with text of anybody in them, and figures with units.

/** Make an element: `make("p", { class: "muted" }, "text", child)`. Attributes that are null or false are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Write bytes as the templates do. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const steps = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let [amount, step] = [bytes, 0];
  while (amount >= 1024 && step < steps.length - 1) [amount, step] = [amount / 1024, step + 1];
  return `${amount.toFixed(step === 0 || amount >= 100 ? 0 : 1)} ${steps[step]}`;
}

/** Write seconds as the templates do. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole >= 3600) return `${Math.floor(whole / 3600)} h ${Math.floor((whole / 60) % 60)} min`;
  if (whole >= 60) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return seconds > 0 && seconds < 10 ? `${seconds.toFixed(1)} s` : `${whole} s`;
}

/** A labelled bar, as the template's `bar`. */
export function gauge(label, words, fraction, isFull = false) {
  const bar = make("progress", { max: 1, "aria-label": label, class: isFull ? "full" : null });
  if (fraction !== null && fraction !== undefined) bar.value = Math.min(1, fraction);
  const line = make("div", { class: "gauge-words" }, make("span", {}, label), make("span", { class: "figure" }, words));
  return make("div", { class: "gauge" }, line, bar);
}
