// Live parts of the course's pages: a sentence through the heads and blocks of a rung, the same sentence through every
// rung, and a text at a temperature.
//
// A page has elements of class `live`; `docs/live.py` writes them, and the scripts with the models, which fill
// `bardletModels`: name -> {spec, entries, weights, about}.

import { Model, generate, largest, sampler, softmax } from "./forward.js";
import { Tokenizer } from "./tokenizer.js";
import { fromBase64, unpack } from "./weights.js";
import { pauses } from "./answer.js";
import { TokenList, lens, make, percent, visible } from "./views.js";

/** Characters of the longest sentence: every rung reads it again at each key. */
const LONGEST = 160;
/** Characters that a rung writes after the sentence, and in a text of its own. */
const SHORT = 60, LONG = 300;
/** Rows of the list of next characters. */
const BARS = 12;

// ---------------------------------------------------------------- what a rung computes

/** Return {model, tokenizer, about} of a model as it stands in `bardletModels`. */
export function open({ spec, entries, weights, about }) {
  const model = new Model(spec, unpack(entries, fromBase64(weights)));
  return { model, tokenizer: new Tokenizer(spec.tokenizer), about };
}

/**
 * Yield what the model computes at each position of `ids`: {logits, heads, stream, start}. It sees the last `context`
 * tokens there, from position `start` on, as when it writes. heads: of each block, of each head, the weights over them.
 */
export function* read(model, ids) {
  const cache = model.newCache();
  for (let t = 0; t < ids.length; t++) {
    const look = { attention: [], stream: [] }, start = Math.max(0, t + 1 - model.context), seen = t + 1 - start;
    if (start) cache.length = 0;
    const logits = model.forward(ids.slice(start + cache.length, t + 1), cache, look);
    const heads = model.attention === "average" ? [[new Float32Array(seen).fill(1 / seen)]] : look.attention;
    yield { logits, heads, stream: look.stream, start };
  }
}

/** Return the probabilities of the next token at a temperature; at 0, the likeliest has all. */
export function distribution(logits, temperature) {
  if (temperature > 0) return softmax(Float64Array.from(logits, (x) => x / temperature));
  const p = new Float64Array(logits.length);
  p[largest(logits, 1)[0]] = 1;
  return p;
}

/** Return the number of characters that a model hesitates between: e to the entropy of its probabilities. */
export const perplexity = (p) => Math.exp(p.reduce((sum, x) => sum - (x > 0 ? x * Math.log(x) : 0), 0));

/** Read a sentence: {ids, unknown, steps, surprise (-ln p of each token but the first), loss (of a character)}. */
export async function readSentence({ model, tokenizer }, sentence, pause = async () => {}) {
  const { ids, unknown } = tokenizer.encode(sentence), steps = [], surprise = [];
  for (const step of read(model, ids)) {
    if (steps.length) surprise.push(-Math.log(softmax(Float64Array.from(steps.at(-1).logits))[ids[steps.length]]));
    steps.push(step);
    await pause();
  }
  const characters = Array.from(tokenizer.decode(ids.slice(1))).length;
  return { ids, unknown, steps, surprise, loss: surprise.reduce((a, b) => a + b, 0) / characters };
}

/** Return the text that a model writes after `ids`. */
export async function write({ model, tokenizer }, ids, { temperature, seed, tokens }, pause = async () => {}) {
  const decoder = tokenizer.decoder(), choose = sampler({ temperature, seed, topK: model.vocab });
  let text = "", written = 0;
  for (const step of generate(model, ids, choose)) {
    await pause();
    if (!step) continue;
    if (model.stop.includes(step.id)) break;
    text += decoder.feed(step.id);
    if (++written >= tokens) break;
  }
  return text + decoder.end();
}

// ---------------------------------------------------------------- a live part

/** The work of a live part ended, because newer work began. */
class Replaced extends Error {}

const opened = new Map(); // the models of a page that are in use, by name
const use = (name) => opened.get(name) ?? opened.set(name, open(globalThis.bardletModels[name])).get(name);

/** A field and, below it, what rungs make of its text. Subclasses define `question`, `build()` and `update()`. */
class Live {
  constructor(root) {
    this.root = root;
    this.names = root.dataset.rungs.split(" ");
    this.parts = root.dataset.live.split(" ");
    this.id = `live-${Live.count = (Live.count ?? 0) + 1}`;
    this.input = make("input", { id: this.id, type: "text", value: root.dataset.sentence, maxLength: LONGEST,
      autocomplete: "off", spellcheck: false, on: { input: () => this.refresh() } });
    this.notice = make("p", { className: "live-hint", attributes: { role: "status" } });
    this.body = make("div", { className: "live-body" }, ...this.build());
    root.replaceChildren(make("label", { htmlFor: this.id, textContent: this.question }), this.input, this.notice,
      this.body, this.origin());
    this.refresh();
  }

  /** The line that says which models these are. */
  origin() {
    const { origin, together } = globalThis.bardletModels[this.names[0]].about;
    return make("p", { className: "live-hint", textContent: this.names.length > 1 ? together : origin });
  }

  /** A pause for the browser, which ends this work if newer work has begun. */
  pauses() {
    const mine = this.work = {}, rest = pauses(20);
    return async () => {
      await rest();
      if (this.work !== mine) throw new Replaced();
    };
  }

  /** Show what the rungs make of the text. The promise is for tests: it ends when the newest text is shown. */
  refresh() {
    this.body.setAttribute("aria-busy", "true");
    return this.done = this.show();
  }

  async show() {
    const pause = this.pauses(), known = use(this.names[0]).tokenizer.encode(this.input.value);
    const unknown = known.unknown.map(visible).join(" ");
    this.notice.textContent = known.ids.length < 2 ? "Type at least two characters that the model knows."
      : unknown ? `Left out, because the training text does not have them: ${unknown}` : "";
    try {
      if (known.ids.length > 1) await this.update(this.input.value, pause);
      this.body.removeAttribute("aria-busy");
    } catch (error) {
      if (!(error instanceof Replaced)) throw error;
      await this.done;
    }
  }
}

const surpriseToP = (nats) => Math.exp(-nats);

/** A weight between 0 and 1 as one of the eleven shades of `live.css`. */
const shade = (weight) => Math.round(10 * weight);

/** Attention and the logit lens: a sentence through one rung, position by position. */
class Reading extends Live {
  get question() {
    return "A sentence of your own";
  }

  build() {
    this.chosen = null; // the position; null: the last
    this.tokens = make("div");
    this.expects = make("p", { attributes: { "aria-live": "polite" } });
    this.details = make("div");
    return [make("p", { className: "live-hint", textContent: "Choose a character, with the pointer or the arrow keys. "
      + "The darker it is, the less this rung expected it." }), this.tokens, this.expects, this.details];
  }

  async update(sentence, pause) {
    this.rung = use(this.names[0]);
    this.reading = await readSentence(this.rung, sentence, pause);
    const { ids, surprise } = this.reading, { tokenizer } = this.rung;
    this.list = new TokenList("The sentence, a character at a time", (n) => this.inspect(n));
    ids.forEach((id, n) => this.list.add(tokenizer.label(id), n ? surpriseToP(surprise[n - 1]) : 1));
    this.tokens.replaceChildren(this.list.element);
    this.list.select(Math.min(this.chosen ?? Infinity, ids.length - 1));
  }

  inspect(n) {
    const { ids, steps } = this.reading, { model, tokenizer } = this.rung, step = steps[n];
    this.chosen = n === ids.length - 1 ? null : n;
    const p = softmax(Float64Array.from(step.logits)), named = (id) => `\u201c${visible(tokenizer.label(id))}\u201d`;
    const likeliest = largest(p, 3).map((id) => `${named(id)} with ${percent(p[id])}`).join(", ");
    const id = ids[n + 1], next = id === undefined ? "" : ` The one that follows, ${named(id)}, has ${percent(p[id])}.`;
    this.expects.textContent = `After this ${named(ids[n])}, the rung expects ${likeliest}.${next}`;
    this.details.replaceChildren(...[
      this.parts.includes("attention")
        ? headRows(step, ids.slice(step.start, n + 1), tokenizer, model.attention === "average") : null,
      this.parts.includes("lens") ? this.lens(step, n) : null].filter(Boolean));
  }

  /** What each block would write; beside it the probability of the character that follows, or of the likeliest. */
  lens(step, n) {
    const { ids } = this.reading, { model, tokenizer } = this.rung;
    const follows = n + 1 < ids.length, id = follows ? ids[n + 1] : largest(step.logits, 1)[0];
    const [section, rows] = lens({ id }, step.stream, model, tokenizer,
      { title: "The logit lens: what each block would write", chosen: follows ? "next character" : "likeliest" });
    Array.from(rows);
    return section;
  }
}

/**
 * A row for each head: the characters that it sees, shaded by their weights, and the one with the largest.
 * averages: the weights are those of rung 2, which has no head.
 */
function headRows({ heads }, context, tokenizer, averages) {
  const rows = heads.flatMap((block, b) => block.map((weights, h) => {
    const top = largest(weights, 1)[0], most = averages ? "each" : visible(tokenizer.label(context[top]));
    return make("tr", {}, make("th", { scope: "row", textContent: averages ? "average" : `${b + 1}.${h + 1}` }),
      make("td", { className: "live-seen" }, ...Array.from(weights, (weight, i) => make("span", {
        textContent: visible(tokenizer.label(context[i])), title: percent(weight), data: { weight: shade(weight) } }))),
      make("td", { textContent: `${most} ${percent(weights[top])}` }));
  }));
  if (!rows.length) return null;
  const titles = averages ? ["", "takes from each character", ""] : ["head", "takes from each character", "most from"];
  const head = titles.map((textContent) => (textContent ? make("th", { scope: "col", textContent }) : make("td")));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

/** The same sentence through every rung: its loss, where it was surprised, and what it writes next. */
class Comparison extends Live {
  get question() {
    return "A sentence of your own, through every rung";
  }

  build() {
    this.seed = 1;
    this.rows = make("ol", { className: "live-rungs" });
    return [make("p", { className: "live-hint", textContent: "The darker a character, the less the rung expected it. "
      + "In italics: what the rung writes next, at temperature 0.8." }), this.rows,
    make("button", { type: "button", textContent: "Write something else", on: { click: () => {
      this.seed++;
      this.refresh();
    } } })];
  }

  async update(sentence, pause) {
    const rows = [];
    for (const name of this.names) {
      const rung = use(name), { tokenizer, about } = rung;
      const { ids, surprise, loss } = await readSentence(rung, sentence, pause);
      const next = await write(rung, ids, { temperature: 0.8, seed: this.seed, tokens: SHORT }, pause);
      rows.push(make("li", { data: { loss } }, make("span", { className: "live-name", textContent: about.name }), " ",
        make("span", { className: "live-loss", textContent: `${loss.toFixed(2)} nats a character` }), bar(loss / 5),
        make("span", { className: "live-text" }, ...ids.map((id, n) => make("span", { textContent: tokenizer.label(id),
          data: { surprise: n ? shade((1 - surpriseToP(surprise[n - 1])) ** 2) : 0 } })),
        make("i", { textContent: next }))));
      this.rows.replaceChildren(...rows, ...Array.from(this.rows.children).slice(rows.length));
    }
  }
}

const title = (textContent) => make("p", { className: "live-title", textContent });

/** A bar that is `share` of the width. */
function bar(share) {
  const element = make("span", { className: "live-bar", attributes: { "aria-hidden": "true" } }, make("span"));
  element.firstChild.style.width = `${100 * Math.min(1, share)}%`;
  return element;
}

/** Temperature: the distribution of the next character, and a text written by it. */
class Temperature extends Live {
  get question() {
    return "Beginning of a text";
  }

  build() {
    const refresh = { input: () => this.refresh() };
    this.slider = make("input", { id: `${this.id}-temperature`, type: "range", min: 0, max: 2, step: 0.1, value: 0.8,
      on: refresh });
    this.seed = make("input", { id: `${this.id}-seed`, type: "number", min: 0, max: 1e6, step: 1, value: 1,
      on: refresh });
    this.value = make("output", { htmlFor: this.slider.id });
    this.next = make("ol", { className: "live-next" });
    this.about = make("p", { className: "live-hint" });
    this.text = make("p", { className: "live-written", attributes: { "aria-label": "A text of the model" } });
    const another = make("button", { type: "button", textContent: "Another text", on: { click: () => {
      this.seed.value = (Number(this.seed.value) || 0) + 1;
      this.refresh();
    } } });
    return [make("div", { className: "live-settings" },
      make("label", { htmlFor: this.slider.id }, "Temperature ", this.value, this.slider),
      make("label", { htmlFor: this.seed.id }, "Seed", this.seed), another),
    make("div", { className: "live-columns" }, make("div", {}, title("The next character"),
      this.next, this.about), make("div", {}, title("A text at this temperature"), this.text))];
  }

  async update(sentence, pause) {
    const rung = use(this.names[0]), { model, tokenizer } = rung, temperature = Number(this.slider.value);
    this.value.textContent = temperature.toFixed(1);
    const { ids } = tokenizer.encode(sentence), window = ids.slice(-model.context);
    const p = this.p = distribution(model.forward(window, model.newCache()), temperature);
    this.next.replaceChildren(...largest(p, BARS).map((id) => make("li", {},
      make("span", { className: "live-label", textContent: visible(tokenizer.label(id)) }), bar(p[id]),
      make("span", { textContent: percent(p[id]) }))));
    this.about.textContent = `As uncertain as between ${perplexity(p).toFixed(1)} equally likely characters.`;
    const options = { temperature, seed: Number(this.seed.value), tokens: LONG };
    const text = await write(rung, ids, options, pause);
    this.text.replaceChildren(make("b", { textContent: sentence }), text);
  }
}

const KINDS = { attention: Reading, lens: Reading, compare: Comparison, temperature: Temperature };

/** Bring the live parts of a page to life. Returns them. */
export function start(root) {
  const kind = (element) => KINDS[element.dataset.live.split(" ")[0]];
  return Array.from(root.querySelectorAll(".live"), (element) => new (kind(element))(element));
}

if (typeof document !== "undefined" && globalThis.bardletModels) globalThis.bardletLive = start(document);
