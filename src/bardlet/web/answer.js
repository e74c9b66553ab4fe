// A text that the model writes: its tokens, what else was likely at each, and what the model did there.

import { generate, largest, softmax } from "./forward.js";

/** Let the browser draw and react. */
export const frame = () => new Promise((resolve) => setTimeout(resolve));

/** Return a function that lets the browser react if `milliseconds` have passed since it last did. */
export function pauses(milliseconds) {
  let last = performance.now();
  return async () => {
    if (performance.now() - last <= milliseconds) return;
    await frame();
    last = performance.now();
  };
}

/** Bytes of looks (see `generate`) that a page keeps: 2,800 tokens of a model of 10 million parameters. */
const LOOK_BYTES = 2 ** 27;

/** The looks of the newest tokens. Those of older tokens are dropped; `Answer.look` computes them again. */
export class Looks {
  constructor({ layers, encoderLayers, heads, context, channels }, bytes = LOOK_BYTES) {
    const largestLook = 4 * (layers * heads * context * (encoderLayers ? 2 : 1) + (layers + 1) * channels);
    this.limit = Math.max(1, Math.floor(bytes / largestLook));
    this.steps = [];
  }

  keep(step) {
    this.steps.push(step);
    if (this.steps.length > this.limit) this.steps.shift().look = null;
  }
}

/**
 * One text that the model writes.
 *
 * steps: a token each, {id, p, text, likeliest, start, look}. p: its probability. likeliest: the ten likeliest tokens,
 * [{id, p}]. start, look: see `generate`. list: shows the tokens. question: the message that an answer belongs to.
 */
export class Answer {
  constructor({ model, tokenizer, looks, list, choose, prompt, source = null, limit, question = null }) {
    Object.assign(this, { model, tokenizer, looks, list, choose, prompt, source, limit, question });
    this.steps = [];
    this.finished = false;
    this.decoder = tokenizer.decoder();
  }

  get ids() {
    return this.steps.map((step) => step.id);
  }

  get text() {
    return this.tokenizer.decode(this.ids);
  }

  /** Return the ids that the model read before token n. */
  context(n) {
    return [...this.prompt, ...this.ids.slice(0, n)].slice(this.steps[n].start);
  }

  newCache() {
    return this.source ? this.model.encode(this.source) : this.model.newCache();
  }

  /** Write on until the model ends its text, `limit` tokens are there, or `alive()` is false. */
  async write(alive) {
    const { model, choose, limit } = this, pause = pauses(30);
    if (this.finished) return;
    if (this.steps.length < limit) {
      for (const step of generate(model, [...this.prompt, ...this.ids], choose, { cache: this.newCache(), watch: true })) {
        if (!alive()) return;
        if (step) {
          if (model.stop.includes(step.id)) break;
          this.push(step);
          if (this.steps.length >= limit) break;
        }
        await pause();
      }
    }
    if (alive()) this.finish();
  }

  push({ id, logits, look, start }) {
    const p = softmax(Float64Array.from(logits));
    const step = { id, p: p[id], likeliest: largest(p, 10).map((other) => ({ id: other, p: p[other] })), look, start };
    this.looks.keep(step);
    this.show(step);
  }

  show(step) {
    step.text = this.decoder.feed(step.id);
    this.steps.push(step);
    this.list.add(step.text, step.p);
  }

  /** End the text here: the bytes of a character that is not whole show as U+FFFD. */
  finish() {
    if (this.finished) return;
    this.finished = true;
    const rest = this.decoder.end();
    if (!rest) return;
    this.steps.at(-1).text += rest;
    this.list.append(rest);
  }

  /** Replace token n by another of its likeliest, and drop what follows. A token that ends texts ends this one. */
  branch(n, { id, p }) {
    const step = this.steps[n];
    this.steps.length = n;
    this.list.keep(n);
    this.decoder = this.tokenizer.decoder();
    for (const before of this.ids) this.decoder.feed(before);
    this.finished = false;
    if (this.model.stop.includes(id)) this.finish();
    else this.show(Object.assign(step, { id, p }));
  }

  /** Return the look of token n, which may take a while; null once `alive()` is false. */
  async look(n, alive) {
    const step = this.steps[n], pause = pauses(30);
    if (step.look) return step.look;
    const again = generate(this.model, this.context(n), () => step.id, { cache: this.newCache(), watch: true });
    for (const reading of again) {
      if (!alive()) return null;
      if (reading) {
        step.look = reading.look;
        this.looks.keep(step);
        return step.look;
      }
      await pause();
    }
    return null;
  }
}
