"""What make_sources.py needs: random codes and scales, and the rules by which they are decoded and
quantized, written by hand in torch."""

from pathlib import Path

import torch
from safetensors.torch import load_file

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E8M0, U8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
TABLES = Path(__file__).parent / "quant" / "tables.safetensors"
SUBNORMAL, SMALLEST, LARGEST = 2.0**-140, 2.0**-126, 3.3895e38

random = torch.Generator()


# Random codes and scales.


def normal(*shape):
    return torch.randn(shape, generator=random)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=random)


def fp8(*shape, zeros=40):
    """E4M3: normal, but the first 254 are all codes that are not NaN; zeros of both signs follow."""
    codes = (normal(*shape) * 60).clamp(-448, 448).to(E4M3).flatten().view(U8)
    every = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=U8)
    every = every[torch.randperm(254, generator=random)][: len(codes)]
    codes[: len(every)] = every
    codes[256 : 256 + zeros] = integers(0, 2, len(codes[256 : 256 + zeros])).to(U8) * 0x80
    return codes.view(E4M3).reshape(shape)


def fp4(*shape, zeros=0):
    """E2M1, two in a byte: any codes, then zeros of both signs in the second group of 64."""
    codes = integers(0, 256, *shape).to(U8)
    codes.view(-1)[32 : 32 + zeros // 2] &= 0x88
    return codes


def scales(*shape, extreme=()):
    """Positive f32, then those asked for in the last places."""
    values = (normal(*shape) - 7).exp()
    if extreme:
        values.view(-1)[-len(extreme) :] = torch.tensor(extreme)
    return values


def exponents(*shape, extreme=()):
    """E8M0 as bytes: from 2^-12 to 2^-5, then those asked for in the last places."""
    values = integers(115, 123, *shape).to(U8)
    if extreme:
        values.view(-1)[-len(extreme) :] = torch.tensor(extreme, dtype=U8)
    return values


# The rules, by hand.


def rule(values, scale, tile, dtype=BF16):
    """An element times the scale of its tile, in f32, rounded once."""
    rows, columns = (torch.arange(n) // t for n, t in zip(values.shape[-2:], tile))
    return (values.float() * scale.float()[..., rows[:, None], columns]).to(dtype)


def halves(packed):
    """Two codes a byte, the earlier one in the low half."""
    packed = packed.view(U8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()


def e8m0(scale):
    """A power of two. A byte of 255 is infinity, but NaN where the type is E8M0."""
    return scale.float() if scale.dtype == E8M0 else (scale.float() - 127).exp2()


def bits(tensor):
    """NaN are all alike."""
    kind = {1: U8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().view(kind)


def compare(name, ours, theirs):
    """Tells where a library disagrees with the rule. The library is right."""
    different = (bits(ours) != bits(theirs.to(ours.dtype))).sum().item()
    if different:
        print(f"{name}: {100 * different / ours.numel():.2f} % of elements differ from the rule")
    return theirs


def cuda_reference(tensor):
    """What bitsandbytes' CUDA kernel gives for a tensor: its CPU code differs for zeros, subnormals,
    very large values, infinities and NaN, and divides in a partial block."""

    def flush(x):
        return torch.where(x.abs() < SMALLEST, x * 0, x)

    x = flush(tensor.flatten().float())
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 64)).reshape(-1, 64)
    absmax = blocks.abs().nan_to_num(0, posinf=torch.inf).amax(1)
    absmax[blocks.isnan().all(1)] = torch.finfo(F32).min
    product = (blocks * flush(1 / absmax)[:, None]).flatten()[: len(x)]
    thresholds = load_file(TABLES)["nf4_cuda_thresholds"]
    codes = (product[:, None] > thresholds).sum(1)
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    return (codes[::2] << 4 | codes[1::2]).to(U8), absmax
