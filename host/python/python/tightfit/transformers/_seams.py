"""Whether transformers lets us in where we come in."""

from __future__ import annotations

import inspect
from typing import Any

from . import _caller

OLDEST = (5, 6)


def problems() -> list[str]:
    """What of transformers is not as it is needed: nothing, or why stock has to do the work."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdigit())
    if version < OLDEST:
        return [f"transformers {transformers.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"]
    try:
        from transformers import conversion_mapping, core_model_loading
        from transformers.quantizers import auto
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    except ImportError as error:
        return [f"transformers {transformers.__version__}: {error}"]
    found = []

    def need(holder: Any, name: str, *parameters: str) -> None:
        member = getattr(holder, name, None)
        where = f"{getattr(holder, '__name__', holder)}.{name}"
        if member is None:
            found.append(f"there is no {where}")
        elif missing := [wanted for wanted in parameters if wanted not in inspect.signature(member).parameters]:
            found.append(f"{where} does not take {', '.join(missing)}")

    need(auto, "register_quantizer")
    need(auto, "register_quantization_config")
    need(auto.AutoHfQuantizer, "merge_quantization_configs", "quantization_config", "quantization_config_from_args")
    if "bitsandbytes_4bit" not in getattr(auto, "AUTO_QUANTIZER_MAPPING", {}):
        found.append("there is no quantizer 'bitsandbytes_4bit'")
    need(conversion_mapping, "get_model_conversion_mapping", "model")
    need(core_model_loading, "rename_source_key", "meta_state_dict")
    need(core_model_loading.WeightConverter, "add_tensor", "target_key", "source_key", "source_pattern", "future")
    need(core_model_loading.WeightConverter, "materialize_tensors")
    need(core_model_loading.WeightConverter, "convert", "layer_name")
    for name in ("get_weight_conversions", "get_quantize_ops", "param_element_size", "preprocess_model"):
        need(Bnb4BitHfQuantizer, name)
    need(Bnb4BitHfQuantizer, "_process_model_before_weight_loading", "model")
    need(Bnb4BitHfQuantizer, "_process_model_after_weight_loading", "model")
    return found + _caller.problems()
