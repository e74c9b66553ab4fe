// Tokenize, chat and write with llama.cpp: node llama.mjs NODE_MODULES FILE.gguf < {texts, prompts, ...} > {...}
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp/dist/index.js")));
const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[3] });
// keys and values in fp32; by default they are rounded to fp16
const context = await model.createContext({
  contextSize: request.context, sequences: 1, flashAttention: false,
  experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
});
const sequence = context.getSequence();

const completions = [];
for (const prompt of request.prompts) {
  await sequence.clearHistory();
  const ids = [];
  for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    ids.push(id);
    if (ids.length >= request.tokens || model.isEogToken(id)) break; // it stops by itself
  }
  completions.push(ids);
}

const { Template } = await import(pathToFileURL(join(process.argv[2], "@huggingface/jinja/dist/index.js")));
const template = model.fileInfo.metadata.tokenizer.chat_template;
const render = (messages) => new Template(template).render({ messages, add_generation_prompt: true });
const about = JSON.parse(readFileSync(join(process.argv[2], "node-llama-cpp/package.json"), "utf8"));
process.stdout.write(JSON.stringify({
  version: `node-llama-cpp ${about.version}`,
  ids: request.texts.map((text) => Array.from(model.tokenize(text, false))), completions,
  chat_ids: request.chats.map((messages) => Array.from(model.tokenize(render(messages), true))),
}) + "\n", () => process.exit(0));
