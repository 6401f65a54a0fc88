#!/usr/bin/env python3
"""Products of bf16 rows on the processor, beside bitsandbytes' packed kernel in the same run.

    cargo bench -p tightfit-kernels --bench linear --no-run
    kernels/benches/linear_cpu.py target/release/deps/linear-... [4096x14336 ...]

The first argument is the benchmark's program, which does our products; shapes follow, outputs first.
`THREADS` says how many threads both use, 2 if it is not set; `DOUBLE=1` double-quantizes our scales. Needs
torch, bitsandbytes and a processor with AVX512-BF16, on which bitsandbytes repacks weights in its own
order. Its kernel is called without the Python around it; ours reads the stored weights.

Calls alternate, each with the next of some copies of the weights that are together larger than caches.
Printed are the least and the median time of both in milliseconds, the ratio of these, the time that the same
threads take only to read the codes, and the error of both against f64. `ROWS` and `SECONDS` say which numbers of
rows, and how long to measure each.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as nf4
import torch
from bitsandbytes.cextension import lib

SHAPES = ["4096x14336", "14336x4096", "3584x3584", "512x3584"]
ROWS = [int(r) for r in os.environ.get("ROWS", "1 2 4 8 16 64 256").split()]
BLOCK = 64
THREADS = int(os.environ.get("THREADS", "2"))
DOUBLE = os.environ.get("DOUBLE") == "1"
# For some milliseconds threads of OpenMP look for more work before they sleep: ours would have to wait for them.
PAUSE = 0.02


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


class Ours:
    def __init__(self, program, folder, outputs, inputs, copies):
        arguments = [outputs, inputs, BLOCK, THREADS, copies, folder]
        command = [program, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, command):
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def theirs(x, codes, absmax, y):
    (rows, inputs), outputs = x.shape, y.shape[1]
    sizes = [ctypes.c_int64(size) for size in (rows, outputs, inputs)]
    pointers = [pointer(tensor) for tensor in (x, codes, absmax, y)]
    strides = [ctypes.c_int64(size) for size in (BLOCK, x.stride(0), y.stride(0))]
    start = time.perf_counter()
    lib.gemv_4bit_inference_cpu_nf4_bf16(*sizes, *pointers, *strides)
    return time.perf_counter() - start


def relative_error(have, need):
    return float((have.double() - need).norm() / need.norm())


def measure(program, outputs, inputs, folder):
    copies = max(2, (160 << 20) // (outputs * inputs // 2))
    dense = torch.randn(outputs, inputs, dtype=torch.bfloat16) * 0.02
    codes, state = nf4.quantize_4bit(dense, quant_type="nf4", blocksize=BLOCK, compress_statistics=DOUBLE)
    scales = state.absmax
    if DOUBLE:
        scales = nf4.dequantize_blockwise(state.absmax, state.state2) + state.offset
    both = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), dim=1).flatten().long()
    scales = scales.double().repeat_interleave(BLOCK)
    truth = (state.code.double()[both] * scales).reshape(outputs, inputs)
    del both, scales
    codes.numpy().tofile(folder / "codes")
    state.absmax.numpy().tofile(folder / "absmax")
    if DOUBLE:
        state.state2.absmax.numpy().tofile(folder / "nested_absmax")
        state.offset.float().reshape(1).numpy().tofile(folder / "mean")
    packed, state = nf4._convert_weight_packed_for_cpu(codes.clone(), state)
    packed = [packed.clone() for _ in range(copies)]
    absmax = [state.absmax.clone() for _ in range(copies)]
    all_x = torch.randn(max(ROWS), inputs, dtype=torch.bfloat16)
    all_x.view(torch.int16).numpy().tofile(folder / "x")
    ours = Ours(program, folder, outputs, inputs, copies)
    print(f"\n{outputs} x {inputs}, {outputs * inputs * 9 / 16e6:.1f} MB, {copies} copies")
    for rows in ROWS:
        x, y = all_x[:rows], torch.empty(rows, outputs, dtype=torch.bfloat16)
        times = ([], [], [])
        # About three seconds, and at least ten calls.
        end = time.monotonic() + float(os.environ.get("SECONDS", "3"))
        while time.monotonic() < end or len(times[0]) < 10:
            i = len(times[0]) % copies
            times[0].append(ours.seconds(f"bf16 {rows}"))
            times[2].append(ours.seconds("read"))
            times[1].append(theirs(x, packed[i], absmax[i], y))
            time.sleep(PAUSE)
        need = x.double() @ truth.t()
        have = torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.bfloat16)
        errors = [relative_error(of, need) for of in (have.reshape(rows, outputs), y)]
        least, median = [[f(of) * 1e3 for of in times] for f in (min, statistics.median)]
        print(
            f"{rows:4} rows: least {least[0]:7.3f}, bitsandbytes {least[1]:7.3f} ({least[1] / least[0]:5.2f} x); "
            f"median {median[0]:7.3f}, {median[1]:7.3f} ({median[1] / median[0]:5.2f} x); "
            f"reading {least[2]:6.3f}, {median[2]:6.3f}; error {errors[0]:.5f}, {errors[1]:.5f}; {len(times[0])} calls",
            flush=True,
        )
    ours.end()


def main(program, *shapes):
    torch.manual_seed(1)
    torch.set_num_threads(THREADS)
    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, {THREADS} threads")
    for shape in shapes or SHAPES:
        outputs, inputs = (int(size) for size in shape.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            measure(program, outputs, inputs, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
