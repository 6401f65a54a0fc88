"""Which of a checkpoint's tensors become which of a model's parameters, as transformers has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
        key: The parameter or buffer.
        operations: What transformers makes of it on the way: none for one that is taken as it is.
        half: Which of a converter's sources it is, such as gates and up projections of experts.
        expert: The last number in its name: of a tensor for one expert, which that is.
    """

    key: str
    operations: tuple[Any, ...]
    half: int = 0
    expert: int = 0


def own_converters(model: Any) -> list[Any]:
    """The converters that transformers has for this model."""
    conversions = get_model_conversion_mapping(model)
    return [entry for entry in conversions if isinstance(entry, WeightConverter)]


def targets(model: Any, names: Iterable[str], key_mapping: dict[str, str] | None = None) -> dict[str, Target | None]:
    """Finds where each tensor goes; None for what the model has no place for.

    ``key_mapping`` is the argument of ``from_pretrained``: patterns in names, and what takes their place.
    """
    conversions = get_model_conversion_mapping(model, key_mapping)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, places = model.base_model_prefix, model.state_dict()

    def target(name: str) -> Target | None:
        key, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if key not in places and name in places:
            # As the loader has it: it should not have been renamed.
            key, pattern = rename_source_key(name, [], [], prefix, places)
        if key not in places:
            return None
        if pattern is None:
            return Target(key, ())
        converter = by_pattern[pattern]
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        half = list(converter.source_patterns).index(pattern)
        return Target(key, tuple(converter.operations), half, numbers[-1] if numbers else 0)

    return {name: target(name) for name in names}
