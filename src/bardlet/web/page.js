// The page of an exported model: write, chat or translate, and look at every token.

import { Model, generate, sampler, softmax } from "./forward.js";
import { Tokenizer, chatIds } from "./tokenizer.js";
import { fromBase64, unpack } from "./weights.js";
import { TokenList, alternatives, attention, lens, make, percent, plain, visible } from "./views.js";

const text = (id) => document.getElementById(id).textContent;
const frame = () => new Promise((resolve) => setTimeout(resolve));

/** Read the model out of the page. */
function load() {
  const spec = JSON.parse(text("spec"));
  const model = new Model(spec, unpack(JSON.parse(text("entries")), fromBase64(text("weights"))));
  document.getElementById("weights").remove(); // a copy that nobody needs any more
  return { spec, model, tokenizer: new Tokenizer(spec.tokenizer) };
}

/** One text that the model writes: the steps so far, and the list that shows them. */
class Answer {
  constructor(page, label) {
    this.page = page;
    this.steps = [];
    this.list = new TokenList(label, (n) => page.inspect(this, n));
  }

  get ids() {
    return this.steps.map((step) => step.id);
  }

  /** Write on until the model ends its text, `limit` tokens are there, or somebody stops it. */
  async write(prompt, source, choose, limit) {
    const { model, tokenizer, spec } = this.page;
    Object.assign(this, { prompt, source, choose, limit });
    const whole = [...prompt, ...this.ids], decoder = tokenizer.decoder();
    for (const id of this.ids) decoder.feed(id);
    const cache = source ? model.encode(source) : model.newCache();
    const mine = this.page.running = {}; // a new run ends the one before
    let paused = performance.now();
    for (const step of generate(model, whole, choose, { cache, watch: true })) {
      if (this.page.running !== mine) return;
      if (step) {
        if (spec.stop.includes(step.id)) break;
        const context = [...prompt, ...this.ids].slice(step.start);
        this.push({ ...step, context, text: decoder.feed(step.id) });
        if (this.steps.length >= limit) break;
      }
      if (performance.now() - paused > 30) {
        await frame();
        paused = performance.now();
      }
    }
    this.page.stopped();
  }

  push(step) {
    this.steps.push(step);
    this.list.add(step.text, softmax(Float64Array.from(step.logits))[step.id]);
  }

  /** Replace token n, and write on from there. */
  branch(n, id) {
    const step = this.steps[n];
    this.steps.length = n;
    this.list.keep(n);
    this.push({ ...step, id, text: this.page.tokenizer.decode([id]) });
    this.list.select(n);
    this.page.start(() => this.write(this.prompt, this.source, this.choose, this.limit));
  }
}

class Page {
  constructor({ spec, model, tokenizer }) {
    Object.assign(this, { spec, model, tokenizer, running: null, messages: [] });
    document.title = plain(spec.about.title);
    this.status = make("p", { className: "status", attributes: { role: "status" } });
    this.output = make("div", { className: "output" });
    this.details = make("aside", { className: "details", attributes: { "aria-label": "About the selected token" } },
      make("p", { className: "hint", textContent: "Point at a token, or choose it with the arrow keys, to see what else "
        + "the model could have written." }));
    const main = document.getElementById("page");
    main.replaceChildren(
      make("header", {}, make("h1", { textContent: plain(spec.about.title) }),
        ...spec.about.notes.map((textContent) => make("p", { className: "hint", textContent }))),
      this.form(), this.status, make("div", { className: "columns" }, this.output, this.details));
  }

  /** The input and the settings. */
  form() {
    const words = { write: ["Beginning of a text", "Write"], chat: ["Message", "Send"], translate: ["Sentence", "Translate"] };
    const [label, verb] = words[this.spec.mode];
    this.input = make("textarea", { id: "input", rows: 3, attributes: { dir: "auto" } });
    this.temperature = make("input", { id: "temperature", type: "number", min: 0, max: 5, step: 0.1,
      value: this.spec.mode === "translate" ? 0 : 0.8 });
    this.length = make("input", { id: "length", type: "number", min: 1, max: 100000, step: 1, value: 200 });
    this.seed = make("input", { id: "seed", type: "number", min: 0, step: 1, value: Math.floor(Math.random() * 1e6) });
    this.go = make("button", { type: "submit", textContent: verb });
    this.stop = make("button", { type: "button", textContent: "Stop", disabled: true,
      on: { click: () => { this.running = null; this.stopped(); } } });
    const field = (name, input) => make("label", { htmlFor: input.id }, name, input);
    return make("form", {
      on: {
        submit: (event) => { event.preventDefault(); this.submit(); },
        keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.submit(); },
      },
    }, make("label", { htmlFor: "input", className: "wide" }, label, this.input),
    make("div", { className: "settings" }, field("Temperature", this.temperature), field("Most tokens", this.length),
      field("Seed", this.seed), this.go, this.stop));
  }

  submit() {
    const choose = sampler({ temperature: Number(this.temperature.value), seed: Number(this.seed.value) });
    const limit = Math.max(1, Math.floor(Number(this.length.value)) || 1), typed = this.input.value;
    if (this.spec.mode !== "write" && !typed.trim()) return this.say("Write something first.");
    if (this.spec.mode === "write") this.output.replaceChildren();
    let encoded, prompt, source = null;
    if (this.spec.mode === "chat") {
      this.remember({ role: "user", content: typed });
      encoded = chatIds(this.tokenizer, this.messages);
      prompt = encoded.ids;
      this.input.value = "";
    } else {
      encoded = this.tokenizer.encode(this.spec.mode === "translate" ? typed.trim() : typed);
      prompt = encoded.ids.length ? encoded.ids : this.spec.start;
      if (this.spec.mode === "translate") {
        source = [...encoded.ids.slice(0, this.model.context - 1), this.spec.tokenizer.special["<|endoftext|>"]];
        prompt = [this.spec.tokenizer.special["<|pad|>"]];
        this.output.replaceChildren();
      } else if (typed && this.spec.startsDocuments && prompt[0] !== this.spec.start[0]) {
        prompt = [...this.spec.start, ...prompt];
      }
    }
    const answer = this.answer = new Answer(this, this.spec.mode === "chat" ? "Answer" : "Text of the model");
    if (this.spec.mode === "write" && typed) this.output.append(make("p", { className: "prompt", textContent: typed, attributes: { dir: "auto" } }));
    this.output.append(answer.list.element);
    this.unknown = encoded.unknown;
    this.start(() => answer.write(prompt, source, choose, limit));
  }

  remember(message) {
    if (this.answer) this.messages.push({ role: "assistant", content: this.tokenizer.decode(this.answer.ids) });
    this.messages.push(message);
    this.output.append(make("p", { className: "prompt", textContent: message.content, attributes: { dir: "auto" } }));
  }

  start(work) {
    this.stop.disabled = false;
    this.began = performance.now();
    this.before = this.answer.steps.length;
    this.say("Writing ...");
    work();
  }

  stopped() {
    this.running = null;
    this.stop.disabled = true;
    const seconds = (performance.now() - this.began) / 1000, count = this.answer.steps.length - this.before;
    const left = this.unknown?.length ? ` Left out, because the model does not know them: ${this.unknown.map(visible).join(" ")}` : "";
    this.say(`${count} token${count === 1 ? "" : "s"}, ${(count / seconds).toFixed(0)} a second.${left}`);
  }

  say(message) {
    this.status.textContent = message;
  }

  /** Show what there is to know about token n of an answer. */
  inspect(answer, n) {
    const step = answer.steps[n], { tokenizer, model } = this;
    const p = softmax(Float64Array.from(step.logits))[step.id];
    this.details.replaceChildren(...[
      make("h2", { textContent: `${visible(tokenizer.label(step.id))}: ${percent(p)}` }),
      make("p", { className: "hint", textContent: "The likeliest tokens here. Choose one to write on from it." }),
      alternatives(step, tokenizer, (id) => answer.branch(n, id)),
      attention(step.look.cross, answer.source ?? [], tokenizer, "Where it looked in the source"),
      attention(step.look.attention, step.context, tokenizer, "Where each head looked"),
      lens(step, model, tokenizer),
    ].filter(Boolean));
  }
}

/** Begin once the page is drawn: a large model takes a moment. */
async function begin() {
  await frame();
  globalThis.page = new Page(load());
}

if (typeof document !== "undefined") begin();
