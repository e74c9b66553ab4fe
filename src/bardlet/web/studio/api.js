// Requests to the server. A failure is an Error with the sentence that the server gave.

/** A refusal of the server, or no answer from it. status: 0 if there was none. */
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const SILENT = "The server does not answer. Trainings go on; start `bardlet serve` again to see them.";

/** Send a request and return its response. A refusal or silence is a Failure. */
async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(SILENT);
  }
  if (answer.ok) return answer;
  const { error = {} } = await answer.json().catch(() => ({}));
  throw new Failure(error.message ?? `The server answered ${answer.status}.`, answer.status, error.code);
}

const query = (path, values) => {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
};

/** Return the JSON at a path. */
export const get = async (path, values = {}, signal = undefined) => (await send(query(path, values), { signal })).json();

/** Post JSON, and return the JSON of the answer. */
export const post = async (path, body = {}, { values = {}, signal } = {}) => (await send(query(path, values), {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal })).json();

/** Upload a file, or a text as one, and return what the server stored. `onProgress(share)` is called on the way. */
export function upload(name, content, onProgress = () => {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not say how much it has sent
    request.open("POST", query("/studio/files", { name }));
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    request.addEventListener("error", () => reject(new Failure(SILENT)));
    request.addEventListener("load", () => {
      let value = {};
      try { value = JSON.parse(request.responseText); } catch { /* not from our server */ }
      if (request.status < 300) resolve(value);
      else reject(new Failure(value.error?.message ?? `The server answered ${request.status}.`, request.status));
    });
    request.send(content);
  });
}

/** Post JSON, and yield the objects of the stream of server-sent events that comes back. */
export async function* stream(path, body, signal) {
  const answer = await send(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(SILENT);
    }
    if (part.done) throw new Failure("The text was cut: the server stopped.");
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Failure(value.error.message, 0, value.error.code);
      yield value;
    }
  }
}
