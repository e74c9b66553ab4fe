// The tab Chat: a conversation with a model. It stays in this browser and is sent to the server with each message.

import { stream } from "./api.js";
import { WRITING, button, command, field, hint, make, menu, quoted } from "./parts.js";

const UNTAUGHT = "This model never learned to answer. In the tab Train, give it conversations: More settings, "
  + "\u201cconversations: answer like them\u201d, and start from this model. Or let it go on with a text in the tab Write.";
/** Where the browser keeps the conversation. */
const STORE = "bardlet-chat";

function stored() {
  try {
    const { system = "", messages = [] } = JSON.parse(localStorage.getItem(STORE)) ?? {};
    const valid = (each) => ["user", "assistant"].includes(each?.role) && typeof each.content === "string";
    return { system: String(system), messages: messages.filter(valid) };
  } catch {
    return { system: "", messages: [] };
  }
}

export class Tab {
  constructor(app) {
    Object.assign(this, { app, abort: null, taught: new Set(), ...stored() });
    this.model = menu([], "");
    this.instructions = make("textarea", { rows: 2, value: this.system, attributes: { dir: "auto" },
      on: { input: () => { this.system = this.instructions.value; this.keep(); } } });
    this.temperature = make("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0.7 });
    this.length = make("input", { type: "number", min: 1, max: 100000, step: 1, value: 300 });
    this.seed = make("input", { type: "number", min: 0, step: 1, placeholder: "random" });
    this.talk = make("ol", { className: "talk", attributes: { "aria-label": "Conversation" } });
    this.spoken = make("p", { className: "unseen", attributes: { "aria-live": "polite" } }); // a whole answer, for a screen reader
    this.input = make("textarea", { rows: 2, required: true, attributes: { dir: "auto" }, placeholder: "Write a message" });
    this.stopButton = button("Stop", () => this.abort?.abort(), { disabled: true });
    this.status = make("p", { className: "status", attributes: { role: "status" } });
    const form = make("form", { className: "compose", on: {
      submit: (event) => { event.preventDefault(); this.send(); },
      keydown: (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
      } } }, field("Message", this.input, "Enter sends, Shift+Enter begins a line."),
    make("div", { className: "row" }, this.sendButton = make("button", { type: "submit", textContent: "Send" }), this.stopButton));
    this.untaught = make("p", { className: "note", hidden: true, textContent: UNTAUGHT, attributes: { role: "status" } });
    this.commands = make("details", {}, make("summary", { textContent: "Do the same elsewhere" }));
    this.element = make("div", { className: "columns" },
      make("div", { className: "card" }, field("Model", this.model), this.untaught, field("Instructions (system prompt)", this.instructions),
        make("div", { className: "settings" }, field("Temperature", this.temperature), field("Tokens", this.length), field("Seed", this.seed)), hint(WRITING),
        make("div", { className: "row" }, button("New conversation", () => this.clear())),
        make("p", { className: "hint", textContent: "The conversation stays in this browser." }), this.commands),
      make("div", { className: "card" }, this.talk, this.spoken, this.status, form));
    for (const each of [this.model, this.instructions, this.temperature, this.length, this.seed]) {
      each.addEventListener("change", () => this.showCommands());
    }
    this.draw();
  }

  async show(name) {
    const models = await this.app.chooseModel([this.model], name, ({ has_chat_template: taught }) => taught);
    if (!models) return;
    this.taught = new Set(models.filter(({ has_chat_template: taught }) => taught).map(({ id }) => id));
    if (!models.length) this.status.textContent = "There are no models yet: train one, then teach it conversations in the tab Train.";
    this.showCommands();
  }

  hide() { /* it goes on writing */ }

  keep() {
    try {
      localStorage.setItem(STORE, JSON.stringify({ system: this.system, messages: this.messages }));
    } catch { /* the browser keeps nothing, or it is full */ }
  }

  clear() {
    const before = this.messages;
    this.abort?.abort();
    this.abort = null;
    this.stopButton.disabled = true;
    this.messages = [];
    this.status.textContent = "";
    this.keep();
    this.draw();
    if (before.length) this.app.say("The conversation is gone.", false, ["Undo", () => { this.messages = before; this.keep(); this.draw(); }]);
  }

  draw() {
    if (this.model.value) this.showCommands();
    this.talk.replaceChildren(...this.messages.map((message, n) => this.bubble(message, n)));
  }

  bubble({ role, content }, n) {
    const text = make("p", { className: "said", textContent: content, attributes: { dir: "auto" } });
    const last = n === this.messages.length - 1;
    const actions = role === "user" ? [button("Edit", () => this.edit(n))] : last ? [button("Again", () => this.again())] : [];
    return make("li", { className: role }, make("strong", { textContent: role === "user" ? "You" : "Model" }), text,
      make("div", { className: "actions" }, ...actions));
  }

  send() {
    const content = this.input.value.trim();
    if (!content || this.sendButton.disabled) return;
    this.abort?.abort();
    this.messages = [...this.messages, { role: "user", content }];
    this.input.value = "";
    this.answer();
  }

  /** Put a message back into the field; it and what follows leave the conversation. */
  edit(n) {
    const before = this.messages;
    this.abort?.abort();
    this.input.value = before[n].content;
    this.messages = before.slice(0, n);
    if (before.length > n + 2) this.app.say("The messages after it are gone.", false, ["Undo", () => { this.messages = before; this.keep(); this.draw(); }]);
    this.keep();
    this.draw();
    this.input.focus();
  }

  /** Let the model answer the last message once more. */
  again() {
    this.abort?.abort();
    if (this.messages.at(-1)?.role === "assistant") this.messages = this.messages.slice(0, -1);
    this.input.focus(); // the button goes with the answer
    this.answer();
  }

  async answer() {
    const mine = this.abort = new AbortController();
    this.messages = this.messages.filter(({ content }) => content); // not an answer that was stopped before its first word
    const { system: _, ...request } = this.request;
    const answer = { role: "assistant", content: "" };
    this.messages = [...this.messages, answer];
    this.keep();
    this.draw();
    this.stopButton.disabled = false;
    this.status.textContent = "Writing ...";
    const body = { ...request, stream: true };
    let reason = "stopped";
    try {
      for await (const { choices } of stream("/v1/chat/completions", body, mine.signal)) {
        for (const { delta, finish_reason: finished } of choices) {
          answer.content += delta.content ?? "";
          reason = finished ?? reason;
        }
        const said = this.messages.at(-1) === answer ? this.talk.lastChild?.querySelector(".said") : null;
        if (said) said.textContent = answer.content;
      }
    } catch (error) {
      if (this.messages.at(-1) === answer && !answer.content) this.messages = this.messages.slice(0, -1);
      if (error.name !== "AbortError") reason = error.code === "no_chat_template" ? UNTAUGHT : error.message;
    }
    if (this.abort !== mine) return;
    this.abort = null;
    this.stopButton.disabled = true;
    this.status.textContent = { stop: "", length: "The answer was cut at the token limit.", stopped: "Stopped." }[reason] ?? reason;
    this.spoken.textContent = answer.content && `Model: ${answer.content}`;
    this.keep();
    this.draw();
    this.talk.lastChild?.scrollIntoView({ block: "nearest" });
  }

  showCommands() {
    this.untaught.hidden = !this.model.value || this.taught.has(this.model.value);
    this.sendButton.disabled = !this.untaught.hidden;
    const { model, system, messages, temperature, max_completion_tokens: tokens, seed } = this.request;
    const spoken = JSON.stringify(messages.length ? messages : [{ role: "user", content: "Hello" }]);
    const options = [system && `--system=${quoted(system)}`, `--temperature ${temperature}`, `--tokens ${tokens}`,
      seed === undefined ? "" : `--seed ${seed}`].filter(Boolean).join(" ");
    const python = `model=${JSON.stringify(model)}, messages=${spoken}, temperature=${temperature}, max_completion_tokens=${tokens}`
      + (seed === undefined ? "" : `, seed=${seed}`);
    this.commands.replaceChildren(this.commands.firstChild,
      command(`bardlet chat ${quoted(this.app.folderOf(model))} ${options}`, "the command of bardlet"),
      command(`openai.OpenAI(base_url="${location.origin}/v1", api_key=os.environ["BARDLET_API_KEY"]).chat.completions.create(${python})`, "the Python code"));
  }

  /** The settings and the conversation, as the server wants them. */
  get request() {
    const system = this.system.trim(), said = this.messages.filter(({ content }) => content);
    return { model: this.model.value, system, messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
      temperature: Number(this.temperature.value), max_completion_tokens: Number(this.length.value) || 300,
      ...(this.seed.value === "" ? {} : { seed: Number(this.seed.value) }) };
  }
}
