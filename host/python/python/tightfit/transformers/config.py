"""``TightfitConfig``: bitsandbytes' configuration with what Tightfit needs to know beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Union

import torch
from transformers import BitsAndBytesConfig

METHOD = "tightfit"

# Whether this version of transformers lets us in; else every configuration is bitsandbytes' own.
known = True


@dataclass(frozen=True)
class Options:
    """How Tightfit loads a model, whatever its quantization."""

    policy: str = "auto"
    devices: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: Union[bool, Callable[[int, int], Any], None] = None
    threads: int | None = None
    staging: int | str | None = None
    strict: bool = False
    quantize_on: str = "auto"
    products: bool | None = None
    experts: str = "nf4"
    purpose: str = "inference"
    lora_rank: int = 16
    lora_experts: bool = False
    materialize: bool = True


class TightfitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """4-bit NF4, loaded by Tightfit. It is saved as bitsandbytes' configuration, which it is.

    Args:
        policy: Where ``device_map="auto"`` puts tensors: ``auto``, ``packed``, ``huggingface`` or a ``.wasm`` file.
        devices: The devices that it may use, for example ``["cuda:0:20GiB", "cuda:1"]``; by default all GPUs, else the
            host. With a device map: sizes for its devices.
        settings: The policy's settings: ``context``, ``batch``, ``reserve``, ...
        progress: True for a bar, or a function of the bytes that are done and those of all.
        threads: Threads that read and quantize.
        staging: Upper bound of host memory that data goes through.
        strict: Infinities and NaN in weights to be quantized are an error.
        quantize_on: Where weights for GPUs are quantized: ``cpu``, ``gpu`` or ``auto``.
        products: Whether linear layers and experts multiply with Tightfit's kernels, which read weights in 4 bits as they
            lie, or with bitsandbytes'; None: those of layers on GPUs, on processors without bfloat16 instructions of
            AVX-512 (on others bitsandbytes' are faster, with a second copy of the weights), and all of experts.
        experts: ``nf4``, or ``stored`` to leave stacks of experts in the type of the model.
        purpose: What the memory that is left free has to be enough for: ``inference``, or ``qlora``. For that what
            ``prepare_model_for_kbit_training`` would cast is f32 at once, so that it is not held twice, and each device
            keeps free what LoRA, its gradients, AdamW's moments and the largest weight dequantized take, and with the
            setting ``context`` activations, too. The setting ``reserve`` is another amount instead.
        lora_rank: Rank of the adapters that ``qlora`` has room for.
        lora_experts: Whether that is also for adapters on stacks of experts in 4 bits, as PEFT puts them there by
            ``target_parameters``, and for some families by ``all-linear``.
        materialize: False leaves all parameters on the meta device, for ``tightfit.transformers.materialize`` to load when
            the model has been given adapters and been sharded by FSDP2.
        **kwargs: Those of ``BitsAndBytesConfig``; by default NF4 with bfloat16 for products, where that class takes
            FP4 and float32.
    """

    def __init__(
        self,
        policy: str = "auto",
        devices: Iterable[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: Union[bool, Callable[[int, int], Any], None] = None,
        threads: int | None = None,
        staging: int | str | None = None,
        strict: bool = False,
        quantize_on: str = "auto",
        products: bool | None = None,
        experts: str = "nf4",
        purpose: str = "inference",
        lora_rank: int = 16,
        lora_experts: bool = False,
        materialize: bool = True,
        **kwargs: Any,
    ) -> None:
        from .._api import device_names

        if kwargs.get("load_in_8bit"):
            raise ValueError("TightfitConfig is for 4 bits: load_in_8bit is bitsandbytes' own")
        if experts not in ("nf4", "stored"):
            raise ValueError(f"experts is {experts!r}, not 'nf4' or 'stored'")
        if purpose not in ("inference", "qlora"):
            raise ValueError(f"purpose is {purpose!r}, not 'inference' or 'qlora'")
        kwargs.setdefault("load_in_4bit", True)
        kwargs.setdefault("bnb_4bit_quant_type", "nf4")
        kwargs.setdefault("bnb_4bit_compute_dtype", torch.bfloat16)
        super().__init__(**kwargs)
        if known:
            self.quant_method = METHOD
        self._options = Options(
            policy=str(policy),
            devices=None if devices is None else tuple(device_names(devices)),
            settings=dict(settings or {}),
            progress=progress,
            threads=threads,
            staging=staging,
            strict=strict,
            quantize_on=quantize_on,
            products=products,
            experts=experts,
            purpose=purpose,
            lora_rank=lora_rank,
            lora_experts=lora_experts,
            materialize=materialize,
        )

    @property
    def options(self) -> Options:
        """What is Tightfit's of it."""
        return self._options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration as a checkpoint states it: its quantization, and nothing of ours.

        Raises:
            ValueError: It names a policy, which is code, devices or the like: only the caller does.
        """
        if own := sorted(set(config_dict) & set(Options.__dataclass_fields__)):
            raise ValueError(f"a checkpoint does not say how Tightfit loads it: {', '.join(own)} in its configuration")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def for_checkpoint(self, stored: Any) -> TightfitConfig:
        """This configuration for a checkpoint that says how it has been quantized.

        What bitsandbytes has quantized stays as it is; of other methods' weights those that are decoded as
        they are read are quantized as this configuration says.
        """
        given = stored if isinstance(stored, dict) else stored.to_dict()
        made = copy.copy(self)
        made._options = replace(self._options)
        if not given.get("load_in_4bit", False):
            return made
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules"):
            if name in given:
                setattr(made, name, given[name])
        return made

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: bitsandbytes' own form."""
        plain = copy.copy(self)
        plain.__dict__.pop("_options", None)
        output: dict[str, Any] = BitsAndBytesConfig.to_dict(plain)
        output["quant_method"] = "bitsandbytes"
        return output
