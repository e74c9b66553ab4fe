// The tab Translate: lines beside their translations; a chosen line shows its cross-attention.

import { post } from "./api.js";
import { button, command, field, fill, make, menu, percent, quoted, visible } from "./parts.js";

/** Codes of refusals that the other lines get, too. */
const FOR_ALL = ["model_not_supported", "model_not_found", "model_not_loadable", "model_too_large"];

/** The last token of each side ends its line: it has no text of its own. */
const named = (tokens) => tokens.map((token, i) => (i === tokens.length - 1 ? "end" : visible(token)));

/** Return the pair of tokens with the largest weight. The ends of the lines count only where there is nothing else. */
export function strongest(weights) {
  const rows = weights.slice(0, Math.max(1, weights.length - 1));
  let best = { row: 0, column: 0, weight: -1 };
  rows.forEach((row, r) => row.slice(0, Math.max(1, row.length - 1)).forEach((weight, column) => {
    if (weight > best.weight) best = { row: r, column, weight };
  }));
  return best;
}

/** An item of the list: a line, with its translation beside it, or below on a narrow screen. */
const pair = (source, beside) => make("li", {}, make("div", { className: "pair" },
  make("p", { className: "source", textContent: source, attributes: { dir: "auto" } }), beside));

/** The cross-attention of a line: a table with a row for each token of the translation. */
class AttentionMap {
  constructor() {
    this.layer = menu([], "", () => this.draw());
    this.layerField = field("Layer", this.layer);
    this.said = make("p", { attributes: { "aria-live": "polite" } });
    this.grid = make("div", { className: "scroll", tabIndex: 0,
      attributes: { role: "region", "aria-label": "Cross-attention" } });
    this.element = make("section", { className: "card", hidden: true }, make("h2", { textContent: "Cross-attention" }),
      make("p", { className: "hint", textContent: "A row for each token of the translation, a column for each token of the "
        + "line: the attention, in percent, that the decoder pays to it when it predicts the row's token." }),
      this.layerField, this.said, this.grid);
  }

  /** Show a map, as the server sends it. */
  show(found) {
    this.found = found;
    const layers = found.attention.map((_, i) => [String(i), `${i + 1} of ${found.attention.length}`]);
    fill(this.layer, [["mean", "mean of all layers"], ...layers]);
    this.layerField.hidden = layers.length < 2;
    this.draw();
  }

  /** Show a sentence in place of a map. */
  explain(message) {
    this.found = null;
    this.layerField.hidden = true;
    this.grid.replaceChildren();
    this.grid.hidden = true;
    this.element.hidden = false; // before the sentence, which is read out
    this.said.textContent = message;
  }

  draw() {
    if (!this.found) return;
    const source = named(this.found.source), target = named(this.found.target);
    const weights = this.found.attention[Number(this.layer.value)] ?? this.found.mean;
    const { row, column, weight } = strongest(weights);
    this.grid.hidden = this.element.hidden = false; // before the sentence, which is read out
    this.said.textContent = `Strongest pair: for \u201c${target[row]}\u201d, the decoder looks at \u201c${source[column]}\u201d with `
      + `${percent(weight)} of its attention.`;
    const head = make("thead", {}, make("tr", {}, make("td"),
      ...source.map((textContent) => make("th", { scope: "col" }, make("span", { textContent })))));
    const body = make("tbody", {}, ...weights.map((line, r) => make("tr", {}, make("th", { scope: "row", textContent: target[r] }),
      ...line.map((value, c) => make("td", { textContent: Math.round(100 * value), title: `${target[r]}, ${source[c]}: ${percent(value)}`,
        data: { weight: Math.round(10 * Math.sqrt(value)), ...(r === row && c === column ? { strongest: "true" } : {}) } })))));
    this.grid.replaceChildren(make("table", { className: "map" }, head, body));
  }
}

const UNTAUGHT = "This model never learned to translate. In the tab Train, give it two files, line by line: the sentences and their "
  + "translations.";

export class Tab {
  constructor(app) {
    Object.assign(this, { app, abort: null, translators: new Set() });
    this.untaught = make("p", { className: "note", hidden: true, textContent: UNTAUGHT, attributes: { role: "status" } });
    this.model = menu([], "", () => this.showCommands());
    this.text = make("textarea", { rows: 6, required: true, attributes: { dir: "auto" }, placeholder: "A sentence a line" });
    this.beam = make("input", { type: "number", min: 1, max: 16, step: 1, value: 1, required: true });
    this.stopButton = button("Stop", () => this.abort?.abort(), { disabled: true });
    const form = this.form = make("form", { className: "card", on: {
      submit: (event) => { event.preventDefault(); this.translate(); },
      keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); } } },
    field("Model", this.model), this.untaught, field("Text", this.text, "One sentence a line. Ctrl+Enter translates."),
    field("Beam width", this.beam, "1 takes the likeliest token each time; 4 or 5 keeps several translations open."),
    make("div", { className: "row" }, make("button", { type: "submit", textContent: "Translate" }), this.stopButton));
    this.status = make("p", { className: "status", attributes: { role: "status" },
      textContent: "The translations appear here. Choose one to see its cross-attention." });
    this.lines = make("ol", { className: "pairs", attributes: { "aria-label": "Translations" } });
    this.commands = make("details", {}, make("summary", { textContent: "Do the same elsewhere" }));
    this.map = new AttentionMap();
    this.element = make("div", { className: "columns" }, make("div", {}, form),
      make("div", {}, make("div", { className: "card" }, this.status, this.lines, this.commands), this.map.element));
    for (const each of [this.text, this.beam]) each.addEventListener("change", () => this.showCommands());
  }

  async show(name) {
    const models = await this.app.chooseModel([this.model], name, ({ translates }) => translates);
    if (!models) return;
    this.translators = new Set(models.filter(({ translates }) => translates).map(({ id }) => id));
    if (!models.length) this.status.textContent = "There are no models yet: train one on sentence pairs in the tab Train.";
    this.showCommands();
  }

  hide() { /* it goes on translating */ }

  get sentences() {
    return this.text.value.split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
  }

  async translate() {
    const { sentences } = this, model = this.model.value, beam = Number(this.beam.value);
    if (!sentences.length) return;
    this.abort?.abort();
    const mine = this.abort = new AbortController();
    this.lines.replaceChildren();
    this.map.element.hidden = true;
    this.showCommands();
    this.stopButton.disabled = false;
    let done = 0, reason = "";
    for (const line of sentences) {
      this.status.textContent = `Translating line ${done + 1} of ${sentences.length} ...`;
      try {
        const { translations } = await post("/translate", { model, text: line, beam }, { signal: mine.signal });
        this.add(model, line, translations[0]);
        done += 1;
      } catch (error) {
        if (this.abort !== mine) return;
        reason = error.name === "AbortError" ? "Stopped." : error.message;
        if (error.name === "AbortError" || FOR_ALL.includes(error.code) || error.status !== 400) break;
        this.refuse(line, reason.replace(/^text: line 1 has/, "This line has"));
        reason = "";
      }
    }
    this.abort = null;
    this.stopButton.disabled = true;
    this.status.textContent = reason && !done ? reason : [`${done} ${done === 1 ? "line" : "lines"} translated.`, reason,
      done ? "Choose a translation to see its cross-attention." : ""].filter(Boolean).join(" ");
  }

  /** Add a line with its translation. */
  add(model, source, target) {
    const choose = button(target || "(an empty line)", () => this.align(choose, model, source, target),
      { className: "translation", attributes: { "aria-pressed": "false", dir: "auto" } });
    this.lines.append(pair(source, choose));
  }

  /** Add a line with the reason why it has no translation. */
  refuse(source, reason) {
    this.lines.append(pair(source, make("p", { className: "hint", textContent: reason })));
  }

  /** Show the cross-attention of a line. */
  async align(chosen, model, source, target) {
    for (const each of this.lines.querySelectorAll(".translation")) each.setAttribute("aria-pressed", String(each === chosen));
    try {
      const found = await post("/studio/alignment", { model, source, target });
      if (chosen.getAttribute("aria-pressed") === "true") this.map.show(found);
    } catch (error) {
      if (error.status !== 400) await this.app.try(() => { throw error; });
      else this.map.explain(error.message);
    }
  }

  /** Show commands that translate the same text. */
  showCommands() {
    this.untaught.hidden = !this.model.value || this.translators.has(this.model.value);
    const model = this.model.value, beam = Number(this.beam.value), { sentences } = this, folder = this.app.folderOf(model);
    const lines = sentences.length ? sentences : ["Guten Morgen"], more = beam > 1 ? ` --beam ${beam}` : "";
    const body = JSON.stringify({ model, text: lines, ...(beam > 1 ? { beam } : {}) });
    this.commands.replaceChildren(this.commands.firstChild,
      command(`printf '%s\\n' ${lines.map(quoted).join(" ")} | bardlet translate ${quoted(folder)}${more}`, "the command of bardlet"),
      command(`curl ${location.origin}/translate -H "Authorization: Bearer $BARDLET_API_KEY" -H 'Content-Type: application/json' -d ${quoted(body)}`, "the command of curl"),
      command(`bardlet.load(${JSON.stringify(folder)}).translate(${JSON.stringify(lines)}${beam > 1 ? `, beam=${beam}` : ""})`, "the Python code"));
  }
}
