"""Converters that give transformers tensors that are in their place, where its own would read them."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter

# What bitsandbytes stores beside a weight: part of it for us.
_BESIDE = r"^(.+)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
_ANY = r"^(.+)$"


class AsItIs(ConversionOps):  # type: ignore[misc]
    """Takes a tensor as it is."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Any]:
        (values,) = input_dict.values()
        return {full_layer_name: values[0] if isinstance(values, list) else values}

    @property
    def reverse_op(self) -> ConversionOps:
        return AsItIs()


class AlreadyQuantized(ConversionOps):  # type: ignore[misc]
    """Quantizes nothing: it has been, on the way to its place."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return AlreadyQuantized()


class Filled(WeightConverter):  # type: ignore[misc]
    """A converter that collects the names of tensors, and not what would read them.

    ``find(name)`` gives a tensor in its place, or None for what is part of another; ``place(key)`` puts what is no
    tensor, and says whether it has, or gives the tensor that others are in memory, in place.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Filled:
        # transformers makes one for each parameter. What is shared is not written to.
        return _copied(self, self.find, self.place)

    def convert(self, layer_name: str, *arguments: Any, **named: Any) -> Any:
        placed = self.place(layer_name)
        if placed is False:
            return super().convert(layer_name, *arguments, **named)
        self.collected_tensors.clear()
        if placed is not True:
            return {layer_name: placed}
        if (info := named.get("loading_info")) is not None:
            info.missing_keys.discard(layer_name)
        return {}

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, source_key)

    def materialize_tensors(self) -> dict[str, list[Any]]:
        tensors = {}
        for pattern in list(self.collected_tensors):
            found = [self.find(name) for name in self.collected_tensors.pop(pattern)]
            if found := [tensor for tensor in found if tensor is not None]:
                tensors[pattern] = found
        return tensors


def _copied(converter: Any, find: Any, place: Any) -> Filled:
    copied: Filled = object.__new__(Filled)
    for base in type(converter).__mro__:
        for name in getattr(base, "__slots__", ()):
            if hasattr(converter, name):
                object.__setattr__(copied, name, getattr(converter, name))
    object.__setattr__(copied, "collected_tensors", type(converter.collected_tensors)(list))
    object.__setattr__(copied, "layer_targets", type(converter.layer_targets)(set))
    copied.find = find
    copied.place = place
    return copied


def converters(own: list[Any], find: Any, place: Any) -> list[Any]:
    """Converters for all of a model's tensors.

    Of two with the same pattern transformers takes the last: these stand in for the model's own, and the
    one for any name is for what those do not match.
    """
    everything = Filled([_BESIDE, _ANY], [r"\1"], [AsItIs()])
    everything.find, everything.place = find, place
    return [_copied(converter, find, place) for converter in own] + [everything]
