"""LoRA of PEFT on experts in 4 bits: adapters for each expert, as PEFT has them for a stack that is a parameter.

PEFT puts ``target_parameters`` on parameters only, and adds what adapters make to the whole stack. A stack in 4 bits is no
parameter, and is never dense. So while PEFT puts adapters on a model its stacks are shown as parameters, and what PEFT makes
for them is a class of ours. All else is PEFT's own: names, shapes, files, several adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel, layer

from .experts import Adapters, Experts4bit, Stack4bit

# There is none before 0.17; `problems` says so.
Base: Any = getattr(layer, "ParamWrapper", LoraLayer)


def problems() -> list[str]:
    """What of PEFT is not as it is needed: nothing, or why experts in 4 bits take no adapters."""
    found = []

    def need(holder: Any, name: str, *parameters: str) -> None:
        member = getattr(holder, name, None)
        if member is None:
            found.append(f"there is no {holder.__name__}.{name}")
        elif missing := [wanted for wanted in parameters if wanted not in inspect.signature(member).parameters]:
            found.append(f"{holder.__name__}.{name} does not take {', '.join(missing)}")

    if Base is LoraLayer:
        return ["it has no target_parameters"]
    need(LoraModel, "_inject_parameters", "peft_config", "model", "adapter_name")
    need(LoraConfig, "_register_custom_module")
    need(Base, "__init__", "base_layer", "adapter_name", "parameter_name")
    need(Base, "get_param")
    return found


class ParamWrapper(Base):  # type: ignore[misc]
    """PEFT's layer for a stack of experts that is in 4 bits. It has PEFT's name, by which PEFT looks for it."""

    def forward(
        self, x: torch.Tensor, *args: Any, adapters: Mapping[str, Adapters] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("experts take the same adapters for all rows of a batch")
        known = dict(adapters or {})
        if not self.disable_adapters:
            active = [name for name in self.active_adapters if name in self.lora_A]
            known |= {self.parameter_name: [self._factors(name) for name in active]} if active else {}
        y: torch.Tensor = self.base_layer(x, *args, adapters=known, **kwargs)
        return y

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One adapter's factors of what is added to the stack, and its scaling."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        # Experts lie one behind the other in A, and next to each other in B.
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        scaling = float(self.scaling[adapter])
        if getattr(self, "_did_swap_in_out_features", False):
            return b, a, scaling
        # A is of the first of the stack's two sides, and B of the second.
        return a.transpose(1, 2), b.transpose(1, 2), scaling

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        left, right, scaling = self._factors(adapter_name)
        return left @ right * scaling

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"adapters cannot be merged into {self.parameter_name}, which is in 4 bits: merge them into the model as it "
            "was before it was quantized"
        )


def _wrapped(target: Any, adapter_name: str, parameter_name: str | None = None, **named: Any) -> ParamWrapper | None:
    """What PEFT asks for a layer for experts; None for what its own is right for."""
    module = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if parameter_name is None:
        leaves = [name for name in module.parameter_names if _is_stack(module, name)]
        raise ValueError(f"experts take adapters by target_parameters={leaves}, not by target_modules")
    return ParamWrapper(target, adapter_name, parameter_name, **named) if _is_stack(module, parameter_name) else None


def _is_stack(module: Any, name: str) -> bool:
    return isinstance(module._modules.get(name), Stack4bit) or isinstance(module._parameters.get(name), _Shown)


class _Shown(torch.nn.Parameter):  # type: ignore[misc]
    """What stands for a stack: of its type and shape, and one element of memory."""

    @staticmethod
    def of(stack: Stack4bit) -> _Shown:
        shown: _Shown = _Shown(torch.zeros((), dtype=stack.dtype, device=stack.device).expand(stack.shape), False)
        return shown


@contextmanager
def _shown(modules: list[Any]) -> Iterator[None]:
    """Has stacks be parameters for a while."""
    kept: list[tuple[Any, dict[str, Any]]] = []
    try:
        for module in modules:
            stacks = {name: child for name, child in module._modules.items() if isinstance(child, Stack4bit)}
            kept.append((module, stacks))
            parameters = dict(module._parameters)
            module._parameters.clear()
            for name in (*module.parameter_names, *parameters):
                if name in stacks:
                    module._modules.pop(name, None)
                    module._parameters[name] = _Shown.of(stacks[name])
                elif name in parameters:
                    module._parameters[name] = parameters[name]
        yield
    finally:
        for module, stacks in kept:
            for name, stack in stacks.items():
                module._parameters.pop(name, None)
                module._modules[name] = stack


def register() -> None:
    """Has PEFT put LoRA on experts in 4 bits. A second time changes nothing."""
    if getattr(LoraModel.inject_adapter, "is_tightfits", False):
        return
    inject = LoraModel.inject_adapter

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **named: Any) -> None:
        modules = [module for module in model.modules() if isinstance(module, Experts4bit)]
        config = self.peft_config[adapter_name]
        if not modules:
            inject(self, model, adapter_name, *args, **named)
        elif unlike := problems():
            inject(self, model, adapter_name, *args, **named)
            # What all-linear is made of stands there only now.
            if getattr(config, "target_parameters", None):
                raise RuntimeError(
                    f"PEFT {peft.__version__} cannot put adapters on experts in 4 bits: {'; '.join(unlike)}. Leave "
                    "target_parameters out, or load the experts as they are: TightfitConfig(experts='stored')"
                )
        else:
            config._register_custom_module({Experts4bit: _wrapped})
            with _shown(modules):
                inject(self, model, adapter_name, *args, **named)

    inject_adapter.is_tightfits = True  # type: ignore[attr-defined]
    LoraModel.inject_adapter = inject_adapter
