// The tab Learn: a lesson for each rung of the ladder, with the reader's own model of it to play with.

import { attention } from "../views.js";
import { Failure, get, post, stream } from "./api.js";
import { button, command, copier, every, field, hint, loss, make, percent, plain, quoted, visible } from "./parts.js";

/** The likeliest next tokens that the server gives. */
const LIKELIEST = 20;
/** Tokens that it writes, and the seed. */
const LENGTH = 120, SEED = 1;
const SENTENCE = "To be, or not to be, that is the question";
const heading = (textContent) => make("h3", { textContent });

/** Show Markdown of the course: paragraphs, lists, code, and `code`, *emphasis* and **importance** in a line. */
export function markdown(text) {
  const blocks = [];
  for (const part of text.split(/\n{2,}/)) {
    const last = blocks.at(-1);
    if (/^```/.test(part) || last?.open) {
      if (!last?.open) blocks.push({ open: true, code: part.replace(/^```\w*\n?/, "") });
      else last.code += `\n\n${part}`;
      const block = blocks.at(-1);
      if (/\n?```\s*$/.test(block.code)) Object.assign(block, { open: false, code: block.code.replace(/\n?```\s*$/, "") });
    } else if (/^ {4}/.test(part)) blocks.push({ code: part.replace(/^ {4}/gm, "") });
    else if (/^(- |\d+\. )/.test(part)) blocks.push({ items: part.split(/\n(?=- |\d+\. )/).map((item) => item.replace(/^(- |\d+\. )/, "")) });
    else blocks.push({ text: part });
  }
  return blocks.map(({ code, items, text: line }) => {
    if (code !== undefined) return make("pre", { tabIndex: 0, attributes: { role: "region", "aria-label": "Code" }, textContent: code });
    if (items) return make("ul", {}, ...items.map((item) => make("li", {}, ...spans(item))));
    return make("p", {}, ...spans(line));
  });
}

/** Return the parts of a line: text, code, emphasis. */
function spans(line) {
  return line.replaceAll("\n", " ").split(/(`[^`]+`|\*\*[^*]+\*\*|\*[^*\s][^*]*\*)/).filter(Boolean).map((part) => {
    if (part.startsWith("`")) return make("code", { textContent: part.slice(1, -1) });
    if (part.startsWith("**")) return make("strong", { textContent: part.slice(2, -2) });
    return part.startsWith("*") && part.length > 2 ? make("em", { textContent: part.slice(1, -1) }) : part;
  });
}

/** The next token of a text: its likeliest candidates, whose bars a temperature changes. */
class NextToken {
  constructor() {
    this.slider = make("input", { type: "range", min: 0.1, max: 2, step: 0.1, value: 1, on: { input: () => this.draw() } });
    this.said = make("p", { className: "hint", attributes: { "aria-live": "polite" } });
    this.bars = make("ol", { className: "neighbors" });
    this.element = make("section", {}, heading("What comes next?"), field("Temperature", this.slider), this.said, this.bars);
    this.candidates = [];
  }

  show(candidates) {
    this.candidates = candidates;
    this.draw();
  }

  draw() {
    const temperature = Number(this.slider.value);
    const weights = this.candidates.map(({ p }) => p ** (1 / temperature)), total = weights.reduce((a, b) => a + b, 0) || 1;
    this.slider.setAttribute("aria-valuetext", String(temperature));
    this.said.textContent = `At temperature ${temperature}, among the ${this.candidates.length} likeliest tokens. A low one leaves only `
      + "the best; a high one makes them alike.";
    this.bars.replaceChildren(...this.candidates.slice(0, 10).map(({ name }, n) => make("li", {},
      make("span", { className: "label", textContent: visible(name) }),
      make("meter", { value: weights[n] / total, max: 1, attributes: { "aria-hidden": "true" } }),
      make("span", { textContent: percent(weights[n] / total) }))));
  }
}

/** A model of a rung to play with. */
class Playground {
  constructor(app, rung) {
    Object.assign(this, { app, rung, model: rung.model });
    this.text = make("input", { value: SENTENCE, maxLength: 2000, required: true, attributes: { dir: "auto" } });
    this.status = make("p", { className: "status", attributes: { role: "status" } });
    this.looked = make("div");
    this.next = new NextToken();
    this.written = make("div");
    this.all = make("div", { attributes: { "aria-live": "polite" } });
    const form = make("form", { on: { submit: (event) => { event.preventDefault(); this.play(); } } },
      field("A sentence", this.text), make("div", { className: "row" }, make("button", { type: "submit", textContent: "Let it read" }),
        button("Every rung reads it", () => this.climb()), button("Look inside", () => app.go("inside", rung.run))));
    this.element = make("section", { className: "card" }, make("h2", { textContent: "Your own model of this rung" }), form, this.status,
      this.looked, this.next.element, this.written, this.all);
    this.next.element.hidden = true;
  }

  /** Take another sentence if the text of this model lacks a character of ours: one that it writes itself. */
  async choose() {
    try {
      await post("/tokenize", { model: this.model, text: SENTENCE });
    } catch (error) {
      if (error.status !== 400) throw error;
      const { choices } = await post("/v1/completions", { model: this.model, prompt: "", max_tokens: SENTENCE.length, seed: SEED, temperature: 0.5 });
      this.text.value = choices[0].text.trim().replace(/\s+/g, " ") || this.text.value;
    }
  }

  async play() {
    if (this.text.value === SENTENCE) await this.app.try(() => this.choose());
    const text = this.text.value;
    this.status.textContent = "Reading ...";
    const done = await this.app.try(async () => {
      const seen = this.rung.attends ? await post("/studio/inside", { model: this.model, text, tokens: 0 }) : null;
      if (seen) this.showAttention(seen);
      await this.write(text);
      return true;
    }, this.status);
    if (done) this.status.textContent = "";
  }

  showAttention({ tokens, attention: maps, cut }) {
    const at = make("input", { type: "range", min: 0, max: tokens.length - 1, value: tokens.length - 1 }), chosen = {};
    const place = make("div"), label = { label: (each) => each.text || each.name };
    const draw = () => {
      const n = Number(at.value);
      at.setAttribute("aria-valuetext", tokens[n].name);
      place.replaceChildren(attention(maps.map((heads) => heads.map((rows) => rows[n])), tokens.slice(0, n + 1), label,
        `Where it looked back from \u201c${visible(tokens[n].name)}\u201d`, chosen));
    };
    at.addEventListener("input", draw);
    draw();
    this.looked.replaceChildren(field("Position in the sentence", at, cut ? `This rung reads only the last ${tokens.length} tokens.` : ""), place);
  }

  /** Show what comes next, and a text at the temperature of the slider. */
  async write(prompt) {
    const temperature = Number(this.next.slider.value);
    let text = "", first = null;
    for await (const { choices } of stream("/v1/completions", { model: this.model, prompt, max_tokens: LENGTH, temperature, seed: SEED,
      top_k: -1, logprobs: LIKELIEST, stream: true })) {
      for (const choice of choices) {
        text += choice.text;
        first ??= choice.logprobs?.top_logprobs?.[0] ?? null;
        this.showText(prompt, text, temperature);
      }
    }
    if (first) {
      this.next.element.hidden = false;
      this.next.show(Object.entries(first).map(([name, value]) => ({ name, p: Math.exp(value) })).sort((a, b) => b.p - a.p));
    }
  }

  showText(prompt, text, temperature) {
    this.written.replaceChildren(heading("It writes"), make("p", { className: "sample", attributes: { dir: "auto" } },
      make("strong", { textContent: prompt }), text),
    command(`bardlet sample ${quoted(this.app.folderOf(this.model))} --prompt=${quoted(prompt)} --tokens ${LENGTH} --temperature ${temperature} --top-k none --seed ${SEED}`,
      "the command of bardlet"));
  }

  async climb() {
    this.all.replaceChildren(hint("Reading ..."));
    const answer = await this.app.try(() => post("/studio/rungs", { model: this.model, text: this.text.value, tokens: 40 }));
    if (!answer) return this.all.replaceChildren();
    this.all.replaceChildren(heading("The same sentence on every rung"), make("div", { className: "scroll", tabIndex: 0,
      attributes: { role: "region", "aria-label": "The same sentence on every rung" } }, make("table", { className: "ladder" },
      make("thead", {}, make("tr", {}, ...["rung", "loss", "it writes on"].map((textContent) => make("th", { scope: "col", textContent })))),
      make("tbody", {}, ...answer.rungs.map((rung) => make("tr", {}, make("th", { scope: "row", textContent: `${rung.number}. ${rung.name}` }),
        make("td", { textContent: loss(rung.loss) }), make("td", { textContent: plain(rung.continuation) })))))));
  }
}

export class Tab {
  constructor(app) {
    Object.assign(this, { app, rungs: [], chosen: 1 });
    this.list = make("ol", { className: "rungs", attributes: { "aria-label": "Rungs" } });
    this.climbing = make("div", { attributes: { "aria-live": "polite" } });
    this.lesson = make("article");
    this.element = make("div", { className: "columns" }, make("section", { className: "card" }, make("h2", { textContent: "The ladder" }),
      hint("The lecture \u201cLet\u2019s build GPT\u201d grows a GPT one idea at a time. Each idea is a rung here: read it, train it, and "
        + "play with your own model of it."), this.climbing, this.list), this.lesson);
  }

  async show(about) {
    if (/^\d+$/.test(about)) this.chosen = Number(about);
    await this.refresh();
    if (this.shown !== this.chosen) await this.open(this.chosen);
    this.stop ??= every(3, () => this.refresh());
  }

  hide() {
    this.stop?.();
    this.stop = null;
  }

  /** Fetch the rungs and the ladder's job. */
  async refresh() {
    await this.app.try(async () => {
      const [{ rungs }, { jobs }, { models }] = await Promise.all([get("/studio/lessons"), get("/studio/jobs"), get("/studio/models")]);
      this.app.places = new Map(models.map(({ id, folder }) => [id, folder]));
      for (const rung of rungs) Object.assign(rung, { model: models.find(({ run }) => run && run === rung.run)?.id ?? null });
      const job = jobs.find(({ kind }) => kind === "ladder"), key = JSON.stringify([rungs, job?.id, job?.state]);
      if (key === this.key) return;
      this.key = key;
      const before = this.rungs.find(({ number }) => number === this.chosen)?.run;
      this.rungs = rungs;
      this.draw(job);
      if (this.shown === this.chosen && rungs.find(({ number }) => number === this.chosen).run !== before) await this.open(this.chosen);
    });
  }

  draw(job) {
    const busy = ["waiting", "running"].includes(job?.state), missing = (from, to) => this.rungs.some(({ number, run }) =>
      number >= from && number <= to && !run);
    const climb = (rungs) => this.app.try(async () => { await post("/studio/ladder", { rungs }); await this.refresh(); });
    this.climbing.replaceChildren(busy ? make("div", { className: "row" }, make("span", { className: "badge running",
      textContent: job.state === "waiting" ? "in the queue" : "training the rungs" }),
    button("Stop", () => this.app.try(() => post(`/studio/jobs/${job.id}/stop`)))) : make("div", { className: "row" },
      ...(missing(1, 7) ? [button("Train rungs 1 to 7 (a few minutes)", () => climb("1-7"))]
        : missing(8, 13) ? [button("Train rungs 8 to 13 (two minutes each)", () => climb("8-13"))] : [])),
    ...(job && job.state === "failed" ? [make("p", { className: "note", textContent: job.message })] : []),
    ...(job ? [command(job.command)] : []));
    const focused = document.activeElement?.closest("ol") === this.list ? document.activeElement.dataset.number : null;
    this.list.replaceChildren(...this.rungs.map((rung) => make("li", {}, button("", () => this.app.go("learn", String(rung.number)),
      { className: "link", data: { number: rung.number }, attributes: { "aria-current": String(rung.number === this.chosen) },
        textContent: `${rung.number}. ${rung.title}` }), make("span", { className: "hint", textContent: rung.loss === null ? rung.adds
      : `loss ${rung.loss.toFixed(3)}${rung.verdict ? `, ${rung.verdict}` : ""}` }))));
    if (focused) this.list.querySelector(`[data-number="${focused}"]`)?.focus();
  }

  /** Show the lesson of a rung. */
  async open(number) {
    const rung = this.rungs.find((each) => each.number === number);
    if (!rung) throw new Failure(`There is no rung ${number}.`);
    const lesson = await this.app.try(() => get(`/studio/lessons/${number}`));
    if (!lesson) return;
    this.shown = this.chosen = number;
    for (const each of this.list.querySelectorAll("button")) each.setAttribute("aria-current", String(Number(each.dataset.number) === number));
    const row = (name, value) => make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value }));
    const figures = [["in the lecture", rung.lecture?.toFixed(2)], ["normal here", rung.band && `${rung.band[0].toFixed(3)} to ${rung.band[1].toFixed(3)}`],
      ["yours", rung.loss === null ? "not trained yet" : `${rung.loss.toFixed(4)}${rung.verdict && `: ${rung.verdict}`}`]].filter(([, value]) => value);
    const play = rung.model ? new Playground(this.app, rung) : null;
    this.lesson.replaceChildren(make("section", { className: "card" }, make("h2", { textContent: `${number}. ${lesson.title}` }),
      ...markdown(lesson.what), make("h3", { textContent: "Why" }), ...markdown(lesson.why),
      make("h3", { textContent: "Is my loss normal?" }), make("table", {}, make("tbody", {}, ...figures.map(([name, value]) => row(name, value))))),
    play?.element ?? make("p", { className: "card hint", textContent: "Train the rungs, and your own model of this one appears here." }),
    make("section", { className: "card" }, make("details", {}, make("summary", { textContent: "The code of this rung" }),
      make("pre", { tabIndex: 0, attributes: { role: "region", "aria-label": "Code" }, textContent: lesson.code }), copier("Copy", () => lesson.code)),
    make("details", {}, make("summary", { textContent: "Its settings" }), make("pre", { tabIndex: 0, attributes: { role: "region", "aria-label": "Settings" }, textContent: lesson.settings })),
    make("h3", { textContent: "Write it yourself" }), hint("The first command copies a starter file for each rung, which never replaces yours. "
      + "Complete the one of this rung. The second command tests it."), ...lesson.commands.map((line) => command(line)),
    ...(lesson.exercise ? [make("h3", { textContent: "Exercise" }), ...markdown(lesson.exercise),
      hint("The answer is on the page of this rung in the course, which make docs builds.")] : []),
    make("div", { className: "row" }, ...[[number - 1, "Previous rung"], [number + 1, "Next rung"]].filter(([to]) => this.rungs.some((each) => each.number === to))
      .map(([to, textContent]) => button(textContent, () => this.app.go("learn", String(to)))))));
    if (play) await play.play();
  }
}
