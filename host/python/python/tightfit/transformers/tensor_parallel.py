"""What of transformers' plans for tensor parallelism has to be otherwise."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

logger = logging.getLogger("tightfit.transformers")

# Styles that leave a process with heads of its own.
_BY_HEADS = ("colwise", "rowwise")


def keep_heads_whole(model: Any, config: Any) -> None:
    """Takes attention out of a model's plan whose heads are not as many for each process: all compute it then.

    Raises:
        ValueError: The caller's own plan cuts it.
    """
    size = config.tp_size
    given = config.tp_plan if isinstance(config.tp_plan, dict) else {}
    whole: dict[str, str] = {}
    for owner, reason in _uneven(model, {**model._tp_plan, **given}, size):
        whole.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", owner), reason)
    for owner, reason in whole.items():
        rules = [rule for rule in model._tp_plan if rule == owner or rule.startswith(owner + ".")]
        if asked := [rule for rule in given if rule == owner or rule.startswith(owner + ".")]:
            raise ValueError(f"tp_plan cuts {asked[0]!r}, but {reason}, which {size} processes cannot share")
        for rule in rules:
            del model._tp_plan[rule]
        logger.warning("%s is whole in each of %d processes: %s", owner, size, reason)


def _uneven(model: Any, plan: Mapping[str, str], size: int) -> Iterator[tuple[str, str]]:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    for owner, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", owner)
        cut = [name for name, _ in module.named_children() if plan.get(f"{generic}.{name}") in _BY_HEADS]
        if not any(name == "o_proj" or name.startswith("q_") for name in cut):
            continue
        if isinstance(heads, int) and heads % size != 0:
            yield owner, f"it has {heads} heads"
        elif "k_proj" in cut and isinstance(key_heads, int) and key_heads % size != 0:
            yield owner, f"it has {key_heads} heads of keys and values"
