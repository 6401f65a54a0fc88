"""The functions of the package: arguments as people give them, for the native half."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from . import _native
from ._native import Checkpoint, Model, Plan, Slice
from ._progress import Progress, reporting

Path = Union[str, "os.PathLike[str]"]
Source = Union[Path, Sequence[Path], Checkpoint]
Setting = Union[str, int, float, bool]
Device = Any  # "cuda:0:20GiB", torch.device, or an ordinal


def open(
    source: Path | Sequence[Path],
    *,
    revision: str | None = None,
    offline: bool = False,
    headers: bool = False,
    dequantize: str = "auto",
    progress: Progress = None,
) -> Checkpoint:
    """Opens a checkpoint and checks what is in it, without reading weights.

    Args:
        source: A directory, a ``.safetensors`` file, an index, a Hugging Face id (``org/name``), which is
            downloaded unless it is in the local cache, or a list of ``.safetensors`` files.
        revision: A branch, a tag or a commit, of an id.
        offline: Never download.
        headers: Of an id that is not in the cache, ask for configuration and headers only. It can be planned
            for and not loaded.
        dequantize: Which weights that another method has quantized are decoded as they are read: ``auto``
            (those for which NF4 takes less), ``all`` or ``none``.
        progress: See ``load``; bytes are those of one file that is downloaded.

    Raises:
        CheckpointError: It is not there, or invalid.
        HubError: It cannot be downloaded.
    """
    if isinstance(source, (str, os.PathLike)):
        name, files = os.fspath(source), []
    else:
        name, files = None, [os.fspath(file) for file in source]
    with reporting(progress, "downloading") as report:
        return _native.open(name, files, revision, offline, headers, dequantize, report)


def plan(
    source: Source,
    devices: Device | Iterable[Device] | None = None,
    policy: Path = "auto",
    *,
    settings: Mapping[str, Setting] | None = None,
    double_quant: bool | None = None,
    formats: Mapping[str, str] | None = None,
    omit: Iterable[str] = (),
    slices: Iterable[Slice] = (),
    limits: Mapping[str, Setting] | None = None,
    rows: int = 0,
    experts_per_token: int = 0,
    gradients: bool = False,
    reserve_headroom: bool = False,
) -> Plan:
    """Asks a policy where every tensor goes. No memory is taken and no weight read.

    Args:
        source: What ``open`` takes, or a checkpoint.
        devices: ``"cuda:0"``, ``"cuda:0:20GiB"``, ``"cpu"``, ``"sim:32GiB"`` (an accelerator that is simulated in
            host memory), a ``torch.device``, or several; by default all GPUs, else host memory. One with a size need not be
            there to be planned for.
        policy: ``auto``, ``packed``, ``huggingface``, ``map``, ``tensor-parallel``, or a ``.wasm`` file.
        settings: The policy's settings, as ``--set`` of the command: ``context``, ``batch``, ``reserve``, ``skip``,
            ``experts``, ``format:PATTERN``, ...
        double_quant: Whether scales are quantized too: the setting ``double-quant``.
        formats: Formats of tensors by name, whatever the policy says: ``stored``, ``nf4``, ``nf4+double``,
            ``bf16``, ``f16``, ``f32``.
        omit: Names of tensors that are left out, as if the checkpoint did not have them.
        slices: Parts of tensors that are planned for in their place, as ``Checkpoint.cut`` has it: for one of several
            processes that share a model. ``formats`` and ``omit`` then mean the parts.
        limits: What a policy may use, as ``--policy-limit`` of the command.
        rows: Rows of the largest product with 4-bit weights for which workspace is reserved.
        experts_per_token: Experts that a router chooses for a token, whose workspace that is too; by default as many as
            config.json says.
        gradients: Whether that is enough for gradients of inputs, too.
        reserve_headroom: Whether the headroom that the policy leaves is reserved with the weights.

    Raises:
        OutOfMemory: It does not fit, or the policy says so.
        UsageError: A setting, format or name is wrong.
        PolicyError: The policy failed.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open(source)
    if parts := list(slices):
        checkpoint = checkpoint.cut(parts)
    given = _texts(settings)
    if double_quant is not None:
        given.append(("double-quant", _text(double_quant)))
    return _native.plan(
        checkpoint,
        device_names(devices),
        os.fspath(policy),
        given,
        dict(formats or {}),
        list(omit),
        _texts(limits),
        rows,
        experts_per_token,
        gradients,
        reserve_headroom,
    )


def load(
    source: Plan | Source,
    devices: Device | Iterable[Device] | None = None,
    policy: Path = "auto",
    *,
    threads: int | None = None,
    staging: int | str | None = None,
    strict: bool = False,
    quantize_on: str = "auto",
    progress: Progress = None,
    **planning: Any,
) -> Model:
    """Carries a plan out: reserves the devices' memory, reads, quantizes and copies.

    Args:
        source: A plan, which is carried out as it was shown; or what ``plan`` takes.
        devices: Of ``plan``, as are ``policy`` and all further arguments; only without a plan.
        threads: Threads that read and quantize; by default as many as there are cores.
        staging: Upper bound of host memory that data goes through; 64 MiB by default.
        strict: Infinities and NaN in weights to be quantized are an error.
        quantize_on: Where weights for GPUs are quantized: ``cpu``, ``gpu`` or ``auto``. The bytes are the same.
        progress: True for tqdm's bar; or called about every 50 ms, on this thread, with the bytes that are
            done and those of all. What it raises ends the load and is raised here.

    Raises:
        OutOfMemory: A device has less memory than the plan needs by now.
        KeyboardInterrupt: Ctrl-C; everything has been given back.
    """
    if isinstance(source, Plan):
        if devices is not None or policy != "auto" or planning:
            raise TypeError("a plan is loaded as it is: devices, policy and settings are those it was made with")
        planned = source
    else:
        planned = plan(source, devices, policy, **planning)
    with reporting(progress, "loading") as report:
        return _native.load(planned, threads, _size(staging), strict, quantize_on, report)


def save(
    source: Plan | Source,
    directory: Path,
    policy: Path = "auto",
    *,
    settings: Mapping[str, Setting] | None = None,
    double_quant: bool | None = None,
    formats: Mapping[str, str] | None = None,
    omit: Iterable[str] = (),
    limits: Mapping[str, Setting] | None = None,
    force: bool = False,
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    staging: int | str | None = None,
    strict: bool = False,
    progress: Progress = None,
) -> dict[str, int]:
    """Quantizes and writes a checkpoint as bitsandbytes does, in bounded memory whatever its size.

    Args:
        source: A plan, whose formats are taken; or what ``plan`` takes.
        directory: Where it will be, complete or not at all.
        force: Replace a checkpoint that is there.
        max_shard_size: Bytes of a file at most; 5 GB by default.

    The others are those of ``plan`` and ``load``.

    Returns:
        ``files``, ``bytes``, ``quantized`` (weights in 4 bits) and ``nonfinite_blocks``.

    Raises:
        OutputError: It cannot be written, or is there already.
    """
    if isinstance(source, Plan):
        what: Plan | Checkpoint = source
    else:
        what = source if isinstance(source, Checkpoint) else open(source)
    given = _texts(settings)
    if double_quant is not None:
        given.append(("double-quant", _text(double_quant)))
    with reporting(progress, "saving") as report:
        return _native.save(
            what,
            os.fspath(directory),
            os.fspath(policy),
            given,
            dict(formats or {}),
            list(omit),
            _texts(limits),
            force,
            _size(max_shard_size),
            threads,
            _size(staging),
            strict,
            report,
        )


def device_names(devices: Device | Iterable[Device] | None) -> list[str]:
    """Devices as the native half names them."""
    if devices is None:
        return []
    if isinstance(devices, (str, int)) or hasattr(devices, "type"):
        devices = [devices]
    return [_device_name(device) for device in devices]


def _device_name(device: Device) -> str:
    # An ordinal, as in a device map.
    if isinstance(device, int):
        return f"cuda:{device}"
    name = str(device)
    # torch's word for the current one; which that is only torch can say.
    return "cuda:0" if name == "cuda" else name


def _texts(values: Mapping[str, Setting] | None) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in (values or {}).items()]


def _text(value: Setting) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(value: int | str | None) -> str | None:
    return None if value is None else str(value)


