"""bitsandbytes' linear layer with Tightfit's products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch

from ..ops import FLOATS, Product, linear


class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer in all it has, whose product is ours as long as its weight is where it was loaded.

    A layer that was copied, moved or got another weight multiplies as bitsandbytes does.
    """

    product: Product | None
    # Columns before and behind those of its input, which make whole blocks of a part of a weight.
    padding: tuple[int, int]

    @staticmethod
    def of(module: torch.nn.Module) -> None:
        """Makes a layer one of these, which has no product yet."""
        module.__class__ = Linear4bit
        module.__dict__["product"] = None
        module.__dict__["padding"] = (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.padding != (0, 0):
            x = torch.nn.functional.pad(x, self.padding)
        product = self.product
        dtype = self.compute_dtype or x.dtype
        if product is None or x.device != product.device or dtype not in FLOATS:
            return super().forward(x)
        bias = self.bias
        if bias is not None:
            bias = bias.to(dtype)
        return linear(product, x.to(dtype), bias).to(x.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.__dict__["product"] = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        place = self.weight.data_ptr()
        super()._apply(fn, recurse)
        if self.weight.data_ptr() != place:
            self.__dict__["product"] = None
        return self
