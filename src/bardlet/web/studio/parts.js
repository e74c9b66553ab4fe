// Parts that several tabs use.

import { make } from "../views.js";

export { make, percent, plain, visible } from "../views.js";

/** A labelled control. text: a sentence under it. */
export function field(label, control, text = "") {
  control.id ||= `field-${field.count = (field.count ?? 0) + 1}`;
  const note = text && make("small", { id: `${control.id}-hint`, className: "hint", textContent: text });
  if (text) control.setAttribute("aria-describedby", note.id);
  return make("div", { className: "field" }, make("label", { htmlFor: control.id, textContent: label }), control, note || null);
}

/** An explanation. */
export const hint = (textContent) => make("p", { className: "hint", textContent });

export const WRITING = "A token is the piece of text that a model reads and writes at a time: a character, or a part of a word. "
  + "Temperature: 0 always takes the likeliest token, 1 takes each as often as the model expects it, more is bolder. The same seed "
  + "gives the same text.";

/** A button. */
export const button = (textContent, click, options = {}) => make("button", { type: "button", textContent,
  on: { click }, ...options });

/** A menu of [value, text] pairs. */
export const menu = (options, value, change = () => {}) => {
  const select = make("select", { on: { change } });
  fill(select, options, value);
  return select;
};

/** Put other options into a menu, and keep its choice if it is still there. */
export function fill(select, options, value = select.value) {
  select.replaceChildren(...options.map(([value, textContent]) => make("option", { value, textContent })));
  if (options.some(([each]) => each === value)) select.value = value;
}

/** A command line with a button that copies it. */
export const command = (text, label = "the command line") => make("div", { className: "command" }, make("code", { textContent: text }),
  copier("Copy", () => text, { attributes: { "aria-label": `Copy ${label}` } }));

/** A button that copies what `text()` returns, and says so. */
export function copier(name, text, options = {}) {
  const said = make("span", { className: "hint", attributes: { role: "status" } });
  return make("span", {}, button(name, async () => {
    said.textContent = await copy(text()) ? "Copied." : "Select the text to copy it.";
    setTimeout(() => { said.textContent = ""; }, 2000);
  }, options), said);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Seconds in words: 45 s, 3 min, 1 h 20 min. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "unknown";
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const bytes = (n) => (n < 1000 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : n < 1e9
  ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);

export const count = (n) => (n === null || n === undefined ? "" : n.toLocaleString("en"));

/** A number with as many digits as a loss needs. */
export const loss = (x) => (x === null || x === undefined ? "" : x.toFixed(4));

/** Quote a word for a shell. */
export const quoted = (word) => (/^[\w@%+=:,./-]+$/u.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`);

/** Call `work` now and then every `seconds`, while the page is visible, until the returned function is called. */
export function every(seconds, work) {
  let stopped = false, busy = false, timer = 0;
  const tick = async () => {
    clearTimeout(timer);
    if (stopped || busy || document.hidden) return;
    busy = true;
    try {
      await work();
    } finally {
      busy = false;
      if (!stopped) timer = setTimeout(tick, 1000 * seconds);
    }
  };
  document.addEventListener("visibilitychange", tick);
  tick();
  return () => {
    stopped = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", tick);
  };
}
