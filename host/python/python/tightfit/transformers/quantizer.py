"""The quantizer: transformers asks it before, while and after weights are loaded."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

import tightfit

from ..ops import ROWS, Product, SharedWorkspace
from ..torch import DTYPES, params4bit, tensor
from . import _caller, agreement, experts, fsdp, mapping, materializing, parts, placement, processes, purpose, stock, tensor_parallel
from ._report import Report
from .config import Options, TightfitConfig
from .filling import AlreadyQuantized, converters
from .linear import Linear4bit as OurLinear4bit

logger = logging.getLogger("tightfit.transformers")

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}

# How transformers makes a stack of experts that have a key each, of gates and up projections.
_MERGED = [("MergeModulelist", 0), ("Concatenate", 1)]

# What `install` says for configurations that are not ours.
defaults = Options()


def _is_faster(device: str) -> bool:
    """Whether products of linear layers are faster than bitsandbytes' on a device.

    On processors with bfloat16 instructions of AVX-512 bitsandbytes packs weights again, in memory of its own, and
    multiplies those 2 to 4 times as fast; on others it dequantizes them for each product.
    """
    if device.startswith("cuda:"):
        return True
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return True
    return not has_avx512bf16()


def _experts_per_token(config: Any) -> int:
    """How many experts a router chooses for a token."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
    counts = [getattr(config, name, None) for name in names]
    # Some have one for each layer.
    flat = [count for each in counts for count in (each if isinstance(each, (list, tuple)) else [each])]
    return max((count for count in flat if isinstance(count, int)), default=8)


def _dense(codes: torch.Tensor, state: Any) -> Any:
    """What dequantizes a weight for products of many rows."""
    # On a processor bitsandbytes may pack the parameter again.
    codes, state = codes.detach(), copy.copy(state)

    def dense(dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(codes, state).to(dtype)
        return weight

    return dense


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
        # And the other way round, by parameter.
        self._names: dict[str, str] = {}
        # Names of the tensors of stacks of experts by halves, by parameter.
        self._stacks: dict[str, list[list[str]]] = {}
        # The same of those that are not in 4 bits, and that transformers would copy together.
        self._plain_stacks: dict[str, list[list[str]]] = {}
        self._skipped: dict[str, str] = {}
        self._headroom: dict[str, int] = {}
        # How processes share the model, if they do, and what is loaded as soon as transformers has cut it.
        self._shared: Any = None
        self._later: Any = None
        # What is not loaded before others have sharded it.
        self._unfilled: Any = None
        # The parts that this process has of tensors that it has not whole.
        self._parts: dict[str, parts.Part] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        processes.refuse_sharding(not self.options.materialize)
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
        processes.shared(model)
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
        self._shared = processes.shared(model)
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
        if not self.options.materialize:
            if self._shared is not None:
                raise ValueError("distributed_config shards a model before it is loaded: leave materialize=False out")
            if self._filled_map is not None:
                raise ValueError("materialize=False puts nothing on devices: leave device_map out")
            opened = tightfit.open(checkpoint_files)
            self._unfilled = materializing.Unfilled(self, model, opened, _caller.asked().get("key_mapping"))
            self._unfilled.pack(model)
            return
        if self._shared is None:
            with torch.device("cpu"):
                self._load(model, device_map, checkpoint_files)
            return
        self._prepare_parts(model)
        self._later = device_map, checkpoint_files

    def _prepare_parts(self, model: Any) -> None:
        """Makes modules ready for being cut, which transformers does next."""
        if self._shared.tp_size > 1:
            tensor_parallel.keep_heads_whole(model, self._shared)
        if self._shared.fsdp_size > 1:
            fsdp.check(self.quantization_config, self._shared, self.dtype)
            fsdp.pack(model, self.dtype)
            return
        # Their forwards are wrapped then, and have to be ours before.
        for module in model.modules():
            if isinstance(module, Linear4bit):
                OurLinear4bit.of(module)
                module._hf_quantized_needs_local_tp = True
            elif self.options.experts != "stored" and experts.has_stacks(module):
                experts.adopt(module, self.quantization_config.bnb_4bit_compute_dtype)

    def _load_parts(self) -> None:
        """Loads this process's part, once transformers has cut the model."""
        if self._later is None:
            return
        (device_map, files), self._later = self._later, None
        with torch.device("cpu"):
            self._load(self._model, device_map, files)

    def _load(self, model: Any, device_map: Any, files: list[str]) -> None:
        if self._shared is None:
            plan, targets = self._plan(model, device_map, tightfit.open(files))
            self.loaded = self._carry_out(plan)
        else:
            # Nothing is reserved before all of them can load, and know that they load the same.
            checkpoint = agreement.together(lambda: tightfit.open(files), lambda opened: self._digest(model, opened))
            plan, targets = agreement.together(lambda: self._plan(model, device_map, checkpoint))
            self.loaded = agreement.together(lambda: self._carry_out(plan))
        loaded = self.loaded
        if self._stacks and any(loaded[name].quant_type for halves in self._stacks.values() for name in halves[0][:1]):
            # Of stacks in 4 bits transformers takes what lies beside the codes for weights of their own.
            ignored = model._keys_to_ignore_on_load_unexpected
            # A list in older versions.
            kind = set if isinstance(ignored, set) else list
            model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), experts.BESIDE])
        if self._filled_map is not None:
            self._filled_map.update(placement.device_map(model, self.loaded, targets))

    def _digest(self, model: Any, checkpoint: Any) -> str:
        """What processes that share a model have to have in common."""
        options = self.options
        mine = [options.policy, options.settings, options.experts, options.purpose, options.strict]
        return agreement.digest(checkpoint, [mine, self.quantization_config.to_dict(), self._shared.to_dict()])

    def _plan(self, model: Any, device_map: Any, checkpoint: Any) -> tuple[tightfit.Plan, Any]:
        """The plan, and where each tensor goes."""
        arguments = _caller.asked()
        targets = mapping.targets(model, checkpoint, arguments.get("key_mapping"))
        formats, omit = self._formats(model, checkpoint, targets)
        if self._shared is not None:
            if self._stacks and self._shared.fsdp_size > 1:
                raise ValueError("experts in 4 bits are not parameters that FSDP2 would shard")
            self._parts = parts.of_tensors(model, checkpoint, targets, formats, lambda layer: fsdp.shard(layer).part)
            whole = checkpoint
            checkpoint = whole.cut([tightfit.Slice(name, part.dimension, part.ranges) for name, part in self._parts.items()])
            # Each tensor is one still, in the same order.
            names = dict(zip(whole, checkpoint, strict=True))
            formats = {names[name]: format for name, format in formats.items()}
            omit = [names[name] for name in omit]
            targets = {names[name]: target for name, target in targets.items()}
        options, config = self.options, self.quantization_config
        self._choices = _experts_per_token(model.config.get_text_config())
        limits = None
        # As for transformers it is nothing beside a map, or without one.
        if self._filled_map is not None and (max_memory := arguments.get("max_memory")):
            limits = placement.limited(max_memory, config.llm_int8_enable_fp32_cpu_offload)
        given = None if device_map is self._filled_map else device_map
        if given is not None and not isinstance(given, dict):
            # A process that shares a model has a device of its own.
            given = {"": given}
        devices, policy, settings = placement.asked_of(options, given, targets, limits)
        plan = tightfit.plan(
            checkpoint,
            devices,
            policy,
            settings={**self._reserve(model), **settings, **options.settings},
            double_quant=config.bnb_4bit_use_double_quant,
            formats=formats,
            omit=omit,
            rows=ROWS if options.products is not False else 0,
            experts_per_token=self._choices,
            gradients=options.purpose == "qlora",
        )
        logger.info("%s", plan)
        logger.info("products are computed in %s", config.bnb_4bit_compute_dtype)
        return plan, targets

    def _carry_out(self, plan: tightfit.Plan) -> tightfit.Model:
        options = self.options
        return tightfit.load(
            plan,
            threads=options.threads,
            staging=options.staging,
            strict=options.strict,
            quantize_on=options.quantize_on,
            progress=options.progress,
        )

    def _reserve(self, model: Any) -> dict[str, int]:
        """The setting that leaves room for training."""
        if self.options.purpose != "qlora":
            return {}
        head, options = model.get_output_embeddings(), self.options
        keys = self._stacks if options.lora_experts else ()
        stacks = [(key, model.get_parameter(key).shape) for key in keys]
        self._headroom = purpose.qlora(model, head, options.lora_rank, options.settings, stacks)
        return {"reserve": sum(self._headroom.values())}

    def _formats(self, model: Any, checkpoint: Any, targets: Any) -> tuple[dict[str, str], list[str]]:
        """What becomes of each tensor: its format, or that it is left out."""
        places = model.state_dict()
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._stacks = self._find_stacks(model, checkpoint, targets)
        keep = model._get_dtype_plan(self.dtype)
        is_double = self.quantization_config.bnb_4bit_use_double_quant
        if self._shared is not None and self._shared.fsdp_size > 1:
            # What has scales of scales is known when all processes' scales are.
            is_double = False
        nf4 = "nf4+double" if is_double else "nf4"
        formats: dict[str, str] = {}
        omit = []
        for name, target in targets.items():
            info = checkpoint[name]
            if target is None:
                omit.append(name)
                continue
            if target.key in self._stacks:
                formats[name] = "stored" if info.quantized in ("nf4", "fp4") else nf4
                continue
            owner, _, leaf = target.key.rpartition(".")
            module = model.get_submodule(owner) if owner else model
            if isinstance(module, Linear4bit) and leaf == "weight" and not target.operations:
                self._linears[name] = owner
                self._names[target.key] = name
                formats[name] = "stored" if info.quantized in ("nf4", "fp4") else nf4
                continue
            if info.quantized in ("nf4", "fp4"):
                raise ValueError(f"{name!r} is stored in 4 bits, which {type(module).__name__} cannot hold")
            wanted = places[target.key].dtype
            if self.options.purpose == "qlora" and purpose.is_cast(wanted) and target.key in parameters:
                formats[name] = self._plain_format(info, torch.float32, "", {})
                continue
            formats[name] = self._plain_format(info, wanted, target.key, keep)
        return formats, omit

    def _find_stacks(self, model: Any, checkpoint: Any, targets: Any) -> dict[str, list[list[str]]]:
        """The tensors of stacks of experts that will be in 4 bits: all stacks of a module, or none."""
        sources: dict[str, list[tuple[int, int, str]]] = {}
        cannot: dict[str, str] = {}
        merged: dict[str, bool] = {}
        for name, target in targets.items():
            if target is None:
                continue
            owner, _, leaf = target.key.rpartition(".")
            module = model.get_submodule(owner) if owner else model
            if leaf not in experts.LEAVES or not experts.has_stacks(module):
                continue
            parameter = getattr(module, leaf)
            if not isinstance(parameter, torch.nn.Parameter) or parameter.dim() != 3:
                continue
            sources.setdefault(target.key, []).append((target.half, target.expert, name))
            made = [type(operation).__name__ for operation in target.operations]
            shape = checkpoint[name].shape
            steps = [
                (type(operation).__name__, operation.dim)
                for operation in target.operations
                if hasattr(operation, "dim")
            ]
            # What the plan lays out as a stack is what these make.
            is_merged = len(steps) == len(made) and steps in (_MERGED, _MERGED[:1])
            merged[target.key] = merged.get(target.key, True) and is_merged and not checkpoint[name].quantized
            is_stored = checkpoint[name].quantized in ("nf4", "fp4")
            if self.options.experts == "stored" and not is_stored:
                cannot[owner] = "experts are to stay as they are"
            elif any(part in owner for part in self.quantization_config.llm_int8_skip_modules or ()):
                cannot[owner] = "it is in llm_int8_skip_modules"
            elif made not in ([], ["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
                cannot[owner] = f"it is made by {', '.join(made)}"
            elif made and len(shape) != 2 or not made and (len(shape) != 3 or tuple(shape) != tuple(parameter.shape)):
                cannot[owner] = f"{name!r} has shape {list(shape)}"
            elif math.prod(shape[-2:]) % experts.BLOCK != 0:
                cannot[owner] = f"a matrix of {list(shape[-2:])} is not a whole number of blocks of {experts.BLOCK}"
        stacks = {}
        for key, found in sources.items():
            owner = key.rpartition(".")[0]
            halves: list[list[str]] = [[] for _ in range(1 + max(half for half, _, _ in found))]
            for half, _, name in sorted(found):
                halves[half].append(name)
            if owner not in cannot:
                stacks[key] = halves
                continue
            if self.options.experts != "stored":
                self._skipped[owner] = cannot[owner]
            if merged[key] and len({len(half) for half in halves}) == 1:
                self._plain_stacks[key] = halves
        return stacks

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
        if self._unfilled is not None:
            return converters(self._own, self._find, lambda key: self._unfilled.place(self._model, key))
        return [] if self.loaded is None and self._later is None else converters(self._own, self._find, self._place)

    def _place(self, key: str) -> Any:
        """Puts a stack of experts where its parameter is, if this is one.

        Of one that is not in 4 bits it gives the tensor, if it is one in memory; False for everything else.
        """
        self._load_parts()
        assert self.loaded is not None
        if plain := self._plain_stacks.get(key):
            whole = self.loaded.stack(experts.stacked(plain))
            shape = parts.local_shape(self._model.get_parameter(key))
            return False if whole is None or shape.numel() != math.prod(whole.shape) else tensor(whole).view(shape)
        names = self._stacks.get(key)
        if names is None:
            return self._shared is not None and self._place_part(key)
        owner, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(owner)
        shape = list(parts.local_shape(getattr(module, leaf)))
        padding = self._parts[names[0][0]].padding if names[0][0] in self._parts else (0, 0)
        shape[-1] += sum(padding)
        dtype = self.dtype or torch.bfloat16
        stack = experts.Stack4bit(self.loaded, names, shape, dtype, module.is_transposed, padding)
        experts.put(module, leaf, stack, self.quantization_config.bnb_4bit_compute_dtype)
        return True

    def _place_part(self, key: str) -> bool:
        """Puts this process's part of a weight in 4 bits where its parameter is: as it is, not as a ``DTensor``."""
        assert self.loaded is not None
        name = self._names.get(key)
        if name is None or name not in self.loaded:
            return False
        module = self._model.get_submodule(key.rpartition(".")[0])
        if self._shared.fsdp_size > 1:
            fsdp.put(module, self.loaded[name])
            return True
        parameter = self._find(name)
        parameter._is_hf_initialized = True
        module.weight = parameter
        if name in self._parts:
            module.__dict__["padding"] = self._parts[name].padding
        return True

    def _exchange_scales(self, model: Any) -> None:
        assert self.loaded is not None
        layers = ((model.get_submodule(owner), self.loaded[name]) for name, owner in self._linears.items())
        fsdp.exchange_scales(layers, self.quantization_config.bnb_4bit_use_double_quant, self.dtype)

    def _use_products(self, model: Any) -> None:
        """Has layers multiply with Tightfit's kernels, where they shall."""
        assert self.loaded is not None
        workspaces: dict[str, SharedWorkspace | None] = {}

        def shared(device: str) -> SharedWorkspace | None:
            if device not in workspaces:
                assert self.loaded is not None
                native = self.loaded.workspace(device, ROWS, self._choices, self.options.purpose == "qlora")
                workspaces[device] = SharedWorkspace(native) if native.bytes else None
            return workspaces[device]

        for name, owner in self._linears.items():
            module = model.get_submodule(owner)
            weight = self.loaded[name] if name in self.loaded else None
            if weight is None or not isinstance(module, OurLinear4bit) or not self._wants_products(weight.device):
                continue
            native = self.loaded.linear(name)
            state = module.weight.quant_state
            if module.weight.data_ptr() != weight.codes.address:
                # It has been moved since.
                continue
            module.product = Product(native, shared(native.device), _dense(module.weight, state))
        for module in model.modules():
            if isinstance(module, experts.Experts4bit):
                # bitsandbytes has none for them.
                if self.options.products is not False:
                    experts.use_products(module, shared)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """What is saved: of experts in 4 bits what ``tightfit save`` writes."""
        if self._shared is not None and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("this is a part of a model: save the model from its files, with tightfit.save")
        stacks = {name: module for name, module in model.named_modules() if isinstance(module, experts.Stack4bit)}
        if not stacks:
            return super().get_state_dict_and_metadata(model)
        state = model.state_dict()
        for prefix, stack in stacks.items():
            for key in [key for key in state if key.startswith(prefix + ".")]:
                del state[key]
            state.update(stack.checkpoint())
        return state, {}

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
        if self._shared is None and self._wants_products(weight.device):
            OurLinear4bit.of(module)
        stored = weight.format == "stored"
        storage = self.quantization_config.bnb_4bit_quant_storage
        if self._shared is not None and self._shared.pp_size > 1:
            # transformers takes the type of what a stage receives from the stage's first parameter.
            storage = self.dtype
        return params4bit(weight, module, None if stored else self.dtype, storage)

    def _wants_products(self, device: str) -> bool:
        wanted = self.options.products
        return _is_faster(device) if wanted is None else wanted

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self._shared is not None and self._shared.fsdp_size > 1:
            self._exchange_scales(model)
        try:
            if self.loaded is not None:
                self._use_products(model)
        except tightfit.DeviceError as error:
            # Of a GPU that is older than the kernels: bitsandbytes multiplies.
            logger.warning("products are bitsandbytes' own: %s", error)
        for owner, reason in self._skipped.items():
            logger.warning("%s is not in 4 bits: %s", owner, reason)
        model.tightfit = Report(self.loaded, self._skipped, self._headroom)
        # It is bitsandbytes' from here on: Trainer, PEFT and accelerate ask for that.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        # Nothing to be reversed when it is saved.
        model._weight_conversions = [entry for entry in model._weight_conversions if not hasattr(entry, "find")]
        if self._unfilled is not None:
            model.__dict__["_tightfit_unfilled"], self._unfilled = self._unfilled, None
        # The model keeps what it needs.
        self.loaded = self._model = None
        return model
