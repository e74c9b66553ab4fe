// A worker of peers.py: greedy generation by llama.cpp, through its binding for Node.js.
// node peers_llama.mjs NODE_MODULES FILE.gguf THREADS ROWS CONTEXT; reads a line {prompt, tokens} each, answers {seconds, ids}.
import { createInterface } from "node:readline";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, modelPath, threads, rows, contextSize] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(join(modules, "node-llama-cpp/dist/index.js")));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: Number(threads), logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: Number(contextSize), sequences: Number(rows), threads: Number(threads) });
const sequences = Array.from({ length: Number(rows) }, () => context.getSequence());

async function write(sequence, prompt, tokens) {
  const ids = [];
  await sequence.clearHistory();
  for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    ids.push(id);
    if (ids.length >= tokens) break;
  }
  return ids;
}

console.log("ready");
for await (const line of createInterface({ input: process.stdin })) {
  const { prompt, tokens } = JSON.parse(line);
  const started = performance.now();
  const ids = await Promise.all(sequences.map((sequence) => write(sequence, prompt, tokens)));
  console.log(JSON.stringify({ seconds: (performance.now() - started) / 1000, ids: ids[0], tokens: ids.reduce((n, row) => n + row.length, 0) }));
}
process.exit(0);
