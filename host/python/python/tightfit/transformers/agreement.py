"""What the processes that share a model tell each other while it is loaded: that they load the same, and how it went."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import tightfit

from .._errors import TightfitError

Result = TypeVar("Result")


class OtherProcessError(TightfitError, RuntimeError):
    """Another of the processes that share a model could not load its part. ``rank`` is which."""

    rank: int | None = None


def together(step: Callable[[], Result], what: Callable[[Result], str] = lambda result: "") -> Result:
    """Does a step that every process does, and goes on only if all of them could.

    ``what`` says of a result what has to be the same in all of them.

    Raises:
        OtherProcessError: Another could not. Where this one could not, what it raised is raised.
        UsageError: They have different results.
    """
    import torch.distributed as dist

    result: Any = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as raised:  # noqa: BLE001 - the others wait for what became of it, whatever it is
        error = raised
    mine = {"error": None if error is None else str(error), "what": what(result) if error is None else ""}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    for rank, other in enumerate(everyone):
        if other["error"] is not None:
            failed = OtherProcessError(f"rank {rank} cannot load its part: {other['error']}")
            failed.rank = rank
            raise failed
    for rank, other in enumerate(everyone):
        if other["what"] != mine["what"]:
            raise tightfit.UsageError(
                f"rank {dist.get_rank()} would load another model than rank {rank}: "
                "files, options or versions are not the same"
            )
    return result  # type: ignore[no-any-return]


def digest(checkpoint: Any, options: Any) -> str:
    """What has to be the same for all: what the files' headers say, and what was asked for."""
    tensors = [(info.name, info.dtype, list(info.shape), info.bytes, info.quantized) for info in checkpoint.tensors()]
    text = json.dumps([tightfit.__version__, tensors, options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
