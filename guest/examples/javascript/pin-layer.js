// One layer on a device of your choice, everything else on the first device.

import { write } from "tightfit:host/log@0.1.0";
import { storedBytes } from "tightfit:host/sizing@0.1.0";

const SETTINGS = [
  { name: "layer", default: "0", help: "Number of the layer to pin." },
  { name: "device", default: "0", help: "Where it goes: a device's index or name." },
];
const NF4 = { tag: "nf4", val: { blockSize: 64, doubleQuantized: false } };
const STORED = { tag: "stored" };

// What the world `policy` exports. A refusal is thrown; a `u64` is a BigInt.
export const planner = {
  describe() {
    return { name: "pin-layer", version: "1.0.0", settings: SETTINGS };
  },

  plan(request) {
    try {
      return place(request);
    } catch (error) {
      // What is no refusal ends in a trap, which carries no text: the host shows what was logged
      // before that.
      if (error instanceof Error) write("error", String(error));
      throw error;
    }
  },
};

// Where every tensor goes.
function place(request) {
  const values = new Map(SETTINGS.map((setting) => [setting.name, setting.default]));
  for (const [name, value] of request.settings) values.set(name, value.trim());
  const layer = number(values.get("layer"));
  if (layer === undefined || layer > 9999) {
    throw badSetting("layer", values.get("layer"), "a whole number from 0 to 9999");
  }
  const device = find(request.devices, values.get("device"));

  const sizes = new Map();
  const inside = `.layers.${layer}.`;
  let needed = 0n;
  const placements = request.tensors.map((tensor) => {
    const format = isQuantized(tensor) ? NF4 : STORED;
    const pinned = `.${tensor.name}`.includes(inside);
    if (pinned) needed += size(tensor, format, sizes);
    return { device: pinned ? device : 0, format };
  });
  if (needed === 0n) {
    const allowed = "the number of a layer of this model";
    throw badSetting("layer", values.get("layer"), allowed);
  }
  const { name, available } = request.devices[device];
  if (needed > available) {
    const message = `layer ${layer} takes ${amount(needed, true)}, ${name} has ${amount(available)}`;
    throw { reason: "does-not-fit", message, missingBytes: needed - available };
  }
  write("info", `layer ${layer} takes ${needed} bytes`);
  return { placements, headroom: new BigUint64Array(request.devices.length) };
}

// Bytes as people read them: a need is rounded up, what there is down.
function amount(bytes, up = false) {
  const [unit, name] = bytes >= 100n << 20n ? [1n << 30n, "GiB"] : [1n << 20n, "MiB"];
  const hundredths = (bytes * 100n + (up ? unit - 1n : 0n)) / unit;
  return `${hundredths / 100n}.${String(hundredths % 100n).padStart(2, "0")} ${name}`;
}

// Matrices of linear layers and of experts are; a bitsandbytes weight is already.
function isQuantized(tensor) {
  if (tensor.quantized || !["bf16", "f16", "f32"].includes(tensor.dtype)) return false;
  const path = tensor.name.split(".");
  const leaf = path.pop();
  const dimensions = tensor.shape.length;
  // One matrix of one expert, or a stack of those of all.
  if (path.includes("experts")) return dimensions >= 2 && !leaf.endsWith("bias");
  const module = path.at(-1) ?? "";
  return (
    leaf === "weight" &&
    dimensions === 2 &&
    !["lm_head", "gate", "router"].includes(module) &&
    !module.includes("embed") &&
    !module.includes("norm")
  );
}

// Bytes on a device, as the host counts them; asked for once per shape.
function size(tensor, format, sizes) {
  const asked = tensor.quantized ? { tag: "nf4", val: tensor.quantized } : format;
  const key = [tensor.dtype, tensor.shape, asked.tag, asked.val?.blockSize,
    asked.val?.doubleQuantized].join();
  if (!sizes.has(key)) {
    try {
      sizes.set(key, storedBytes(tensor.dtype, tensor.shape, asked).padded);
    } catch (error) {
      throw { reason: "unsupported", message: error.payload.message };
    }
  }
  return sizes.get(key);
}

// The device of this index or name.
function find(devices, text) {
  const names = devices.map((device) => device.name);
  const index = number(text) ?? names.indexOf(text);
  if (index < 0 || index >= devices.length) {
    throw badSetting("device", text, `a device (${names.join(", ")}) or its index`);
  }
  return index;
}

// A whole number in decimal digits.
function number(text) {
  return /^[0-9]{1,9}$/.test(text) ? Number(text) : undefined;
}

function badSetting(name, value, allowed) {
  const message = `setting \`${name}\` is \`${value}\`: it must be ${allowed}`;
  return { reason: "bad-setting", message };
}
