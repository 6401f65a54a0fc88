"""What several processes would share of a model: refused, not guessed."""

from __future__ import annotations

import os
from typing import Any

_WITHOUT = "Tightfit loads a whole model in each process"


def refuse_sharding() -> None:
    """Refuses what shards every model of this process.

    Raises:
        ValueError: DeepSpeed's ZeRO-3 or FSDP2 is switched on.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{_WITHOUT}: DeepSpeed's ZeRO-3 shards it while it is loaded (ZeRO-2 does not)")
    if _fsdp_version() == 2:
        raise ValueError(f"{_WITHOUT}: FSDP2 shards it")


def refuse_parallel(model: Any) -> None:
    """Refuses a model that is one process's share.

    Raises:
        ValueError: ``tp_plan`` or ``distributed_config`` was asked for.
    """
    config = getattr(model.config, "distributed_config", None)
    # Older versions note it on the model alone.
    if config is not None or getattr(model, "_tp_size", None) is not None:
        raise ValueError(f"{_WITHOUT}: leave tp_plan and distributed_config out")


def _fsdp_version() -> int:
    """The version of FSDP that is switched on; 0 for none."""
    # So says accelerate's launcher,
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes", "on"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    # and so a program that has made its Accelerator already.
    from accelerate.state import AcceleratorState

    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    return 0 if plugin is None else int(plugin.fsdp_version)
