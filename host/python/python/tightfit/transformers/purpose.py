"""What training takes beside the weights, so that a plan can leave room for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

# An element of an adapter: itself, its gradient, and AdamW's two moments, all f32.
_TRAINED = {"lora": 4, "gradients": 4, "optimizer": 8}


def qlora(
    model: Any, head: Any, rank: int, settings: Mapping[str, Any], stacks: Iterable[tuple[str, Any]] = ()
) -> dict[str, int]:
    """Bytes that QLoRA takes beside the weights, by what for.

    ``lora``, ``gradients`` and ``optimizer`` are of adapters of this rank on all linear layers in 4 bits, and on these
    ``stacks`` of experts, by name with their shapes: of twice the rank where gates and up projections are one, as
    PEFT has it for all linear layers. ``dense weight`` is the largest linear layer dequantized, which the gradients of
    many rows are computed with. ``activations``, where the settings have a ``context`` (and a ``batch``): what
    checkpoints of every layer keep, and what one layer and the logits take while they are computed again, all in f32.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear4bit) and module is not head]
    elements = sum(rank * (module.in_features + module.out_features) for module in linears)
    for key, (experts, rows, columns) in stacks:
        elements += experts * rank * (2 if key.endswith("gate_up_proj") else 1) * (rows + columns)
    needs = {what: size * elements for what, size in _TRAINED.items()}
    needs["dense weight"] = max((2 * module.in_features * module.out_features for module in linears), default=0)
    context = settings.get("context")
    if context is not None:
        tokens = int(context) * int(settings.get("batch", 1))
        text = model.config.get_text_config()
        widest = max((module.in_features + module.out_features for module in linears), default=0)
        layers = int(getattr(text, "num_hidden_layers", 0) or 0)
        hidden = int(getattr(text, "hidden_size", 0) or 0)
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        # The logits, their gradient and what the loss is made of.
        needs["activations"] = 4 * tokens * (layers * hidden + 4 * widest + 3 * vocabulary)
    return needs


def is_cast(dtype: torch.dtype) -> bool:
    """Whether ``prepare_model_for_kbit_training`` casts parameters of this type to f32."""
    return dtype in (torch.bfloat16, torch.float16)
