// The tab Write: a model continues a text, token by token; each token shows what else was likely, and can be replaced.

import { TokenList } from "../views.js";
import { stream } from "./api.js";
import { WRITING, button, command, copier, field, hint, make, menu, percent, plain, quoted, visible } from "./parts.js";

const LIKELIEST = 10;
const CHOOSING = "Top-k: the model chooses among so many of the likeliest tokens. The color of a written token says how unlikely it was.";
/** The names of tokens that are no text of their own: a part of a character, or an id that the tokenizer lacks. */
const NO_TEXT = /^(bytes:\\x|token_id:)/;

/** Settings of a model that writes. */
class Voice {
  constructor(label, temperature) {
    this.model = menu([], "");
    this.temperature = make("input", { type: "number", min: 0, max: 5, step: 0.1, value: temperature });
    this.topK = make("input", { type: "number", min: 1, step: 1, placeholder: "all" });
    this.element = make("fieldset", {}, make("legend", { textContent: label }), field("Model", this.model),
      make("div", { className: "settings" }, field("Temperature", this.temperature), field("Top-k", this.topK)));
  }

  get values() {
    const topK = Number(this.topK.value);
    return { model: this.model.value, temperature: Number(this.temperature.value), ...(topK > 0 ? { top_k: topK } : { top_k: -1 }) };
  }
}

/** A text that a model writes. */
class Draft {
  constructor(tab, voice, label) {
    Object.assign(this, { tab, values: voice.values, tokens: [], prompt: tab.prompt.value, request: null, abort: null });
    this.list = new TokenList(label, (n) => tab.inspect(this, n), { holds: true });
    this.list.element.addEventListener("click", () => tab.inspect(this, this.list.selected));
    this.note = make("p", { className: "status", attributes: { role: "status" } });
    this.copy = copier("Copy the text", () => this.prompt + this.text);
    this.element = make("div", {}, make("h3", { textContent: `${plain(this.values.model)}, temperature ${this.values.temperature}` }),
      this.prompt ? make("p", { className: "prompt", textContent: this.prompt, attributes: { dir: "auto" } }) : null,
      this.list.element, this.note, this.copy);
  }

  /** Write on after the tokens that are there. */
  async write(seed, most) {
    this.abort?.abort();
    const mine = this.abort = new AbortController(), began = performance.now(), before = this.tokens.length;
    this.note.textContent = "Writing ...";
    this.request = { ...this.values, prompt: this.prompt + this.text, seed, max_tokens: Math.max(1, most - before) };
    this.tab.showCommands();
    const body = { ...this.request, logprobs: LIKELIEST, stream: true };
    let reason = "";
    try {
      for await (const { choices } of stream("/v1/completions", body, mine.signal)) {
        for (const choice of choices) {
          this.take(choice);
          reason = choice.finish_reason ?? reason;
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        if (this.abort === mine) this.abort = null;
        throw error;
      }
      reason = "stopped";
    }
    if (this.abort !== mine) return;
    this.abort = null;
    const written = this.tokens.length - before, rate = written / ((performance.now() - began) / 1000);
    this.note.textContent = `${written} token${written === 1 ? "" : "s"}, ${rate.toFixed(0)} a second.`
      + (reason === "stop" ? " The text ends here." : reason === "stopped" ? " Stopped." : "");
  }

  /** Add the tokens of a part of the stream. */
  take({ text, logprobs }) {
    if (!logprobs?.tokens) return;
    let rest = text;
    logprobs.tokens.forEach((token, i) => {
      // what a token adds to the text: bytes of a character that is not whole add nothing
      const shown = rest.startsWith(token) ? token : i === logprobs.tokens.length - 1 ? rest : "";
      rest = rest.slice(shown.length);
      const p = Math.exp(logprobs.token_logprobs[i]);
      const likeliest = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([name, value]) => ({ name, p: Math.exp(value) }))
        .sort((a, b) => b.p - a.p);
      this.tokens.push({ name: token, text: shown, p, likeliest });
      this.list.add(shown, p);
    });
  }

  get text() {
    return this.tokens.map(({ text }) => text).join("");
  }

  /** Replace token n by another one, and drop what follows. */
  branch(n, { name, p }) {
    const { likeliest } = this.tokens[n];
    this.abort?.abort();
    this.tokens.length = n;
    this.list.keep(n);
    this.tokens.push({ name, text: name, p, likeliest });
    this.list.add(name, p);
  }
}

export class Tab {
  constructor(app) {
    this.app = app;
    this.drafts = [];
    this.first = new Voice("Writer", 0.8);
    this.second = new Voice("Second writer", 1.2);
    this.both = make("input", { type: "checkbox", on: { change: () => { this.second.element.hidden = !this.both.checked; } } });
    this.second.element.hidden = true;
    this.prompt = make("textarea", { rows: 3, attributes: { dir: "auto" }, placeholder: "Nothing: the model begins by itself" });
    this.length = make("input", { type: "number", min: 1, max: 100000, step: 1, value: 200, required: true });
    this.seed = make("input", { type: "number", min: 0, step: 1, value: Math.floor(Math.random() * 1e6), required: true });
    this.stopButton = button("Stop", () => this.drafts.forEach(({ abort }) => abort?.abort()), { disabled: true });
    this.go = make("button", { type: "submit", textContent: "Write" });
    const another = button("Another one", () => { this.seed.value = Math.floor(Math.random() * 1e6); form.requestSubmit(); },
      { title: "The same with another seed" });
    const form = make("form", { className: "card", on: {
      submit: (event) => { event.preventDefault(); this.write(); },
      keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); } } },
    field("Beginning of a text", this.prompt, "Enter begins a new line; Ctrl+Enter writes."), this.first.element,
    make("label", { className: "check" }, this.both, " Compare with a second writer"), this.second.element,
    make("div", { className: "settings" }, field("Tokens", this.length), field("Seed", this.seed)),
    make("details", {}, make("summary", { textContent: "What do these settings do?" }), hint(WRITING), hint(CHOOSING)),
    make("div", { className: "row" }, this.go, another, this.stopButton));
    this.output = make("div", { className: "drafts" });
    this.selected = make("p", { className: "selected", attributes: { "aria-live": "polite" } });
    this.likely = make("div");
    this.details = make("aside", { className: "details", attributes: { "aria-label": "About the selected token" } }, this.selected, this.likely);
    this.commands = make("details", {}, make("summary", { textContent: "Do the same elsewhere" }));
    this.element = make("div", { className: "columns" }, make("div", {}, form),
      make("div", {}, make("div", { className: "card" }, this.output, this.details, this.commands)));
    this.hint();
  }

  async show(name) {
    const models = await this.app.chooseModel([this.first.model, this.second.model], name);
    if (!models) return;
    this.go.disabled = !models.length;
    if (!models.length) this.likely.textContent = "There are no models yet: train one in the tab Train.";
    else if (this.app.asked) await this.write(); // "Write with it"
    this.app.asked = false;
  }

  hide() { /* it goes on writing */ }

  async write() {
    this.drafts.forEach(({ abort }) => abort?.abort());
    const voices = this.both.checked ? [this.first, this.second] : [this.first];
    this.drafts = voices.map((voice, i) => new Draft(this, voice, `Text of writer ${i + 1}`));
    this.output.dataset.both = String(voices.length > 1);
    this.output.replaceChildren(...this.drafts.map(({ element }) => element));
    this.hint();
    await this.run(this.drafts);
  }

  /** Let drafts write on. */
  async run(drafts) {
    this.stopButton.disabled = false;
    await Promise.all(drafts.map((draft) => this.app.try(
      () => draft.write(Number(this.seed.value), Number(this.length.value)), draft.note)));
    this.stopButton.disabled = this.drafts.every(({ abort }) => !abort);
  }

  hint() {
    this.selected.textContent = "";
    this.likely.replaceChildren(make("p", { className: "hint", textContent: "The stronger the color of a token, the less likely "
      + "it was. Point at one, or choose it with the arrow keys, to see what else the model could have written; "
      + "a click holds it." }));
  }

  inspect(draft, n) {
    const token = draft.tokens[n];
    if (!token) return;
    this.selected.textContent = `${visible(token.text)}: ${percent(token.p)}`;
    this.likely.replaceChildren(make("p", { className: "hint", textContent: "The likeliest tokens here, with the model\u2019s own percentages (temperature 1). Choose one to write on from it." }),
      make("ol", { className: "alternatives" }, ...token.likeliest.map((other) => make("li", {}, make("button", {
        type: "button", disabled: NO_TEXT.test(other.name), data: { chosen: other.name === token.name },
        attributes: { "aria-current": other.name === token.name },
        on: { click: () => { draft.branch(n, other); draft.list.select(n); this.inspect(draft, n); this.run([draft]); } },
      }, make("span", { className: "label", textContent: visible(other.name) }),
      make("meter", { value: other.p, max: 1, attributes: { "aria-hidden": "true" } }), make("span", { textContent: percent(other.p) }))))));
  }

  /** Show commands that write the same texts: what was written last, after what stood before it. */
  showCommands() {
    this.commands.replaceChildren(this.commands.firstChild, ...this.drafts.filter(({ request }) => request).flatMap(({ request }) => {
      const { model, temperature, top_k: topK, prompt, seed, max_tokens: tokens } = request, folder = this.app.folderOf(model);
      const body = JSON.stringify({ model, prompt, max_tokens: tokens, temperature, seed, top_k: topK });
      return [
        command(`bardlet sample ${quoted(folder)} --prompt=${quoted(prompt)} --tokens ${tokens} --temperature ${temperature} `
          + `--top-k ${topK > 0 ? topK : "none"} --seed ${seed}`, "the command of bardlet"),
        command(`curl ${location.origin}/v1/completions -H "Authorization: Bearer $BARDLET_API_KEY" -H 'Content-Type: application/json' `
          + `-d ${quoted(body)}`, "the command of curl"),
        command(`bardlet.load(${JSON.stringify(folder)}).generate(${JSON.stringify(prompt)}, ${tokens}, temperature=${temperature}, `
          + `top_k=${topK > 0 ? topK : "None"}, seed=${seed})`, "the Python code")];
    }));
  }
}
