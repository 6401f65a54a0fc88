"""The quantizer: transformers asks it before, while and after weights are loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

import tightfit

from ..torch import DTYPES, params4bit, tensor
from . import mapping, placement, processes, stock
from ._report import Report
from .config import Options, TightfitConfig
from .filling import AlreadyQuantized, converters

logger = logging.getLogger("tightfit.transformers")

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}

# What `install` says for configurations that are not ours.
defaults = Options()


class TightfitHfQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Has the weights loaded by Tightfit where transformers would load them and bitsandbytes quantize them.

    From `preprocess_model` on, which knows model and files, everything is in its place; what transformers
    does then is to put it into the model: renaming, ties, missing keys and reports stay its own.
    """

    # All parts of a weight are one tensor of ours.
    serialized_names: dict[str, list[str]] = {}

    def __new__(cls, quantization_config: Any = None, **kwargs: Any) -> Any:
        # Copying makes one without a configuration.
        quant_type = getattr(quantization_config, "bnb_4bit_quant_type", "nf4")
        if quant_type != "nf4" and not kwargs.get("pre_quantized", True):
            if isinstance(quantization_config, TightfitConfig):
                raise ValueError("Tightfit quantizes to NF4 only: FP4 is loaded where a checkpoint has it")
            return Bnb4BitHfQuantizer(quantization_config, **kwargs)
        return super().__new__(cls)

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Nothing is left to be read: with True transformers would start threads that do.
        self._pre_quantized = bool(kwargs.get("pre_quantized", True))
        self.pre_quantized = False
        self.options = getattr(quantization_config, "options", defaults)
        self.loaded: tightfit.Model | None = None
        self._filled_map: dict[str, Any] | None = None
        self._asked_map = ""
        self._linears: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        processes.refuse_sharding()
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("Tightfit has no place on disk: leave 'disk' out of the device map")
        if self.quantization_config.load_in_8bit:
            raise ValueError("Tightfit loads 4 bits, not 8")

    def update_device_map(self, device_map: Any) -> Any:
        if isinstance(device_map, str):
            # The policy answers: filled when there is a plan. Of texts transformers would make its own.
            self._filled_map, self._asked_map = {}, device_map
            return self._filled_map
        return super().update_device_map(device_map)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        # Else transformers would take memory for all of it a second time, to warm its allocator up.
        return 0.0

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Older versions say so only after our load; this is what they ask first then.
        processes.refuse_parallel(model)
        # Of these the shape in memory is another than the model's.
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> Any:
        return AlreadyQuantized()

    def get_load_operations(self) -> dict[str, Any]:
        return {}

    @property
    def is_compileable(self) -> bool:
        return True

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        processes.refuse_parallel(model)
        if reason := stock.why(kwargs.get("checkpoint_files")):
            filled, asked = self._filled_map, self._asked_map
            stock.hand_over(self, self._pre_quantized, reason)
            self.preprocess_model(model, dtype=dtype, **kwargs)
            if filled is not None:
                filled.update(stock.device_map(self, model, asked))
            return
        self.dtype = dtype
        self._model = model
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(
            model, device_map=device_map, checkpoint_files=checkpoint_files, **kwargs
        )
        assert checkpoint_files, "preprocess_model has handed over"
        self._own = mapping.own_converters(model)
        # Whatever is made here is made in its place, not on the device that models are sketched on.
        with torch.device("cpu"):
            self._load(model, device_map, checkpoint_files)

    def _load(self, model: Any, device_map: Any, files: list[str]) -> None:
        checkpoint = tightfit.open(files)
        targets = mapping.targets(model, checkpoint)
        formats, omit = self._formats(model, checkpoint, targets)
        options, config = self.options, self.quantization_config
        devices, policy, settings = placement.asked_of(
            options, None if device_map is self._filled_map else device_map, targets
        )
        plan = tightfit.plan(
            checkpoint,
            devices,
            policy,
            settings={**settings, **options.settings},
            double_quant=config.bnb_4bit_use_double_quant,
            formats=formats,
            omit=omit,
        )
        logger.info("%s", plan)
        logger.info("products are computed in %s", config.bnb_4bit_compute_dtype)
        self.loaded = tightfit.load(
            plan,
            threads=options.threads,
            staging=options.staging,
            strict=options.strict,
            quantize_on=options.quantize_on,
            progress=options.progress,
        )
        if self._filled_map is not None:
            self._filled_map.update(placement.device_map(model, self.loaded, targets))

    def _formats(self, model: Any, checkpoint: Any, targets: Any) -> tuple[dict[str, str], list[str]]:
        """What becomes of each tensor: its format, or that it is left out."""
        places = model.state_dict()
        keep = model._get_dtype_plan(self.dtype)
        nf4 = "nf4+double" if self.quantization_config.bnb_4bit_use_double_quant else "nf4"
        formats: dict[str, str] = {}
        omit = []
        for name, target in targets.items():
            info = checkpoint[name]
            if target is None:
                omit.append(name)
                continue
            owner, _, leaf = target.key.rpartition(".")
            module = model.get_submodule(owner) if owner else model
            if isinstance(module, Linear4bit) and leaf == "weight" and not target.operations:
                self._linears[name] = owner
                formats[name] = "stored" if info.quantized in ("nf4", "fp4") else nf4
                continue
            if info.quantized in ("nf4", "fp4"):
                raise ValueError(f"{name!r} is stored in 4 bits, which {type(module).__name__} cannot hold")
            formats[name] = self._plain_format(info, places[target.key].dtype, target.key, keep)
        return formats, omit

    @staticmethod
    def _plain_format(info: Any, wanted: torch.dtype, key: str, keep: dict[str, torch.dtype]) -> str:
        """As the model has it: cast on the way where the file has another type."""
        for pattern, dtype in keep.items():
            if pattern in key:
                wanted = dtype
        have = DTYPES.get(info.dtype)
        if have is None or not have.is_floating_point or have == wanted:
            return "stored"
        return _FORMATS.get(wanted, "stored")

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.loaded is None else converters(self._own, self._find)

    def _find(self, name: str) -> Any:
        """The tensor of this name, in its place; None for what is part of another."""
        assert self.loaded is not None
        if name not in self.loaded:
            return None
        weight = self.loaded[name]
        owner = self._linears.get(name)
        if owner is None:
            return tensor(weight)
        module = self._model.get_submodule(owner)
        module._is_hf_initialized = True
        stored = weight.format == "stored"
        return params4bit(
            weight, module, None if stored else self.dtype, self.quantization_config.bnb_4bit_quant_storage
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.tightfit = Report(self.loaded)
        # It is bitsandbytes' from here on: Trainer, PEFT and accelerate ask for that.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        # Nothing to be reversed when it is saved.
        model._weight_conversions = [entry for entry in model._weight_conversions if not hasattr(entry, "find")]
        # The model keeps what it needs.
        self.loaded = self._model = None
        return model
