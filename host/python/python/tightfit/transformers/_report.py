"""What ``model.tightfit`` is."""

from __future__ import annotations

from typing import Any

from .._native import DeviceMemory, Model, Plan


class Report:
    """What Tightfit has loaded for a model.

    Attributes:
        plan: The plan, exact to the byte; None for a copy that came from a file.
        skipped: Weights that transformers' modules cannot hold in 4 bits, each with the reason.
    """

    def __init__(self, model: Model | None = None, skipped: dict[str, str] | None = None) -> None:
        self._model = model
        self.plan: Plan | None = None if model is None else model.plan
        self.skipped: dict[str, str] = dict(skipped or {})

    @property
    def memory(self) -> list[DeviceMemory]:
        """What is reserved on each device, as the library counts it."""
        return [] if self._model is None else self._model.memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        # The copy's tensors are copies, which are not in the reservation.
        return Report(None, self.skipped)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Report, (None, self.skipped))

    def __repr__(self) -> str:
        return f"Report({self.plan!r})"
