// The loss of a GGUF file by llama.cpp's logits: node llama_loss.mjs NODE_MODULES FILE.gguf < {windows} > {loss, tokens}
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp/dist/index.js")));
const { windows } = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[3] });
const context = await model.createContext({ contextSize: windows[0].length, sequences: 1 });
const sequence = context.getSequence();

let sum = 0, tokens = 0;
for (const ids of windows) {
  await sequence.clearHistory();
  const all = { generateNext: { logits: true, options: { temperature: 0 } } };
  const outputs = await sequence.controlledEvaluate(ids.slice(0, -1).map((id) => [id, all]));
  outputs.forEach(({ next: { logits } }, n) => { // the cross-entropy of each next token, in nats
    const values = [...logits.values()], most = Math.max(...values);
    sum += most + Math.log(values.reduce((total, x) => total + Math.exp(x - most), 0)) - logits.get(ids[n + 1]);
    tokens += 1;
  });
}
console.log(JSON.stringify({ loss: sum / tokens, tokens }));
process.exit(0);
