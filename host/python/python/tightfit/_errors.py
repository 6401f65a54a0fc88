"""One class of exception for each cause."""

from __future__ import annotations

from typing import Any


class TightfitError(Exception):
    """Something did not succeed. Everything that was reserved has been given back.

    ``kind`` is what kind of error it is, as the command's ``--json`` names it (``host/cli/JSON.md``).
    """

    kind: str = "other"


class UsageError(TightfitError, ValueError):
    """The call is wrong: an argument, a setting, a name. ``setting`` and ``tensor`` say which, if known."""

    setting: str | None = None
    tensor: str | None = None


class CheckpointError(TightfitError, ValueError):
    """The checkpoint is invalid, unreadable or not there. ``path`` and ``tensor`` say where, if known."""

    path: str | None = None
    tensor: str | None = None


class NonFiniteError(CheckpointError):
    """A weight to be quantized has infinities or NaN, and the load was strict. ``tensor`` names it."""


class HubError(TightfitError, OSError):
    """A model could not be downloaded."""

    path: str | None = None


class OutOfMemory(TightfitError, MemoryError):
    """The model does not fit. Sizes are in bytes, each None where it is not known.

    Attributes:
        device: The device that is too small; None where a policy has tried several.
        need: Bytes needed there, or on all devices together, headroom included.
        have: Bytes that there are.
        missing: Bytes more with which it would do.
        tensor: The first tensor that does not fit.
    """

    device: str | None = None
    need: int | None = None
    have: int | None = None
    missing: int | None = None
    tensor: str | None = None


class PolicyError(TightfitError, RuntimeError):
    """The policy refused or failed. ``policy`` names it, ``limit`` the limit that it ran into, if one."""

    policy: str | None = None
    limit: str | None = None
    tensor: str | None = None


class DeviceError(TightfitError, RuntimeError):
    """A device is not there, or failed. ``device`` names it."""

    device: str | None = None


class OutputError(TightfitError, OSError):
    """What was to be written cannot be, or is there already. ``path`` says where."""

    path: str | None = None


class InternalError(TightfitError, RuntimeError):
    """A fault of Tightfit's own: please report it."""


_CLASSES: dict[str, type[BaseException]] = {
    "usage": UsageError,
    "bad-setting": UsageError,
    "no-policy": UsageError,
    "does-not-fit": OutOfMemory,
    "out-of-memory": OutOfMemory,
    "no-device": DeviceError,
    "device": DeviceError,
    "hub": HubError,
    "exists": OutputError,
    "output": OutputError,
    "non-finite": NonFiniteError,
    "internal": InternalError,
    "interrupted": KeyboardInterrupt,
}

# Classes of kinds that are not listed, by the command's exit status.
_BY_STATUS: dict[int, type[BaseException]] = {
    2: UsageError,
    3: CheckpointError,
    4: OutOfMemory,
    5: PolicyError,
    6: DeviceError,
    130: KeyboardInterrupt,
}


def exception(kind: str, message: str, fields: dict[str, Any]) -> BaseException:
    """Makes the exception for an error of the native half, which calls this."""
    cls = _CLASSES.get(kind) or _BY_STATUS.get(fields["status"], TightfitError)
    if kind == "unsupported":
        cls = PolicyError
    error = cls(message)
    if isinstance(error, TightfitError):
        error.kind = kind
        fields["policy"] = fields["guest"]
        for name, value in fields.items():
            # Only what the class speaks of.
            if hasattr(cls, name):
                setattr(error, name, value)
    return error
