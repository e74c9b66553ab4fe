// Tokens per second of llama.cpp with several sequences at once, by its binding for Node.js: no server, no HTTP.
// node serving_llama.mjs NODE_MODULES FILE.gguf < {clients, seconds, tokens, threads} > {tokens_per_second, first_token_s}
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp/dist/index.js")));
const { clients, seconds, tokens, threads } = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[3] });
const context = await model.createContext({ contextSize: 256, sequences: clients, threads });
const vocabulary = 60, firsts = [];
let counted = 0;
const started = performance.now(), until = started + 1000 * seconds;

/** Write one text after the other: a prompt of 50 to 100 tokens of its own, then new tokens at temperature 1. */
async function client() {
  const sequence = context.getSequence();
  while (performance.now() < until) {
    const prompt = Array.from({ length: 50 + Math.floor(51 * Math.random()) }, () => Math.floor(vocabulary * Math.random()));
    const began = performance.now();
    let written = 0;
    await sequence.clearHistory();
    for await (const id of sequence.evaluate(prompt, { temperature: 1, topK: 0, topP: 1, minP: 0, yieldEogToken: true })) {
      if (!written) firsts.push((performance.now() - began) / 1000);
      written += 1;
      counted += performance.now() < until;
      if (written >= tokens || id === null) break;
    }
  }
}

await Promise.all(Array.from({ length: clients }, client));
firsts.sort((a, b) => a - b);
console.log(JSON.stringify({ tokens_per_second: counted / seconds, first_token_s: firsts[Math.floor(firsts.length / 2)],
  first_token_90_s: firsts[Math.ceil(0.9 * (firsts.length - 1))] }));
process.exit(0);
