"""Models of transformers whose weights Tightfit loads.

With this module imported, ``from_pretrained`` takes a ``TightfitConfig`` and works as ever otherwise::

    import tightfit.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen2.5-7B", quantization_config=tightfit.transformers.TightfitConfig(), device_map="auto"
    )
    model.tightfit.plan       # what went where, to the byte

For programs that make a ``BitsAndBytesConfig`` themselves, ``install()`` has those loaded by Tightfit too.

transformers reads no tensor: it asks its quantizer what becomes of the files' keys, and ours answers with
tensors that are in their place already. All of that goes through transformers' own registries.
"""

from __future__ import annotations

from ._report import Report
from .agreement import OtherProcessError
from .config import TightfitConfig
from .materializing import materialize
from .register import install, installed, uninstall

__all__ = ["OtherProcessError", "Report", "TightfitConfig", "install", "installed", "materialize", "uninstall"]
