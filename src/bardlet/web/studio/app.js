// The studio: signs in, and shows one tab at a time. The address says which: #write/NAME is the tab Write with a model.

import { begin, session } from "../session.js";
import { Failure, get } from "./api.js";
import { button, fill, make, plain } from "./parts.js";

/** Each tab is a module with a class `Tab`: `new Tab(app)` has an `element`, `show(name)` and `hide()`. */
const TABS = { train: "Train", write: "Write", inside: "Inside", chat: "Chat", translate: "Translate", runs: "Runs", learn: "Learn" };

const part = (id) => document.getElementById(id);

/** Tabs of a server that only serves models. */
const WITHOUT_STUDIO = ["write", "chat", "translate"];

class App {
  /** studio: the server trains, too. */
  constructor(studio) {
    this.names = Object.keys(TABS).filter((name) => studio || WITHOUT_STUDIO.includes(name));
    this.studio = studio;
    this.tabs = {};
    this.models = [];
    this.places = new Map(); // the folder of each model, for commands
    this.current = null;
    for (const name of this.names) {
      const textContent = TABS[name];
      part("tabs").append(make("button", { id: `tab-${name}`, type: "button", textContent, tabIndex: -1,
        attributes: { role: "tab", "aria-selected": "false", "aria-controls": `panel-${name}` },
        on: { click: () => this.go(name), keydown: (event) => this.move(event, name) } }));
      part("panels").append(make("section", { id: `panel-${name}`, hidden: true,
        attributes: { role: "tabpanel", "aria-labelledby": `tab-${name}` } }));
    }
    part("tabs").hidden = part("sign-out").hidden = false;
    addEventListener("hashchange", () => this.route());
    this.route();
  }

  /** Go to a tab, with a model or a run if one is named. */
  go(name, about = "") {
    const hash = `#${name}${about ? `/${encodeURIComponent(about)}` : ""}`;
    if (location.hash === hash) this.route();
    else location.hash = hash;
  }

  async route() {
    const [wanted, about = ""] = location.hash.slice(1).split("/", 2);
    const name = this.names.includes(wanted) ? wanted : this.names[0];
    const left = document.activeElement?.closest("[role=tabpanel]");
    for (const each of this.names) {
      part(`tab-${each}`).setAttribute("aria-selected", String(each === name));
      part(`tab-${each}`).tabIndex = each === name ? 0 : -1;
      if (each === name) part(`tab-${each}`).scrollIntoView({ block: "nearest", inline: "nearest" });
      part(`panel-${each}`).hidden = each !== name;
    }
    if (left?.hidden) part(`tab-${name}`).focus(); // the element that had the focus is gone
    document.title = `${TABS[name]} - bardlet`;
    if (this.current !== name) this.tabs[this.current]?.hide();
    this.current = name;
    await this.try(async () => {
      if (!this.tabs[name]) {
        const { Tab } = await import(`./${name}.js`);
        this.tabs[name] ??= new Tab(this);
        part(`panel-${name}`).replaceChildren(this.tabs[name].element);
      }
      if (this.current === name) await this.tabs[name].show(decoded(about));
    });
  }

  move(event, name) {
    const { names } = this, now = names.indexOf(name);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = names[(to + names.length) % names.length];
    this.go(next);
    part(`tab-${next}`).focus();
  }

  /** The folder of a model, for a command. */
  folderOf(model) {
    return this.places.get(model) ?? model;
  }

  /** Do something; show its failure, in the element `place` if there is one. Return what it returned, or undefined. */
  async try(work, place = null) {
    try {
      return await work();
    } catch (error) {
      if (error.name === "AbortError") return undefined;
      if (!(error instanceof Failure)) throw error;
      if (error.status === 401) {
        location.reload(); // the session has ended
        return undefined;
      }
      if (place) place.textContent = error.message;
      else if (!part("toasts").textContent.startsWith(error.message)) this.say(error.message, true); // once, not at every look
      return undefined;
    }
  }

  /** Show a sentence for a while. action: [label, function] of a button beside it. */
  say(message, alarming = false, action = null) {
    const toast = make("div", { className: `toast ${alarming ? "alarm" : ""}` }, make("p", { textContent: message }),
      action && button(action[0], () => { toast.remove(); action[1](); }),
      button("\u00d7", () => toast.remove(), { attributes: { "aria-label": "Close" } }));
    part("toasts").replaceChildren(toast);
    const leave = () => (toast.matches(":hover, :focus-within") ? setTimeout(leave, 3_000) : toast.remove());
    setTimeout(leave, action ? 20_000 : 8_000);
  }

  /**
   * Put the models of the server into menus, and choose `name`, of a model or a run, in the first one. Return the models,
   * if they came. suits: says which of them come first.
   */
  chooseModel(menus, name, suits = () => true) {
    return this.try(async () => {
      const [{ data }, { models: served }] = await Promise.all([get("/v1/models"), this.studio ? get("/studio/models") : { models: [] }]);
      this.places = new Map(served.map(({ id, folder }) => [id, folder]));
      const models = [...data.filter(suits), ...data.filter((model) => !suits(model))];
      const names = models.map(({ id }) => id);
      for (const each of menus) fill(each, names.map((model) => [model, plain(model)]));
      const wanted = served.find(({ run }) => run === name)?.id ?? name;
      if (names.includes(wanted)) menus[0].value = wanted;
      else if (name) this.say(`${plain(name)} has no weights yet; another model is chosen.`);
      this.models = names;
      return models;
    });
  }
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return ""; // not from us
  }
}

/** Show the form for signing in, with a reason. */
function ask(message) {
  part("status").textContent = message;
  part("sign-in").hidden = false;
  part("key").focus();
}

part("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const reason = await session("POST", { key: part("key").value });
  part("key").value = "";
  if (reason) ask(reason);
  else open();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which tab is shown
  part("content").focus();
});

part("sign-out").addEventListener("click", () => globalThis.studio.say("To come back you need the key, or a new link. The terminal "
  + "where bardlet serve was started shows both.", false, ["Sign out", signOut]));

async function signOut() {
  const reason = await session("DELETE");
  if (reason) globalThis.studio.say(reason, true);
  else location.reload();
}

function open() {
  part("status").textContent = "";
  part("sign-in").hidden = true;
  get("/session").then(({ studio }) => { globalThis.studio = new App(studio); }, ({ message }) => ask(message));
}

const [signedIn, message] = await begin();
if (signedIn) open();
else ask(message);
