"""Loads a checkpoint through the C interface and takes its tensors into PyTorch and NumPy without a copy.

    cargo build --release -p tightfit-c
    python host/c/examples/dlpack_torch.py target/release/libtightfit_c.so MODEL [DEVICE]

DEVICE is `cpu` (the default), `sim:1GiB`, `cuda:0`, ... Checks every value against the checkpoint's files,
also after the model is unloaded, and writes to memory reserved behind the weights. What is not installed is
not run, and said to be missing; TIGHTFIT_REQUIRE_TORCH=1 and TIGHTFIT_REQUIRE_NUMPY=1 make that a failure.
"""

import ctypes
import gc
import json
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

DATA, CODES, ABSMAX, NESTED_ABSMAX = range(4)
CACHE_BYTES = 1 << 20
# The values of the 4-bit codes: bitsandbytes, `get_4bit_type("nf4")`.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]
# Half of the widest gap between two of them: the most by which a quantized value is off.
HALF_GAP = (NF4[1] - NF4[0]) / 2


class Structure(ctypes.Structure):
    """A structure that begins with its size."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(type(self)), **fields)


class Setting(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("value", c_char_p)]


class LoadOptions(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("threads", c_size_t), ("staging_bytes", c_uint64), ("strict", c_uint32),
        ("progress", c_void_p), ("cancelled", c_void_p), ("user_data", c_void_p), ("reserve_headroom", c_uint32),
    ]


class Tensor(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("index", c_size_t), ("name", c_char_p), ("dtype", c_char_p),
        ("format", c_char_p), ("device_name", c_char_p), ("device", c_size_t), ("shape", POINTER(c_uint64)),
        ("rank", c_size_t), ("elements", c_uint64), ("parts", c_size_t), ("quant_type", c_char_p),
        ("block_size", c_uint32), ("double_quantized", c_uint32), ("nested_offset", c_float),
    ]


class Library:
    """The functions, with a status that is not success as an exception."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.tightfit_last_error.restype = c_char_p
        self.library.tightfit_model_tensor_count.restype = c_size_t

    def call(self, name, *arguments):
        if getattr(self.library, "tightfit_" + name)(*arguments) != 0:
            raise RuntimeError(f"{name}: {self.library.tightfit_last_error().decode()}")

    def made(self, name, *arguments):
        out = c_void_p()
        self.call(name, *arguments, byref(out))
        return out

    def load(self, model, device):
        """A model with `CACHE_BYTES` reserved behind its weights."""
        checkpoint = self.made("checkpoint_open", model.encode())
        policy = self.made("policy_open", b"auto", None, c_size_t(0))
        devices = self.made("devices_open", (c_char_p * 1)(device.encode()), c_size_t(1))
        settings = (Setting * 1)(Setting(b"reserve", str(CACHE_BYTES).encode()))
        options = LoadOptions(reserve_headroom=1)
        loaded = self.made("load", checkpoint, policy, devices, settings, c_size_t(1), byref(options))
        for kind, handle in ("checkpoint", checkpoint), ("policy", policy), ("devices", devices):
            getattr(self.library, f"tightfit_{kind}_close")(byref(handle))
        return loaded

    def tensors(self, model):
        for index in range(self.library.tightfit_model_tensor_count(model)):
            tensor = Tensor()
            self.call("model_tensor", model, c_size_t(index), byref(tensor))
            yield tensor

    def exported(self, model, tensor, kind):
        """One part of a tensor."""

        def make(versioned):
            form = "tensor_to_dlpack" if versioned else "tensor_to_dlpack_unversioned"
            return self.made(form, model, c_size_t(tensor.index), c_uint32(kind))

        return Exported(make, tensor.device_name.decode())

    def cache(self, model, tensor, elements):
        """Memory behind the weights on a tensor's device, as two rows of f16."""

        def make(versioned):
            assert versioned, "this form is given for tensors only"
            device, shape = c_size_t(tensor.device), (c_uint64 * 2)(2, elements // 2)
            allocation = self.made("model_allocate", model, device, c_uint64(2 * elements))
            return self.made("allocation_to_dlpack", byref(allocation), b"F16", shape, c_size_t(2))

        return Exported(make, tensor.device_name.decode())


class Exported:
    """What `from_dlpack` of PyTorch, NumPy and others asks for. All transfers to a device have ended when a load
    returns, so that their streams need not be waited for."""

    def __init__(self, make, device):
        kind, _, ordinal = device.partition(":")
        self.make, self.device = make, (2, int(ordinal)) if kind == "cuda" else (1, 0)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None, **_):
        versioned = max_version is not None and max_version >= (1, 0)
        return capsule(self.make(versioned), versioned)


def capsule(pointer, versioned):
    """A DLPack tensor as Python's consumers take it; they rename it and free it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    return new(pointer, b"dltensor_versioned" if versioned else b"dltensor", None)


def read_checkpoint(model):
    """Name -> (type, shape, bytes) of every tensor in the model's files."""
    files = [Path(model)] if Path(model).is_file() else sorted(Path(model).glob("*.safetensors"))
    tensors = {}
    for file in files:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        data = content[8 + length:]
        for name, entry in json.loads(content[8:8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = entry["dtype"], entry["shape"], data[begin:end]
    return tensors


def kinds_of(tensor):
    if tensor.quant_type is None:
        return [DATA]
    return [CODES, ABSMAX] + ([NESTED_ABSMAX] if tensor.double_quantized else [])


def check_torch(library, path, device):
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    stored = read_checkpoint(path)
    model = library.load(path, device)
    taken = []
    for tensor in library.tensors(model):
        parts = {}
        for kind in kinds_of(tensor):
            parts[kind] = torch.utils.dlpack.from_dlpack(library.exported(model, tensor, kind))
        taken.append((tensor.name.decode(), tensor.block_size, tensor.double_quantized, parts))
    cache = torch.utils.dlpack.from_dlpack(library.cache(model, tensor, CACHE_BYTES // 2))
    library.library.tightfit_model_unload(byref(model))

    where = torch.device(device.split(":")[0]) if device.startswith("cuda") else torch.device("cpu")
    cache.fill_(3)
    assert cache.device.type == where.type and cache.sum(dtype=torch.float64).item() == 3 * CACHE_BYTES // 2
    quantized = 0
    for name, block_size, double_quantized, parts in taken:
        dtype, shape, content = stored[name]
        expected = torch.frombuffer(bytearray(content), dtype=dtypes[dtype]).reshape(shape)
        assert all(part.device.type == where.type for part in parts.values())
        if DATA in parts:
            assert parts[DATA].shape == expected.shape and torch.equal(parts[DATA].cpu(), expected), name
            continue
        assert not double_quantized, "this program asks for plain scales"
        codes, absmax = parts[CODES].cpu().flatten(), parts[ABSMAX].cpu()
        values = torch.tensor(NF4)[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
        scales = absmax.repeat_interleave(block_size)[:expected.numel()]
        off = (values[:expected.numel()] * scales - expected.flatten().float()).abs()
        assert (off <= HALF_GAP * scales * (1 + 1e-5)).all(), name
        quantized += 1
    assert quantized and quantized < len(taken)
    print(f"torch {torch.__version__}: {len(taken)} tensors on {where}, {quantized} of them 4-bit, as in the files")

    if where.type == "cuda":
        # The reservation is returned with the last tensor.
        del taken, parts, codes, absmax, cache
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        model = library.load(path, device)
        held = next(tensor for tensor in library.tensors(model))
        kept = torch.utils.dlpack.from_dlpack(library.exported(model, held, kinds_of(held)[0]))
        during = torch.cuda.mem_get_info()[0]
        library.library.tightfit_model_unload(byref(model))
        after_unload = torch.cuda.mem_get_info()[0]
        del kept
        gc.collect()
        after = torch.cuda.mem_get_info()[0]
        assert during < before and after_unload == during and after == before, (before, during, after_unload, after)
        print(f"torch: {before - during} bytes were kept by one tensor, and returned with it")


def check_numpy(library, path, device):
    import numpy

    model = library.load(path, device)
    stored = read_checkpoint(path)
    seen = []
    for tensor in library.tensors(model):
        # NumPy has no bfloat16.
        for kind in kinds_of(tensor) if tensor.quant_type or tensor.dtype != b"BF16" else []:
            array = numpy.from_dlpack(library.exported(model, tensor, kind))
            assert not array.flags.writeable
            seen.append((tensor.name.decode(), tensor.block_size, kind, array))
    cache = numpy.from_dlpack(library.cache(model, tensor, CACHE_BYTES // 2))
    library.library.tightfit_model_unload(byref(model))
    cache.fill(3)
    assert cache.dtype == numpy.float16 and cache.sum(dtype=int) == 3 * CACHE_BYTES // 2
    absmax = 0
    for name, block_size, kind, array in seen:
        dtype, shape, content = stored[name]
        if kind == DATA:
            assert list(array.shape) == shape and array.tobytes() == content, name
        elif kind == ABSMAX and dtype == "BF16":
            values = (numpy.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
            blocks = numpy.abs(numpy.pad(values, (0, -len(values) % block_size)).reshape(-1, block_size))
            assert array.dtype == numpy.float32 and (array == blocks.max(axis=1)).all(), name
            absmax += 1
        elif kind == CODES:
            elements = numpy.prod(shape, dtype=int)
            assert array.dtype == numpy.uint8 and array.shape == ((elements + 1) // 2, 1), name
    assert absmax
    print(f"numpy {numpy.__version__}: {len(seen)} arrays, {absmax} of scales, as the files give them")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    library = Library(os.path.abspath(sys.argv[1]))
    path, device = sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "cpu"
    for package, check in ("torch", check_torch), ("numpy", check_numpy):
        try:
            __import__(package)
        except ImportError as error:
            if os.environ.get(f"TIGHTFIT_REQUIRE_{package.upper()}") == "1":
                sys.exit(f"{error}, and TIGHTFIT_REQUIRE_{package.upper()}=1")
            print(f"not run: {error}")
            continue
        if package == "numpy" and device.startswith("cuda"):
            print("not run: NumPy reads host memory only")
            continue
        check(library, path, device)


main()
