"""Our quantizer in transformers' registries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import _seams, config
from .config import METHOD, Options, TightfitConfig

# Other versions may not even have what is imported here.
if not (_problems := _seams.problems()):
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    from . import quantizer

logger = logging.getLogger("tightfit.transformers")

_BITSANDBYTES = "bitsandbytes_4bit"


def _register() -> None:
    """Makes transformers know TightfitConfig. Importing this module again changes nothing."""
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(METHOD)(TightfitConfig)
    auto.register_quantizer(METHOD)(quantizer.TightfitHfQuantizer)
    merge = auto.AutoHfQuantizer.merge_quantization_configs

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        # A checkpoint that is quantized already names its own class, and transformers takes no other.
        if isinstance(quantization_config_from_args, TightfitConfig):
            return quantization_config_from_args.for_checkpoint(quantization_config)
        return merge(quantization_config, quantization_config_from_args)

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


def install(**options: Any) -> None:
    """Has every model that is loaded in bitsandbytes' 4 bits loaded by Tightfit, until ``uninstall``.

    For programs that make a ``BitsAndBytesConfig(load_in_4bit=True)`` themselves, and for checkpoints that
    bitsandbytes has quantized. FP4 that is yet to be quantized stays bitsandbytes' own.

    Args:
        **options: ``policy``, ``devices``, ``settings``, ... of ``TightfitConfig``.
    """
    made = TightfitConfig(**options)
    if _problems:
        logger.warning("Tightfit is not installed, and transformers loads by itself: %s", "; ".join(_problems))
        return
    quantizer.defaults = made.options
    auto.AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = quantizer.TightfitHfQuantizer


def uninstall() -> None:
    """Undoes ``install``. Models that are loaded stay as they are."""
    if _problems:
        return
    quantizer.defaults = Options()
    auto.AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = Bnb4BitHfQuantizer


@contextmanager
def installed(**options: Any) -> Iterator[None]:
    """``install`` for a ``with`` block."""
    install(**options)
    try:
        yield
    finally:
        uninstall()


if _problems:
    logger.warning(
        "this version of transformers is not known to Tightfit, and TightfitConfig loads as bitsandbytes does: %s",
        "; ".join(_problems),
    )
    config.known = False
else:
    _register()
