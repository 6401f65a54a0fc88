"""The same job on the same GPU, in one run: `tightfit load`, transformers with bitsandbytes, and copying the
checkpoint's bytes to the GPU from pinned memory.

    pip install torch transformers bitsandbytes accelerate
    tightfit synth qwen2.5-7b DIR
    python host/wasm/benches/peer_gpu.py DIR [--tightfit PATH] [--runs N] [--double] [--json FILE]

Every job is a process of its own, and the jobs take turns, so that each meets the same page cache. A process
for transformers loads more than once: its first load also pays for starting CUDA, which is given beside the
others. `driver` is the most that the driver says was gone from the GPU's free memory, less what a process takes that
only starts CUDA (for transformers: through PyTorch); it wants a GPU that nobody else uses.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

PIECE = 64 << 20
LOADS = 2


class Driver:
    """The driver's own figures for GPU 0. Has a context of its own, as asking needs one: what it takes is the
    same before, during and after a job."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.context = ctypes.c_void_p()
        device = ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code:
            sys.exit(f"{name}: error {code}")

    def free(self):
        """Free bytes, whoever has taken the others."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuCtxSetCurrent", self.context)
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


class Lowest:
    """The least free memory while a block runs, sampled every few milliseconds."""

    def __init__(self, driver):
        self.driver = driver

    def __enter__(self):
        self.before = self.lowest = self.driver.free()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.003):
            self.lowest = min(self.lowest, self.driver.free())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def taken(self):
        return self.before - self.lowest


def child_context(_):
    """What a context takes."""
    Driver()
    time.sleep(0.5)
    return {}


def child_torch_context(_):
    """What a context takes that PyTorch has started."""
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize()
    time.sleep(0.5)
    return {}


def child_transformers(arguments):
    """Loads as users do."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=arguments.double,
    )
    seconds = []
    for _ in range(LOADS):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            arguments.directory, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        loaded = {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }
        time.sleep(0.3)
        del model
    return loaded | {"first_seconds": seconds[0], "seconds": min(seconds[1:])}


def child_copy(arguments):
    """Copies as many bytes as the checkpoint has from pinned memory, in pieces."""
    import torch

    total = sum(file.stat().st_size for file in Path(arguments.directory).glob("*.safetensors"))
    source = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True).fill_(number) for number in range(2)]
    target = [torch.empty(PIECE, dtype=torch.uint8, device="cuda:0") for _ in range(2)]
    pieces = max(1, total // PIECE)
    for warm in range(2):
        target[warm].copy_(source[warm], non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(pieces):
        target[number % 2].copy_(source[number % 2], non_blocking=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds * total / (pieces * PIECE), "bytes": total}


CHILDREN = {
    "context": child_context,
    "torch_context": child_torch_context,
    "transformers": child_transformers,
    "copy": child_copy,
}


def run_child(name, arguments, driver):
    command = [sys.executable, __file__, arguments.directory, "--child", name]
    if arguments.double:
        command.append("--double")
    with Lowest(driver) as memory:
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1]) | {"driver": memory.taken}


def run_tightfit(arguments, driver):
    command = [arguments.tightfit, "load", arguments.directory, "--device", "cuda:0", "--json"]
    if arguments.double:
        command += ["--set", "double-quant=true"]
    with Lowest(driver) as memory:
        start = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        process = time.perf_counter() - start
    report = json.loads(output)
    device = report["devices"][0]
    return {
        "seconds": report["load"]["seconds"],
        "process_seconds": process,
        "allocated": device["allocated"],
        "reserved": device["reserved"],
        "peak_reserved": device["peak_reserved"],
        "driver": memory.taken,
    }


def warm(directory):
    """Reads the files, so that all find them in the page cache."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.read(PIECE):
                pass


def middle(results, key):
    return statistics.median(result[key] for result in results)


def gib(count):
    return f"{count / 2**30:.3f}"


def table(results, context):
    ours, theirs, copy = results["tightfit"], results["transformers"], results["copy"]

    def row(name, runs, seconds, context=0):
        times = [run[seconds] for run in runs]
        sizes = [gib(middle(runs, key)) if key in runs[0] else "-" for key in ("allocated", "reserved", "peak_reserved")]
        driver = gib(middle(runs, "driver") - context) if context else "-"
        return [name, f"{statistics.median(times):.3f}", f"{min(times):.3f} to {max(times):.3f}", *sizes, driver]

    rows = [
        ["", "seconds", "of the runs", "allocated", "reserved", "peak reserved", "driver"],
        row("tightfit", ours, "seconds", context["tightfit"]),
        row("tightfit, the whole process", ours, "process_seconds"),
        row("transformers + bitsandbytes", theirs, "seconds", context["transformers"]),
        row("the same, first in its process", theirs, "first_seconds"),
        row("copy of the bf16 bytes, pinned", copy, "seconds"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for cells in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))))
    print("sizes in GiB, medians")
    print()
    seconds = middle(ours, "seconds")
    print(f"transformers / tightfit, seconds: {middle(theirs, 'seconds') / seconds:.2f}")
    print(f"tightfit / pinned copy, seconds: {seconds / middle(copy, 'seconds'):.2f}")
    print(f"pinned copy: {copy[0]['bytes'] / middle(copy, 'seconds') / 1e9:.1f} GB/s of {copy[0]['bytes']} bytes")
    for name, runs in ("tightfit", ours), ("transformers", theirs):
        reserved, driver = middle(runs, "peak_reserved"), middle(runs, "driver") - context[name]
        print(f"{name}: peak reserved / allocated {reserved / middle(runs, 'allocated'):.4f}, "
              f"driver / peak reserved {driver / reserved:.4f}")
    print("contexts: " + ", ".join(f"{name} {taken >> 20} MiB" for name, taken in context.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--tightfit", default="tightfit", help="the command")
    parser.add_argument("--runs", type=int, default=5, help="turns that each job has")
    parser.add_argument("--double", action="store_true", help="double quantization")
    parser.add_argument("--json", help="where to write every figure")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments)))
        return
    warm(arguments.directory)
    driver = Driver()
    context = {
        "tightfit": run_child("context", arguments, driver)["driver"],
        "transformers": run_child("torch_context", arguments, driver)["driver"],
    }
    results = {"tightfit": [], "transformers": [], "copy": []}
    for number in range(arguments.runs):
        print(f"run {number + 1} of {arguments.runs}", file=sys.stderr, flush=True)
        results["tightfit"].append(run_tightfit(arguments, driver))
        results["transformers"].append(run_child("transformers", arguments, driver))
        results["copy"].append(run_child("copy", arguments, driver))
    table(results, context)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"context": context} | results, indent=1))


if __name__ == "__main__":
    main()
