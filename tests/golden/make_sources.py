#!/usr/bin/env python3
"""Makes the golden files of checkpoints that another method has quantized.

    make_sources.py TARGET

For each case TARGET gets a directory with `config.json`, `model.safetensors` (the checkpoint) and
`expected.safetensors` (its weights decoded by the method's own library, and what bitsandbytes makes
of them); README.md tells what is in them. Every value that a library gives is compared with the rule
as it is written in source_rules.py, and differences are printed, so that where no library decodes a
layout the rule can be trusted too.
"""

import json
import sys
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    preset_name_to_scheme,
)
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from source_rules import BF16, E2M1, E4M3, E8M0, F16, F32, LARGEST, SMALLEST, SUBNORMAL, U8
from source_rules import compare, cuda_reference, e8m0, exponents, fp4, fp8, halves, integers
from source_rules import normal, random, rule, scales

LAYER = "model.layers.0."
ATTENTION, MLP, EXPERTS = LAYER + "self_attn.", LAYER + "mlp.", LAYER + "mlp.experts."


# What a case consists of.


class Case:
    def __init__(self, target, name, model_type, dtype=BF16):
        self.directory = target / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.name, self.source, self.expected = name, {}, {}
        self.config = {"model_type": model_type, "torch_dtype": str(dtype).removeprefix("torch.")}
        random.manual_seed(int.from_bytes(name.encode()[-7:]))

    def add(self, name, value, **source):
        """Adds a weight: its tensors in the checkpoint, by the ends of their names, and its value.
        A weight's own name is that of its module and `.weight`, or, for stacks, that of the parameter.
        """
        stack = name.startswith(EXPERTS) and value.ndim == 3
        separator = "" if stack else "."
        for end, tensor in source.items():
            self.source[name if stack and not end else name + separator + end] = tensor
        name = name if stack else name + ".weight"
        value = value.contiguous()
        codes, state = quantize_4bit(
            value, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        codes, absmax = codes.flatten(), state.absmax
        self.expected |= {name: value, name + ".codes": codes, name + ".absmax": absmax}
        for what, cpu, cuda in zip(("codes", "absmax"), (codes, absmax), cuda_reference(value)):
            if not torch.equal(cpu, cuda):
                self.expected[f"{name}.cudaref_{what}"] = cuda

    def keep(self, module, **tensors):
        """Adds tensors that the method has left alone."""
        self.source |= {f"{module}.{end}": tensor.to(BF16) for end, tensor in tensors.items()}

    def write(self, quantization):
        """Writes the files. compressed-tensors writes its configuration itself."""
        path = self.directory / "config.json"
        ours = isinstance(quantization, dict)
        config = self.config | ({"quantization_config": quantization} if ours else {})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not ours:
            ModelCompressor(quantization_config=quantization).update_config(self.directory)
            path.write_text(path.read_text() + "\n")
        save_file(self.source, self.directory / "model.safetensors", {"format": "pt"})
        save_file(self.expected, self.directory / "expected.safetensors")


def written(config):
    """The configuration as transformers writes it."""
    return json.loads(config.to_json_string(use_diff=False))


def compressed(layout, groups):
    for group in groups.values():
        group.format = layout
    return QuantizationConfig(
        config_groups=groups, format=layout, quantization_status="compressed", ignore=["lm_head"]
    )


def scheme(preset, *targets, **weights):
    """A preset of compressed-tensors, with other arguments for weights."""
    made = preset_name_to_scheme(preset, list(targets or ["Linear"]))
    if weights:
        old = made.weights.model_dump(exclude={"observer", "zp_dtype"})
        made.weights = QuantizationArgs(**(old | weights))
    return made


def decompress(layout, which, **state):
    return BaseCompressor.get_value_from_registry(layout).decompress(state, which)["weight"]


# FP8.

WHOLE, ROW, BLOCK = (1 << 30, 1 << 30), (1, 1 << 30), (128, 128)
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
DEEPSEEK |= {"weight_block_size": list(BLOCK)}
UE8M0 = DEEPSEEK | {"scale_fmt": "ue8m0"}


def finegrained(case, name, shape, scale, tile=BLOCK, end="weight_scale_inv", q=None, **others):
    """A weight of transformers' `fp8`. transformers takes the tile's size from the shapes, so its
    value counts only where the quotient is that size; elsewhere the rule by hand does."""
    q = fp8(*shape) if q is None else q
    grid = scale.shape[-2:] if scale.ndim > 1 else (1, 1)
    floats = scale.float() if scale.element_size() > 1 else e8m0(scale)
    value = rule(q, floats if scale.ndim > 1 else floats.reshape(1, 1), tile)
    if all(n == g * min(n, t) for n, g, t in zip(shape[-2:], grid, tile)):
        theirs = Fp8Dequantize(None)._dequantize_one(q, scale, BF16)
        value = compare(f"{case.name} {name}", value, theirs)
    own = "" if len(shape) > 2 else "weight"
    case.add(name, value, **{own: q, end: scale}, **others)


def fp8_block(target):
    case = Case(target, "fp8_block", "deepseek_v3")
    q = fp8(256, 24, zeros=128)
    finegrained(case, ATTENTION + "q_a_proj", q.shape, scales(2, 1, extreme=(2.0**-130,)), q=q)
    finegrained(case, ATTENTION + "o_proj", (8, 256), scales(1, 2))
    finegrained(case, ATTENTION + "kv_a_proj_with_mqa", (200, 12), scales(2, 1))
    finegrained(case, MLP + "up_proj", (7, 320), scales(1, 3))
    finegrained(case, MLP + "down_proj", (131, 9), scales(2, 1))
    case.keep("lm_head", weight=normal(16, 24))
    case.keep("model.norm", weight=normal(24))
    case.write(DEEPSEEK)


def fp8_block_32(target):
    """Blocks of another size, ragged in both directions, and extreme scales."""
    case = Case(target, "fp8_block_32", "qwen3")
    extreme = (SUBNORMAL, 0.0, SMALLEST, 1e36, LARGEST)
    finegrained(case, ATTENTION + "q_proj", (70, 100), scales(3, 3, extreme=extreme), (32, 48))
    finegrained(case, ATTENTION + "o_proj", (33, 47), scales(2, 1), (32, 48))
    case.write(written(FineGrainedFP8Config(weight_block_size=(32, 48))))


def fp8_block_ue8m0(target):
    """Scales as E8M0, as bytes, and as powers of two in f32."""
    case = Case(target, "fp8_block_ue8m0", "deepseek_v3")
    finegrained(case, ATTENTION + "q_a_proj", (256, 16), exponents(2, 1, extreme=(0,)).view(E8M0))
    finegrained(case, ATTENTION + "q_b_proj", (128, 24), e8m0(exponents(1, 1)))
    finegrained(case, ATTENTION + "o_proj", (16, 256), exponents(1, 2, extreme=(0,)))
    finegrained(case, MLP + "up_proj", (140, 10), exponents(2, 1, extreme=(254,)).view(E8M0))
    finegrained(case, MLP + "down_proj", (6, 300), exponents(1, 3, extreme=(0, 254)))
    case.write(UE8M0)


def fp8_tensor(target):
    case = Case(target, "fp8_tensor", "ministral3")
    for name, shape, scale, ends in [
        ("q_proj", (64, 48), scales(), ("weight_scale_inv", "activation_scale")),
        ("k_proj", (32, 40), scales().to(BF16), ("weight_scale_inv", "activation_scale")),
        ("v_proj", (33, 31), scales(1), ("weight_scale", "input_scale")),
        ("o_proj", (20, 20), scales(), ("weight_scale", "input_scale")),
    ]:
        others = {ends[1]: scales(*scale.shape).to(scale.dtype)}
        finegrained(case, ATTENTION + name, shape, scale, WHOLE, ends[0], **others)
    case.write(written(FineGrainedFP8Config("static", weight_block_size=None)))


def fp8_scale_names(target):
    case = Case(target, "fp8_scale_names", "deepseek_v4")
    for name, shape, grid in [("wq_a", (256, 16), (2, 1)), ("wo_b", (20, 128), (1, 1))]:
        scale = exponents(*grid).view(E8M0)
        finegrained(case, "layers.0.attn." + name, shape, scale, end="scale")
    case.write(UE8M0)

    case = Case(target, "fp8_qscale_names", "mistral_large4")
    for name, shape, scale in [("wq", (64, 32), scales()), ("wo", (24, 40), scales().to(BF16))]:
        name, others = "layers.0.attention." + name, {"qscale_act": scale * 2}
        finegrained(case, name, shape, scale, WHOLE, "qscale_weight", **others)
    case.write(written(FineGrainedFP8Config("static", weight_block_size=None)))


def fp8_stack(target):
    case = Case(target, "fp8_stack", "qwen3_5_moe")
    finegrained(case, EXPERTS + "gate_up_proj", (2, 256, 16), scales(2, 2, 1), end="_scale_inv")
    finegrained(case, EXPERTS + "down_proj", (2, 16, 136), scales(2, 1, 2), end="_scale_inv")
    case.keep(MLP + "gate", weight=normal(2, 16))
    case.write(written(FineGrainedFP8Config(modules_to_not_convert=["lm_head", MLP + "gate"])))


def float_quantized(case, name, shape, which, scale, tile, **others):
    q = fp8(*shape)
    value = decompress("float-quantized", which, weight=q, weight_scale=scale).to(BF16)
    compare(f"{case.name} {name}", rule(q, scale if scale.ndim > 1 else scale[None], tile), value)
    case.add(name, value, weight=q, weight_scale=scale, **others)


def fp8_compressed(target):
    case, rows = Case(target, "fp8_rows", "llama"), scheme("FP8_DYNAMIC")
    extreme = (0.0, SMALLEST, 2.0**-132, 1e36, LARGEST)
    for name, shape, kind in [("q", (48, 80), BF16), ("k", (37, 33), BF16), ("v", (24, 64), F32)]:
        scale = scales(shape[0], 1, extreme=extreme).to(kind)
        float_quantized(case, f"{ATTENTION}{name}_proj", shape, rows, scale, ROW)
    case.write(compressed("float-quantized", {"group_0": rows}))

    case = Case(target, "fp8_ct_tensor_and_block", "llama")
    whole, blocks = scheme("FP8", "re:.*self_attn.*"), scheme("FP8_BLOCK", "re:.*mlp.*")
    for name, shape, kind in [("q_proj", (24, 40), BF16), ("k_proj", (17, 31), F32)]:
        scale, others = scales(1).to(kind), {"input_scale": scales(1).to(kind)}
        float_quantized(case, ATTENTION + name, shape, whole, scale, WHOLE, **others)
    float_quantized(case, MLP + "gate_proj", (256, 16), blocks, scales(2, 1).to(BF16), BLOCK)
    float_quantized(case, MLP + "up_proj", (150, 20), blocks, scales(2, 1), BLOCK)
    float_quantized(case, MLP + "down_proj", (5, 300), blocks, scales(1, 3).to(BF16), BLOCK)
    case.write(compressed("float-quantized", {"group_0": whole, "group_1": blocks}))


# Four bits.


def gpt_oss(case, experts, hidden, intermediate, extreme, infinite):
    """Stacks of experts. Groups with 2^128 have codes of at least 1 if they are to be `infinite`."""
    for name, shape in [
        ("gate_up_proj", (experts, 2 * intermediate, hidden)),
        ("down_proj", (experts, hidden, intermediate)),
    ]:
        blocks = fp4(*shape[:2], shape[2] // 32, 16, zeros=128)
        scale = exponents(*blocks.shape[:3], extreme=extreme)
        if infinite:
            blocks[scale == 255] |= 0x22
        value = convert_moe_packed_tensors(blocks, scale).transpose(1, 2)
        ours = rule(E2M1[halves(blocks).flatten(-2)], e8m0(scale), (1, 32))
        compare(f"{case.name} {name}", ours, value)
        bias = normal(*shape[:2]).to(BF16)
        case.add(EXPERTS + name, value, _blocks=blocks, _scales=scale, _bias=bias)
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    case.write(written(Mxfp4Config([*ignored, "lm_head"])))


def mxfp4_stack(target):
    case = Case(target, "mxfp4_stack", "gpt_oss")
    value = normal(32, 64).to(BF16)
    case.add(ATTENTION + "q_proj", value, weight=value, bias=normal(32).to(BF16))
    case.keep(MLP + "router", weight=normal(2, 64), bias=normal(2))
    gpt_oss(case, 2, 64, 32, (0, 1, 254, 254, 255, 0), infinite=True)
    case = Case(target, "mxfp4_stack_255", "gpt_oss")
    gpt_oss(case, 1, 32, 32, (255, 120, 255, 255), infinite=False)


def mxfp4_expert(target):
    case, group = Case(target, "mxfp4_expert", "kimi_linear"), scheme("MXFP4A16")
    for name, shape in [("1", (24, 96)), ("2", (33, 32)), ("3", (24, 96))]:
        packed = fp4(shape[0], shape[1] // 2, zeros=64)
        scale = exponents(shape[0], shape[1] // 32, extreme=(0, 1, 254) if name == "3" else ())
        source = {"weight_packed": packed, "weight_scale": scale}
        value = decompress("mxfp4-pack-quantized", group, **source)
        compare(f"{case.name} {name}", rule(E2M1[halves(packed)], e8m0(scale), (1, 32)), value)
        case.add(f"{LAYER}block_sparse_moe.experts.0.w{name}", value, **source)
    case.write(compressed("mxfp4-pack-quantized", {"group_0": group}))

    case = Case(target, "mxfp4_expert_i8", "deepseek_v4")
    for name, shape in [("w1", (24, 96)), ("w2", (33, 32))]:
        packed = fp4(shape[0], shape[1] // 2).view(torch.int8)
        scale = exponents(shape[0], shape[1] // 32, extreme=(0, 1, 254)).view(E8M0)
        value = Fp8Dequantize(None)._dequantize_one(packed, scale, BF16)
        compare(f"{case.name} {name}", rule(E2M1[halves(packed)], e8m0(scale), (1, 32)), value)
        case.add("layers.0.ffn.experts.0." + name, value, weight=packed, scale=scale)
    case.config["expert_dtype"] = "fp4"
    case.write(UE8M0)


def int4(case, name, shape, which, kind=BF16, extreme=()):
    """A weight of `pack-quantized`: 4-bit integers with a scale a group, or a row."""
    rows, columns = shape
    size = which.weights.group_size or 1 << 30
    groups = -(-columns // size)
    values = (normal(*shape) * 3).round().clamp(-8, 7).to(torch.int8)
    values.view(-1)[:16] = torch.arange(-8, 8)
    scale = scales(rows, groups, extreme=extreme).to(kind)
    source = {"weight_packed": pack_to_int32(values, 4), "weight_scale": scale}
    zero = torch.zeros(rows, groups, dtype=torch.int8)
    if not which.weights.symmetric:
        zero = integers(-8, 8, rows, groups).to(torch.int8)
        source["weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0)
    source["weight_shape"] = torch.tensor(shape)
    value = decompress("pack-quantized", which, **source)
    shifted = values - zero[:, torch.arange(columns) // size]
    compare(f"{case.name} {name}", rule(shifted, scale, (1, size), kind), value)
    case.add(name, value, **source)


def int4_group(target):
    wide = scheme("W4A16", "re:.*self_attn.*")
    narrow = scheme("W4A16", "re:.*mlp.*", group_size=32)
    config = compressed("pack-quantized", {"group_0": wide, "group_1": narrow})
    extreme = (0.0, 2.0**-132, SMALLEST, -0.01, 1e37, LARGEST)
    case = Case(target, "int4_group", "llama")
    int4(case, ATTENTION + "q_proj", (24, 128), wide)
    int4(case, ATTENTION + "o_proj", (9, 256), wide, extreme=extreme)
    int4(case, MLP + "up_proj", (37, 96), narrow)
    case.write(config)

    extreme = (0.0, 2.0**-24, 2.0**-14, -0.01, 8191.0, 60000.0)
    case = Case(target, "int4_group_f16", "llama", F16)
    int4(case, ATTENTION + "q_proj", (16, 128), wide, F16)
    int4(case, MLP + "up_proj", (21, 96), narrow, F16, extreme)
    case.write(config)


def int4_channel_asym(target):
    case = Case(target, "int4_channel_asym", "llama")
    group = scheme("W4A16_ASYM", "re:.*self_attn.*", group_size=32)
    rows = scheme("W4A16", "re:.*up_proj", strategy="channel", group_size=None)
    shifted = scheme("W4A16_ASYM", "re:.*down_proj", strategy="channel", group_size=None)
    int4(case, ATTENTION + "q_proj", (32, 64), group)
    int4(case, ATTENTION + "k_proj", (37, 96), group, extreme=(0.0, SMALLEST, LARGEST))
    int4(case, MLP + "up_proj", (24, 100), rows)
    int4(case, MLP + "down_proj", (13, 45), shifted)
    groups = {"group_0": group, "group_1": rows, "group_2": shifted}
    case.write(compressed("pack-quantized", groups))


def nvfp4(target):
    case, group = Case(target, "nvfp4", "llama"), scheme("NVFP4")
    for name, shape, divisor in [
        ("q_proj", (40, 64), 1234.5),
        ("k_proj", (33, 48), 3e-3),
        ("v_proj", (16, 80), 2.0**120),
    ]:
        packed, scale = fp4(shape[0], shape[1] // 2), fp8(shape[0], shape[1] // 16)
        scale, divisor = scale.float().abs().to(E4M3), torch.tensor([divisor])
        source = {"weight_packed": packed, "weight_scale": scale}
        ours = rule(E2M1[halves(packed)], scale.float() / divisor, (1, 16))
        for what, number in ("", divisor), (" without dimensions", divisor[0]):
            numbers = source | {"weight_global_scale": number}
            value = decompress("nvfp4-pack-quantized", group, **numbers)
            compare(f"nvfp4 {name}, divisor{what}", ours, value)
        source |= {"weight_global_scale": divisor, "input_global_scale": scales(1)}
        case.add(ATTENTION + name, ours, **source)
    case.write(compressed("nvfp4-pack-quantized", {"group_0": group}))


def nan(target):
    """The only case with NaN among codes, and scales of 255, which are NaN as E8M0 only."""
    case = Case(target, "fp8_nan", "deepseek_v3")
    for name, count in [("o_proj", 4), ("q_a_proj", 64)]:
        q = fp8(32, 64)
        q.view(U8).view(-1)[-count:] = 0x7F
        q.view(U8)[16, 16] = 0xFF
        finegrained(case, ATTENTION + name, q.shape, exponents(1, 1).view(E8M0), q=q)
    for name, kind in [("q_b_proj", E8M0), ("kv_b_proj", U8)]:
        scale = exponents(1, 2, extreme=(255,)).view(kind)
        finegrained(case, ATTENTION + name, (4, 256), scale)
    case.write(UE8M0)


def main():
    target = Path(sys.argv[1])
    for make in (fp8_block, fp8_block_32, fp8_block_ue8m0, fp8_tensor, fp8_scale_names, fp8_stack):
        make(target)
    for make in (fp8_compressed, mxfp4_stack, mxfp4_expert, int4_group, int4_channel_asym):
        make(target)
    nvfp4(target)
    nan(target)


if __name__ == "__main__":
    main()
