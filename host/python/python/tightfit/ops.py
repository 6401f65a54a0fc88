"""Products with 4-bit weights of a loaded model as torch operators, for eager and compiled code, with gradients.

``linear(product, x)`` is ``x @ W.T + bias``, where ``product`` is ``model.linear(name)``: the weight is used as it lies.
Operators know products by numbers, so that ``torch.compile`` has them in its graphs without a break. On a GPU
nothing is allocated but by torch and nothing waited for: CUDA graphs can capture it. W gets no gradient, and
nothing but W is needed for that of x.

Products of a GPU share a workspace for each loaded model. What is given to several streams eagerly is put
into order; graphs that have captured products of one model and GPU must not run beside each other or beside
eager products on other streams.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ._native import Experts, Linear, Workspace

# Rows that workspaces are enough for. Products of more are done with dense weights, and layers of experts in parts.
ROWS = 4096

# Types that products take.
FLOATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class Product:
    """A ``Linear`` or ``Experts`` of a loaded model that operators can name by ``handle``.

    Of many rows W is dequantized by ``dense(dtype)``, where that is given, and multiplied by torch: decoding it
    once is faster then.

    A copy, or one that comes out of a file, is None: it would not be in the model's memory.
    """

    __slots__ = ("__weakref__", "dense", "device", "handle", "inputs", "native", "outputs", "shared")

    def __init__(
        self,
        native: Linear | Experts,
        shared: SharedWorkspace | None = None,
        dense: Callable[[torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        self.native = native
        self.dense = dense
        # Numbers, for compilers to read.
        self.inputs = native.inputs if isinstance(native, Linear) else native.hidden
        self.outputs = native.outputs if isinstance(native, Linear) else native.hidden
        self.device = torch.device(native.device if native.is_on_gpu else "cpu")
        self.shared = shared
        if native.is_on_gpu and shared is None:
            raise ValueError(f"{native!r} needs a workspace: SharedWorkspace(model, device)")
        self.handle = next(_handles)
        _products[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def __repr__(self) -> str:
        return f"Product({self.native!r})"


class SharedWorkspace:
    """The workspace of all products of a model on one GPU, and the stream that has used it last."""

    def __init__(self, workspace: Workspace) -> None:
        self.native = workspace
        self._last: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> int:
        """The current stream, which from now on is behind all that has used it."""
        stream = torch.cuda.current_stream(device)
        if self._last == stream or torch.cuda.is_current_stream_capturing():
            return int(stream.cuda_stream)
        with self._lock:
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
        return int(stream.cuda_stream)

    def __del__(self) -> None:
        # What it has been given to has to be done before it goes.
        if self._last is not None:
            self._last.synchronize()


_handles = itertools.count(1)
_products: weakref.WeakValueDictionary[int, Product] = weakref.WeakValueDictionary()


def _product(handle: int) -> Any:
    product = _products.get(handle)
    if product is None:
        raise RuntimeError(f"tightfit: product {handle} is gone with its model")
    return product


def linear(product: Product, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias``, of the type of x: bfloat16, float16 or float32, on W's device.

    Args:
        product: A product with W [outputs, inputs].
        x: [..., inputs].
        bias: [outputs], of x's type.
    """
    if _is_eager(x) and not (torch.is_grad_enabled() and bias is not None and bias.requires_grad):
        # Without what an operator has to look at before: half of a small product's time.
        return _multiply(x, bias, product.handle, product.outputs, False)
    result: torch.Tensor = torch.ops.tightfit.linear(x, bias, product.handle, product.outputs)
    return result


def _is_eager(x: torch.Tensor) -> bool:
    """Whether nobody watches what is done with x: no compiler, no gradients, no mode, no subclass."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is torch.Tensor and not (torch.is_grad_enabled() and x.requires_grad) and _modes() == 0


_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def linear_transposed(product: Product, x: torch.Tensor) -> torch.Tensor:
    """``x @ W``, of x [..., outputs], as of weights that lie transposed: the gradient of ``linear``."""
    result: torch.Tensor = torch.ops.tightfit.linear_input_gradient(x, product.handle, product.inputs)
    return result


def experts(
    product: Product,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A layer of experts. It has no gradient.

    Args:
        product: A layer of experts.
        x: [tokens, hidden].
        ids: Numbers of experts, [tokens, choices]; what is none is skipped.
        weights: What their results are multiplied with, [tokens, choices].
        bias: That of gates and up projections, [experts, 2 * intermediate].
        down_bias: That of down projections, [experts, hidden].
    """
    result: torch.Tensor = torch.ops.tightfit.experts(x, ids, weights, bias, down_bias, product.handle)
    return result


def _checked(what: str, tensor: torch.Tensor, like: torch.Tensor, last: int) -> torch.Tensor:
    if tensor.dtype != like.dtype or tensor.device != like.device or tensor.shape[-1] != last:
        raise ValueError(
            f"tightfit: {what} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, need {like.dtype} "
            f"[..., {last}] on {like.device}"
        )
    return tensor.contiguous()


def _most_rows(device: torch.device, gradient: bool) -> int:
    """From where on a dense weight is faster, as measured on an H200 and on a processor with AVX-512."""
    if device.type == "cuda":
        return 64 if gradient else 256
    return 16 if gradient else 256


def _multiply(x: torch.Tensor, bias: torch.Tensor | None, handle: int, columns: int, gradient: bool) -> torch.Tensor:
    product = _product(handle)
    native: Linear = product.native
    of_x, of_y = (native.outputs, native.inputs) if gradient else (native.inputs, native.outputs)
    dtype = FLOATS.get(x.dtype)
    if dtype is None or x.device != product.device or x.shape[-1] != of_x or columns != of_y:
        raise ValueError(
            f"tightfit: x is {x.dtype} {list(x.shape)} on {x.device}, need floats [..., {of_x}] on {product.device}"
        )
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], of_y))
    if bias is not None:
        if bias.dim() != 1:
            raise ValueError(f"tightfit: the bias has {bias.dim()} dimensions")
        bias = _checked("the bias", bias, x, of_y)
    rows = x.numel() // of_x if of_x else y.numel() // max(of_y, 1)
    if y.numel() == 0:
        return y
    if product.dense is not None and rows > _most_rows(x.device, gradient):
        weight = product.dense(x.dtype)
        return x @ weight if gradient else torch.nn.functional.linear(x, weight, bias)
    stream, workspace, threads = 0, None, 1
    if product.shared is not None:
        stream, workspace = product.shared.on(x.device), product.shared.native
    else:
        threads = torch.get_num_threads()
    native._multiply(
        gradient,
        dtype,
        rows,
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        threads,
        stream,
        workspace,
    )
    return y


@torch.library.custom_op("tightfit::linear", mutates_args=())  # type: ignore[untyped-decorator]
def _linear(x: torch.Tensor, bias: torch.Tensor | None, product: int, outputs: int) -> torch.Tensor:
    return _multiply(x, bias, product, outputs, False)


@torch.library.custom_op("tightfit::linear_input_gradient", mutates_args=())  # type: ignore[untyped-decorator]
def _linear_input_gradient(dy: torch.Tensor, product: int, inputs: int) -> torch.Tensor:
    return _multiply(dy, None, product, inputs, True)


@_linear.register_fake  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, bias: torch.Tensor | None, product: int, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@_linear_input_gradient.register_fake  # type: ignore[untyped-decorator]
def _(dy: torch.Tensor, product: int, inputs: int) -> torch.Tensor:
    return dy.new_empty((*dy.shape[:-1], inputs))


def _save_for_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.product, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tightfit.linear_input_gradient(dy, ctx.product, ctx.inputs)
    if ctx.has_bias and ctx.needs_input_grad[1]:
        db = dy.flatten(0, -2).sum(0) if dy.dim() > 1 else dy
    return dx, db, None, None


_linear.register_autograd(_gradients, setup_context=_save_for_gradients)


def _save_for_products(ctx: Any, inputs: Any, output: Any) -> None:
    dy, ctx.product, _ = inputs
    ctx.outputs = dy.shape[-1]


def _products_back(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.tightfit.linear(g, None, ctx.product, ctx.outputs), None, None


_linear_input_gradient.register_autograd(_products_back, setup_context=_save_for_products)


@torch.library.custom_op("tightfit::experts", mutates_args=())  # type: ignore[untyped-decorator]
def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    product: int,
) -> torch.Tensor:
    layer = _product(product)
    native: Experts = layer.native
    dtype = FLOATS.get(x.dtype)
    if dtype is None or x.device != layer.device or x.dim() != 2 or x.shape[1] != native.hidden:
        raise ValueError(
            f"tightfit: x is {x.dtype} {list(x.shape)} on {x.device}, need floats [tokens, {native.hidden}] on "
            f"{layer.device}"
        )
    tokens = x.shape[0]
    if ids.shape != weights.shape or ids.dim() != 2 or ids.shape[0] != tokens:
        raise ValueError(
            f"tightfit: ids are {list(ids.shape)} and their weights {list(weights.shape)}, need [{tokens}, choices]"
        )
    if ids.device != x.device or weights.device != x.device:
        raise ValueError(f"tightfit: ids and their weights have to be on {x.device}")
    x = x.contiguous()
    ids = ids.to(torch.int32).contiguous()
    weights = weights.to(torch.float32).contiguous()
    if bias is not None:
        bias = _checked("the bias", bias, x, 2 * native.intermediate)
    if down_bias is not None:
        down_bias = _checked("the bias", down_bias, x, native.hidden)
    for given in (bias, down_bias):
        if given is not None and given.shape[:-1] != (native.experts,):
            raise ValueError(f"tightfit: a bias is {list(given.shape)}, need [{native.experts}, ...]")
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    stream, workspace, threads = 0, None, 1
    if layer.shared is not None:
        stream, workspace = layer.shared.on(x.device), layer.shared.native
    else:
        threads = torch.get_num_threads()
    for part in range(0, tokens, ROWS):
        rows = slice(part, part + ROWS)
        native._multiply(
            dtype,
            x[rows].shape[0],
            ids.shape[1],
            x[rows].data_ptr(),
            ids[rows].data_ptr(),
            weights[rows].data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if down_bias is None else down_bias.data_ptr(),
            y[rows].data_ptr(),
            threads,
            stream,
            workspace,
        )
    return y


@_experts.register_fake  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    product: int,
) -> torch.Tensor:
    return torch.empty_like(x)
