// Run an exported page's model in Node: node page.mjs FILE < {texts, prompts, sources, chats, tokens, ...} > {...}
import { readFileSync } from "node:fs";

const web = new URL("../../src/bardlet/web/", import.meta.url);
const [{ Model, argmax, erf, generate, largest }, { Tokenizer }, { fromBase64, unpack }, prompts,
  { Answer, Looks }] = await Promise.all(
  ["forward.js", "tokenizer.js", "weights.js", "prompts.js", "answer.js"].map((name) => import(new URL(name, web))));

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

/** The tokens of an answer as the page shows them. */
class Shown {
  constructor() {
    this.tokens = [];
  }

  add(text) {
    this.tokens.push(text);
  }

  append(text) {
    this.tokens.push(this.tokens.pop() + text);
  }

  keep(count) {
    this.tokens.length = count;
  }
}

function answerOf(facts, bytes) {
  return new Answer({ model, tokenizer, looks: new Looks(model, bytes), list: new Shown(), choose: argmax, ...facts });
}

/** Write an answer, branch as [n, id] says, one after the other, and write on after each: ids, tokens, text. */
async function branched({ prompt, limit, branches, bytes }) {
  const answer = answerOf({ prompt, limit }, bytes), states = [];
  const write = async () => {
    await answer.write(() => true);
    states.push({ ids: answer.ids, shown: answer.list.tokens.join(""), text: answer.text, finished: answer.finished });
  };
  await write();
  for (const [n, id] of branches) {
    answer.branch(n, { id, p: 0.5 });
    await write();
  }
  return states;
}

/** Write an answer with all looks kept and with one kept only; return the looks of both, the second computed again. */
async function looks({ prompt, limit, source = null }) {
  const both = [];
  for (const bytes of [2 ** 40, 0]) {
    const answer = answerOf({ prompt, limit, source }, bytes), seen = [];
    await answer.write(() => true);
    const kept = answer.steps.filter((step) => step.look).length;
    for (let n = 0; n < answer.steps.length; n++) seen.push(await answer.look(n, () => true));
    const widths = answer.steps.map((_, n) => answer.context(n).length);
    both.push({ kept, widths, looks: JSON.parse(JSON.stringify(seen, (_, v) => (v instanceof Float32Array ? [...v] : v))) });
  }
  return both;
}

function conversation({ messages, tokens }) {
  try {
    return prompts.chatPrompt(tokenizer, messages, model.context, tokens);
  } catch (error) {
    return { error: error.message };
  }
}

/** Translate lines as the page does. */
async function translate(text) {
  const lines = [];
  for (const line of prompts.translationSources(tokenizer, text, spec)) {
    const answer = line && answerOf({ ...line, prompt: [spec.pad] });
    await answer?.write(() => true);
    lines.push(line ? { text: answer.text, ids: answer.ids, cut: line.cut, limit: line.limit } : null);
  }
  return lines;
}

const started = performance.now();
const completions = (request.prompts ?? []).map((prompt) => greedy(prompt));
const seconds = (performance.now() - started) / 1000;
console.log(JSON.stringify({
  ids: (request.texts ?? []).map((text) => tokenizer.encode(text).ids),
  decoded: (request.texts ?? []).map((text) => tokenizer.decode(tokenizer.encode(text).ids)),
  logits: (request.prompts ?? []).map((prompt) => Array.from(model.forward(prompt, model.newCache()))),
  completions, seconds,
  translations: (request.sources ?? []).map((source) => greedy([spec.pad], model.encode(source))),
  chats: (request.chats ?? []).map((messages) => prompts.chatIds(tokenizer, messages).ids),
  erf: (request.erf ?? []).map(erf),
  begins: (request.begins ?? []).map((text) => prompts.promptIds(tokenizer, text, spec).ids),
  conversations: (request.conversations ?? []).map(conversation),
  lines: request.lines === undefined ? null : await translate(request.lines),
  branched: request.branched ? await branched(request.branched) : null,
  looks: request.looks ? await looks(request.looks) : null,
  largest: (request.largest ?? []).map(([numbers, count]) => largest(Float32Array.from(numbers), count)),
  argmax: (request.largest ?? []).map(([numbers]) => argmax(Float32Array.from(numbers))),
}));
