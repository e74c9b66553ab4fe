// The ids that a model reads before it writes: the beginning of a text, a conversation, or a sentence to translate.

import { SPACE } from "./tokenizer.js";

/** Return the ids of the beginning of a text, and its unknown characters. `bardlet/api/models.py` has the same rule. */
export function promptIds(tokenizer, text, { start, startsDocuments }) {
  const { ids, unknown } = tokenizer.encode(text);
  if (!ids.length) return { ids: start, unknown };
  return { ids: startsDocuments && ids[0] !== start[0] ? [...start, ...ids] : ids, unknown };
}

const CHAT = /<\|/g;

/** Return the ids of a conversation, and its characters that are unknown; `bardlet/data/chat_template.py` explains. */
export function chatIds(tokenizer, messages) {
  const ids = [], unknown = new Set();
  for (const { role, content } of messages) {
    const encoded = tokenizer.encode(content.replace(CHAT, "< |"));
    ids.push(tokenizer.special[`<|${role}|>`], ...encoded.ids, tokenizer.special["<|end|>"]);
    encoded.unknown.forEach((character) => unknown.add(character));
  }
  ids.push(tokenizer.special["<|assistant|>"]);
  return { ids, unknown: [...unknown] };
}

/**
 * Return {ids, unknown, forgotten, limit} of a conversation, as `bardlet/inference/chat_session.py` does.
 *
 * forgotten: number of messages left out at the start, so that the answer fits into the window. limit: most tokens of
 * the answer, at most half of the window. RangeError if the last message alone does not fit.
 */
export function chatPrompt(tokenizer, messages, context, tokens) {
  const limit = Math.min(tokens, Math.floor(context / 2));
  let length = 0;
  for (const [forgotten, { role }] of messages.entries()) {
    if (role !== "user") continue; // the kept part starts with a question
    const { ids, unknown } = chatIds(tokenizer, messages.slice(forgotten));
    if (ids.length <= context - limit) return { ids, unknown, forgotten, limit };
    length = ids.length;
  }
  throw new RangeError(`The message is too long: ${length} tokens, but ${context - limit} fit in the model's window of `
    + `${context}, with ${limit} reserved for the answer. Shorten it.`);
}

const AROUND = new RegExp(`^[${SPACE}\\x1c-\\x1f]+|[${SPACE}\\x1c-\\x1f]+$`, "g"); // Python's str.strip()

/**
 * Return {source, limit, cut, unknown} of each line, null of an empty line, as `bardlet/inference/translate.py` does.
 *
 * limit: most tokens of the translation. cut: true if the line is longer than the window, so that its end is left out.
 */
export function translationSources(tokenizer, text, { context, eos }) {
  return text.split("\n").map((line) => line.replace(AROUND, "")).map((line) => {
    if (!line) return null;
    const { ids, unknown } = tokenizer.encode(line), source = [...ids.slice(0, context - 1), eos];
    return { source, limit: Math.min(2 * source.length + 20, context), cut: ids.length >= context, unknown };
  });
}
