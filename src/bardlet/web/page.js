// The page of an exported model: write, chat or translate, and look at every token.

import { Model, sampler } from "./forward.js";
import { Tokenizer } from "./tokenizer.js";
import { chatPrompt, promptIds, translationSources } from "./prompts.js";
import { fromBase64, unpack } from "./weights.js";
import { Answer, Looks, frame, pauses } from "./answer.js";
import { TokenList, alternatives, attention, lens, make, percent, plain, visible } from "./views.js";

const text = (id) => document.getElementById(id).textContent;

/** Read the model out of the page. */
function load() {
  const spec = JSON.parse(text("spec"));
  const model = new Model(spec, unpack(JSON.parse(text("entries")), fromBase64(text("weights"))));
  document.getElementById("weights").remove(); // a copy that nobody needs any more
  return { spec, model, tokenizer: new Tokenizer(spec.tokenizer) };
}

/**
 * answers: the texts that the page shows, in order. answer: the one that was written last. running: a token of the run
 * that is writing, or null; a new run ends the one before. notices: sentences about the text that was typed.
 */
class Page {
  constructor({ spec, model, tokenizer }) {
    Object.assign(this, { spec, model, tokenizer, running: null, answers: [], answer: null, notices: [] });
    this.looks = new Looks(model);
    document.title = plain(spec.about.title);
    this.status = make("p", { className: "status", attributes: { role: "status" } });
    this.output = make("div", { className: "output" });
    this.details = make("aside", { className: "details", attributes: { "aria-label": "About the selected token" } });
    this.form = this.makeForm();
    document.getElementById("page").replaceChildren(
      make("header", {}, make("h1", { textContent: plain(spec.about.title) }),
        ...spec.about.notes.map((textContent) => make("p", { className: "hint", textContent }))),
      this.form, this.status, make("div", { className: "columns" }, this.output, this.details));
    this.hint();
  }

  /** Return the input and the settings. */
  makeForm() {
    const words = { write: ["Beginning of a text", "Write"], chat: ["Message", "Send"],
      translate: ["Sentences, one on each line", "Translate"] };
    const translates = this.spec.mode === "translate", [label, verb] = words[this.spec.mode];
    this.input = make("textarea", { id: "input", rows: 3, attributes: { dir: "auto" } });
    this.temperature = make("input", { id: "temperature", type: "number", min: 0, max: 5, step: 0.1,
      value: translates ? 0 : 0.8 });
    this.length = make("input", { id: "length", type: "number", min: 1, max: 100000, step: 1, value: 200 });
    this.seed = make("input", { id: "seed", type: "number", min: 0, step: 1, value: Math.floor(Math.random() * 1e6) });
    this.go = make("button", { type: "submit", textContent: verb });
    this.stop = make("button", { type: "button", textContent: "Stop", disabled: true,
      on: { click: () => this.interrupt() } });
    const field = (name, input) => make("label", { htmlFor: input.id }, name, input);
    const form = make("form", {
      on: {
        submit: (event) => { event.preventDefault(); this.submit(); },
        keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); },
      },
    }, make("label", { htmlFor: "input", className: "wide" }, label, this.input),
    make("div", { className: "settings" }, field("Temperature", this.temperature),
      translates ? null : field("Most tokens", this.length), field("Seed", this.seed), this.go, this.stop));
    return form;
  }

  // ---------------------------------------------------------------- writing

  /** Write what the form asks for. */
  submit() {
    const typed = this.input.value, tokens = Math.max(1, Math.floor(Number(this.length.value)) || 1);
    if (this.spec.mode !== "write" && !typed.trim()) return this.say("Write something first.");
    this.interrupt();
    this.choose = sampler({ temperature: Number(this.temperature.value), seed: Number(this.seed.value) });
    this.notices = [];
    try {
      this[this.spec.mode](typed, tokens);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      return this.say(error.message);
    }
    this.run();
  }

  write(typed, limit) {
    const { ids, unknown } = promptIds(this.tokenizer, typed, this.spec);
    this.clear();
    if (typed) this.quote(typed);
    this.add("Text of the model", { prompt: ids, limit });
    this.leaveOut(unknown);
  }

  chat(typed, tokens) {
    const messages = [...this.messages, { role: "user", content: typed }];
    const { ids, unknown, forgotten, limit } = chatPrompt(this.tokenizer, messages, this.model.context, tokens);
    this.quote(typed);
    this.add("Answer", { prompt: ids, limit, question: typed });
    this.input.value = "";
    if (forgotten) this.notices.push(`The first ${forgotten} messages no longer fit in the model's window.`);
    this.leaveOut(unknown);
  }

  translate(typed) {
    const lines = translationSources(this.tokenizer, typed, this.spec), cut = lines.findIndex((line) => line?.cut);
    this.clear();
    lines.forEach((line, n) => {
      if (line) this.add(`Translation of line ${n + 1}`, { ...line, prompt: [this.spec.pad] }).classList.add("line");
      else this.output.append(make("p", { className: "line" }));
    });
    const more = lines.filter((line) => line?.cut).length - 1;
    if (cut >= 0) {
      this.notices.push(`Line ${cut + 1}${more ? ` and ${more} more` : ""}: longer than the ${this.model.context} tokens `
        + "that the model reads; only its beginning is translated.");
    }
    this.leaveOut([...new Set(lines.flatMap((line) => line?.unknown ?? []))]);
  }

  /** The conversation, as it stands on the page. */
  get messages() {
    return this.answers.flatMap((answer) => [{ role: "user", content: answer.question },
      { role: "assistant", content: answer.text }]);
  }

  clear() {
    this.answers = [];
    this.output.replaceChildren();
    this.hint();
  }

  quote(typed) {
    this.output.append(make("p", { className: "prompt", textContent: typed, attributes: { dir: "auto" } }));
  }

  leaveOut(unknown) {
    if (unknown.length) this.notices.push(`Left out, because the model does not know them: ${unknown.map(visible).join(" ")}`);
  }

  /** Add an answer that is to be written, and return its element. */
  add(label, facts) {
    const { model, tokenizer, looks, choose } = this;
    const list = new TokenList(label, (n) => this.inspect(answer, n));
    const answer = new Answer({ model, tokenizer, looks, list, choose, ...facts });
    this.answers.push(answer);
    this.output.append(list.element);
    return list.element;
  }

  /** Write on at token n of an answer from another token. A conversation goes on from there, too. */
  branch(answer, n, token) {
    if (!this.answers.includes(answer) || n >= answer.steps.length) return;
    this.notices = [];
    if (this.spec.mode === "chat" && answer !== this.answers.at(-1)) {
      this.answers.length = this.answers.indexOf(answer) + 1;
      while (this.output.lastChild !== answer.list.element) this.output.lastChild.remove();
      this.notices.push("The conversation goes on from here; the messages after it are gone.");
    }
    answer.branch(n, token);
    this.answer = answer;
    if (answer.steps.length) answer.list.select(answer.steps.length - 1);
    else this.hint();
    this.run();
  }

  /** Write all answers that are not finished. */
  async run() {
    const mine = this.running = {};
    this.stop.disabled = false;
    this.began = performance.now();
    this.before = this.count();
    this.say("Writing ...");
    for (const answer of this.answers.filter((each) => !each.finished)) {
      this.answer = answer;
      await answer.write(() => this.running === mine);
      if (this.running !== mine) return;
    }
    this.done();
  }

  /** End the run, if there is one, and leave its texts as they are. */
  interrupt() {
    if (!this.running) return;
    this.answers.forEach((answer) => answer.finish());
    this.done();
  }

  done() {
    this.running = null;
    this.stop.disabled = true;
    const seconds = (performance.now() - this.began) / 1000, count = this.count() - this.before;
    const written = count ? `${count} token${count === 1 ? "" : "s"}, ${(count / seconds).toFixed(0)} a second.`
      : "The text ends here.";
    this.say([written, ...this.notices].join(" "));
  }

  count() {
    return this.answers.reduce((sum, answer) => sum + answer.steps.length, 0);
  }

  say(message) {
    this.status.textContent = message;
  }

  // ---------------------------------------------------------------- looking at a token

  hint() {
    this.inspected = null;
    this.details.replaceChildren(make("p", { className: "hint", textContent: "Point at a token, or choose it with the "
      + "arrow keys, to see what else the model could have written." }));
    this.views = make("div", { className: "looks" });
  }

  /** Show token n of an answer: its alternatives at once; then, unless another token is chosen, what the model did. */
  async inspect(answer, n) {
    const mine = this.inspected = {}, alive = () => this.inspected === mine;
    const step = answer.steps[n], { tokenizer, model } = this, pause = pauses(30);
    this.views.setAttribute("aria-busy", "true");
    this.details.replaceChildren(
      make("h2", { textContent: `${visible(tokenizer.label(step.id))}: ${percent(step.p)}` }),
      make("p", { className: "hint", textContent: "The likeliest tokens here. Choose one to write on from it." }),
      alternatives(step, tokenizer, (token) => this.branch(answer, n, token)), this.views);
    const context = answer.context(n);
    await frame();
    const look = alive() && await answer.look(n, alive);
    if (!look || !alive()) return;
    const [section, rows] = lens(step, look.stream, model, tokenizer);
    this.views.replaceChildren(...[
      attention(look.cross, answer.source ?? [], tokenizer, "Where it looked in the source"),
      attention(look.attention, context, tokenizer, "Where each head looked"), section].filter(Boolean));
    this.views.removeAttribute("aria-busy");
    for (const row of rows) {
      await pause();
      if (!alive()) return;
    }
  }
}

/** Begin once the page is drawn: a large model takes a moment. */
async function begin() {
  await frame();
  globalThis.page = new Page(load());
}

if (typeof document !== "undefined") begin();
