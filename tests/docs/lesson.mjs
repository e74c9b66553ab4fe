// Run the live parts' models in Node: node lesson.mjs FOLDER NAME ... < {sentence} > {name: {loss, steps, ...}}
import { readFileSync } from "node:fs";

const [folder, ...names] = process.argv.slice(2), { sentence } = JSON.parse(readFileSync(0, "utf8"));
const modelIn = (script) => JSON.parse(script.slice(script.indexOf(" = ") + 3, script.lastIndexOf(";")));
const web = new URL("../../src/bardlet/web/", import.meta.url);
const { distribution, open, perplexity, readSentence, write } = await import(new URL("lesson.js", web));

const results = {};
for (const name of names) {
  const rung = open(modelIn(readFileSync(`${folder}/${name}.js`, "utf8")));
  const { ids, unknown, loss, steps } = await readSentence(rung, sentence);
  const last = steps.at(-1).logits;
  results[name] = {
    ids, unknown, loss, about: rung.about,
    steps: steps.map(({ logits, heads, stream, start }) => ({ logits, heads, start,
      lens: rung.model.head ? stream.map((x) => rung.model.read(x)) : [] })),
    greedy: await write(rung, ids, { temperature: 0, seed: 1, tokens: 40 }),
    sampled: await Promise.all([1, 1, 2].map((seed) => write(rung, ids, { temperature: 1, seed, tokens: 40 }))),
    temperatures: [0, 0.5, 2].map((temperature) => distribution(last, temperature)),
    perplexity: perplexity(distribution(last, 1)),
  };
}
const plain = (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);
console.log(JSON.stringify(results, plain));
