"""Device maps: asked of a policy, or given by the user, in names of the model's modules."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int

from .config import Options
from .mapping import Target


def asked_of(
    options: Options,
    device_map: dict[str, Any] | None,
    targets: dict[str, Target | None],
    devices: list[str] | None = None,
) -> tuple[list[str] | None, str, dict[str, str]]:
    """Devices, policy and settings for a device map; None leaves it to the options' policy.

    ``devices`` are those of ``max_memory``, which says nothing where a map says where everything goes.
    """
    if device_map is None:
        if options.devices is not None:
            if devices is not None:
                raise ValueError("devices are given twice: in the configuration, and by max_memory")
            devices = list(options.devices)
        return devices, options.policy, {}
    names: list[str] = []
    for place in device_map.values():
        name = device_name(place)
        if name not in names:
            names.append(name)
    sized = {spec_name(spec): spec for spec in options.devices or ()}
    specs = [sized.get(name, name) for name in names]
    if len(names) == 1:
        return specs, options.policy, {}
    by_tensor = {
        name: device_name(_place(device_map, target.key)) for name, target in targets.items() if target is not None
    }
    return specs, "map", {"device-map": json.dumps(by_tensor)}


def limited(max_memory: dict[Any, Any], offload: bool) -> list[str]:
    """Devices of ``max_memory``, as accelerate has it: GPUs by number, then the processor.

    The processor is used where no GPU is named, or where what does not fit may be there (`offload`): 4-bit weights
    that accelerate carries to a GPU for each use.
    """
    sizes: dict[Any, int] = {}
    for place, size in max_memory.items():
        if place == "disk":
            raise ValueError("Tightfit has no place on disk: leave 'disk' out of max_memory")
        if place != "cpu" and not isinstance(place, int):
            raise ValueError(f"max_memory names {place!r}: Tightfit knows GPUs by number, and 'cpu'")
        sizes[place] = convert_file_size_to_int(size)
    gpus = [
        f"cuda:{place}:{sizes[place]}" for place in sorted(place for place in sizes if place != "cpu") if sizes[place]
    ]
    if "cpu" in sizes and (offload or not gpus):
        gpus.append(f"cpu:{sizes['cpu']}")
    if not gpus:
        raise ValueError("max_memory leaves no device any memory")
    return gpus


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
