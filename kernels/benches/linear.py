#!/usr/bin/env python3
"""Products on a GPU, beside bitsandbytes and cuBLAS with bf16 in the same run.

    cargo bench -p tightfit-kernels --bench linear --no-run
    kernels/benches/linear.py target/release/deps/linear-... [kernels/cuda/linear.sm_90a.cubin.zlib]

The first argument is the benchmark's program, which says how kernels are launched; the second the
module they are in, PTX or machine code for the GPU. Needs torch and bitsandbytes.

Every time is the median of graphs of 40 calls, in microseconds; weights are rotated among copies that
are together much larger than the L2. Results are compared with f64 first.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as nf4
import torch

SHAPES = [
    ("Qwen2.5-7B q, o", 3584, 3584),
    ("Qwen2.5-7B k, v", 512, 3584),
    ("Qwen2.5-7B gate, up", 18944, 3584),
    ("Qwen2.5-7B down", 3584, 18944),
    ("Llama-3.1-70B gate, up", 28672, 8192),
    ("Llama-3.1-70B down", 8192, 28672),
]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
DEVICE = "cuda"

driver = ctypes.CDLL("libcuda.so.1")


def check(code, what):
    if code != 0:
        sys.exit(f"{what}: CUDA error {code}")


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


def tensor_map(tensor, element_bytes, columns, rows, row_bytes, tile_columns, tile_rows, swizzle):
    """A CUtensorMap of a tensor, which has to lie at a multiple of 64."""
    buffer = ctypes.create_string_buffer(192)
    encoded = (ctypes.c_uint64 * 16).from_buffer(buffer, -ctypes.addressof(buffer) % 64)
    code = driver.cuTensorMapEncodeTiled(
        encoded,
        element_bytes - 1,
        2,
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(tile_columns, tile_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        (swizzle // 16).bit_length() - 1,
        2,
        0,
    )
    check(code, "a map")
    return encoded


class Kernels:
    def __init__(self, program, module):
        torch.zeros(1, device=DEVICE)
        self.program = program
        self.module = ctypes.c_void_p()
        image = Path(module).read_bytes()
        if str(module).endswith(".zlib"):
            image = zlib.decompress(image)
        image += b"\0"
        check(driver.cuModuleLoadData(ctypes.byref(self.module), image), module)
        self.functions, self.launches = {}, {}
        self.workspace = torch.zeros(64 << 20, dtype=torch.uint8, device=DEVICE)

    def launch_of(self, transposed, by_row, rows, outputs, inputs):
        key = (transposed, by_row, rows, outputs, inputs)
        if key not in self.launches:
            major, minor = torch.cuda.get_device_capability()
            multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
            arguments = [major, minor, multiprocessors, rows, outputs, inputs, int(by_row), int(transposed)]
            answer = subprocess.run([self.program, "launch", *map(str, arguments)], check=True, capture_output=True)
            self.launches[key] = json.loads(answer.stdout)
        return self.launches[key]

    def function(self, name, shared):
        if name not in self.functions:
            function = ctypes.c_void_p()
            check(driver.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()), name)
            check(driver.cuFuncSetAttribute(function, 8, shared), "shared memory")
            check(driver.cuFuncSetAttribute(function, 9, 100), "carve-out")
            self.functions[name] = function
        return self.functions[name]

    def multiply(self, x, y, outputs, inputs, codes, absmax, nested=(), by_row=False, transposed=False):
        launch = self.launch_of(transposed, by_row, x.shape[0], outputs, inputs)
        assert launch["workspace"] <= self.workspace.numel()
        for row in range(0, x.shape[0], launch["rows"]):
            part, result = x[row : row + launch["rows"]], y[row : row + launch["rows"]]
            pointers = [codes, absmax, *(nested or (None, None, None)), part, None, result, self.workspace]
            values = [0 if pointer is None else pointer.data_ptr() for pointer in pointers]
            values += [part.shape[0], outputs, inputs, 64, 0, launch["shares"]]
            arguments = [ctypes.c_uint64(value) for value in values]
            maps = [tensor_map(of, *numbers) for of, numbers in zip((part, codes), launch["maps"])]
            passed = [ctypes.addressof(argument) for argument in [*arguments, *maps]]
            passed = (ctypes.c_void_p * len(passed))(*passed)
            # Weights are read before the kernel before has ended.
            attribute = Attribute(6)
            attribute.value[0] = 1
            config = Config(
                (launch["grid"], 1, 1),
                (launch["threads"], 1, 1),
                launch["shared"],
                torch.cuda.current_stream().cuda_stream,
                ctypes.pointer(attribute),
                1,
            )
            function = self.function(launch["kernel"], launch["shared"])
            check(driver.cuLaunchKernelEx(ctypes.byref(config), function, passed, None), launch["kernel"])


def timed(call, calls=40, rounds=5):
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls * 1e3)
    return statistics.median(times)


def copy_rate():
    """Bytes per microsecond that a copy reads and writes: the best that the driver does."""
    size = 2 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))

    def copy(_):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_uint64(tensor.data_ptr()) for tensor in (target, source))
        check(driver.cuMemcpyDtoDAsync_v2(*pointers, ctypes.c_size_t(size), stream), "copy")

    return 2 * size / timed(copy, calls=4)


def relative_error(have, need):
    return float((have.double() - need).norm() / need.norm())


def main(program, module):
    kernels = Kernels(program, module)
    rate = copy_rate()
    print(
        f"{torch.cuda.get_device_name()}, copy {rate / 1e6:.2f} TB/s, torch {torch.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}"
    )
    for name, outputs, inputs in SHAPES:
        copies = max(2, min(12, (400 << 20) // (outputs * inputs // 2)))
        weights, doubled = [], []
        for _ in range(copies):
            dense = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=DEVICE) * 0.02
            weights.append(nf4.quantize_4bit(dense, quant_type="nf4", blocksize=64))
            codes, state = nf4.quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=True)
            offset = state.offset.float().reshape(1)
            doubled.append((codes, state.absmax, (state.state2.absmax, offset, state.state2.code)))
        dense = [
            torch.randn(outputs, inputs, dtype=torch.bfloat16, device=DEVICE)
            for _ in range(min(copies, max(2, (900 << 20) // (2 * outputs * inputs))))
        ]
        size = outputs * inputs * (1 / 2 + 4 / 64)
        print(f"\n{name}: {outputs} x {inputs}, {size / 1e6:.0f} MB, {copies} copies")
        truth = exact(outputs, inputs, weights[0][0], weights[0][1].absmax)
        truth_of_doubled = exact(outputs, inputs, doubled[0][0], scales_of(doubled[0]))
        first = None
        for rows in ROWS:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=DEVICE)
            y = torch.full((rows, outputs), float("nan"), dtype=torch.bfloat16, device=DEVICE)

            def ours(i, by_row=False):
                codes, state = weights[i % copies]
                kernels.multiply(x, y, outputs, inputs, codes, state.absmax, by_row=by_row)

            def ours_doubled(i):
                codes, absmax, nested = doubled[i % copies]
                kernels.multiply(x, y, outputs, inputs, codes, absmax, nested)

            def theirs(i):
                codes, state = weights[i % copies]
                return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

            need = x.double() @ truth.t()
            ours(0)
            error, their_error = relative_error(y, need), relative_error(theirs(0), need)
            y.fill_(float("nan"))
            ours_doubled(0)
            error_of_doubled = relative_error(y, x.double() @ truth_of_doubled.t())
            assert max(error, error_of_doubled) < 1 / 256, (error, error_of_doubled)
            plain, double, by_row = timed(ours), timed(ours_doubled), timed(lambda i: ours(i, True))
            them, bf16 = timed(theirs), timed(lambda i: x @ dense[i % len(dense)].t())
            first = first or plain
            print(
                f"{rows:5} rows: {plain:7.1f} us, {100 * size / plain / rate:3.0f} % of copy, {plain / first:5.2f} x 1 row, "
                f"double-quantized {double:7.1f}, by row {by_row:7.1f}, bitsandbytes {them:7.1f} ({them / plain:4.2f} x), "
                f"cuBLAS bf16 {bf16:7.1f} ({bf16 / plain:4.2f} x), error {error:.5f}, bitsandbytes' {their_error:.5f}",
                flush=True,
            )
        for rows in (64, 1024):
            dy = torch.randn(rows, outputs, dtype=torch.bfloat16, device=DEVICE)
            dx = torch.full((rows, inputs), float("nan"), dtype=torch.bfloat16, device=DEVICE)

            def backward(i):
                codes, state = weights[i % copies]
                kernels.multiply(dy, dx, outputs, inputs, codes, state.absmax, transposed=True)

            def their_backward(i):
                return dy @ nf4.dequantize_4bit(*weights[i % copies])

            backward(0)
            error = relative_error(dx, dy.double() @ truth)
            assert error < 1 / 128, error
            plain, them = timed(backward, calls=10), timed(their_backward, calls=10)
            print(f"{rows:5} rows of dx: {plain:7.1f} us, bitsandbytes {them:7.1f} ({them / plain:4.2f} x), error {error:.5f}")


def exact(outputs, inputs, codes, absmax):
    """The weights as f64, of the values of their codes."""
    values = nf4.get_4bit_type("nf4", device=DEVICE).double()
    codes = codes.reshape(outputs, inputs // 2)
    codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(outputs, inputs // 64, 64)
    return (values[codes.int()] * absmax.double().reshape(outputs, inputs // 64, 1)).reshape(outputs, inputs)


def scales_of(doubled):
    _, codes, (nested, offset, code_map) = doubled
    return code_map[codes.int()] * nested.repeat_interleave(256)[: codes.numel()] + offset


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    default = Path(__file__).resolve().parent.parent / "cuda/linear.sm_90a.cubin.zlib"
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else default)
