// A product with a 4-bit weight of its own, on the first device: `multiply [ROWS]`.

import { Buffer } from "tightfit:host/buffers@0.1.0";
import { Weight, multiply as multiplyAll } from "tightfit:host/linear@0.1.0";
import { quantizeBytes } from "tightfit:host/nf4@0.1.0";

const [OUTPUTS, INPUTS] = [4, 64];

// What the world `program` exports. What is thrown is why it gave up, as text.
export const run = {
  run([rows = "1"]) {
    try {
      return multiply(Number(rows));
    } catch (error) {
      // What the host says has a payload: a tag, and what it is about.
      throw error.payload ? JSON.stringify(error.payload, wide) : String(error);
    }
  },
};

// Quantizes 1 and -1, which NF4 has exactly, and multiplies whole numbers with them.
function multiply(rows) {
  const numbers = new Float32Array(OUTPUTS * INPUTS);
  numbers.forEach((_, n) => {
    const [output, input] = [Math.floor(n / INPUTS), n % INPUTS];
    numbers[n] = input % (output + 2) === 0 ? 1 : -1;
  });
  const codes = Buffer.allocate(0, BigInt(numbers.length / 2));
  const absmax = Buffer.allocate(0, BigInt((4 * numbers.length) / 64));
  quantizeBytes(bytes(numbers), "f32", 64, at(codes), at(absmax));
  const shape = new BigUint64Array([BigInt(OUTPUTS), BigInt(INPUTS)]);
  const weight = Weight.fromCodes("nf4", shape, 64, at(codes), at(absmax));

  const input = Float32Array.from({ length: rows * INPUTS }, (_, n) => {
    return Math.floor(n / INPUTS) + ((n % INPUTS) % 3);
  });
  const x = Buffer.allocate(0, BigInt(input.byteLength));
  const y = Buffer.allocate(0, BigInt(4 * rows * OUTPUTS));
  x.write(0n, bytes(input));
  multiplyAll([{ weight, input: at(x), rows, float: "f32", output: at(y), rounding: "fastest" }]);
  // Reading waits for what is queued.
  const result = new Float32Array(y.read(0n, y.length()).slice().buffer);
  const lines = Array.from({ length: rows }, (_, row) => {
    return result.subarray(row * OUTPUTS, (row + 1) * OUTPUTS).join(" ");
  });
  return lines.join("\n");
}

function at(buffer, offset = 0n) {
  return { buffer, offset };
}

function bytes(floats) {
  return new Uint8Array(floats.buffer);
}

function wide(_, value) {
  return typeof value === "bigint" ? String(value) : value;
}
