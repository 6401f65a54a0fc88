"""Loads Hugging Face checkpoints into 4-bit NF4, in exactly the memory that the weights need.

A plan says where every tensor goes and in which format, exact to the byte, before any weight is read;
loading it reserves each device's memory in one piece and never takes more::

    plan = tightfit.plan("model", devices=["cuda:0", "cuda:1"])
    print(plan)
    model = tightfit.load(plan)
    torch.from_dlpack(model["model.embed_tokens.weight"])

Models of transformers are loaded through ``tightfit.transformers``, single weights given to torch and
bitsandbytes by ``tightfit.torch``. Neither is imported here: this package needs nothing but itself.

Sizes are in bytes; where one is given it may be a text, such as ``"20GiB"``. Long calls leave the
interpreter to other threads, and Ctrl-C ends them with everything given back.
"""

from __future__ import annotations

from ._api import load, open, plan, save
from ._errors import (
    CheckpointError,
    DeviceError,
    HubError,
    InternalError,
    NonFiniteError,
    OutOfMemory,
    OutputError,
    PolicyError,
    TightfitError,
    UsageError,
)
from ._native import (
    BUILTIN_POLICIES,
    Checkpoint,
    DeviceMemory,
    DevicePlan,
    Model,
    Part,
    Plan,
    PlannedTensor,
    Slice,
    TensorInfo,
    Weight,
    __version__,
)

__all__ = [
    "BUILTIN_POLICIES",
    "Checkpoint",
    "CheckpointError",
    "DeviceError",
    "DeviceMemory",
    "DevicePlan",
    "HubError",
    "InternalError",
    "Model",
    "NonFiniteError",
    "OutOfMemory",
    "OutputError",
    "Part",
    "Plan",
    "PlannedTensor",
    "PolicyError",
    "Slice",
    "TensorInfo",
    "TightfitError",
    "UsageError",
    "Weight",
    "__version__",
    "load",
    "open",
    "plan",
    "save",
]
