#!/usr/bin/env python3
"""Compiles the kernels with NVRTC. build.sh calls it; it needs no CUDA toolkit and no GPU.

    compile.py NVRTC_WHEEL DIRECTORY [OPTION...]

NVRTC_WHEEL is the wheel of nvidia-cuda-nvrtc-cu12, a zip file with the two shared libraries. The
results go to the directory, and their names to standard output. Those whose name ends in `.zlib` are
compressed: the code of the products would be several MiB otherwise.

    compile.py --same A B

says by its status whether two results are the same. Other versions of zlib compress to other bytes.
"""

import ctypes
import os
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

QUANTIZE = [
    "--std=c++17",
    # One rounding at a time, as the CPU kernels have it. The last three are the defaults.
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
]
MULTIPLY = ["--std=c++17"]
# Result, source, architecture, options. PTX is compiled by the driver for the GPU that is there, of
# that architecture or a later one; machine code runs on its own.
RESULTS = [
    ("nf4.ptx", "nf4.cu", "compute_75", QUANTIZE),
    ("nf4.sm_75.cubin.zlib", "nf4.cu", "sm_75", QUANTIZE),
    ("nf4.sm_80.cubin.zlib", "nf4.cu", "sm_80", QUANTIZE),
    ("nf4.sm_90.cubin.zlib", "nf4.cu", "sm_90", QUANTIZE),
    ("linear.ptx.zlib", "linear.cu", "compute_80", MULTIPLY),
    ("linear.sm_75.cubin.zlib", "linear.cu", "sm_75", MULTIPLY),
    ("linear.sm_80.cubin.zlib", "linear.cu", "sm_80", MULTIPLY),
    ("linear.sm_90a.cubin.zlib", "linear.cu", "sm_90a", MULTIPLY),
    ("experts.ptx.zlib", "experts.cu", "compute_80", MULTIPLY),
    ("experts.sm_75.cubin.zlib", "experts.cu", "sm_75", MULTIPLY),
    ("experts.sm_80.cubin.zlib", "experts.cu", "sm_80", MULTIPLY),
    ("experts.sm_90a.cubin.zlib", "experts.cu", "sm_90a", MULTIPLY),
    ("decoder.ptx.zlib", "decoder.cu", "compute_80", MULTIPLY),
    ("decoder.sm_75.cubin.zlib", "decoder.cu", "sm_75", MULTIPLY),
    ("decoder.sm_80.cubin.zlib", "decoder.cu", "sm_80", MULTIPLY),
    ("decoder.sm_90.cubin.zlib", "decoder.cu", "sm_90", MULTIPLY),
]


def main(wheel, out, *more):
    directory = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as libraries:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/lib/lib" in name:
                    path = Path(libraries, os.path.basename(name))
                    path.write_bytes(archive.read(name))
        # NVRTC looks for the file of its builtins by name: it is found if it is loaded already.
        for builtins in Path(libraries).glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        nvrtc = ctypes.CDLL(str(next(Path(libraries).glob("libnvrtc.so*"))))
        for name, source, architecture, options in RESULTS:
            options = [f"--gpu-architecture={architecture}", *options, *more]
            result = compile_source(nvrtc, directory, source, options)
            if name.endswith(".zlib"):
                result = zlib.compress(result, 9)
            Path(out, name).write_bytes(result)
            print(name)


def compile_source(nvrtc, directory, source, options):
    def check(status):
        if status != 0:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            sys.exit(f"{source}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def text(program, size, read):
        length = ctypes.c_size_t()
        check(size(program, ctypes.byref(length)))
        buffer = ctypes.create_string_buffer(length.value)
        check(read(program, buffer))
        return buffer.raw

    def strings(items):
        return (ctypes.c_char_p * len(items))(*items)

    # Headers by name, so that no path of this machine gets into the result.
    headers = sorted(directory.glob("*.cuh"))
    program = ctypes.c_void_p()
    check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            (directory / source).read_bytes(),
            source.encode(),
            len(headers),
            strings([header.read_bytes() for header in headers]),
            strings([header.name.encode() for header in headers]),
        )
    )
    options = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    log = text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode().strip()
    if log:
        print(log, file=sys.stderr)
    check(status)
    # What it warns of would be wrong on the GPU only.
    if log:
        sys.exit(f"{source}: NVRTC is not silent about it")
    if b"--gpu-architecture=sm_" in options[0]:
        return text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    return text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")


def content(path):
    data = Path(path).read_bytes()
    return zlib.decompress(data) if path.endswith(".zlib") else data


if __name__ == "__main__":
    if sys.argv[1:2] == ["--same"] and len(sys.argv) == 4:
        sys.exit(content(sys.argv[2]) != content(sys.argv[3]))
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
