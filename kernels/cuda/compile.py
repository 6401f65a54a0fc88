#!/usr/bin/env python3
"""Compiles nf4.cu to PTX with NVRTC. build.sh calls it; it needs no CUDA toolkit and no GPU.

    compile.py NVRTC_WHEEL OUT

NVRTC_WHEEL is the wheel of nvidia-cuda-nvrtc-cu12, a zip file with the two shared libraries.
"""

import ctypes
import os
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = "nf4.cu"
OPTIONS = [
    # Turing and everything after it: the driver compiles PTX for the GPU that is there.
    "--gpu-architecture=compute_75",
    "--std=c++17",
    # One rounding at a time, as the CPU kernels have it. The last three are the defaults.
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
]


def main(wheel, out):
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
        ptx = compile_to_ptx(nvrtc, directory)
    Path(out).write_bytes(ptx)


def compile_to_ptx(nvrtc, directory):
    def check(status):
        if status != 0:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            sys.exit(f"{SOURCE}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def text(program, size, read):
        length = ctypes.c_size_t()
        check(size(program, ctypes.byref(length)))
        buffer = ctypes.create_string_buffer(length.value)
        check(read(program, buffer))
        return buffer.value

    def strings(items):
        return (ctypes.c_char_p * len(items))(*items)

    # Headers by name, so that no path of this machine gets into the result.
    headers = sorted(directory.glob("*.cuh"))
    program = ctypes.c_void_p()
    check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            (directory / SOURCE).read_bytes(),
            SOURCE.encode(),
            len(headers),
            strings([header.read_bytes() for header in headers]),
            strings([header.name.encode() for header in headers]),
        )
    )
    options = [option.encode() for option in OPTIONS]
    status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    log = text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode().strip()
    if log:
        print(log, file=sys.stderr)
    check(status)
    # What it warns of would be wrong on the GPU only.
    if log:
        sys.exit(f"{SOURCE}: NVRTC is not silent about it")
    return text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
