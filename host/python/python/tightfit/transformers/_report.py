"""What ``model.tightfit`` is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._native import DeviceMemory, Model, Plan


class Report:
    """What Tightfit has loaded for a model.

    Attributes:
        plan: The plan, exact to the byte; None for a copy that came from a file.
        skipped: Weights that transformers' modules cannot hold in 4 bits, each with the reason.
        headroom: Bytes that the plan leaves free on each device for training, by what for.
    """

    def __init__(
        self,
        model: Model | None = None,
        skipped: Mapping[str, str] | None = None,
        headroom: Mapping[str, int] | None = None,
    ) -> None:
        self._model = model
        self.plan: Plan | None = None if model is None else model.plan
        self.skipped: dict[str, str] = dict(skipped or {})
        self.headroom: dict[str, int] = dict(headroom or {})

    @property
    def memory(self) -> list[DeviceMemory]:
        """What is reserved on each device, as the library counts it."""
        return [] if self._model is None else self._model.memory

    def figures(self) -> dict[str, dict[str, int]]:
        """Bytes of each device by who counts them.

        ``planned``, ``reserved`` and ``peak reserved`` are Tightfit's; on a GPU ``torch allocated``, ``torch
        reserved`` and ``torch peak reserved`` are what torch's allocator has taken beside that, and ``driver used``
        and ``driver free`` what the driver says of all programs; of host memory ``resident`` is this process'.
        """
        return {memory.name: self._figures(memory) for memory in self.memory}

    def _figures(self, memory: DeviceMemory) -> dict[str, int]:
        found = {"planned": memory.planned, "reserved": memory.reserved, "peak reserved": memory.peak_reserved}
        if not memory.name.startswith("cuda:"):
            if (resident := _resident()) is not None:
                found["resident"] = resident
            return found
        import torch

        free, total = torch.cuda.mem_get_info(memory.name)
        found["torch allocated"] = torch.cuda.memory_allocated(memory.name)
        found["torch reserved"] = torch.cuda.memory_reserved(memory.name)
        found["torch peak reserved"] = torch.cuda.max_memory_reserved(memory.name)
        found["driver used"] = total - free
        found["driver free"] = free
        return found

    def __str__(self) -> str:
        lines = []
        for device, figures in self.figures().items():
            lines.append(device)
            lines.extend(f"  {what:<20}{count / 2**20:12.1f} MiB" for what, count in figures.items())
        if self.headroom:
            lines.append("left free for training")
            lines.extend(f"  {what:<20}{count / 2**20:12.1f} MiB" for what, count in self.headroom.items())
        lines.extend(f"not in 4 bits: {name}: {reason}" for name, reason in self.skipped.items())
        return "\n".join(lines)

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        # The copy's tensors are copies, which are not in the reservation.
        return Report(None, self.skipped, self.headroom)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Report, (None, self.skipped, self.headroom))

    def __repr__(self) -> str:
        return f"Report({self.plan!r})"


def _resident() -> int | None:
    """Bytes of memory that this process has, where the system says so."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
