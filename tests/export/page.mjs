// Run an exported page's model in Node: node page.mjs FILE < {texts, prompts, sources, chats, tokens} > {...}
import { readFileSync } from "node:fs";

const web = new URL("../../src/bardlet/web/", import.meta.url);
const [{ Model, argmax, erf, generate }, { Tokenizer, chatIds }, { fromBase64, unpack }] = await Promise.all(
  ["forward.js", "tokenizer.js", "weights.js"].map((name) => import(new URL(name, web))));

const html = readFileSync(process.argv[2], "utf8"), request = JSON.parse(readFileSync(0, "utf8"));
const read = (id) => html.match(new RegExp(`id="${id}">(.*?)</script>`, "s"))[1];
const spec = JSON.parse(read("spec")), tokenizer = new Tokenizer(spec.tokenizer);
const model = new Model(spec, unpack(JSON.parse(read("entries")), fromBase64(read("weights"))));

function greedy(prompt, cache = model.newCache()) {
  const ids = [];
  const steps = generate(model, prompt, argmax, { cache, watch: request.watch });
  while (ids.length < request.tokens) {
    const { value: step, done } = steps.next();
    if (done) break;
    if (!step) continue;
    ids.push(step.id);
    if (spec.stop.includes(step.id)) break;
  }
  return ids;
}

const started = performance.now();
const completions = (request.prompts ?? []).map((prompt) => greedy(prompt));
const seconds = (performance.now() - started) / 1000;
console.log(JSON.stringify({
  ids: (request.texts ?? []).map((text) => tokenizer.encode(text).ids),
  decoded: (request.texts ?? []).map((text) => tokenizer.decode(tokenizer.encode(text).ids)),
  logits: (request.prompts ?? []).map((prompt) => Array.from(model.forward(prompt, model.newCache()))),
  completions, seconds,
  translations: (request.sources ?? []).map((source) => greedy([spec.tokenizer.special["<|pad|>"]], model.encode(source))),
  chats: (request.chats ?? []).map((messages) => chatIds(tokenizer, messages).ids),
  erf: (request.erf ?? []).map(erf),
}));
