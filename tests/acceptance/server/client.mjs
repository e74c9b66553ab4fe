// Call a server with the package openai, and write what it returned or raised as JSON. The request: see client.py.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const find = createRequire(pathToFileURL(`${process.env.BARDLET_NODE_MODULES}/package.json`));
const { OpenAI } = find("openai");
const request = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({
  baseURL: `${request.url}/v1`, apiKey: request.key, timeout: 60_000, maxRetries: request.retries,
});

const methods = {
  completions: (fields) => client.completions.create(fields),
  chat: (fields) => client.chat.completions.create(fields),
  embeddings: (fields) => client.embeddings.create(fields),
  models: async () => ({ data: (await client.models.list()).data }),
  model: ({ model }) => client.models.retrieve(model),
};

function failure(error) {
  const { message, code, param, type, status } = error;
  return {
    error: error.constructor.name, message, code, param, type, status_code: status,
    retry_after: error.headers?.get?.("retry-after") ?? null,
  };
}

async function callOne({ to, fields, extra, take }) {
  const started = performance.now(), chunks = [];
  try {
    const answer = await methods[to]({ ...fields, ...extra });
    if (!fields.stream) {
      return { value: answer, seconds: (performance.now() - started) / 1000 };
    }
    for await (const chunk of answer) {
      chunks.push(chunk);
      if (chunks.length === take) {
        break; // this aborts the request
      }
    }
    return { chunks };
  } catch (error) {
    return { ...failure(error), chunks };
  }
}

const results = [];
for (const call of request.calls) {
  results.push(await callOne(call));
}
console.log(JSON.stringify({ results }));
