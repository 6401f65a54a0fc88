"""A product with a 4-bit weight of its own, on the first device: `multiply [ROWS]`."""

import struct

from componentize_py_types import Err
from wit_world.imports import linear, nf4
from wit_world.imports.buffers import Buffer, Place
from wit_world.imports.linear import Product, Rounding, Weight
from wit_world.imports.types import Dtype, QuantType

OUTPUTS, INPUTS = 4, 64


class Run:
    """What the world `program` exports."""

    def run(self, arguments: list[str]) -> str:
        try:
            return multiply(int(arguments[0]) if arguments else 1)
        except Err as error:
            # What the host says: an `Error`, for example of a quota that is exceeded.
            raise Err(repr(error.value)) from error


def multiply(rows: int) -> str:
    """Quantizes 1 and -1, which NF4 has exactly, and multiplies whole numbers with them."""
    numbers = [1.0 if i % (o + 2) == 0 else -1.0 for o in range(OUTPUTS) for i in range(INPUTS)]
    codes = Buffer.allocate(0, len(numbers) // 2)
    absmax = Buffer.allocate(0, 4 * len(numbers) // 64)
    nf4.quantize_bytes(floats(numbers), Dtype.F32, 64, Place(codes, 0), Place(absmax, 0))
    shape = [OUTPUTS, INPUTS]
    weight = Weight.from_codes(QuantType.NF4, shape, 64, Place(codes, 0), Place(absmax, 0))

    x, y = Buffer.allocate(0, 4 * rows * INPUTS), Buffer.allocate(0, 4 * rows * OUTPUTS)
    x.write(0, floats([float(r + i % 3) for r in range(rows) for i in range(INPUTS)]))
    product = Product(
        weight=weight, input=Place(x, 0), rows=rows, float=Dtype.F32, bias=None,
        output=Place(y, 0), experts=None, rounding=Rounding.FASTEST,
    )
    linear.multiply([product])
    # Reading waits for what is queued.
    result = struct.unpack(f"<{rows * OUTPUTS}f", y.read(0, y.length()))
    lines = [result[r * OUTPUTS:(r + 1) * OUTPUTS] for r in range(rows)]
    return "\n".join(" ".join(str(int(number)) for number in line) for line in lines)


def floats(numbers: list[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)
