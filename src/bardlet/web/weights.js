// The weights in an exported page: base64 of one block of bytes, and a list of what is where in it.

let floats; // the numbers of all 65,536 halves

/** Return name -> Float32Array. entries: [{name, dtype, shape, offset}]; bytes: an ArrayBuffer. */
export function unpack(entries, bytes) {
  const tensors = {};
  for (const { name, dtype, shape, offset } of entries) {
    const size = shape.reduce((a, b) => a * b, 1);
    if (dtype === "fp32") tensors[name] = new Float32Array(bytes, offset, size);
    else if (dtype === "fp16") {
      const halves = new Uint16Array(bytes, offset, size), values = new Float32Array(size);
      floats ??= Float32Array.from({ length: 1 << 16 }, (_, bits) => halfToFloat(bits));
      for (let i = 0; i < size; i++) values[i] = floats[halves[i]];
      tensors[name] = values;
    } else { // int8: the scale of each row, then the rows
      const [rows, columns] = shape, scale = new Float32Array(bytes, offset, rows);
      const whole = new Int8Array(bytes, offset + 4 * rows, size), values = new Float32Array(size);
      for (let row = 0, i = 0; row < rows; row++)
        for (let column = 0; column < columns; column++, i++) values[i] = whole[i] * scale[row];
      tensors[name] = values;
    }
  }
  return tensors;
}

/** Return the number that 16 bits are in IEEE 754's half precision. */
export function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Return the bytes of base64 text as an ArrayBuffer. */
export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return bytes.buffer;
}
