"""Tightfit's load beside safetensors' own way to a GPU, `prefetch` (0.9.0rc1 and later), same files, same run.

    python host/wasm/benches/peer_prefetch.py DIR --tightfit target/release/tightfit [--runs 5] [--threads 16]

safetensors loads the weights as they are (bf16); Tightfit quantizes them to NF4 on the way. Both are timed without the
start of CUDA: safetensors in this process after a first load, Tightfit as it reports its load. Wants torch with CUDA.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from safetensors import safe_open


def prefetch(files: list[Path], threads: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    handles = [safe_open(file, framework="pt", device=0) for file in files]
    # Of several files all at once, with as many threads in all.
    each = max(1, threads // len(files))
    loaders = [handle.prefetch(device=0, threads=each) for handle in handles]
    tensors = [tensor for loader in loaders for _, tensor in loader]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert tensors
    del tensors
    for loader in loaders:
        loader.close()
    torch.cuda.empty_cache()
    return seconds


def tightfit(binary: str, directory: str, threads: int, *more: str) -> float:
    command = [binary, "load", directory, "--device", "cuda:0", "--threads", str(threads), "--json", *more]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["load"]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--tightfit", default="target/release/tightfit")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=16)
    given = parser.parse_args()
    files = sorted(Path(given.directory).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    prefetch(files, given.threads)
    times: dict[str, list[float]] = {}
    for _ in range(given.runs):
        times.setdefault("safetensors prefetch, bf16", []).append(prefetch(files, given.threads))
        for name, more in [("tightfit, NF4", ()), ("tightfit, bf16", ("--set", "skip=*"))]:
            times.setdefault(name, []).append(tightfit(given.tightfit, given.directory, given.threads, *more))
    peer = statistics.median(times["safetensors prefetch, bf16"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        span = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{name:28} {median:.3f} s ({span}), {size / median / 1e9:.1f} GB/s, {peer / median:.2f} x as fast")


if __name__ == "__main__":
    main()
