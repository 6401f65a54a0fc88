"""One layer on a device of your choice, everything else on the first device."""

from componentize_py_types import Err
from wit_world.exports.planner import Description, Proposal, Refusal, RefusalReason, Request, Setting
from wit_world.imports import log, sizing
from wit_world.imports.types import (
    Device, Dtype, Format, Format_Nf4, Format_Stored, Nf4Format, Placement, Tensor,
)

SETTINGS = [
    Setting("layer", "0", "Number of the layer to pin."),
    Setting("device", "0", "Where it goes: a device's index or name."),
]
NF4 = Format_Nf4(Nf4Format(block_size=64, double_quantized=False))
STORED = Format_Stored()


class Planner:
    """What the world `policy` exports."""

    def describe(self) -> Description:
        return Description("pin-layer", "1.0.0", SETTINGS)

    def plan(self, request: Request) -> Proposal:
        try:
            return place(request)
        except Err:
            # A refusal.
            raise
        except Exception as error:
            # It ends in a trap, which carries no text: the host shows what was logged before that.
            log.write(log.Level.ERROR, repr(error))
            raise


def place(request: Request) -> Proposal:
    """Where every tensor goes; a refusal is raised."""
    values = {setting.name: setting.default for setting in SETTINGS}
    values.update((name, value.strip()) for name, value in request.settings)
    layer = number(values["layer"])
    if layer is None or layer > 9999:
        raise bad_setting("layer", values, "a whole number from 0 to 9999")
    device = find(request.devices, values["device"])

    placements, sizes, needed = [], {}, 0
    inside = f".layers.{layer}."
    for tensor in request.tensors:
        form = NF4 if is_quantized(tensor) else STORED
        pinned = inside in "." + tensor.name
        if pinned:
            needed += size(tensor, form, sizes)
        placements.append(Placement(device if pinned else 0, form))
    if needed == 0:
        raise bad_setting("layer", values, "the number of a layer of this model")
    there = request.devices[device]
    if needed > there.available:
        free = amount(there.available)
        message = f"layer {layer} takes {amount(needed, up=True)}, {there.name} has {free}"
        missing = needed - there.available
        raise Err(Refusal(RefusalReason.DOES_NOT_FIT, message, missing))
    log.write(log.Level.INFO, f"layer {layer} takes {needed} bytes")
    return Proposal(placements, headroom=[0] * len(request.devices))


def is_quantized(tensor: Tensor) -> bool:
    """Matrices of linear layers and of experts are; a bitsandbytes weight is already."""
    if tensor.quantized or tensor.dtype not in (Dtype.BF16, Dtype.F16, Dtype.F32):
        return False
    *path, leaf = tensor.name.split(".")
    if "experts" in path:
        # One matrix of one expert, or a stack of those of all.
        return len(tensor.shape) >= 2 and not leaf.endswith("bias")
    module = path[-1] if path else ""
    return (
        leaf == "weight"
        and len(tensor.shape) == 2
        and module not in ("lm_head", "gate", "router")
        and "embed" not in module
        and "norm" not in module
    )


def size(tensor: Tensor, form: Format, sizes: dict) -> int:
    """Bytes on a device, as the host counts them; asked for once per shape."""
    if tensor.quantized:
        packed = tensor.quantized
        form = Format_Nf4(Nf4Format(packed.block_size, packed.double_quantized))
    key = (tensor.dtype, tuple(tensor.shape), repr(form))
    if key not in sizes:
        try:
            sizes[key] = sizing.stored_bytes(tensor.dtype, tensor.shape, form).padded
        except Err as error:
            reason = RefusalReason.UNSUPPORTED
            raise Err(Refusal(reason, error.value.message, None)) from error
    return sizes[key]


def find(devices: list[Device], text: str) -> int:
    """The device of this index or name."""
    names = [device.name for device in devices]
    index = number(text)
    if index is None and text in names:
        index = names.index(text)
    if index is None or index >= len(devices):
        allowed = f"a device ({', '.join(names)}) or its index"
        raise bad_setting("device", {"device": text}, allowed)
    return index


def amount(bytes: int, up: bool = False) -> str:
    """Bytes as people read them: a need is rounded up, what there is down."""
    unit, name = (1 << 30, "GiB") if bytes >= 100 << 20 else (1 << 20, "MiB")
    hundredths = (bytes * 100 + (unit - 1 if up else 0)) // unit
    return f"{hundredths // 100}.{hundredths % 100:02} {name}"


def number(text: str) -> int | None:
    """A whole number in decimal digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def bad_setting(name: str, values: dict, allowed: str) -> Err:
    message = f"setting `{name}` is `{values[name]}`: it must be {allowed}"
    return Err(Refusal(RefusalReason.BAD_SETTING, message, None))
