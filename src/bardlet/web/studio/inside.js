// The tab Inside: a model reads a text; for each token, where its heads looked, what its blocks knew, and which tokens
// are alike. Heads can be switched off, to see what they are for.

import { attention, TokenList } from "../views.js";
import { post } from "./api.js";
import { button, command, field, hint, loss, make, menu, percent, plain, quoted, visible } from "./parts.js";

const RUNG = /(^|\/)seed-\d+(-\d+)?$/u; // the name of a rung's run, see ladder/run.py
const PATIENCE = 250; // milliseconds that a token stays selected before its neighbors are asked for

const heading = (textContent) => make("h3", { textContent });

/** A token's name, for a sentence. */
const named = ({ name }) => (name.startsWith("bytes:") || name.startsWith("token_id:") ? name : visible(name));

const inQuotes = (token) => `\u201c${named(token)}\u201d`;

/** A text with its line breaks, and codes for other characters that nobody sees. */
const readable = (text) => text.replace(/[^\n\t]+/gu, plain);

/** A button for each head: pressed, the head is off. Arrow keys move among them. */
class Switches {
  constructor(layers, heads, onChange) {
    Object.assign(this, { layers, heads, onChange, buttons: [] });
    this.element = make("div", { className: "switches", on: { keydown: (event) => this.move(event) },
      attributes: { role: "group", "aria-label": "Heads to switch off" } });
    for (let layer = 0; layer < layers; layer += 1) {
      this.element.append(make("span", { className: "hint", textContent: `block ${layer + 1}` }));
      for (let head = 0; head < heads; head += 1) {
        const each = button(String(head + 1), () => this.toggle(each), { data: { layer, head }, tabIndex: -1,
          attributes: { "aria-pressed": "false", "aria-label": `Switch off head ${head + 1} of block ${layer + 1}` } });
        this.buttons.push(each);
        this.element.append(each);
      }
    }
    this.element.style.setProperty("--heads", heads);
    this.buttons[0].tabIndex = 0;
  }

  /** The heads that are off: [layer, head] from 0. */
  get off() {
    return this.buttons.filter((each) => each.getAttribute("aria-pressed") === "true")
      .map(({ dataset }) => [Number(dataset.layer), Number(dataset.head)]);
  }

  toggle(each) {
    each.setAttribute("aria-pressed", String(each.getAttribute("aria-pressed") !== "true"));
    this.onChange();
  }

  /** Switch all heads on, or off. */
  all(off) {
    this.buttons.forEach((each) => each.setAttribute("aria-pressed", String(off)));
    this.onChange();
  }

  move(event) {
    const now = this.buttons.indexOf(event.target);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.heads, ArrowUp: -this.heads }[event.key];
    const next = this.buttons[now + (step ?? 0)];
    if (now < 0 || step === undefined) return;
    event.preventDefault();
    if (!next) return;
    this.buttons[now].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

export class Tab {
  constructor(app) {
    this.app = app;
    this.asked = this.before = this.after = this.abort = null;
    this.chosen = {}; // the head whose attention is shown
    this.known = new Map(); // neighbors, by model and token
    this.model = menu([], "");
    this.text = make("textarea", { rows: 4, required: true, maxLength: 20000, attributes: { dir: "auto" },
      placeholder: "A sentence for the model to read" });
    this.length = make("input", { type: "number", min: 0, max: 200, step: 1, value: 60, required: true });
    const form = make("form", { className: "card", on: {
      submit: (event) => { event.preventDefault(); this.look(); },
      keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); } } },
    hint("Watch a model read a text: which words it looked back at, when it made up its mind, and what surprised it."),
    field("Model", this.model), field("Text", this.text), field("Tokens to write on", this.length),
    make("div", { className: "row" }, make("button", { type: "submit", textContent: "Look inside" })));
    this.status = make("p", { className: "status", attributes: { role: "status" } });
    this.reading = make("div");
    this.details = make("aside", { className: "details", hidden: true, attributes: { "aria-label": "About the selected token" } });
    this.heads = make("section", { className: "card", hidden: true });
    this.rungs = make("section", { className: "card", hidden: true });
    this.commands = make("details", { hidden: true }, make("summary", { textContent: "Do the same elsewhere" }));
    this.element = make("div", { className: "columns inside" }, form,
      make("div", { className: "card" }, this.status, this.reading, this.details, this.commands),
      make("div", {}, this.heads, this.rungs));
    this.status.textContent = "Choose a model, write a sentence, and look inside.";
  }

  async show(name) {
    const models = await this.app.chooseModel([this.model], name);
    if (!models) return;
    if (!models.length) this.status.textContent = "There are no models yet: train one in the tab Train.";
  }

  hide() { clearTimeout(this.timer); }

  /** Read the text of the form, with all heads. */
  async look() {
    const asked = { model: this.model.value, text: this.text.value, tokens: Number(this.length.value) };
    const answer = await this.read(asked, []);
    if (!answer) return;
    Object.assign(this, { asked, before: answer, after: null, chosen: {} });
    this.selected = answer.tokens.length - 1;
    this.showHeads();
    this.showRungs();
    this.showCommands();
    this.showText();
  }

  /** Read the same text with the heads that are on now. */
  async again() {
    const off = this.switches.off;
    if (!off.length) this.stop();
    const answer = off.length ? await this.read(this.asked, off) : this.before;
    if (!answer) return;
    this.after = off.length ? answer : null;
    this.compare();
    this.showCommands();
    this.showText();
  }

  /** Ask the server. Return nothing if it refuses, or if the next question came first. */
  async read(asked, off) {
    this.stop();
    const mine = this.abort = new AbortController();
    this.status.textContent = "Reading ...";
    const answer = await this.app.try(() => post("/studio/inside", { ...asked, off }, { signal: mine.signal }), this.status);
    return this.abort === mine ? answer : null;
  }

  /** Drop the question that the server has not answered yet. */
  stop() {
    this.abort?.abort();
    this.abort = null;
  }

  /** The answer that the page shows. */
  get shown() {
    return this.after ?? this.before;
  }

  // ------------------------------------------------------------------------ the text

  showText() {
    const { tokens, losses, cut, loss: mean } = this.shown;
    this.list = new TokenList("The text, token by token", (n) => this.inspect(n), { hover: false });
    tokens.forEach(({ name, text }, n) => this.list.add(readable(text) || (name.startsWith("bytes:") ? "" : plain(name)),
      losses[n] === null ? 1 : Math.exp(-losses[n])));
    this.status.textContent = `${tokens.length} token${tokens.length === 1 ? "" : "s"}`
      + (cut ? `; ${cut} before them were left out, because this view reads no more.` : ".")
      + (mean.per_token === null ? "" : ` Loss: ${loss(mean.per_token)} nats a token`
        + (mean.per_character === null ? "." : `, ${loss(mean.per_character)} a character.`));
    this.reading.replaceChildren(
      hint("The stronger the color, the more a token surprised the model. The loss is its mean surprise; 0 would be a perfect guess. "
        + "Choose a token by a click or with the arrow keys."), this.list.element);
    this.list.select(this.selected);
  }

  inspect(n) {
    this.selected = n;
    const { tokens, losses, attention: maps } = this.shown, token = tokens[n];
    const label = { label: (each) => readable(each.text) || named(each) };
    const p = losses[n] === null ? "the first token, which the model does not predict"
      : `${percent(Math.exp(-losses[n]))} likely, loss ${loss(losses[n])} nats`;
    this.neighbors = make("section");
    this.details.hidden = false;
    const looks = attention(maps.map((heads) => heads.map((rows) => rows[n])), tokens.slice(0, n + 1), label, "Where it looked back", this.chosen);
    looks.firstChild.after(hint("To choose the next token, each head looks back at the text and picks what it needs. Engineers call this "
      + "attention: the weights of a head sum to 100\u00a0%."));
    for (const each of looks.querySelectorAll(".heads button")) {
      each.dataset.off = String(Boolean(this.after) && this.switches.off.some(([layer, head]) => `${layer}` === each.dataset.layer && `${head}` === each.dataset.head));
    }
    this.details.replaceChildren(heading(`How expected was ${inQuotes(token)}?`), make("p", { textContent: p }), this.lens(n), looks, this.neighbors);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.showNeighbors(token), this.known.has(this.key(token)) ? 0 : PATIENCE);
  }

  /** The predictions after token n, block by block. */
  lens(n) {
    const { lens, tokens } = this.shown, next = tokens[n + 1];
    const titles = ["after", "would write", "with", ...(next ? [`next token ${inQuotes(next)}`] : [])];
    return make("section", {}, heading(`What did it expect after ${inQuotes(tokens[n])}?`),
      hint("A model builds its prediction block by block. Each row stops it early, and asks what it would write next. Engineers call "
        + "this the logit lens: the final norm and the head, applied after each block. Where a row is marked, it would have been right."),
      make("table", { className: "lens" }, make("thead", {}, make("tr", {}, ...titles.map((textContent) => make("th", { scope: "col", textContent })))),
        make("tbody", {}, ...lens.map(({ after, guesses }) => {
          const guess = guesses[n];
          return make("tr", { data: { right: guess.id === next?.id } }, make("th", { scope: "row", textContent: after }),
            make("td", { textContent: named(guess) }), make("td", { textContent: percent(guess.p) }),
            next ? make("td", { textContent: percent(guess.following) }) : null);
        }))));
  }

  key({ id }) {
    return `${id} ${this.asked.model}`;
  }

  async showNeighbors(token) {
    const key = this.key(token), section = this.neighbors;
    if (!this.known.has(key)) {
      const answer = await this.app.try(() => post("/studio/neighbors", { model: this.asked.model, token: token.id }));
      if (!answer) return;
      this.known.set(key, answer.neighbors);
    }
    section.replaceChildren(heading("Tokens that are alike to the model"), hint(`The model turns each token into a list of numbers, its `
      + `embedding. These have lists most like that of ${inQuotes(token)}; 1 is the same direction (cosine similarity).`),
    make("ol", { className: "neighbors" }, ...this.known.get(key).map((each) => make("li", {},
      make("span", { className: "label", textContent: named(each) }),
      make("meter", { value: Math.max(0, each.similarity), max: 1, attributes: { "aria-hidden": "true" } }),
      make("span", { textContent: each.similarity.toFixed(2) })))));
  }

  // ------------------------------------------------------------------------ heads switched off

  showHeads() {
    const maps = this.before.attention;
    this.switches = new Switches(maps.length, maps[0].length, () => this.again());
    this.comparison = make("div", { attributes: { "aria-live": "polite" } });
    this.heads.hidden = false;
    this.heads.replaceChildren(make("h2", { textContent: "Switch heads off" }),
      hint("Switch a head off, and the model reads the text without it: if the loss rises, it needed that head here. Engineers call this "
        + "ablation: zeros replace the output of the head."),
      make("div", { className: "scroll" }, this.switches.element),
      make("div", { className: "row" }, button("All on", () => this.switches.all(false)), button("All off", () => this.switches.all(true))),
      this.comparison);
    this.compare();
  }

  /** Show the loss and the continuation before and after. */
  compare() {
    const { before, after } = this;
    const box = (title, { continuation }) => [heading(title), make("p", { className: "sample", textContent: readable(continuation) || "(no text)" })];
    const row = (name, key) => make("tr", {}, make("th", { scope: "row", textContent: name }), ...[before, after].map(
      (each) => make("td", { textContent: loss(each.loss[key]) })),
    make("td", { textContent: before.loss[key] === null ? "" : signed(after.loss[key] - before.loss[key]) }));
    this.comparison.replaceChildren(...(after ? [make("table", {}, make("thead", {}, make("tr", {}, ...["loss, in nats", "all heads", "now", "change"]
      .map((textContent) => make("th", { scope: "col", textContent })))), make("tbody", {}, row("a token", "per_token"), row("a character", "per_character")))] : []),
    ...box(after ? "It writes on with all heads" : "It writes on", before), ...(after ? box("It writes on now", after) : []));
  }

  // ------------------------------------------------------------------------ the ladder

  showRungs() {
    this.rungs.hidden = !RUNG.test(this.asked.model);
    const asked = this.asked, table = make("div", { className: "scroll", attributes: { "aria-live": "polite" } });
    this.rungs.replaceChildren(make("h2", { textContent: "The same sentence on every rung" }),
      hint("This model is a rung of a ladder. Let its siblings read the sentence and write on, from the simplest to the newest."),
      make("div", { className: "row" }, button("Climb the ladder", async () => {
        table.replaceChildren(hint("Reading ..."));
        const answer = await this.app.try(() => post("/studio/rungs", asked));
        table.replaceChildren(answer ? this.ladder(answer.rungs) : "");
      })), table);
  }

  ladder(rungs) {
    if (!rungs.length) return hint("There are no trained rungs beside this model.");
    return make("table", { className: "ladder" }, make("thead", {}, make("tr", {}, ...["rung", "loss", "it writes on"].map(
      (textContent) => make("th", { scope: "col", textContent })))), make("tbody", {}, ...rungs.map((rung) => make("tr", {},
      make("th", { scope: "row", textContent: `${rung.number}. ${rung.name}` }), make("td", { textContent: loss(rung.loss) }),
      make("td", { textContent: readable(rung.continuation) || "(no text)" })))));
  }

  // ------------------------------------------------------------------------ commands

  showCommands() {
    const { model, text, tokens } = this.asked, folder = this.app.folderOf(model), off = this.after ? this.switches.off : [];
    const heads = off.length ? `, [${off.map(([layer, head]) => `(${layer}, ${head})`).join(", ")}]` : "";
    this.commands.hidden = false;
    this.commands.replaceChildren(this.commands.firstChild,
      command(`bardlet sample ${quoted(folder)} --prompt=${quoted(text)} --tokens ${tokens} --temperature 0`, "the command of bardlet"),
      command(`curl ${location.origin}/studio/inside -H "Authorization: Bearer $BARDLET_API_KEY" -H 'Content-Type: application/json' -d `
        + quoted(JSON.stringify({ ...this.asked, off })), "the command of curl"),
      command(`import bardlet\nfrom bardlet.inference import inside\nmodel = bardlet.load(${JSON.stringify(folder)})\n`
        + `reading = inside.read(model.module, model.prompt_ids(${JSON.stringify(text)})${heads})\n`
        + "reading.attention_LHTT, inside.losses(reading), inside.lens(model.module, reading, 0)", "the Python code"));
  }
}

/** A difference, with its sign. */
const signed = (x) => `${x < 0 ? "\u2212" : "+"}${Math.abs(x).toFixed(4)}`;
