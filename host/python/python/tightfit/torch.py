"""Loaded weights as torch tensors and bitsandbytes' parameters, in place.

Every tensor keeps the memory of its device, also when the ``tightfit.Model`` is unloaded. They must not be
written to: torch drops the mark that says so.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ._native import Model, Part, Weight

# Types that torch imports only as integers of the same size.
_VIEWED = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def tensor(weight: Weight | Part) -> torch.Tensor:
    """A weight that is not in 4 bits, or one part of one that is, as a tensor, in place.

    Each has a storage of its own, so that saving one saves no other.

    Raises:
        AttributeError: A 4-bit weight has no elements: take its parts, or ``params4bit``.
    """
    part = weight.data if isinstance(weight, Weight) else weight
    viewed = _VIEWED.get(part.dtype)
    if viewed is not None:
        return torch.from_dlpack(part.raw()).view(viewed)
    return torch.from_dlpack(part)


@functools.cache
def _table(quant_type: str, device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    # Whatever the default device is where it is asked for first.
    with torch.device("cpu"):
        table: torch.Tensor = get_4bit_type(quant_type, device="cpu").to(device)
    return table


@functools.cache
def _dynamic_table(device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    with torch.device("cpu"):
        table: torch.Tensor = create_dynamic_map().to(device)
    return table


def quant_state(weight: Weight, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Any]:
    """The codes of a 4-bit weight, uint8 [bytes, 1], and bitsandbytes' ``QuantState``, whose scales are in place.

    ``dtype`` is the type that it is dequantized to: by default the one that it had before.
    """
    from bitsandbytes.functional import QuantState

    if weight.quant_type is None:
        raise ValueError(f"{weight.name!r} is not in 4 bits but {weight.format}")
    codes = tensor(weight.codes)
    nested = offset = None
    if weight.absmax_mean is not None:
        nested = QuantState(
            absmax=tensor(weight.nested_absmax),
            blocksize=256,
            code=_dynamic_table(codes.device).clone(),
            dtype=torch.float32,
        )
        offset = torch.tensor(weight.absmax_mean, device=codes.device)
    # A table of its own for each weight: transformers refuses to save tensors that share memory.
    state = QuantState(
        absmax=tensor(weight.absmax),
        shape=torch.Size(weight.shape),
        code=_table(weight.quant_type, codes.device).clone(),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=dtype or DTYPES[weight.dtype],
        offset=offset,
        state2=nested,
    )
    return codes, state


def params4bit(
    weight: Weight,
    module: torch.nn.Module | None = None,
    dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> Any:
    """A 4-bit weight as bitsandbytes' parameter, in place.

    Args:
        weight: The weight.
        module: The ``Linear4bit`` that it will be the weight of.
        dtype: The type that it is dequantized to: by default the one that it had before.
        quant_storage: The type that its codes are seen as; FSDP wants that of other parameters.
    """
    import bitsandbytes

    codes, state = quant_state(weight, dtype)
    if quant_storage != torch.uint8:
        codes = codes.view(-1).view(quant_storage).view(-1, 1)
    param = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=quant_storage,
        # bitsandbytes looks the module up only to quantize; a copy would keep the original's alive by it.
        module=None,
        # Otherwise the first move to a device would quantize the codes.
        bnb_quantized=True,
    )
    if module is not None:
        module.quant_state = state
    return param


def state_dict(model: Model) -> dict[str, torch.Tensor]:
    """All tensors under the keys that bitsandbytes writes and transformers reads, in place."""
    tensors: dict[str, torch.Tensor] = {}
    for name in model:
        weight = model[name]
        if weight.quant_type is None:
            tensors[name] = tensor(weight)
            continue
        codes, state = quant_state(weight)
        tensors[name] = codes
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = value
    return tensors
