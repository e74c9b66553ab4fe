// The tab Runs: a table; the curves of the chosen runs over each other; two compared; one in detail; deleting with undo.

import { LineChart } from "../charts.js";
import { get, post } from "./api.js";
import { button, bytes, command, count, every, hint, loss, make, plain, quoted } from "./parts.js";
import { Progress, linesOf, uses } from "./training.js";

const COLUMNS = [["name", "Run"], ["text", "Text"], ["model", "Model"], ["parameters", "Weights"], ["steps", "Steps"],
  ["minutes", "Minutes"], ["result", "Result"], ["state", "State"]];
const FORMATS = [["folder", "folder (.zip)"], ["gguf", "GGUF"], ["html", "one HTML page"]];
/** Rows of the table that are shown at once. */
const PAGE = 50;

const size = (n) => (n === null ? "" : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : `${(n / 1e3).toFixed(0)} k`);

export class Tab {
  constructor(app) {
    Object.assign(this, { app, rows: [], chosen: new Set(), order: ["modified", -1], shown: PAGE });
    this.filter = make("input", { type: "search", placeholder: "Filter", attributes: { "aria-label": "Filter the runs" },
      on: { input: () => { this.shown = PAGE; this.draw(); } } });
    this.body = make("tbody");
    this.heads = COLUMNS.map(([key, textContent]) => make("th", { scope: "col" }, button(textContent, () => this.sort(key))));
    this.more = button("Show more", () => { this.shown += PAGE; this.draw(); }, { hidden: true });
    this.undo = make("div");
    this.below = make("div");
    this.element = make("div", {}, make("section", { className: "card" }, make("div", { className: "row" },
      make("h2", { textContent: "Runs" }), this.filter), make("div", { className: "scroll" }, make("table", {},
      make("caption", { className: "hint", textContent: "Choose one run for its details, or several to compare them." }),
      make("thead", {}, make("tr", {}, make("td"), ...this.heads)), this.body)), this.more, this.undo), this.below);
  }

  async show(name) {
    if (name) this.chosen = new Set([name]);
    this.stop ??= every(3, () => this.refresh());
    await this.refresh();
    if (name) await this.open();
  }

  hide() {
    this.stop?.();
    this.stop = null;
  }

  async refresh() {
    const news = await this.app.try(() => get("/studio/runs"));
    if (!news) return;
    const key = JSON.stringify(news);
    if (key !== this.key) {
      this.key = key;
      this.rows = news.runs;
      this.draw();
      if (JSON.stringify(news.deleted) !== this.deleted) this.showDeleted(news.deleted);
      this.deleted = JSON.stringify(news.deleted);
      const shown = this.view && this.rows.find(({ name }) => name === this.view.name);
      if (shown && shown.state !== this.shownState) await this.open();
    }
    if (this.view && this.view.now?.run.state === "running") await this.app.try(() => this.view.update());
  }

  sort(key) {
    this.order = [key, this.order[0] === key ? -this.order[1] : 1];
    this.draw();
  }

  draw() {
    const focused = document.activeElement?.closest("tbody") === this.body ? document.activeElement : null;
    const [key, way] = this.order, wanted = this.filter.value.toLowerCase();
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a ?? "").localeCompare(String(b ?? "")));
    const rows = this.rows.filter(({ name, text }) => `${name} ${text}`.toLowerCase().includes(wanted))
      .sort((a, b) => way * compare(a[key], b[key]));
    this.heads.forEach((head, i) => head.setAttribute("aria-sort",
      COLUMNS[i][0] === key ? (way > 0 ? "ascending" : "descending") : "none"));
    this.more.hidden = rows.length <= this.shown;
    this.body.replaceChildren(...rows.slice(0, this.shown).map((run) => this.row(run)));
    if (focused?.dataset.run) {
      [...this.body.querySelectorAll(focused.tagName)].find(({ dataset }) => dataset.run === focused.dataset.run)?.focus();
    }
    if (!rows.length) {
      this.body.append(make("tr", {}, make("td", { colSpan: COLUMNS.length + 1, textContent: this.rows.length
        ? "No run has this in its name or text." : "No runs yet: train one in the tab Train." })));
    }
  }

  row(run) {
    const check = make("input", { type: "checkbox", checked: this.chosen.has(run.name), data: { run: run.name },
      attributes: { "aria-label": `Choose ${plain(run.name)}` }, on: { change: () => {
        if (check.checked) this.chosen.add(run.name);
        else this.chosen.delete(run.name);
        this.open();
      } } });
    const cells = { ...run, parameters: size(run.parameters), steps: count(run.steps), minutes: run.minutes?.toFixed(1),
      text: plain(run.text ?? "") };
    return make("tr", {}, make("td", {}, check), make("th", { scope: "row" }, button(plain(run.name), () => {
      this.chosen = new Set([run.name]);
      this.draw();
      this.open();
    }, { className: "link", data: { run: run.name } })), ...COLUMNS.slice(1).map(([key]) => make("td", { textContent: cells[key] ?? "" })));
  }

  /** Show the chosen runs below the table. */
  async open() {
    this.view = null;
    const mine = this.opening = {};
    const names = [...this.chosen].filter((name) => this.rows.some((run) => run.name === name));
    this.below.replaceChildren();
    if (names.length === 1) await this.openOne(names[0]);
    else if (names.length > 1) await this.app.try(() => this.compare(names, mine));
  }

  // ---------------------------------------------------------------- one run

  async openOne(name) {
    const run = this.rows.find((each) => each.name === name), { app } = this;
    this.shownState = run.state;
    const actions = [make("span", { className: `badge ${run.state}`, textContent: run.state })];
    if (run.state !== "damaged") actions.push(...uses(app, name, run.model === "encdec" ? "translate" : run.command));
    if (run.state === "stopped") actions.push(button("Go on", () => app.try(async () => {
      await post("/studio/runs/resume", {}, { values: { run: name } });
      app.go("train");
    })));
    if (run.state !== "running") actions.push(button("Delete", () => this.remove(name), { className: "danger" }));
    const view = this.view = new Progress(name, actions);
    this.packing = make("span", { className: "hint", attributes: { role: "status" } });
    const health = make("div", { attributes: { "aria-live": "polite" } });
    const check = button("Check its files and losses", () => app.try(async () => {
      health.replaceChildren(make("p", { className: "hint", textContent: "Reading its files ..." }));
      const found = await get("/studio/health", { run: name }).finally(() => health.replaceChildren());
      health.append(make("ul", { className: "findings" }, ...found.findings.map(({ about, verdict, said }) =>
        make("li", { className: verdict }, make("strong", { textContent: `${about}: ` }), said))), command(found.command));
    }));
    const settings = make("details", { on: { toggle: () => { if (settings.open) app.try(() => this.showSettings(name, settings)); } } },
      make("summary", { textContent: "Settings and results" }));
    view.element.append(make("div", { className: "row" }, make("span", { textContent: "Download: " }),
      ...FORMATS.map(([format, textContent]) => button(textContent, () => this.download(name, format))), this.packing),
    hint("Folder: every file, for bardlet and Hugging Face. GGUF: for llama.cpp and Ollama. One HTML page: the model in a page that writes "
      + "in any browser, without a network."),
    check, health, settings, commandsOf(run));
    this.below.replaceChildren(view.element);
    await app.try(() => view.update());
  }

  /** Let the server make a file, and the browser save it. */
  async download(run, format) {
    const said = this.packing;
    said.textContent = "Making the file ...";
    const made = await this.app.try(() => post("/studio/downloads", {}, { values: { run, format } }), said);
    if (!made) return;
    said.textContent = `${made.name}, ${bytes(made.bytes)}: your browser saves it.`;
    make("a", { href: `/studio/downloads/${made.id}`, download: made.name }).click();
  }

  async showSettings(name, place) {
    const { settings, record, meanings } = await get("/studio/details", { run: name });
    const rows = (values) => Object.entries(values).filter(([, value]) => value === null || Array.isArray(value) || typeof value !== "object")
      .map(([key, value]) => [key, written(value), meanings[key] ?? ""]);
    place.replaceChildren(place.firstChild, table("Settings", ["setting", "value", "meaning"], rows(settings)),
      table("Results", ["result", "value", "meaning"], rows(record)));
  }

  // ---------------------------------------------------------------- several

  /** opening: what `open` began; another choice begins another. */
  async compare(names, opening) {
    const [parts, all] = await Promise.all([
      Promise.all(names.map((run) => get("/studio/progress", { run }))),
      Promise.all(names.slice(0, 8).map((run) => get("/studio/details", { run })))]);
    if (this.opening !== opening) return;
    const chart = new LineChart("Held-out losses");
    const card = make("section", { className: "card" }, make("h2", { textContent: "Held-out losses" }), chart.element);
    if (new Set(parts.map(({ unit }) => unit)).size > 1) card.append(make("p", { className: "note",
      textContent: "Some are in nats per character and some in nats per token: they are not comparable." }));
    if (new Set(parts.map(({ run }) => run.text)).size > 1) card.append(make("p", { className: "note",
      textContent: "The texts differ: losses on different texts are not comparable." }));
    const settings = all.map((each) => each.settings);
    const keys = [...new Set(settings.flatMap(Object.keys))].filter((key) => new Set(settings.map((each) => JSON.stringify(each[key]))).size > 1);
    card.append(make("h3", { textContent: keys.length ? "Settings that differ" : "The settings are the same" }));
    if (keys.length) card.append(table("Settings that differ", ["", ...names.slice(0, 8)], keys.map((key) => [key === "steps" ? "steps planned" : key, ...settings.map((each) => written(each[key]))])));
    card.append(make("h3", { textContent: "Results" }), table("Results", ["", ...names.slice(0, 8)], [
      ["result", ...parts.slice(0, 8).map(({ run }) => run.result)], ["reads like", ...parts.slice(0, 8).map((each) => each.reads_like)],
      ["minutes", ...parts.slice(0, 8).map(({ run }) => run.minutes?.toFixed(1) ?? "")],
      ["best held-out loss", ...parts.slice(0, 8).map(({ points, per_token: scale }) => points.val_loss?.length ? loss(Math.min(...points.val_loss.map(([, y]) => y)) / scale) : "")],
      ["sample", ...parts.slice(0, 8).map(({ samples }) => samples.at(-1)?.text ?? "")]].filter(([, ...cells]) => cells.some(Boolean))));
    this.below.replaceChildren(card);
    chart.show({ unit: `nats per ${[...new Set(parts.map(({ unit }) => unit))].join(" or ")}`, lines: parts.map((each) => ({ ...linesOf(each)[1], name: plain(each.run.name) })) });
  }

  // ---------------------------------------------------------------- deleting

  async remove(name) {
    const answer = await this.app.try(() => post("/studio/runs/delete", {}, { values: { run: name } }));
    if (!answer) return;
    this.chosen.delete(name);
    this.below.replaceChildren();
    await this.refresh();
    this.app.say(`${plain(name)} is deleted.`, false, ["Undo", () => this.restore(answer.deleted)]);
  }

  restore(deleted) {
    return this.app.try(async () => {
      const { name } = await post("/studio/runs/restore", {}, { values: { deleted } });
      this.app.say(`${plain(name)} is back.`);
      await this.refresh();
    });
  }

  showDeleted(deleted) {
    this.undo.replaceChildren(...(deleted.length ? [make("details", {}, make("summary", {
      textContent: `Deleted in the last week: ${deleted.length}` }), make("ul", {}, ...deleted.map((kept) => make("li", { className: "row" },
      make("span", { textContent: plain(decodeURIComponent(kept.slice(kept.indexOf("~") + 1))) }), button("Bring back", () => this.restore(kept))))))] : []));
  }
}

/** What can be done with a run, as command lines. */
function commandsOf({ folder, state }) {
  const name = quoted(folder), lines = { "write a text": `sample ${name}`, ...(state === "stopped" ? { "go on": `resume ${name}` } : {}),
    "check its health": `doctor ${name}`, "make a GGUF file": `export ${name} --to gguf --out ${quoted(`${folder.split("/").at(-1)}.gguf`)}`,
    "make an HTML page": `export ${name} --to html --out ${quoted(`${folder.split("/").at(-1)}.html`)}`, "delete it": `runs ${name} --delete` };
  return make("details", {}, make("summary", { textContent: "Do the same in a terminal" }), ...Object.entries(lines).map(
    ([purpose, line]) => command(`bardlet ${line}`, `the command: ${purpose}`)));
}

const written = (value) => (value === undefined || value === null ? "" : typeof value === "string" ? value
  : Array.isArray(value) ? value.map(written).join(", ") : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(5)))
    : JSON.stringify(value));

/** A table that can be scrolled. */
function table(label, titles, rows) {
  return make("div", { className: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": label } }, make("table", {},
    titles.some(Boolean) ? make("thead", {}, make("tr", {}, ...titles.map((textContent) => make("th", { scope: "col", textContent: plain(textContent) })))) : null,
    make("tbody", {}, ...rows.map(([head, ...cells]) => make("tr", {}, make("th", { scope: "row", textContent: head }),
      ...cells.map((textContent) => make("td", { textContent })))))));
}
