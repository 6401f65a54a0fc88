"""Parts of weights as numpy arrays."""

from __future__ import annotations

from typing import Any

# Types that numpy does not have, with the names that ml_dtypes has for them.
_FOREIGN = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def to_numpy(part: Any) -> Any:
    """Imports a part in host memory, in place and read-only."""
    import numpy

    if part.dtype not in _FOREIGN:
        return numpy.from_dlpack(part)
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError(
            f"numpy has no type for {part.dtype} elements: pip install ml_dtypes, or take the values by dequantize()"
        ) from error
    return numpy.from_dlpack(part.raw()).view(getattr(ml_dtypes, _FOREIGN[part.dtype]))
