// A training in progress: state, curve, samples, and what can be done with it.

import { LineChart } from "../charts.js";
import { get } from "./api.js";
import { button, count, duration, loss, make, plain } from "./parts.js";

/** The lines of a run for a chart, in nats per character where the server knows how. */
export function linesOf(progress, prefix = "") {
  const scale = (points) => points.map(([x, y]) => [x, y / progress.per_token]);
  const { train_loss: train = [], val_loss: val = [], reward } = progress.points ?? {};
  const held = reward ? val.map(([x, y]) => [x, -y]) : scale(val); // reinforcement learning evaluates a reward
  return [{ name: `${prefix}training`, points: reward ?? scale(train), kind: "thin" }, { name: `${prefix}held-out`, points: held }];
}

/** Everything that a chart of a run shows. */
export function chartOf(progress) {
  const characters = progress.unit === "character";
  return {
    lines: linesOf(progress), unit: progress.points?.reward ? "mean reward of an answer" : `nats per ${progress.unit}`, end: progress.planned,
    levels: characters && progress.bigram ? [{ name: "counting letter pairs (bigram)", value: progress.bigram }] : [],
    band: characters && progress.band ? { name: "forecast", values: progress.band } : null,
  };
}

/** The seconds until a run ends: by the time of its steps so far, or by its budget of minutes, which may end it sooner. */
function secondsLeft({ last, planned, step, minutes, now }, started) {
  const bySteps = last.seconds && last.step ? (planned - step) * last.seconds / last.step : Infinity;
  return Math.min(bySteps, minutes && started ? Math.max(0, started + 60 * minutes - now) : Infinity);
}

/** Figures of later stages, with the titles of their charts. */
const OTHERS = { accuracy: "share of right or preferred answers", kl: "KL from the model before, in nats an answer" };
const MEANINGS = [
  ["Loss", "How surprised the model is by the next character or token, on average. 0 would be a perfect guess; lower is better. "
    + "It is measured in nats: a loss of 0.69 means that the model is as unsure as before a coin toss."],
  ["Training, held-out", "The loss on the text it learns from, and on a tenth that it never sees. While both fall, it learns. When "
    + "only the first one falls, it learns by heart."],
  ["Counting letter pairs", "The loss of a table that knows only which letter follows which: the lecture\u2019s first model, the bigram."],
  ["Forecast", "Where the held-out loss should end, from measurements of the text and of this machine."],
  ["Step", "The model reads a batch of the text, and is corrected once."]];

export class Progress {
  /** name: of the run. actions: elements beside its name. started: when its job started, if it is known. */
  constructor(name, actions = [], started = null) {
    Object.assign(this, { name, started });
    this.chart = new LineChart(`Losses of ${plain(name)}`);
    this.chart.element.hidden = true; // until there is a point
    this.others = Object.entries(OTHERS).map(([figure, title]) => [figure, new LineChart(title, { height: 180 })]);
    for (const [, { element }] of this.others) element.hidden = true;
    this.facts = make("p", { className: "facts" });
    this.words = make("p", { className: "reads" });
    this.meter = make("progress", { max: 1, value: 0, attributes: { "aria-label": "Share of the steps" } });
    this.samples = make("div", { className: "samples" });
    this.glossary = make("details", { hidden: true }, make("summary", { textContent: "What do these figures mean?" }),
      make("dl", {}, ...MEANINGS.flatMap(([word, meaning]) => [make("dt", { textContent: word }), make("dd", { textContent: meaning })])));
    this.element = make("article", { className: "card" }, make("div", { className: "row" },
      make("h2", { textContent: plain(name) }), ...actions), this.meter, this.words, this.facts, this.chart.element, ...this.others.map(([, { element }]) => element), this.glossary, this.samples);
  }

  /** Keep what a reader opened in a view before. */
  keep(before) {
    this.now = { ...before.now, version: undefined };
    this.glossary.open = before.glossary.open;
  }

  /** Fetch what is new, and show it. Return the progress. */
  async update() {
    const news = await get("/studio/progress", { run: this.name, version: this.now?.version });
    this.now = { ...news, points: news.points ?? this.now?.points };
    this.glossary.hidden = this.chart.element.hidden = !Object.values(this.now.points ?? {}).some((points) => points.length);
    if (news.points) {
      this.chart.show(chartOf(this.now));
      for (const [figure, chart] of this.others) {
        const points = this.now.points[figure] ?? [];
        chart.element.hidden = !points.length;
        if (points.length) chart.show({ lines: [{ name: figure, points }], unit: chart.label, end: this.now.planned });
      }
    }
    this.describe();
    return this.now;
  }

  describe() {
    const { run, step, planned, last, unit, per_token: scale, reads_like: reads, samples, evaluated: part } = this.now;
    const running = run.state === "running", val = run.val_loss, left = secondsLeft(this.now, this.started);
    this.meter.value = planned ? Math.min(1, step / planned) : 0;
    this.meter.hidden = !running;
    this.facts.textContent = [
      { running: "training", finished: "finished", stopped: "stopped", damaged: "damaged" }[run.state],
      planned ? `step ${count(step)} of ${running ? "about " : ""}${count(planned)}` : "",
      running && Number.isFinite(left) ? `about ${duration(left)} left` : "",
      val === null ? "" : `held-out loss ${loss(val / scale)} nats per ${unit}`
        + (part ? ` (on ${count(part[0])} of ${count(part[1])} tokens)` : ""),
      last.tokens_per_second ? `${count(Math.round(last.tokens_per_second))} tokens a second` : ""].filter(Boolean).join(" \u00b7 ");
    this.words.textContent = reads ? `Reads like: ${reads}.` : "";
    this.showSamples(samples);
  }

  /** Show the newest sample, and a slider back to the first. */
  showSamples(samples) {
    if (!samples.length || samples.at(-1).step === this.list?.at(-1).step) return;
    const atEnd = !this.slider || this.slider.value === this.slider.max;
    if (!this.slider) {
      this.text = make("p", { className: "sample", tabIndex: 0, attributes: { dir: "auto", role: "region", "aria-label": "Text of the sample" } });
      this.when = make("span", { className: "hint" });
      this.slider = make("input", { type: "range", min: 0, value: 0, on: { input: () => { this.text.setAttribute("aria-live", "polite"); this.turn(); } },
        attributes: { "aria-label": "Sample" } });
      this.samples.append(make("h3", { textContent: "What it writes" }),
        make("div", { className: "row" }, this.slider, this.when), this.text);
    }
    this.list = samples;
    this.slider.max = samples.length - 1;
    if (atEnd) this.slider.value = samples.length - 1;
    this.text.setAttribute("aria-live", "off"); // read out when the slider is moved, not while it trains
    this.turn();
  }

  turn() {
    const sample = this.list[Number(this.slider.value)];
    this.when.textContent = `after step ${count(sample.step)}`;
    this.slider.setAttribute("aria-valuetext", this.when.textContent);
    this.text.textContent = sample.text;
  }
}

/** Links that go on with a finished or running model. */
export const uses = (app, name, command) => {
  const tab = ["sft", "dpo", "kto", "ppo", "grpo"].includes(command) ? "chat" : command === "translate" ? "translate" : "write";
  const use = button({ chat: "Chat with it", translate: "Translate with it", write: "Write with it" }[tab], () => { app.asked = true; app.go(tab, name); });
  return tab === "translate" ? [use] : [use, button("Look inside", () => app.go("inside", name))];
};
