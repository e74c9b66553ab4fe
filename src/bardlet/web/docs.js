// The page of the API: the endpoints and fields of /openapi.json, and a form to try each of them.

/** Return a new element. Texts become text nodes, never HTML. */
function make(tag, { on = {}, attributes = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The facts of an API, by its openapi.json. */
class Api {
  constructor(spec) { this.spec = spec; }

  /** Return a schema with its reference followed. */
  resolve(schema) {
    const name = schema?.$ref?.split("/").at(-1);
    return name ? this.spec.components.schemas[name] ?? {} : schema ?? {};
  }

  /** Return the name of a type: integer from 1 to 10, array of string, ... */
  type(schema, depth = 0) {
    const own = this.resolve(schema), options = own.anyOf ?? own.oneOf ?? own.allOf;
    if (options) return [...new Set(options.map((each) => this.type(each, depth)))].join(" or ");
    if (own.const !== undefined) return JSON.stringify(own.const);
    if (own.enum) return own.enum.map((each) => JSON.stringify(each)).join(" or ");
    if (own.type === "array") return `array of ${own.items && depth < 3 ? this.type(own.items, depth + 1) : "anything"}`;
    const low = own.minimum ?? own.exclusiveMinimum, high = own.maximum ?? own.exclusiveMaximum;
    const range = [low !== undefined && `from ${low}`, high !== undefined && `to ${high}`].filter(Boolean).join(" ");
    return [[own.type ?? (own.properties ? "object" : "anything")].flat().join(" or "), range].filter(Boolean).join(" ");
  }

  /** Return (name, type, whether it is required, default, description) of each field. */
  fields(schema) {
    const own = this.resolve(schema), required = new Set(own.required ?? []);
    return Object.entries(own.properties ?? {}).map(([name, field]) => [name, this.type(field),
      required.has(name) ? "required" : field.default === undefined ? "" : JSON.stringify(field.default),
      field.description ?? this.resolve(field).description ?? ""]);
  }

  /** Return a body to begin with: an example of the schema, else its required fields. */
  example(schema, depth = 0) {
    const own = this.resolve(schema), options = own.anyOf ?? own.oneOf ?? own.allOf;
    const given = own.example ?? own.examples?.[0] ?? own.const ?? own.enum?.[0] ?? own.default;
    if (given !== undefined) return given;
    if (depth > 5) return null;
    if (options) return this.example(options[0], depth + 1);
    if (own.type === "array") return own.items ? [this.example(own.items, depth + 1)] : [];
    if (own.properties) {
      return Object.fromEntries((own.required ?? []).map((name) => [name, this.example(own.properties[name], depth + 1)]));
    }
    return { string: "", integer: own.minimum ?? 1, number: own.minimum ?? 1, boolean: false, object: {} }[own.type] ?? null;
  }
}

/** Return a table with a caption and a head. */
function table(caption, head, rows) {
  const cells = (tag, row) => row.map((textContent) => make(tag, { textContent }));
  return make("div", { className: "scroll" }, make("table", {},
    make("caption", { textContent: caption, className: "hint" }),
    make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row))))));
}

/** Return the form that sends a request of one endpoint. */
function trial(path, method, body, parameters) {
  const id = `${method}${path.replaceAll(/\W/g, "-")}`, inputs = new Map();
  const typed = body === undefined ? null
    : make("textarea", { id: `${id}-body`, rows: 8, value: JSON.stringify(body, null, 2), spellcheck: false });
  const status = make("p", { className: "status", attributes: { role: "status" } });
  const output = make("pre", { hidden: true, tabIndex: 0, attributes: { "aria-label": "Response" } });
  const send = make("button", { type: "submit", textContent: "Send" });
  const stop = make("button", { type: "button", textContent: "Stop", disabled: true });
  for (const { name } of parameters) inputs.set(name, make("input", { id: `${id}-${name}` }));

  /** Show a response as it arrives. */
  async function show(answer) {
    status.textContent = `${answer.status} ${answer.statusText}`;
    const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (reader) {
      const { value, done } = await reader.read();
      if (done) break;
      output.textContent = text += value;
    }
    if (answer.headers.get("Content-Type")?.startsWith("application/json")) {
      output.textContent = JSON.stringify(JSON.parse(text), null, 2);
    }
  }

  async function submit(event) {
    event.preventDefault();
    const control = new AbortController();
    let target = path;
    const query = new URLSearchParams();
    for (const { name, in: place } of parameters) {
      const value = inputs.get(name).value;
      if (place === "path") target = target.replace(`{${name}}`, value.split("/").map(encodeURIComponent).join("/"));
      else if (value) query.set(name, value);
    }
    stop.onclick = () => control.abort();
    [send.disabled, stop.disabled, output.hidden, output.textContent] = [true, false, false, ""];
    status.textContent = "Waiting ...";
    try {
      await show(await fetch(query.size ? `${target}?${query}` : target, { method: method.toUpperCase(), signal: control.signal,
        body: typed?.value, headers: typed ? { "Content-Type": "application/json" } : {} }));
    } catch (error) {
      status.textContent = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
    }
    [send.disabled, stop.disabled] = [false, true];
  }

  return make("form", { on: { submit } },
    ...parameters.map(({ name }) => make("label", { htmlFor: `${id}-${name}` }, name, inputs.get(name))),
    typed && make("label", { htmlFor: typed.id }, "Body", typed), send, " ", stop, status, output);
}

/** Return the section of one endpoint. */
function endpoint(api, path, method, operation) {
  const content = api.resolve(operation.requestBody)?.content?.["application/json"];
  const parameters = (operation.parameters ?? []).filter((each) => ["path", "query"].includes(each.in));
  const fields = content ? api.fields(content.schema) : [];
  const body = content && (content.example ?? Object.values(content.examples ?? {})[0]?.value ?? api.example(content.schema));
  return make("details", {},
    make("summary", {}, make("h2", {}, make("code", { textContent: `${method.toUpperCase()} ${path}` })),
      ` ${operation.summary ?? ""}`),
    operation.description && make("p", { textContent: operation.description }),
    parameters.length ? table("Parameters", ["name", "type", "place"],
      parameters.map(({ name, schema, in: place }) => [name, api.type(schema), place])) : null,
    fields.length ? table("Fields of the body", ["field", "type", "default", "meaning"], fields) : null,
    table("Responses", ["status", "meaning"],
      Object.entries(operation.responses ?? {}).map(([status, { description }]) => [status, description ?? ""])),
    make("h3", { textContent: "Try it" }), trial(path, method, body, parameters));
}

/** Fill the page. */
async function load() {
  const status = document.getElementById("status");
  try {
    const answer = await fetch("/openapi.json");
    if (!answer.ok) {
      status.replaceChildren("You are not signed in. ", make("a", { href: "/", textContent: "Sign in on the first page." }));
      return;
    }
    const api = new Api(await answer.json()), methods = ["get", "post", "put", "patch", "delete"];
    const sections = Object.entries(api.spec.paths).flatMap(([path, operations]) => methods
      .filter((method) => operations[method]).map((method) => endpoint(api, path, method, operations[method])));
    document.getElementById("endpoints").replaceChildren(...sections);
    status.textContent = `${sections.length} endpoints.`;
  } catch (error) {
    status.textContent = `The server does not answer: ${error.message}`;
  }
}

await load();
