"""Models that stay on the meta device until others have sharded them, and are loaded then."""

from __future__ import annotations

import logging
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

import tightfit

from ..torch import DTYPES, params4bit, tensor
from . import agreement, fsdp, mapping, parts, placement
from ._report import Report

logger = logging.getLogger("tightfit.transformers")

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


class Unfilled:
    """What a model on the meta device will be loaded from, and which modules have which tensors."""

    def __init__(self, quantizer: Any, model: Any, checkpoint: Any, key_mapping: dict[str, str] | None) -> None:
        self.options, self.config, self.dtype = quantizer.options, quantizer.quantization_config, quantizer.dtype
        self.checkpoint = checkpoint
        # Modules, for their names change when adapters are put around them.
        self.places: dict[str, tuple[torch.nn.Module, str]] = {}
        self.omitted: list[str] = []
        for name, target in mapping.targets(model, checkpoint, key_mapping).items():
            if target is None:
                self.omitted.append(name)
                continue
            if target.operations:
                made = ", ".join(type(operation).__name__ for operation in target.operations)
                raise ValueError(f"{target.key!r} is made by {made} of {name!r}: such models are not loaded later")
            owner, _, leaf = target.key.rpartition(".")
            self.places[name] = model.get_submodule(owner), leaf

    def pack(self, model: Any) -> None:
        """Gives linear layers in 4 bits parameters of the shape that their codes have, as bitsandbytes' own."""
        storage = self.config.bnb_4bit_quant_storage
        fsdp.pack(model, storage)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.weight = Params4bit(
                    module.weight.data,
                    requires_grad=False,
                    blocksize=64,
                    compress_statistics=self.config.bnb_4bit_use_double_quant,
                    quant_type=self.config.bnb_4bit_quant_type,
                    quant_storage=storage,
                    bnb_quantized=True,
                )

    def place(self, model: Any, key: str) -> bool:
        """Leaves a parameter as it is: transformers shall neither read nor initialize it."""
        owner, _, leaf = key.rpartition(".")
        getattr(model.get_submodule(owner), leaf)._is_hf_initialized = True
        return True

    def fill(self, model: Any, inner: Any) -> None:
        """Loads this process's part of what it has by now."""
        from torch.distributed.tensor import DTensor

        is_shared = any(isinstance(parameter, DTensor) for parameter in model.parameters())

        def step(does: Any, what: Any = lambda result: "") -> Any:
            return agreement.together(does, what) if is_shared else does()

        named = [self.config.to_dict(), self.options.policy, self.options.settings]
        plan = step(self._plan, lambda plan: agreement.digest(self.checkpoint, named))
        loaded = step(lambda: self._load(plan))
        # Layers that share a parameter share what takes its place.
        holders: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                holders.setdefault(id(parameter), []).append((module, leaf))
        sharded = []
        for name, (module, leaf) in self.places.items():
            weight, old = loaded[name], getattr(module, leaf)
            if _is_packed(module, leaf):
                if isinstance(old, DTensor):
                    fsdp.put(module, weight)
                    sharded.append((module, weight))
                else:
                    module.weight = params4bit(weight, module, self.dtype, self.config.bnb_4bit_quant_storage)
                continue
            new = tensor(weight)
            if leaf in module._buffers:
                module._buffers[leaf] = new
                continue
            if isinstance(old, DTensor):
                new = DTensor.from_local(
                    new, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
                )
            parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            for holder, its in holders[id(old)]:
                setattr(holder, its, parameter)
        fsdp.exchange_scales(iter(sharded), self.config.bnb_4bit_use_double_quant, self.dtype)
        with torch.no_grad():
            _initialize(model, torch.device(placement.torch_place(plan.devices[0].name)))
        inner.tightfit = Report(loaded)

    def _plan(self) -> Any:
        from torch.distributed.tensor import DTensor

        formats, cut = {}, []
        double = self.config.bnb_4bit_use_double_quant
        device = None
        for name, (module, leaf) in self.places.items():
            info, parameter = self.checkpoint[name], getattr(module, leaf)
            is_sharded = isinstance(parameter, DTensor)
            if is_sharded:
                device = parameter.device_mesh.device_type
            elif not parameter.is_meta:
                raise ValueError(f"{name!r} has been put on {parameter.device} already")
            part: parts.Part | None
            if _is_packed(module, leaf):
                is_stored = info.quantized in ("nf4", "fp4")
                # Scales of scales are known when all processes' scales are.
                formats[name] = "stored" if is_stored else "nf4+double" if double and not is_sharded else "nf4"
                part = fsdp.shard(module).part if is_sharded else None
            else:
                have = DTYPES.get(info.dtype)
                is_same = have is None or not have.is_floating_point or have == parameter.dtype
                formats[name] = "stored" if is_same else _FORMATS.get(parameter.dtype, "stored")
                part = parts.part_of(name, parameter) if is_sharded else None
            if part is not None:
                cut.append(tightfit.Slice(name, part.dimension, part.ranges))
        checkpoint = self.checkpoint.cut(cut)
        names = dict(zip(self.checkpoint, checkpoint, strict=True))
        options = self.options
        devices = None if options.devices is None else list(options.devices)
        if devices is None and device is not None:
            devices = [placement.device_name(device)]
        plan = tightfit.plan(
            checkpoint,
            devices,
            options.policy,
            settings=options.settings,
            double_quant=double,
            formats={names[name]: format for name, format in formats.items()},
            omit=[names[name] for name in self.omitted],
        )
        logger.info("%s", plan)
        return plan

    def _load(self, plan: Any) -> Any:
        options = self.options
        return tightfit.load(
            plan,
            threads=options.threads,
            staging=options.staging,
            strict=options.strict,
            quantize_on=options.quantize_on,
            progress=options.progress,
        )


def _is_packed(module: torch.nn.Module, leaf: str) -> bool:
    return leaf == "weight" and isinstance(module, Linear4bit)


def _initialize(model: torch.nn.Module, device: torch.device) -> None:
    """Gives what came after loading, and is on the meta device for the model was, the values it begins with."""
    from torch.distributed.tensor import DTensor

    made: dict[int, torch.nn.Parameter] = {}
    owners = []
    for module in model.modules():
        for leaf, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                if isinstance(old, DTensor):
                    local = torch.empty_like(old.to_local(), device=device)
                    new = DTensor.from_local(
                        local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
                    )
                else:
                    new = torch.empty_like(old, device=device)
                made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[leaf] = made[id(old)]
            owners.append(module)
    # Adapters know how theirs begin, which is not as the layers do that they are made of.
    configurations = getattr(model, "peft_config", {})
    inside = set()
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters") and any(owner in owners for owner in module.modules()):
            for adapter in module.r:
                configuration = configurations.get(adapter)
                module.reset_lora_parameters(adapter, getattr(configuration, "init_lora_weights", True))
            inside.update(module.modules())
    for module in owners:
        if module in inside:
            continue
        if not hasattr(module, "reset_parameters"):
            raise ValueError(f"{type(module).__name__} came after loading, and does not say how its parameters begin")
        module.reset_parameters()


def materialize(model: torch.nn.Module) -> None:
    """Loads a model that ``TightfitConfig(materialize=False)`` has left on the meta device, or what wraps it.

    What FSDP2 has sharded meanwhile (``torch.distributed.fsdp.fully_shard``) is loaded in shards: each process reads,
    quantizes and holds its own. All of them have to call this. Parameters keep the type that they have by now. Those of
    adapters, which PEFT makes on the meta device too, get the values that adapters begin with.

    Raises:
        ValueError: It is no such model, or is loaded already.
    """
    for inner in model.modules():
        unfilled = inner.__dict__.get("_tightfit_unfilled")
        if unfilled is not None:
            unfilled.fill(model, inner)
            del inner._tightfit_unfilled
            return
    raise ValueError("nothing is left to be loaded: this model is not of TightfitConfig(materialize=False)")
