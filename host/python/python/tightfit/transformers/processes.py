"""How several processes share a model: what Tightfit loads for, and what is refused."""

from __future__ import annotations

import os
from typing import Any

_WITHOUT = "Tightfit loads a whole model in each process"

# The version of transformers from which on what is cut is there to be seen before it is loaded.
_NEEDED = "5.16"


def refuse_sharding(is_later: bool) -> None:
    """Refuses what shards every model of this process. FSDP2 may, where it is before the model is loaded (`is_later`).

    Raises:
        ValueError: DeepSpeed's ZeRO-3 or FSDP2 is switched on.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{_WITHOUT}: DeepSpeed's ZeRO-3 shards it while it is loaded (ZeRO-2 does not)")
    if _fsdp_version() == 2 and not is_later:
        raise ValueError(
            f"{_WITHOUT}: FSDP2 would shard it afterwards. Load it with TightfitConfig(materialize=False), and call "
            "tightfit.transformers.materialize(model) when it is sharded"
        )


def shared(model: Any) -> Any:
    """How processes share a model, as transformers was asked: its ``DistributedConfig``; None where each has all of it.

    Raises:
        ValueError: They share it in a way that Tightfit does not load for.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        # Older versions note it on the model alone.
        if getattr(model, "_tp_size", None) is not None:
            raise ValueError(f"this version of transformers cuts models another way: tp_plan needs {_NEEDED} or newer")
        return None
    if not hasattr(config, "pp_size"):
        raise ValueError(f"this version of transformers cuts models another way: tp_plan needs {_NEEDED} or newer")
    if getattr(config, "dp_replicate_size", 1) > 1:
        raise ValueError("dp_replicate_size: Tightfit shards for fsdp_size, and has no replicas of that")
    if getattr(config, "ep_size", 1) > 1 or config.enable_expert_parallel:
        raise ValueError("ep_size gives whole experts to processes: Tightfit cuts all of them, for tp_size")
    if config.fsdp_size > 1 and config.tp_size * config.pp_size > 1:
        raise ValueError("fsdp_size with tp_size or pp_size: Tightfit shards a model one way")
    return config if config.tp_size * config.pp_size * config.fsdp_size > 1 else None


def _fsdp_version() -> int:
    """The version of FSDP that is switched on; 0 for none."""
    # So says accelerate's launcher,
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes", "on"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    # and so a program that has made its Accelerator already.
    from accelerate.state import AcceleratorState

    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    return 0 if plugin is None else int(plugin.fsdp_version)
