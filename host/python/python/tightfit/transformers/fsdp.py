"""Weights in 4 bits that FSDP2 shards: each process has its part of the codes, and all have the scales.

FSDP2 shards what are parameters: of a linear layer in 4 bits its codes, seen as elements of ``bnb_4bit_quant_storage``.
bitsandbytes puts the weight together again, with the scales that are kept beside it, when a layer is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from ..torch import quant_state, tensor
from .parts import BLOCK, Part


@dataclass(frozen=True)
class Shard:
    """The elements of a weight that this process has: from ``start`` to ``end``, counted through its rows."""

    start: int
    end: int
    rows: int
    columns: int

    @property
    def part(self) -> Part:
        """The rows to be read for them: whole blocks."""
        # Rows after which a block begins.
        step = BLOCK // math.gcd(self.columns, BLOCK)
        first = self.start // self.columns // step * step
        last = min(-(-self.end // (self.columns * step)) * step, self.rows)
        return Part(0, ((first, last),), self.rows)

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks whose scales this process says: those that begin in its elements."""
        return -(-self.start // BLOCK), -(-self.end // BLOCK)


def check(config: Any, shared: Any, dtype: torch.dtype | None) -> None:
    """Refuses what FSDP2 cannot shard.

    Raises:
        ValueError: The codes are of another type than the other parameters, or would be cast.
    """
    storage = config.bnb_4bit_quant_storage
    if storage != dtype:
        raise ValueError(
            f"FSDP2 shards parameters of one type: set bnb_4bit_quant_storage to the model's, {dtype} (it is {storage})"
        )
    if getattr(shared, "fsdp_mixed_precision", False) and storage != torch.bfloat16:
        raise ValueError(f"fsdp_mixed_precision would cast codes that are seen as {storage} to bfloat16")


def pack(model: Any, storage: torch.dtype) -> None:
    """Gives linear layers in 4 bits parameters of the shape that their codes have."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            codes = torch.empty(-(-module.weight.numel() // (2 * storage.itemsize)), 1, dtype=storage, device="meta")
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
            module.quant_storage = storage
            # bitsandbytes would replace what it multiplies.
            module.support_avx512bf16_for_cpu = False


def shard(module: Any) -> Shard:
    """What this process has of a layer's weight, once FSDP2 has sharded it."""
    from .parts import chunk

    parameter = module.weight
    (index,) = [index for index, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    mesh = parameter.device_mesh
    start, end = chunk(parameter.shape[0], mesh.get_local_rank(index), mesh.size(index))
    each, elements = 2 * parameter.dtype.itemsize, module.out_features * module.in_features
    return Shard(min(start * each, elements), min(end * each, elements), module.out_features, module.in_features)


def put(module: Any, weight: Any) -> None:
    """Puts this process's codes where the parameter is. The layer's scales are those of the rows that were read."""
    from torch.distributed.tensor import DTensor

    kept, whole = shard(module), module.weight
    ((first, _),) = kept.part.ranges
    skipped = first * kept.columns
    codes = tensor(weight.codes).view(-1)[(kept.start - skipped) // 2 : -(-(kept.end - skipped) // 2)]
    local = codes.view(whole.dtype).view(-1, 1)
    sharded = DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    parameter = torch.nn.Parameter(sharded, requires_grad=False)
    parameter._is_hf_initialized = True
    module.weight = parameter


def exchange_scales(layers: Iterator[tuple[Any, Any]], nested: bool, dtype: torch.dtype) -> None:
    """Gives all processes the scales of all rows. ``layers`` are modules with the weights of which they have parts.

    Those of weights that have been quantized in the checkpoint are f32, whatever they are there.
    """
    import torch.distributed as dist
    from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_blockwise

    for module, weight in layers:
        kept = shard(module)
        _, state = quant_state(weight, dtype)
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        ((first, _),) = kept.part.ranges
        skipped = first * kept.columns // BLOCK
        start, end = kept.blocks
        everyone = torch.zeros(-(-kept.rows * kept.columns // BLOCK), dtype=torch.float32, device=scales.device)
        everyone[start:end] = scales[start - skipped : end - skipped]
        mesh = module.weight.device_mesh
        for index, placement in enumerate(module.weight.placements):
            if not placement.is_replicate():
                dist.all_reduce(everyone, group=mesh.get_group(index))
        offset = again = None
        if nested and weight.format != "stored":
            offset = everyone.mean()
            everyone, again = quantize_blockwise(everyone - offset, blocksize=256)
        module.quant_state = QuantState(
            absmax=everyone,
            shape=torch.Size((kept.rows, kept.columns)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=offset,
            state2=again,
        )
