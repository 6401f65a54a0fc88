"""Experts of transformers' fused modules in 4 bits: the stacks, and the forward of every class that has them."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..ops import FLOATS, Product, SharedWorkspace, experts, linear, linear_transposed
from ..torch import quant_state

logger = logging.getLogger("tightfit.transformers")

# The parameters that are stacks of matrices, one for each expert.
LEAVES = ("gate_up_proj", "up_proj", "down_proj")

# What files have beside the codes of stacks in 4 bits, after transformers has renamed it.
BESIDE = rf"\.({'|'.join(LEAVES)})\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"

# A stack is in 4 bits where each expert begins with a block.
BLOCK = 64

# Adapters of the matrices of a stack: what is added to them is ``scaling * left @ right``, of left [experts, rows, rank] and
# right [experts, rank, columns].
Adapters = Sequence[tuple[torch.Tensor, torch.Tensor, float]]


def has_stacks(module: torch.nn.Module) -> bool:
    """Whether it is one of the modules that transformers' experts interface is for."""
    flags = ("has_gate", "has_bias", "is_transposed", "config", "_apply_gate")
    return all(hasattr(module, flag) for flag in flags)


class Stack4bit(torch.nn.Module):  # type: ignore[misc]
    """A stack of experts' matrices in 4 bits, in place: [experts, rows, columns], where its parameter was.

    Its parts are buffers: those of the whole stack, also where the checkpoint has a key for each expert and the plan
    has laid them out as one; else those of each, and of both halves of ``gate_up_proj``.

    Attributes:
        shape: The shape of the parameter.
        names: The checkpoint's names: for each half those of the experts, or that of the stack.
        is_fused: Whether the checkpoint has the stack as one tensor.
        is_whole: Whether it is one in memory.
        padding: Of a part of a stack: columns before and behind those of its input, which make whole blocks.
    """

    def __init__(
        self,
        loaded: Any,
        names: list[list[str]],
        shape: Any,
        dtype: torch.dtype,
        transposed: bool,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.padding = padding
        self.shape, self.dtype, self.names = torch.Size(shape), dtype, names
        self.transposed = transposed
        self.is_fused = len(names) == 1 and len(names[0]) == 1 and len(loaded[names[0][0]].shape) == 3
        self._kept = _Kept(loaded)
        self._states: dict[str, dict[str, Any]] = {}
        whole = loaded[names[0][0]] if self.is_fused else loaded.stack(stacked(names))
        self.is_whole = whole is not None
        weights = {(0, 0): whole}
        if whole is None:
            weights = {
                (half, expert): loaded[name]
                for half, of_experts in enumerate(names)
                for expert, name in enumerate(of_experts)
            }
        for (half, expert), weight in weights.items():
            codes, state = quant_state(weight, dtype)
            key = f"{half}_{expert}"
            self.register_buffer(f"codes_{key}", codes)
            self.register_buffer(f"absmax_{key}", state.absmax)
            if state.nested:
                self.register_buffer(f"nested_absmax_{key}", state.state2.absmax)
            self._states[key] = {
                # Gates and up projections lie one behind the other for each expert.
                "shape": tuple(self.shape) if self.is_whole else tuple(state.shape),
                "quant_type": state.quant_type,
                "blocksize": state.blocksize,
                "offset": state.offset.item() if state.nested else None,
            }

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        device: torch.device = self.codes_0_0.device
        return device

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, 4 bits"

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        place = self.codes_0_0.data_ptr()
        super()._apply(fn, recurse)
        if self.codes_0_0.data_ptr() != place:
            self._kept = _Kept(None)
        return self

    def _state(self, key: str) -> tuple[torch.Tensor, Any]:
        """The codes and bitsandbytes' state of a stack, or of one matrix."""
        from bitsandbytes.functional import QuantState

        from ..torch import _dynamic_table, _table

        state = self._states[key]
        codes = getattr(self, f"codes_{key}")
        nested = offset = None
        if state["offset"] is not None:
            nested = QuantState(
                absmax=getattr(self, f"nested_absmax_{key}"),
                blocksize=256,
                code=_dynamic_table(codes.device),
                dtype=torch.float32,
            )
            offset = torch.tensor(state["offset"], device=codes.device)
        return codes, QuantState(
            absmax=getattr(self, f"absmax_{key}"),
            shape=torch.Size(state["shape"]),
            code=_table(state["quant_type"], codes.device),
            blocksize=state["blocksize"],
            quant_type=state["quant_type"],
            dtype=self.dtype,
            offset=offset,
            state2=nested,
        )

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Its tensors under the checkpoint's names, as bitsandbytes stores them."""
        tensors = {}
        for half, of_experts in enumerate(self.names):
            for expert, name in enumerate(of_experts):
                codes, state = self._state("0_0") if self.is_fused else self.matrix(half, expert)
                tensors[name] = codes
                for key, value in state.as_dict(packed=True).items():
                    # Files take no two tensors that share memory.
                    tensors[f"{name}.{key}"] = value.clone() if key.endswith("quant_map") else value
        return tensors

    def matrix(self, half: int, expert: int) -> tuple[torch.Tensor, Any]:
        """The codes and bitsandbytes' state of one expert's matrix, or of one half of it."""
        if not self.is_whole:
            return self._state(f"{half}_{expert}")
        halves = len(self.names)
        return self._part(halves * expert + half, self.shape[1] // halves)

    def _part(self, index: int, rows: int) -> tuple[torch.Tensor, Any]:
        """The codes and bitsandbytes' state of as many rows of a whole stack, by which of such parts it is."""
        import bitsandbytes.functional as functional

        codes, state = self._state("0_0")
        columns = self.shape[2]
        elements = rows * columns
        codes = codes.view(-1)[index * elements // 2 : (index + 1) * elements // 2].view(-1, 1)
        absmax = state.absmax
        if state.nested:
            # A nested scale may be that of two experts.
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        blocks = elements // state.blocksize
        return codes, functional.QuantState(
            absmax=absmax[index * blocks : (index + 1) * blocks],
            shape=torch.Size((rows, columns)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=self.dtype,
        )

    def dequantize(self, expert: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One expert's matrix [rows, columns]."""
        if self.is_whole:
            return _dequantized(*self._part(expert, self.shape[1]), dtype or self.dtype)
        halves = [self._dequantize(half, expert, dtype or self.dtype) for half in range(len(self.names))]
        return halves[0] if len(halves) == 1 else torch.cat(halves)

    def _dequantize(self, half: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return _dequantized(*self.matrix(half, expert), dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.dequantize(expert)

    def multiply(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """``x @ W.T`` with one expert's matrix, or ``x @ W`` where stacks lie transposed; with a gradient for x."""
        if self.padding != (0, 0):
            x = torch.nn.functional.pad(x, self.padding)
        halves = [self._multiply(x, half, expert) for half in range(len(self.names))]
        return halves[0] if len(halves) == 1 else torch.cat(halves, dim=-1)

    def _multiply(self, x: torch.Tensor, half: int, expert: int) -> torch.Tensor:
        product = self._kept.product(self, half, expert)
        if product is not None and product.device == x.device and x.dtype in FLOATS:
            return linear_transposed(product, x) if self.transposed else linear(product, x)
        result: torch.Tensor = _Dense.apply(x, self, half, expert)
        return result


@torch.no_grad()  # type: ignore[untyped-decorator]
def _dequantized(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    matrix: torch.Tensor = dequantize_4bit(codes, state).to(dtype)
    return matrix


def stacked(names: list[list[str]]) -> list[str]:
    """Names by halves in the order of a stack: both halves of an expert, then those of the next."""
    return [name for of_expert in zip(*names, strict=True) for name in of_expert]


class _Dense(torch.autograd.Function):  # type: ignore[misc]
    """A product with a matrix that is dequantized for it, and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack4bit, half: int, expert: int) -> torch.Tensor:
        ctx.of = stack, half, expert
        weight = stack._dequantize(half, expert, x.dtype)
        return x @ weight if stack.transposed else torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        stack, half, expert = ctx.of
        weight = stack._dequantize(half, expert, dy.dtype)
        return (dy @ weight.t() if stack.transposed else dy @ weight), None, None, None


class _Kept:
    """The loaded model of a stack, and products that have been asked of it. A copy has none."""

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded
        self.shared: SharedWorkspace | None = None
        self.is_used = False
        self._products: dict[tuple[int, int], Product | None] = {}

    def product(self, stack: Stack4bit, half: int, expert: int) -> Product | None:
        if not self.is_used:
            return None
        key = half, expert
        if key not in self._products:
            self._products[key] = self._find(stack, half, expert)
        return self._products[key]

    def _find(self, stack: Stack4bit, half: int, expert: int) -> Product | None:
        if self.loaded is None or not self.loaded.is_loaded:
            return None
        names = stack.names[half]
        if stack.is_fused:
            native = self.loaded.linear(names[0], expert)
            state = stack._states["0_0"]
            elements = stack.shape[1] * stack.shape[2]
            if native.is_on_gpu and state["offset"] is not None and elements % (256 * state["blocksize"]) != 0:
                # Kernels for gradients count nested scales from where a matrix begins.
                return None
        else:
            native = self.loaded.linear(names[expert])

        def dense(dtype: torch.dtype) -> torch.Tensor:
            return stack._dequantize(half, expert, dtype)

        return Product(native, self.shared, dense)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Kept, (None,))


class Experts4bit(torch.nn.Module):  # type: ignore[misc]
    """What is put before a class of experts: its forward on stacks in 4 bits, whatever implementation is set."""

    base: type[torch.nn.Module]
    layer: Product | None
    compute_dtype: torch.dtype | None
    # The class's parameters in its own order, those that are stacks now among them.
    parameter_names: tuple[str, ...]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: Mapping[str, Adapters] | None = None,
    ) -> torch.Tensor:
        """What the class computes, with ``adapters`` added to its stacks, by name."""
        if not isinstance(self.down_proj, Stack4bit):
            # It was to be in 4 bits, and could not.
            output: torch.Tensor = self.base.forward(self, hidden_states, top_k_index, top_k_weights)
            return output
        dtype = self.compute_dtype or hidden_states.dtype
        x = hidden_states.to(dtype)
        layer = self.layer
        has_gradient = torch.is_grad_enabled() and (x.requires_grad or top_k_weights.requires_grad)
        if layer is not None and not has_gradient and not adapters and layer.device == x.device and dtype in FLOATS:
            bias = down_bias = None
            if self.has_bias:
                bias, down_bias = self.gate_up_proj_bias.to(dtype), self.down_proj_bias.to(dtype)
            return experts(layer, x, top_k_index, top_k_weights, bias, down_bias).to(hidden_states.dtype)
        return _one_after_the_other(self, x, top_k_index, top_k_weights, adapters or {}).to(hidden_states.dtype)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.layer is not None and _kept(self.down_proj) is None:
            self.layer = None
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made where it is needed, and cannot be looked up.
        return (_new, (type(self).base,), self.__dict__.copy())


def _kept(stack: Any) -> Any:
    return stack._kept.loaded


def _one_after_the_other(
    module: Any,
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: Mapping[str, Adapters],
) -> torch.Tensor:
    """The experts that were chosen, one by one; each product has a gradient."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _Adapted(getattr(module, up_name), adapters.get(up_name, ()), x.dtype)
    down = _Adapted(module.down_proj, adapters.get("down_proj", ()), x.dtype)
    up_bias = down_bias = None
    if module.has_bias:
        up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    choices = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    weights = top_k_weights.reshape(-1)
    chosen, counts = torch.unique_consecutive(ids, return_counts=True)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        which = order[start : start + count]
        start += count
        if not 0 <= expert < len(module.down_proj):
            # Another process has it.
            continue
        tokens = which // choices
        hidden = up.multiply(x[tokens], expert)
        if up_bias is not None:
            hidden = hidden + up_bias[expert].to(hidden.dtype)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = down.multiply(hidden, expert)
        if down_bias is not None:
            hidden = hidden + down_bias[expert].to(hidden.dtype)
        if getattr(module, "has_post_expert_norm", False):
            hidden = module.post_expert_norm(hidden)
        y = y.index_add(0, tokens, hidden.to(y.dtype) * weights[which, None].to(y.dtype))
    return y.to(x.dtype)


class _Adapted:
    """A stack with adapters, which are multiplied by themselves: what they add is never made dense."""

    def __init__(self, stack: Any, adapters: Adapters, dtype: torch.dtype) -> None:
        if not isinstance(stack, Stack4bit):
            raise TypeError("experts are in 4 bits all or not at all")
        self.stack = stack
        # Taken apart once: the gradient of one index would be as large as the factors of all experts.
        self.factors = [
            (left.to(dtype).unbind(), right.to(dtype).unbind(), scaling) for left, right, scaling in adapters
        ]

    def multiply(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        y = self.stack.multiply(x, expert)
        for left, right, scaling in self.factors:
            if self.stack.transposed:
                added = x @ left[expert] @ right[expert]
            else:
                added = x @ right[expert].t() @ left[expert].t()
            y = y + (added * scaling).to(y.dtype)
        return y


@functools.cache
def _class_of(base: Any) -> Any:
    if importlib.util.find_spec("peft") is not None:
        # Whoever has such a module may put adapters on it.
        try:
            from . import peft

            peft.register()
        except ImportError as error:
            logger.warning("experts take no adapters, for PEFT cannot be imported: %s", error)
    return type(base.__name__, (Experts4bit, base), {"base": base, "__module__": base.__module__})


def _new(base: Any) -> torch.nn.Module:
    cls = _class_of(base)
    module: torch.nn.Module = cls.__new__(cls)
    return module


def adopt(module: Any, compute_dtype: torch.dtype | None) -> None:
    """Gives a module of experts the forward that is for stacks in 4 bits, which are yet to be put there."""
    if not isinstance(module, Experts4bit):
        base: Any = type(module)
        module.__class__ = _class_of(base)
        module.layer = None
        module.compute_dtype = compute_dtype
        module.parameter_names = tuple(module._parameters)


def put(module: Any, leaf: str, stack: Stack4bit, compute_dtype: torch.dtype | None) -> None:
    """Puts a stack where its parameter was."""
    adopt(module, compute_dtype)
    delattr(module, leaf)
    module.add_module(leaf, stack)
    module._is_hf_initialized = stack._is_hf_initialized = True


def use_products(module: Any, shared: Callable[[str], SharedWorkspace | None]) -> None:
    """Has products of a module's stacks computed by Tightfit: the whole layer where there are kernels for it."""
    stacks = [stack for stack in module.children() if isinstance(stack, Stack4bit)]
    for stack in stacks:
        name = stack.names[0][0]
        stack._kept.shared = shared(stack._kept.loaded[name].device)
        stack._kept.is_used = True
    module.layer = _layer(module, shared) if stacks else None


def _layer(module: Any, shared: Callable[[str], SharedWorkspace | None]) -> Product | None:
    import tightfit

    is_plain = module.has_gate and not module.is_transposed and not getattr(module, "has_post_expert_norm", False)
    gate = _gate(module) if is_plain else None
    if gate is None:
        return None
    activation, limit, interleaved = gate
    up, down = module.gate_up_proj, module.down_proj
    if down.padding != (0, 0):
        return None
    try:
        native = up._kept.loaded.experts(up.names, down.names[0], activation, limit, interleaved)
    except tightfit.UsageError:
        # Not in a stack, on a GPU.
        return None
    return Product(native, shared(native.device))


def _gate(module: Any) -> tuple[str, float | None, bool] | None:
    """What a module makes of gates and up projections, in the kernels' words: found by trying it out."""
    functional = torch.nn.functional
    with torch.device("cpu"), torch.no_grad():
        tried = torch.linspace(-9, 9, 62).reshape(2, 31)
        both = torch.cat([tried, tried.flip(1) * 1.3], dim=1)[:, :60].contiguous()
        try:
            have = module._apply_gate(both)
        except Exception:  # noqa: BLE001 - whatever it needs, it is none of these
            return None
        gate, up = both.chunk(2, dim=-1)
        known = {
            "silu": functional.silu(gate) * up,
            "gelu": functional.gelu(gate) * up,
            "gelu_tanh": functional.gelu(gate, approximate="tanh") * up,
        }
        for name, wanted in known.items():
            if have.shape == wanted.shape and torch.allclose(have, wanted, rtol=1e-5, atol=1e-5):
                return name, None, False
        limit = getattr(module, "limit", None)
        if isinstance(limit, (int, float)):
            gate, up = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
            wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            if have.shape == wanted.shape and torch.allclose(have, wanted, rtol=1e-5, atol=1e-5):
                return "clamped", float(limit), True
    return None
