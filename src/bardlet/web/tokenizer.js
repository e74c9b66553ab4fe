// Text to token ids and back: characters, bytes, or byte-level BPE (Sennrich et al., 2016; Radford et al., 2019).

/** Unicode's White_Space, in a regular expression. */
export const SPACE = "\\t-\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";

/** GPT-2's rule: contractions, then words, numbers and signs with the space before them, then white space. */
const WORDS = new RegExp(
  `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`, "gu");

export class Tokenizer {
  /**
   * kind: char, byte or bpe. tokens: [id, bytes in hexadecimal] of the tokens that are not merged from others.
   * merges: left and right id of each merge by rank, one after the other; the result of merge n is token mergeIds[n], or
   * firstMerge + n. special: ids of the special tokens by name. nfc, lowercase: how a text is normalized first.
   */
  constructor({ kind, tokens, merges, mergeIds, firstMerge, special, nfc, lowercase }) {
    Object.assign(this, { kind, special, nfc, lowercase });
    this.names = new Map(Object.entries(special).map(([name, id]) => [id, name]));
    this.bytes = []; // of each token, by id
    for (const [id, hex] of tokens) this.bytes[id] = Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
    this.ids = new Map(); // of characters, or of single bytes: a longer token comes from merges only
    this.bytes.forEach((bytes, id) => {
      if (this.names.has(id)) return;
      if (kind === "char") this.ids.set(new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes), id);
      else if (bytes.length === 1) this.ids.set(bytes[0], id);
    });
    this.merges = new Map(); // pair of ids -> rank and the id that they become
    for (let rank = 0; 2 * rank < merges.length; rank++) {
      const [left, right] = merges.slice(2 * rank, 2 * rank + 2), id = mergeIds ? mergeIds[rank] : firstMerge + rank;
      this.merges.set(`${left} ${right}`, { rank, id });
      this.bytes[id] = Uint8Array.of(...this.bytes[left], ...this.bytes[right]);
    }
    this.words = new Map(); // the ids of words seen before
  }

  /** Return the ids of a text, and the characters that the model does not know, which are left out. */
  encode(text) {
    text = text.toWellFormed?.() ?? text;
    if (this.nfc) text = text.normalize("NFC");
    if (this.lowercase) text = Array.from(text, (character) => character.toLowerCase()).join("");
    const ids = [], unknown = new Set();
    if (this.kind === "char") {
      for (const character of text) {
        const id = this.ids.get(character);
        if (id === undefined) unknown.add(character);
        else ids.push(id);
      }
    } else if (this.kind === "byte") {
      for (const byte of new TextEncoder().encode(text)) ids.push(this.ids.get(byte));
    } else {
      for (const [word] of text.matchAll(WORDS)) ids.push(...this.encodeWord(word));
    }
    return { ids, unknown: [...unknown] };
  }

  /** Start with bytes, and merge the pair that was merged first in training, until no pair is left. */
  encodeWord(word) {
    let known = this.words.get(word);
    if (known) return known;
    known = Array.from(new TextEncoder().encode(word), (byte) => this.ids.get(byte));
    for (;;) {
      let best = null, at = -1;
      for (let i = 0; i + 1 < known.length; i++) {
        const merge = this.merges.get(`${known[i]} ${known[i + 1]}`);
        if (merge && (!best || merge.rank < best.rank)) [best, at] = [merge, i];
      }
      if (!best) break;
      known.splice(at, 2, best.id);
    }
    this.words.set(word, known);
    return known;
  }

  /** Return the text of ids; special tokens have none. A character cut in two becomes U+FFFD. */
  decode(ids) {
    const decoder = this.decoder();
    return ids.map((id) => decoder.feed(id)).join("") + decoder.end();
  }

  /** Return a decoder of ids that come one at a time: a token may end inside a character. */
  decoder() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      feed: (id) => (this.names.has(id) ? "" : utf8.decode(this.bytes[id] ?? new Uint8Array(), { stream: true })),
      end: () => utf8.decode(),
    };
  }

  /** Return one token as a label: the name of a special token, else its text, with marks for bytes that are none. */
  label(id) {
    return this.names.get(id) ?? new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes[id] ?? new Uint8Array());
  }
}
