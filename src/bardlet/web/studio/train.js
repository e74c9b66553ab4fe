// The tab Train: a text goes in, minutes are chosen, the plan is shown; then it trains before your eyes.

import { Failure, get, post, upload } from "./api.js";
import { button, bytes, command, count, every, field, fill, hint, make, menu, plain } from "./parts.js";
import { Progress, uses } from "./training.js";

const KINDS = [["text", "a text: write like it"], ["pairs", "sentences and their translations"],
  ["conversations", "conversations: answer like them"], ["preferences", "better and worse answers"]];
const STATES = { waiting: "waiting", running: "training", done: "finished", failed: "failed", stopped: "stopped", interrupted: "cut off" };
/** Ended jobs that are listed below the newest. */
const EARLIER = 5;
const MINUTES = [1, 3, 10, 30, 60];
/** What to expect of a text with at most so many characters. */
const LENGTHS = [[30_000, "A few pages: one minute gives their sound and layout, with many invented words."],
  [300_000, "As long as a story: in a few minutes, many of the words will be real."],
  [3_000_000, "As long as a book or two: ten minutes give real words and names, in sentences that mean little."],
  [Infinity, "A shelf of books: an hour or more gives sentences."]];

export class Tab {
  constructor(app) {
    this.app = app;
    this.files = [];
    this.makeForm();
    this.current = make("div", {}, make("p", { className: "card hint", textContent: "Your training appears here: its losses while "
      + "they fall, and what the model writes on the way." }));
    this.queue = make("div");
    this.element = make("div", { className: "columns" }, make("div", {}, this.form), make("div", {}, this.current, this.queue));
  }

  async show() {
    await this.app.try(() => this.refresh());
    this.stop ??= every(1, () => this.watch());
  }

  hide() {
    this.stop?.();
    this.stop = null;
  }

  // ---------------------------------------------------------------- the form

  makeForm() {
    const { app } = this;
    this.picker = make("input", { type: "file", multiple: true, hidden: true, on: { change: () => this.take(this.picker.files) } });
    const drop = make("div", { className: "drop", on: {
      dragover: (event) => { event.preventDefault(); drop.dataset.over = "true"; },
      dragleave: () => { drop.dataset.over = "false"; },
      drop: (event) => { event.preventDefault(); drop.dataset.over = "false"; this.take(event.dataTransfer.files); },
    } }, make("p", { textContent: "Drop a text here, or" }), this.chooser = button("Choose a file", () => this.picker.click()), this.picker);
    this.pasted = make("textarea", { rows: 3, attributes: { dir: "auto" }, placeholder: "Paste a text" });
    const paste = button("Use this text", () => app.try(() => this.usePasted()));
    this.known = menu([["", "Choose ..."]], "", () => { if (this.known.value) this.add(this.known.value); this.known.value = ""; });
    this.chosen = make("ul", { className: "files", attributes: { "aria-label": "Chosen texts" } });
    this.progress = make("p", { className: "status", attributes: { role: "status" } });
    this.reading = make("section", { attributes: { "aria-live": "polite", "aria-label": "What was read" } });
    this.minutes = make("input", { type: "number", min: 0.2, max: 100000, step: "any", value: 3 });
    const chips = make("div", { className: "chips" }, ...MINUTES.map((n) => button(`${n} min`, () => { this.minutes.value = n; mark(); stale(); },
      { data: { minutes: n } })));
    const mark = () => [...chips.children].forEach((each) => each.setAttribute("aria-pressed", String(each.dataset.minutes === this.minutes.value)));
    this.minutes.addEventListener("input", mark);
    mark();
    this.kind = menu(KINDS, "text", () => { this.adapt(); this.preview(); });
    this.base = menu([["", "a new model"]], "");
    this.baseField = field("Start from", this.base);
    this.name = make("input", { maxLength: 80, placeholder: "from the text", autocomplete: "off", spellcheck: false });
    this.seed = make("input", { type: "number", min: 0, step: 1, placeholder: "1337" });
    this.tokenizer = menu([["auto", "chosen for the text"], ["char", "characters"], ["byte", "bytes"], ["bpe", "byte pairs (BPE)"]], "auto");
    this.model = menu([["qwen3", "qwen3"], ["gpt2", "gpt2"]], "qwen3");
    this.planCard = make("div", { attributes: { "aria-live": "polite" } });
    this.planButton = button("Show the plan", () => this.plan());
    const stale = () => { this.planning?.abort(); this.planCard.replaceChildren(); }; // the plan is one of another form
    this.form = make("form", { className: "card", on: { input: stale, change: stale, submit: (event) => { event.preventDefault(); this.start(); } } },
      make("h2", { textContent: "What should it learn from?" }), drop,
      this.pasting = make("details", {}, make("summary", { textContent: "Paste a text, or choose an example" }),
        field("Text", this.pasted), paste, field("Your earlier texts, and examples", this.known)),
      this.progress, this.chosen, this.reading,
      make("h2", { textContent: "How long may it take?" }), field("Minutes", this.minutes), chips,
      this.more = make("details", {}, make("summary", { textContent: "More settings" }), field("What kind of text is it?", this.kind), this.baseField,
        field("Name of the run", this.name), field("Tokenizer", this.tokenizer, "The pieces of text that the model reads and writes at a time."),
        field("Architecture", this.model, "qwen3 is today\u2019s design and learns more in the same time; gpt2 is the lecture\u2019s."),
        field("Seed", this.seed, "The same seed, settings and number of steps give the same model.")),
      make("div", { className: "row" }, this.trainButton = make("button", { type: "submit", textContent: "Train" }), this.planButton), this.planCard);
    this.adapt();
  }

  /** Show the settings that the kind of training has. */
  adapt() {
    const later = this.kind.value === "conversations" || this.kind.value === "preferences";
    this.baseField.hidden = this.kind.value === "pairs";
    for (const each of [this.tokenizer, this.model]) each.closest(".field").hidden = this.kind.value !== "text";
    this.base.required = later;
    this.minutes.required = !later;
    this.minutes.placeholder = later ? "as many as the data needs" : "";
    if (later) this.minutes.value = "";
    else this.minutes.value ||= 3;
  }

  /** Fetch the texts and models that can be chosen. */
  async refresh() {
    const [{ files, corpora }, { runs }] = await Promise.all([get("/studio/files"), get("/studio/runs")]);
    this.stored = new Map(files.map((file) => [file.id, file]));
    fill(this.known, [["", "Choose ..."], ...files.map(({ id }) => [id, plain(id)]), ...Object.entries(corpora).map(([id, about]) => [id, `${id}: ${about}`])], "");
    fill(this.base, [["", "a new model"], ...runs.filter(({ parameters }) => parameters).map(({ name }) => [name, plain(name)])]);
  }

  /** Upload files. */
  async take(files) {
    for (const file of files) {
      await this.app.try(async () => {
        this.progress.textContent = `Reading ${plain(file.name)} ...`;
        const stored = await upload(file.name, file, (share) => {
          this.progress.textContent = `Reading ${plain(file.name)}: ${Math.round(100 * share)} %`;
        });
        this.add(stored.id, stored);
      });
      this.progress.textContent = "";
    }
    this.picker.value = "";
  }

  async usePasted() {
    const text = this.pasted.value;
    if (!text.trim()) throw new Failure("Paste a text first.");
    const name = `${text.trim().slice(0, 30).replace(/\s+\S*$/, "")}.txt`; // its first words
    const stored = await upload(name, new Blob([text]));
    this.pasted.value = "";
    this.pasting.open = false;
    this.minutes.focus();
    this.add(stored.id, stored);
  }

  /** Choose a text. */
  add(id, file = this.stored?.get(id)) {
    if (this.files.some((each) => each.id === id)) return;
    this.files.push({ id, file });
    if (file && file.kind !== "text") {
      this.kind.value = file.kind;
      this.more.open = true;
      this.adapt();
    }
    this.planCard.replaceChildren();
    this.showFiles();
  }

  showFiles() {
    this.chosen.replaceChildren(...this.files.map(({ id, file }) => make("li", {}, make("div", { className: "row" },
      make("strong", { textContent: plain(id) }), make("span", { className: "hint", textContent: file ? bytes(file.bytes) : "a named text" }),
      button("Remove", () => { this.files = this.files.filter((each) => each.id !== id); this.showFiles(); this.chooser.focus(); },
        { attributes: { "aria-label": `Remove ${plain(id)}` } })))));
    this.preview();
  }

  /** Show what a training would read from the chosen texts, and what it leaves out. */
  async preview() {
    this.previewing?.abort();
    const mine = this.previewing = new AbortController(), files = this.files.map(({ id }) => id), kind = this.kind.value;
    if (!files.length) return this.reading.replaceChildren();
    if (kind === "pairs" && files.length < 2) {
      return this.reading.replaceChildren(hint("Now choose the second file: the translation of each line."));
    }
    const said = hint("Reading ...");
    this.reading.replaceChildren(said);
    const found = await this.app.try(() => post("/studio/previews", { kind, files }, { signal: mine.signal }), said);
    if (!found || this.previewing !== mine) return;
    const { unit, count: number, left_out: left, characters, alphabet, first, notes } = found;
    this.reading.replaceChildren(make("p", { textContent: `${count(number)} ${unit}${number === 1 ? "" : "s"}, ${count(characters)} characters`
      + `${alphabet ? `, ${count(alphabet)} different ones` : ""}${left ? `; ${count(left)} left out` : ""}.` }),
    kind === "text" ? hint(LENGTHS.find(([most]) => characters <= most)[1]) : "",
    ...notes.map((note) => make("p", { className: "note", textContent: note })),
    make("div", { className: "preview", tabIndex: 0, attributes: { role: "region", "aria-label": "Beginning" } }, ...first.map((parts) =>
      (parts[0][0] ? make("dl", {}, ...parts.flatMap(([name, text]) => [make("dt", { textContent: name }),
        make("dd", { textContent: text, attributes: { dir: "auto" } })]))
        : make("p", { textContent: parts[0][1].trim(), attributes: { dir: "auto" } })))),
    make("details", {}, make("summary", { textContent: "Do the same in a terminal" }), command(found.command)));
  }

  /** The form as the server wants it. */
  get values() {
    if (!this.files.length) throw new Failure("Choose a text first.");
    const kind = this.kind.value, text = kind === "text";
    const values = { kind, files: this.files.map(({ id }) => id) };
    if (Number(this.minutes.value) > 0) values.minutes = Number(this.minutes.value);
    if (this.base.value && kind !== "pairs") values.base = this.base.value;
    if (text) Object.assign(values, { tokenizer: this.tokenizer.value, model: this.model.value });
    if (this.name.value.trim()) values.name = this.name.value.trim().replace(/\s+/g, "-");
    if (this.seed.value !== "") values.seed = Number(this.seed.value);
    return values;
  }

  /** Return the form as the server wants it, with the text that was pasted. */
  async read() {
    if (this.pasted.value.trim()) await this.usePasted();
    return this.values;
  }

  async plan() {
    this.planning?.abort();
    const mine = this.planning = new AbortController();
    this.planButton.disabled = true;
    const said = make("p", { className: "hint", textContent: "Reading the text and timing this machine ..." });
    const made = await this.app.try(async () => {
      const form = await this.read();
      this.planCard.replaceChildren(said);
      return post("/studio/plans", form, { signal: mine.signal });
    }, said);
    this.planButton.disabled = false;
    if (!made && !mine.signal.aborted) this.planCard.replaceChildren(said);
    if (!made || mine.signal.aborted) return;
    this.planCard.replaceChildren();
    const lines = made.lines.filter((line) => !/^(reading|measuring|tokenizing)/.test(line));
    this.planCard.append(make("h3", { textContent: "The plan" }),
      make("ul", { className: "plan" }, ...lines.map((line) => make("li", { textContent: line.trim(), className: line.startsWith(" ") ? "reason" : "" }))),
      ...made.notes.map((note) => make("p", { className: "note", textContent: note })), command(made.command));
    this.planCard.scrollIntoView({ block: "nearest" });
  }

  /** Prepare the form to train a model further. */
  further(run) {
    if (![...this.base.options].some(({ value }) => value === run)) this.base.append(make("option", { value: run, textContent: plain(run) }));
    this.base.value = run;
    this.more.open = true;
    this.minutes.focus();
    this.app.say(this.files.length ? `Choose the minutes, and train ${plain(run)} on the same text.`
      : `Choose a text and the minutes, and train ${plain(run)} on it.`);
  }

  async start() {
    if (this.trainButton.disabled) return;
    const said = make("p", { className: "hint" });
    this.trainButton.disabled = true;
    const job = await this.app.try(async () => post("/studio/jobs", await this.read()), said);
    this.trainButton.disabled = false;
    if (!job) return this.planCard.replaceChildren(said);
    this.app.say(`${plain(job.run)} is in the queue.`);
    this.name.value = "";
    this.planCard.replaceChildren();
    await this.watch();
    this.current.scrollIntoView({ block: "nearest" });
  }

  // ---------------------------------------------------------------- trainings

  /** Show the queue, and the progress of the training that runs, or of the last one. */
  async watch() {
    const answer = await this.app.try(() => get("/studio/jobs"));
    if (!answer) return;
    const { jobs } = answer, shown = ({ state, has_run: there, kind }) => state !== "waiting" && (there || state === "failed" || kind === "ladder");
    const now = jobs.find(({ state }) => state === "running") ?? jobs.find(shown); // not one that was taken out of the queue
    if (!now) return this.showQueue(jobs);
    if (this.job?.id !== now.id) {
      this.view = null;
      this.current.replaceChildren();
    }
    if (this.job?.id !== now.id || this.job.state !== now.state || this.job.has_run && !now.has_run) this.showJob(now);
    this.job = now;
    this.showQueue(jobs);
    if (!this.view || this.finished || now.kind === "ladder") return;
    if (!now.has_run) {
      if (now.state === "running") this.preparing.textContent = "Reading the text, and timing this machine ...";
      return;
    }
    await this.app.try(async () => {
      const { run } = await this.view.update();
      if (now.state === "running" && run.state !== "running") this.preparing.textContent = "Starting ...";
      this.preparing.hidden = !now.message && !(now.state === "running" && run.state !== "running");
      this.finished = now.state !== "running" && run.state !== "running";
    });
  }

  showJob(job) {
    const running = job.state === "running";
    if (job.kind === "ladder") return this.showLadder(job, running);
    this.finished = false;
    const actions = [make("span", { className: `badge ${job.state}`, textContent: STATES[job.state] })];
    if (running) actions.push(this.stopper(job));
    if (job.has_run && (job.state === "stopped" || job.state === "interrupted")) {
      actions.push(button("Go on", () => this.app.try(async () => { await post("/studio/runs/resume", {}, { values: { run: job.run } }); await this.watch(); })));
    }
    const use = /--(source|pair) /.test(job.command) ? "translate" : job.command.split(" ")[1];
    if (job.state !== "running" && !job.has_run) this.finished = true; // it was deleted, or never began
    else if (!running) actions.push(...uses(this.app, job.run, use));
    if (job.has_run && job.state === "done" && use === "train") actions.push(button("Train it further", () => this.further(job.run)));
    const before = this.view;
    this.view = new Progress(job.run, actions, job.kind === "resume" ? null : job.started);
    if (before?.now) this.view.keep(before);
    this.preparing = make("p", { className: "hint", attributes: { role: "status" }, textContent: job.message
      || (job.state === "done" && !job.has_run ? "This run is no longer there." : "") });
    const log = make("pre", { tabIndex: 0, attributes: { role: "region", "aria-label": "Messages" } });
    const details = make("details", { on: { toggle: async () => {
      if (details.open) log.textContent = (await this.app.try(() => get(`/studio/jobs/${job.id}/log`)))?.log ?? "";
    } } }, make("summary", { textContent: "Command and messages" }), command(job.command), log);
    this.view.element.append(this.preparing, details);
    this.current.replaceChildren(this.view.element);
  }

  /** A button that stops a job, once: it then saves, which takes a moment. */
  stopper(job) {
    const stop = button(job.stopping ? "Stopping ..." : "Stop", async () => {
      Object.assign(stop, { disabled: true, textContent: "Stopping ..." });
      await this.app.try(() => post(`/studio/jobs/${job.id}/stop`));
    }, { disabled: job.stopping });
    return stop;
  }

  /** Show the job of a ladder, whose runs the tab Learn shows. */
  showLadder(job, running) {
    this.view = null;
    this.current.replaceChildren(make("article", { className: "card" }, make("div", { className: "row" }, make("h2", { textContent: "The ladder" }),
      make("span", { className: `badge ${job.state}`, textContent: STATES[job.state] }),
      ...(running ? [this.stopper(job)] : []), button("See it in Learn", () => this.app.go("learn"))), job.message ? make("p", { className: "note", textContent: job.message }) : null,
    command(job.command)));
  }

  /** Show the jobs that wait, and those that ended before the one above. */
  showQueue(jobs) {
    const waiting = jobs.filter(({ state }) => state === "waiting").reverse();
    const ended = jobs.filter(({ id, run, state, has_run: there }) => (there || state === "failed") && id !== this.job?.id && run !== this.job?.run
      && !["waiting", "running"].includes(state));
    const earlier = ended.filter(({ run }, i) => ended.findIndex((each) => each.run === run) === i).slice(0, EARLIER);
    const key = JSON.stringify([waiting, earlier].map((list) => list.map(({ id }) => id)));
    if (key === this.queued) return;
    this.queued = key;
    const row = (job, ...parts) => make("li", { className: "row" }, make("strong", { textContent: plain(job.run) }), ...parts);
    const list = (title, rows) => (rows.length ? [make("section", { className: "card" }, make("h2", { textContent: title }),
      make("ul", { className: "queue" }, ...rows))] : []);
    this.queue.replaceChildren(
      ...list("Next", waiting.map((job) => row(job,
        button("Remove", () => this.app.try(async () => { await post(`/studio/jobs/${job.id}/stop`); await this.watch(); }),
          { attributes: { "aria-label": `Remove ${plain(job.run)} from the queue` } }), command(job.command, `the command of ${plain(job.run)}`)))),
      ...list("Before", earlier.map((job) => row(job, make("span", { className: `badge ${job.state}`, textContent: STATES[job.state] }),
        job.has_run ? button("Open", () => this.app.go("runs", job.run), { attributes: { "aria-label": `Open ${plain(job.run)}` } })
          : make("span", { className: "hint", textContent: job.message })))));
  }
}
