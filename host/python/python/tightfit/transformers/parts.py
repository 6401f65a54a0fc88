"""Which part of each weight this process has, where several share a model.

transformers puts a ``DTensor`` in the place of each parameter that it cuts, before weights are loaded: what lies there
says which part that is. Weights in 4 bits are cut by whole blocks, so that every process has the codes and scales
that one process alone would have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from .mapping import Target

logger = logging.getLogger("tightfit.transformers")

# Elements that share a scale; blocks follow each other through the rows.
BLOCK = 64


@dataclass(frozen=True)
class Part:
    """A part of a tensor: these ranges of indices along one dimension, of ``length`` in all.

    Attributes:
        padding: Columns before and behind those that were asked for, which are there to make whole blocks.
    """

    dimension: int
    ranges: tuple[tuple[int, int], ...]
    length: int
    padding: tuple[int, int] = (0, 0)

    def within(self, start: int, length: int, dimension: int) -> Part:
        """What of it is in a tensor that is the indices from ``start`` on of this one, along a dimension of its own."""
        cut = [(max(first, start) - start, min(end, start + length) - start) for first, end in self.ranges]
        return Part(dimension, tuple((first, end) for first, end in cut if first < end), length)

    def is_in_blocks(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is cut between blocks only: then a part has the blocks of the whole."""
        inner = math.prod(shape[self.dimension + 1 :])
        edges = [edge for each in self.ranges for edge in each]
        if self.dimension > 0:
            # Each of what the dimensions before count begins with a block.
            edges.append(self.length)
        return all(edge * inner % BLOCK == 0 or edge == self.length and self.dimension == 0 for edge in edges)

    def in_blocks(self) -> Part:
        """The same from where a block begins to where one ends, for columns of a weight in 4 bits."""
        if len(self.ranges) != 1 or self.length % BLOCK != 0:
            return self
        ((start, end),) = self.ranges
        first, last = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
        return Part(self.dimension, ((first, last),), self.length, (start - first, last - end))


def parts(model: Any, packed: Callable[[Any], Part]) -> dict[str, Part]:
    """The part of each parameter that this process has; those that it has whole are not in it.

    ``packed`` says it of a layer in 4 bits whose parameter is of the shape that its codes have.

    Raises:
        ValueError: One is cut along two dimensions, or this process has nothing of one.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, DTensor):
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight" and isinstance(module, Linear4bit) and parameter.shape[1] == 1:
            found[name] = packed(module)
            continue
        part = part_of(name, parameter)
        if part is not None:
            found[name] = part
    return found


def part_of(name: str, parameter: Any) -> Part | None:
    """The part of one that is a ``DTensor``; None where it is all of it."""
    cut = None
    for index, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if cut is not None:
            raise ValueError(f"{name!r} is cut by two dimensions of the mesh, {parameter.placements}: Tightfit cuts by one")
        mesh = parameter.device_mesh
        cut = placement, mesh.get_local_rank(index), mesh.size(index)
    if cut is None:
        return None
    placement, rank, size = cut
    dimension = placement.dim % parameter.dim()
    length = parameter.shape[dimension]
    # One that is interleaved is cut within each of as many parts that follow each other.
    groups = getattr(placement, "split_factor", 1)
    if length % groups != 0:
        raise ValueError(f"{name!r} has {length} indices in dimension {dimension}, which are not {groups} equal parts")
    group = length // groups
    start, end = chunk(group, rank, size)
    if start == end:
        raise ValueError(f"{name!r} has {length} indices in dimension {dimension}: too few for {size} processes")
    ranges = tuple((first + start, first + end) for first in range(0, length, group))
    return Part(dimension, ranges, length)


def chunk(length: int, rank: int, size: int) -> tuple[int, int]:
    """The range of ``length`` indices that a rank of ``size`` has, as ``torch.chunk`` cuts them."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def of_tensors(
    model: Any,
    checkpoint: Any,
    targets: Mapping[str, Target | None],
    formats: Mapping[str, str],
    packed: Callable[[Any], Part],
) -> dict[str, Part]:
    """The part of each of a checkpoint's tensors that this process reads; those that it reads whole are not in it.

    Raises:
        ValueError: A parameter that is cut is made of tensors in a way that cannot be cut.
    """
    of_parameters = parts(model, packed)
    halves: dict[str, int] = {}
    for target in targets.values():
        if target is not None:
            halves[target.key] = max(halves.get(target.key, 1), target.half + 1)
    found = {}
    torn = []
    for name, target in targets.items():
        part = None if target is None else of_parameters.get(target.key)
        if target is None or part is None:
            continue
        info = checkpoint[name]
        made = [type(operation).__name__ for operation in target.operations]
        if not made:
            cut = part
        elif made in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and part.dimension > 0:
            # A tensor for each expert, and for gates and up projections: one matrix of the stack, or half of one.
            rows = info.shape[0] if part.dimension == 1 else info.shape[1]
            start = target.half * rows if part.dimension == 1 and halves[target.key] > 1 else 0
            cut = part.within(start, rows, part.dimension - 1)
        else:
            raise ValueError(
                f"{target.key!r} is cut for tensor parallelism, and made of {name!r} by {', '.join(made)}: "
                "such are not read in parts"
            )
        if info.shape[cut.dimension] != cut.length or not cut.ranges:
            raise ValueError(f"{name!r} has shape {list(info.shape)}, of which {target.key!r} cannot be cut")
        is_quantized = formats[name].startswith("nf4") or info.quantized in ("nf4", "fp4")
        if is_quantized and cut.dimension == len(info.shape) - 1:
            cut = cut.in_blocks()
        if is_quantized and not cut.is_in_blocks(info.shape):
            torn.append(name)
        found[name] = cut
    if torn:
        logger.warning(
            "%d weights are cut within blocks of %d, %s first: parts have blocks of their own, and logits differ from "
            "those of one process by how weights are rounded",
            len(torn),
            BLOCK,
            torn[0],
        )
    return found


def local_shape(parameter: Any) -> torch.Size:
    """The shape of what this process has of a parameter."""
    from torch.distributed.tensor import DTensor

    return parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
