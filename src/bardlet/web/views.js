// Views of a step of generation: its token, what else was likely, what each head attended to, what each block knew.
//
// A step is a token of an answer (see `answer.js`).

import { argmax, softmax } from "./forward.js";

/** Make an element: properties are set as they are, data attributes by `data`, listeners by `on`. */
export function make(tag, { data = {}, on = {}, attributes = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const percent = (p) => (p >= 0.9995 ? "100\u00a0%" : p < 0.001 ? "<\u00a00.1\u00a0%" : `${(100 * p).toFixed(1)}\u00a0%`);

/** Return a text without characters that nobody sees, such as those that turn it around: codes stand for them. */
export const plain = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu,
  (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);

/** Return a token as people can see it, with signs for white space. */
export const visible = (text) => plain(text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423"))
  || "(no text)";

/** Return a name for a token that shows nothing. */
const spoken = (text) => (!text ? "part of a character" : /[\n\r]/.test(text) ? "line break" : "space");

/**
 * A list of tokens. Each is colored: the less likely it was, the stronger. Arrow keys move; `onSelect(n)` is called for
 * the token under the pointer or the cursor. hover: without it, a token is selected by a click, not by the pointer alone.
 * holds: a click holds its token, whatever the pointer passes then, until the next click on it or Escape.
 */
export class TokenList {
  constructor(label, onSelect, { hover = true, holds = false } = {}) {
    Object.assign(this, { onSelect, holds, held: false });
    this.selected = -1;
    this.id = `tokens-${TokenList.count = (TokenList.count ?? 0) + 1}`;
    this.element = make("div", {
      className: "tokens", tabIndex: 0, attributes: { role: "listbox", "aria-label": label, dir: "auto" },
      on: {
        keydown: (event) => this.move(event),
        click: (event) => this.hold(this.indexOf(event.target)),
        ...(hover && { mouseover: (event) => { if (!this.held) this.select(this.indexOf(event.target)); } }),
      },
    });
  }

  indexOf(target) {
    const option = target.closest("[role=option]");
    return option ? Array.from(this.element.children).indexOf(option) : -1;
  }

  add(text, p) {
    const surprise = Math.round(10 * (1 - p) ** 2);
    this.element.append(make("span", {
      id: `${this.id}-${this.element.children.length}`, textContent: text, data: { surprise },
      attributes: { role: "option", "aria-selected": "false", ...(text.trim() ? {} : { "aria-label": spoken(text) }) },
    }));
  }

  /** Add text to the last token. */
  append(text) {
    this.element.lastChild.append(text);
    this.element.lastChild.removeAttribute("aria-label");
  }

  /** Remove all but the first `count` tokens. */
  keep(count) {
    while (this.element.children.length > count) this.element.lastChild.remove();
    if (this.selected < count) return;
    this.selected = -1;
    this.element.removeAttribute("aria-activedescendant");
  }

  hold(n) {
    this.held = this.holds && n >= 0 && !(this.held && n === this.selected);
    this.select(n);
  }

  select(n) {
    if (n < 0 || n >= this.element.children.length || n === this.selected) return;
    this.element.children[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = n;
    const option = this.element.children[n];
    option.setAttribute("aria-selected", "true");
    this.element.setAttribute("aria-activedescendant", option.id);
    this.onSelect(n);
  }

  move(event) {
    if (event.key === "Escape") this.held = false;
    const last = this.element.children.length - 1;
    const to = { ArrowRight: this.selected + 1, ArrowLeft: this.selected - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.select(Math.max(0, Math.min(last, to)));
  }
}

/** A button for each of the likeliest tokens; `onChoose({id, p})` branches there. */
export function alternatives(step, tokenizer, onChoose) {
  return make("ol", { className: "alternatives" }, ...step.likeliest.map(({ id, p }) => make("li", {},
    make("button", {
      type: "button", data: { chosen: id === step.id }, on: { click: () => onChoose({ id, p }) },
      attributes: { "aria-current": id === step.id },
    }, make("span", { className: "label", textContent: visible(tokenizer.label(id)) }),
    make("meter", { value: p, max: 1, attributes: { "aria-hidden": "true" } }),
    make("span", { textContent: percent(p) })))));
}

/**
 * Attention: a small picture for every head, and the text colored by the weights of the one chosen.
 *
 * chosen: the head to begin with, { layer, head }; it changes with the choice. Without it, the first of the last block.
 */
export function attention(maps, context, tokenizer, title, chosen = {}) {
  if (!maps?.length) return null;
  const text = make("p", { className: "attended", attributes: { dir: "auto" } });
  const caption = make("p", { attributes: { "aria-live": "polite" } });
  const pictures = [];
  const show = (layer, head) => {
    const weights = maps[layer][head], largest = Math.max(...weights);
    Object.assign(chosen, { layer, head });
    pictures.forEach((picture) => picture.setAttribute(
      "aria-pressed", String(picture.dataset.layer === `${layer}` && picture.dataset.head === `${head}`)));
    const top = weights.indexOf(largest);
    caption.textContent = `Block ${layer + 1}, head ${head + 1}: most of all ${visible(tokenizer.label(context[top]))}, `
      + `${percent(largest)}.`;
    text.replaceChildren(...Array.from(weights, (weight, i) => make("span", {
      textContent: tokenizer.label(context[i]), title: percent(weight),
      data: { weight: Math.round(10 * weight / largest) },
    })));
  };
  const grid = make("div", { className: "heads" }, ...maps.flatMap((heads, layer) => heads.map((weights, head) => {
    const picture = make("button", {
      type: "button", data: { layer, head }, on: { click: () => show(layer, head) },
      attributes: { "aria-pressed": "false", "aria-label": `block ${layer + 1}, head ${head + 1}` },
    }, drawWeights(weights));
    pictures.push(picture);
    return picture;
  })));
  grid.style.setProperty("--heads", maps[0].length);
  show(chosen.layer ?? maps.length - 1, chosen.head ?? 0);
  return make("section", {}, make("h3", { textContent: title }), make("p", {
    className: "hint", textContent: "A row for each block, a picture for each head: how much it looked at each token, "
      + "from the first on the left to the newest on the right.",
  }), grid, caption, text);
}

function drawWeights(weights) {
  const canvas = make("canvas", { width: 64, height: 16, attributes: { "aria-hidden": "true" } });
  const pen = canvas.getContext("2d"), largest = Math.max(...weights);
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent") || "#c2560c";
  weights.forEach((weight, i) => {
    const left = Math.floor(i * 64 / weights.length), height = 16 * weight / largest;
    pen.fillRect(left, 16 - height, Math.max(1, Math.floor((i + 1) * 64 / weights.length) - left), height);
  });
  return canvas;
}

/**
 * The logit lens (nostalgebraist, 2020): the token that each block would have written, if it had been the last.
 *
 * Returns the section, without rows, and a generator that adds one at a time: each computes the whole vocabulary.
 * chosen: the title of the column with the probability of the step's token.
 */
export function lens(step, stream, model, tokenizer, { title = "What each block knew", chosen = "chosen token" } = {}) {
  if (!model.head || stream.length < 2) return [null, []];
  const body = make("tbody");
  const fill = function* () {
    for (const [n, channels] of stream.entries()) {
      const p = softmax(Float64Array.from(model.read(channels))), best = argmax(p);
      body.append(make("tr", {}, make("th", { scope: "row", textContent: n ? `block ${n}` : "embedding" }),
        make("td", { textContent: visible(tokenizer.label(best)) }), make("td", { textContent: percent(p[best]) }),
        make("td", { textContent: percent(p[step.id]) })));
      yield n;
    }
  };
  const titles = ["after", "would write", "with", chosen];
  return [make("section", {}, make("h3", { textContent: title }), make("table", {},
    make("thead", {}, make("tr", {}, ...titles.map((textContent) => make("th", { scope: "col", textContent })))), body)),
  fill()];
}
