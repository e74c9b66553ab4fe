// Tokenize and write with llama.cpp: node llama.mjs NODE_MODULES FILE.gguf < {texts, prompts, tokens, context} > {...}
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp/dist/index.js")));
const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[3] });
const context = await model.createContext({ contextSize: request.context, sequences: 1 });
const sequence = context.getSequence();

const completions = [];
for (const prompt of request.prompts) {
  await sequence.clearHistory();
  const ids = [];
  for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    ids.push(id);
    if (ids.length >= request.tokens || request.stop.includes(id)) break;
  }
  completions.push(ids);
}
console.log(JSON.stringify({ ids: request.texts.map((text) => Array.from(model.tokenize(text, false))), completions }));
process.exit(0);
