"""One load that is transformers' own, though Tightfit was asked."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from . import _caller

logger = logging.getLogger("tightfit.transformers")


def why(files: Iterable[str] | None) -> str | None:
    """Why Tightfit cannot load from these files; None if it can."""
    if not files:
        return "a state dict is given"
    for file in files:
        if not file.endswith(".safetensors"):
            return f"{file} is no safetensors file"
    return None


def hand_over(quantizer: Any, pre_quantized: bool, reason: str) -> None:
    """Makes a quantizer of ours bitsandbytes' own from here on."""
    logger.warning("transformers loads this model by itself, not Tightfit: %s", reason)
    quantizer.pre_quantized = pre_quantized
    quantizer.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
    quantizer.__class__ = Bnb4BitHfQuantizer


def device_map(quantizer: Any, model: Any, asked: str) -> dict[str, Any]:
    """The map that transformers makes of ``auto`` and the like."""
    from transformers.integrations.accelerate import _get_device_map

    max_memory = _caller.asked().get("max_memory")
    made: dict[str, Any] = _get_device_map(model, asked, max_memory, quantizer)
    return made
