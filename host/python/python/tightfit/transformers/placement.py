"""Device maps: asked of a policy, or given by the user, in names of the model's modules."""

from __future__ import annotations

import json
from typing import Any

import torch

from .config import Options
from .mapping import Target


def asked_of(
    options: Options, device_map: dict[str, Any] | None, targets: dict[str, Target | None]
) -> tuple[list[str] | None, str, dict[str, str]]:
    """Devices, policy and settings for a device map; None leaves it to the options' policy."""
    if device_map is None:
        return (None if options.devices is None else list(options.devices)), options.policy, {}
    names: list[str] = []
    for place in device_map.values():
        name = device_name(place)
        if name not in names:
            names.append(name)
    sized = {spec_name(spec): spec for spec in options.devices or ()}
    devices = [sized.get(name, name) for name in names]
    if len(names) == 1:
        return devices, options.policy, {}
    by_tensor = {
        name: device_name(_place(device_map, target.key)) for name, target in targets.items() if target is not None
    }
    return devices, "map", {"device-map": json.dumps(by_tensor)}


def _place(device_map: dict[str, Any], key: str) -> Any:
    """The device of the longest module name that the key begins with."""
    module = key
    while module not in device_map:
        if not module:
            raise ValueError(f"the device map has no place for {key!r}")
        module = module.rpartition(".")[0]
    return device_map[module]


def device_name(place: Any) -> str:
    """A device of a device map as Tightfit names it."""
    if isinstance(place, int):
        return f"cuda:{place}"
    device = torch.device(place)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return f"cuda:{index}"
    return str(device)


def spec_name(spec: str) -> str:
    """The name of a device that was given with a size."""
    parts = spec.split(":")
    return ":".join(parts[:2]) if parts[0] == "cuda" else parts[0]


def torch_place(name: str) -> Any:
    """A device of Tightfit's as device maps have it: simulated ones are host memory."""
    return int(name.split(":")[1]) if name.startswith("cuda:") else "cpu"


def device_map(model: Any, loaded: Any, targets: dict[str, Target | None]) -> dict[str, Any]:
    """The device map of what is loaded, in as few modules as it takes."""
    places = {}
    for name, target in targets.items():
        if target is not None and name in loaded:
            places[target.key] = torch_place(loaded[name].device)
    if len(set(places.values())) <= 1:
        return {"": next(iter(places.values()), "cpu")}
    whole: dict[str, Any] = {}
    first = next(iter(places.values()))

    def walk(module: Any, prefix: str) -> None:
        inside = {place for key, place in places.items() if key.startswith(prefix + "." if prefix else "")}
        if len(inside) <= 1:
            # Buffers that no file has, such as frequencies, need a place too.
            if inside or any(True for _ in module.buffers()):
                whole[prefix] = inside.pop() if inside else first
            return
        for name, child in module.named_children():
            walk(child, f"{prefix}.{name}" if prefix else name)
        for name, _ in module.named_parameters(recurse=False):
            key = f"{prefix}.{name}" if prefix else name
            if key in places:
                whole[key] = places[key]

    walk(model, "")
    return whole
