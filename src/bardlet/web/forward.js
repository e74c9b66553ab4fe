// The forward pass of every model that bardlet trains, in plain JavaScript.
//
// All of them have one form: an embedding, blocks in which positions first communicate (attention) and then compute
// (feed-forward), and a head. What a rung of the lecture does not have yet is null here. `bardlet/export/canonical.py`
// names the weights.
//
// T positions of C channels are one Float32Array, position after position: channel c of position t is x[t * C + c].

// ---------------------------------------------------------------- layers

/** Return W x + b for each of T positions. weight: (outputs, inputs), row after row. */
export function linear({ weight, bias, inputs, outputs }, x, T) {
  const y = new Float32Array(T * outputs);
  let o = 0;
  for (; o + 4 <= outputs; o += 4) { // four rows at a time: each number of x is read once for four products
    const row0 = o * inputs, row1 = row0 + inputs, row2 = row1 + inputs, row3 = row2 + inputs;
    for (let t = 0; t < T; t++) {
      const start = t * inputs, out = t * outputs + o;
      let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
      for (let i = 0; i < inputs; i++) {
        const value = x[start + i];
        sum0 += weight[row0 + i] * value;
        sum1 += weight[row1 + i] * value;
        sum2 += weight[row2 + i] * value;
        sum3 += weight[row3 + i] * value;
      }
      y[out] = sum0;
      y[out + 1] = sum1;
      y[out + 2] = sum2;
      y[out + 3] = sum3;
    }
  }
  for (; o < outputs; o++) {
    for (let t = 0; t < T; t++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum += weight[o * inputs + i] * x[t * inputs + i];
      y[t * outputs + o] = sum;
    }
  }
  if (bias) for (let t = 0; t < T; t++) for (let j = 0; j < outputs; j++) y[t * outputs + j] += bias[j];
  return y;
}

/** LayerNorm (with a bias) or RMSNorm (without) of each row of `width` numbers. */
export function norm({ weight, bias, eps, centered }, x, width) {
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    let mean = 0, square = 0;
    if (centered) {
      for (let i = 0; i < width; i++) mean += x[start + i];
      mean /= width;
    }
    for (let i = 0; i < width; i++) square += (x[start + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(square / width + eps);
    for (let i = 0; i < width; i++) y[start + i] = (x[start + i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
  }
  return y;
}

export const ACTIVATIONS = {
  relu: (x) => Math.max(0, x),
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_new: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

/** The error function: its power series, or beyond 3, where that loses digits, its continued fraction. */
export function erf(x) {
  const z = Math.abs(x);
  if (z > 6) return Math.sign(x);
  if (z < 3) {
    let term = z, sum = z;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
      term *= -z * z / n;
      sum += term / (2 * n + 1);
    }
    return Math.sign(x) * sum * 2 / Math.sqrt(Math.PI);
  }
  let fraction = 0;
  for (let n = 40; n > 0; n--) fraction = n / 2 / (z + fraction);
  return Math.sign(x) * (1 - Math.exp(-z * z) / (z + fraction) / Math.sqrt(Math.PI));
}

/** Turn scores into probabilities, in place: x[start..end). */
export function softmax(x, start = 0, end = x.length) {
  let largest = -Infinity, sum = 0;
  for (let i = start; i < end; i++) largest = Math.max(largest, x[i]);
  for (let i = start; i < end; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = start; i < end; i++) x[i] /= sum;
  return x;
}

/** Rotate the pairs (i, i + D/2) of each head of D channels by the angle of its position, in place (RoFormer). */
function rotate(x, T, heads, D, first, frequencies) {
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < D / 2; i++) {
      const angle = Math.fround((first + t) * frequencies[i]); // in single precision, as in training
      const cos = Math.cos(angle), sin = Math.sin(angle);
      for (let h = 0; h < heads; h++) {
        const left = (t * heads + h) * D + i, right = left + D / 2;
        const a = x[left], b = x[right];
        x[left] = a * cos - b * sin;
        x[right] = b * cos + a * sin;
      }
    }
  }
}

// ---------------------------------------------------------------- attention

/**
 * Mix the values of S positions for each of T queries, by how well their keys match.
 *
 * q: (T, H, D). k, v: (S, K, D), where K heads serve H queries. first: position of the first query; it sees the keys up
 * to its own position, or all of them if `first` is null. look, if given, gets the weights of each head at the last
 * query: H arrays of S.
 */
function attend(q, k, v, T, S, { heads: H, kvHeads: K, headSize: D }, first, look) {
  const y = new Float32Array(T * H * D), weight = new Float32Array(S), scale = 1 / Math.sqrt(D);
  for (let t = 0; t < T; t++) {
    const visible = first === null ? S : first + t + 1;
    for (let h = 0; h < H; h++) {
      const query = (t * H + h) * D, head = Math.floor(h * K / H) * D;
      for (let s = 0; s < visible; s++) {
        let score = 0;
        for (let d = 0; d < D; d++) score += q[query + d] * k[s * K * D + head + d];
        weight[s] = score * scale;
      }
      softmax(weight, 0, visible);
      for (let s = 0; s < visible; s++) {
        for (let d = 0; d < D; d++) y[query + d] += weight[s] * v[s * K * D + head + d];
      }
      if (look && t === T - 1) look.push(weight.slice(0, visible));
    }
  }
  return y;
}

/** Rung 2: each position becomes the average of itself and all before it. cache.v holds them. */
function average(v, T, S, C) {
  const y = new Float32Array(T * C);
  for (let c = 0; c < C; c++) {
    let sum = 0;
    for (let s = 0; s < S; s++) {
      sum += v[s * C + c];
      if (s >= S - T) y[(s - S + T) * C + c] = sum / (s + 1);
    }
  }
  return y;
}

// ---------------------------------------------------------------- the model

export class Model {
  /**
   * spec: shape and kind of the model. tensors: name -> Float32Array. Both come from `bardlet export`.
   */
  constructor(spec, tensors) {
    Object.assign(this, spec); // vocab, channels, context, heads, kvHeads, headSize, activation, ...
    this.tensors = tensors;
    this.embedding = tensors["embed.weight"];
    this.table = spec.positions === "learned" ? tensors["positions.weight"]
      : spec.positions === "sinusoids" ? sinusoids(spec.context, spec.channels) : null;
    this.blocks = this.stack("blocks", spec.layers);
    this.encoder = this.stack("encoder", spec.encoderLayers);
    this.finalNorm = this.normOf("norm");
    this.encoderNorm = this.normOf("encoder.norm");
    this.head = spec.head === "none" ? null : spec.head === "tied"
      ? { weight: this.embedding, bias: null, inputs: spec.channels, outputs: spec.vocab }
      : this.linearOf("head");
  }

  linearOf(name) {
    const weight = this.tensors[`${name}.weight`];
    if (!weight) return null;
    const [outputs, inputs] = this.shapes[`${name}.weight`];
    return { weight, bias: this.tensors[`${name}.bias`] ?? null, inputs, outputs };
  }

  normOf(name) {
    const weight = this.tensors[`${name}.weight`];
    return weight ? { weight, bias: this.tensors[`${name}.bias`] ?? null, eps: this.eps, centered: this.centered } : null;
  }

  stack(name, layers) {
    return Array.from({ length: layers }, (_, n) => {
      const block = { rotates: this.positions === "rotary" && !this.withoutPositions.includes(n) };
      for (const part of ["q", "k", "v", "o", "crossQ", "crossK", "crossV", "crossO", "up", "gate", "down"]) {
        block[part] = this.linearOf(`${name}.${n}.${part}`);
      }
      for (const part of ["norm1", "norm2", "crossNorm", "qNorm", "kNorm"]) {
        block[part] = this.normOf(`${name}.${n}.${part}`);
      }
      return block;
    });
  }

  /** Return an empty cache: keys and values of every block, for the positions so far. */
  newCache() {
    const size = this.context * (this.attention === "average" ? this.channels : this.kvHeads * this.headSize);
    const keep = () => ({ k: new Float32Array(size), v: new Float32Array(size) });
    return { length: 0, layers: this.blocks.map(keep), source: null };
  }

  /**
   * Read `ids`, which follow the positions in the cache, and return the logits of the token after the last: (V).
   *
   * look, if given, gets `attention` (of each block, of each head: the weights of the last position), `cross` (the same
   * over the source), and `stream`: the last position's channels after the embedding and after each block.
   */
  forward(ids, cache, look = null) {
    const T = ids.length, C = this.channels, first = cache.length;
    if (first + T > this.context) throw new RangeError(`${first + T} positions in a context of ${this.context}`);
    let x = this.embed(ids, first);
    look?.stream?.push(x.slice(-C));
    this.blocks.forEach((block, n) => {
      x = this.communicate(block, x, T, cache.layers[n], first, look?.attention);
      if (block.crossQ) x = this.consult(block, x, T, cache.source[n], look?.cross);
      x = this.compute(block, x, T);
      look?.stream?.push(x.slice(-C));
    });
    cache.length += T;
    return this.read(x.slice(-C));
  }

  /** Return the logits of a residual stream at one position: of the last block, or, as a "lens", of an earlier one. */
  read(x) {
    if (this.finalNorm) x = norm(this.finalNorm, x, this.channels);
    return this.head ? linear(this.head, x, 1) : x;
  }

  embed(ids, first) {
    const C = this.channels, x = new Float32Array(ids.length * C);
    ids.forEach((id, t) => {
      for (let c = 0; c < C; c++) {
        x[t * C + c] = this.embedding[id * C + c] * this.embeddingScale + (this.table ? this.table[(first + t) * C + c] : 0);
      }
    });
    return x;
  }

  /** Self-attention: positions gather from themselves and the positions before. first: null in an encoder. */
  communicate(block, x, T, kept, first, look) {
    if (!this.attention) return x;
    const h = block.norm1 ? norm(block.norm1, x, this.channels) : x;
    const S = (first ?? 0) + T;
    if (this.attention === "average") {
      kept.v.set(h, first * this.channels);
      return average(kept.v, T, S, this.channels);
    }
    const { heads, kvHeads, headSize } = this;
    let q = linear(block.q, h, T), k = linear(block.k, h, T);
    if (block.qNorm) {
      q = norm(block.qNorm, q, headSize);
      k = norm(block.kNorm, k, headSize);
    }
    if (block.rotates) {
      rotate(q, T, heads, headSize, first, this.frequencies);
      rotate(k, T, kvHeads, headSize, first, this.frequencies);
    }
    kept.k.set(k, (first ?? 0) * kvHeads * headSize);
    kept.v.set(linear(block.v, h, T), (first ?? 0) * kvHeads * headSize);
    const weights = look ? [] : null;
    const y = attend(q, kept.k, kept.v, T, S, this, first, weights);
    look?.push(weights);
    return this.add(x, block.o ? linear(block.o, y, T) : y);
  }

  /** Cross-attention: the target gathers from the encoded source. */
  consult(block, x, T, source, look) {
    const q = linear(block.crossQ, norm(block.crossNorm, x, this.channels), T), weights = look ? [] : null;
    const y = attend(q, source.k, source.v, T, source.length, this, null, weights);
    look?.push(weights);
    return this.add(x, linear(block.crossO, y, T));
  }

  /** Feed-forward: each position computes on its own. */
  compute(block, x, T) {
    if (!block.up) return x;
    const h = block.norm2 ? norm(block.norm2, x, this.channels) : x;
    const activate = ACTIVATIONS[this.activation], inner = linear(block.up, h, T);
    if (block.gate) {
      const gate = linear(block.gate, h, T);
      for (let i = 0; i < inner.length; i++) inner[i] *= activate(gate[i]);
    } else {
      for (let i = 0; i < inner.length; i++) inner[i] = activate(inner[i]);
    }
    return this.add(x, block.down ? linear(block.down, inner, T) : inner);
  }

  /** The residual connection, which the first rungs do not have. */
  add(x, y) {
    if (this.residual) for (let i = 0; i < y.length; i++) y[i] += x[i];
    return y;
  }

  /** Encode a source and return a cache for its translation. */
  encode(ids) {
    const S = ids.length;
    if (S > this.context) throw new RangeError(`${S} tokens in a context of ${this.context}`);
    let x = this.embed(ids, 0);
    for (const block of this.encoder) {
      const kept = { k: new Float32Array(S * this.channels), v: new Float32Array(S * this.channels) };
      x = this.compute(block, this.communicate(block, x, S, kept, null), S);
    }
    x = norm(this.encoderNorm, x, this.channels);
    const cache = this.newCache();
    cache.source = this.blocks.map((b) => ({ k: linear(b.crossK, x, S), v: linear(b.crossV, x, S), length: S }));
    return cache;
  }
}

/** The positions of *Attention Is All You Need*: sines, then cosines, of C/2 frequencies. */
function sinusoids(length, C) {
  const table = new Float32Array(length * C);
  for (let p = 0; p < length; p++) {
    for (let i = 0; i < C / 2; i++) {
      const angle = p * 10000 ** (-2 * i / C);
      table[p * C + i] = Math.sin(angle);
      table[p * C + C / 2 + i] = Math.cos(angle);
    }
  }
  return table;
}

// ---------------------------------------------------------------- generation

/** Positions that are read at once: a page stays responsive between slices of a long prompt. */
const SLICE = 16;

/**
 * Yield the ids that follow a prompt, each with what it was chosen by: {id, logits, look, start}. null: still reading.
 *
 * choose: logits -> id. start: position in the prompt and answer of the first id that the model still sees. When the
 * window is full, a model starts it anew with its last half, as in bardlet; a rung of the lecture rereads its last
 * `context` tokens for every new one.
 */
export function* generate(model, prompt, choose, { cache = model.newCache(), watch = false } = {}) {
  let ids = prompt.slice(-model.context), unread = ids, start = prompt.length - ids.length;
  for (;;) {
    for (; unread.length > SLICE; unread = unread.slice(SLICE)) {
      model.forward(unread.slice(0, SLICE), cache);
      yield null;
    }
    const look = watch ? { attention: [], cross: [], stream: [] } : null;
    const logits = model.forward(unread, cache, look), id = choose(logits);
    yield { id, logits, look, start };
    ids.push(id);
    unread = [id];
    if (cache.length === model.context) {
      if (cache.source) return; // a translation ends with the window
      const kept = model.slides ? model.context : Math.max(1, Math.floor(model.context / 2));
      start += ids.length - kept;
      unread = ids = ids.slice(-kept);
      cache.length = 0;
    }
  }
}

/** Return the index of the largest number. */
export function argmax(x) {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}

/** Return the indexes of the `count` largest numbers, in order: a scan, as sorting a large vocabulary takes long. */
export function largest(x, count) {
  const best = [];
  for (let i = 0; i < x.length; i++) {
    if (best.length === count && !(x[i] > x[best[count - 1]])) continue;
    let at = Math.min(best.length, count - 1);
    for (; at > 0 && x[i] > x[best[at - 1]]; at--) best[at] = best[at - 1];
    best[at] = i;
  }
  return best;
}

/** Return a function that samples an id from logits. seed: a number; the same seed draws the same ids. */
export function sampler({ temperature = 0.8, topK = 50, seed = 1 }) {
  if (temperature === 0) return argmax;
  let state = seed >>> 0;
  const random = () => { // mulberry32
    let z = state = (state + 0x6D2B79F5) >>> 0;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
  return (logits) => {
    const order = largest(logits, topK), p = softmax(Float64Array.from(order, (id) => logits[id] / temperature));
    let left = random();
    return order[Math.max(0, p.findIndex((value) => (left -= value) < 0))];
  };
}
