// Answer a request with transformers.js, in Node.js and in a browser.

export async function answer(library, folder, options, { texts, prompts, tokens, stop, chats }) {
  const { AutoTokenizer, AutoModelForCausalLM, Tensor, env } = library;
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModelForCausalLM.from_pretrained(folder, { dtype: "fp32", ...options });
  const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

  // rows padded on the left; it stops by itself
  async function generate(batch) {
    const length = Math.max(...batch.map((ids) => ids.length));
    const padded = (ids, id) => [...Array(length - ids.length).fill(id), ...ids];
    const output = await model.generate({
      input_ids: tensor(batch.map((ids) => padded(ids, tokenizer.pad_token_id))),
      attention_mask: tensor(batch.map((ids) => padded(ids.map(() => 1), 0))),
      max_new_tokens: tokens, do_sample: false,
    });
    return output.tolist().map((row) => row.slice(length).map(Number));
  }

  const completions = [];
  for (const prompt of prompts) completions.push((await generate([prompt]))[0]);
  // transformers.js goes on with every row until all end at once
  const ended = (row) => row.slice(0, row.findIndex((id) => stop.includes(id)) + 1 || row.length);
  return {
    version: env.version, ids: texts.map((text) => tokenizer(text, { return_tensor: false }).input_ids), completions,
    padded: (await generate(prompts)).map(ended),
    chat_ids: chats.map((chat) => tokenizer.apply_chat_template(
      chat, { add_generation_prompt: true, return_tensor: false, return_dict: false })),
  };
}
