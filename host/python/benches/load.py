#!/usr/bin/env python3
"""How long `from_pretrained` takes until a model can be used, and what it takes of the host's memory.

    pip install ./host/python transformers bitsandbytes accelerate
    python host/python/benches/load.py [--shape qwen2.5-0.5b] [--checkpoint DIR] [--device cuda:0|cpu] [--loads N]

transformers with bitsandbytes, and with TightfitConfig, each in a process of its own, which imports and starts everything
first; the checkpoint is in the page cache. Seconds of each load, one after the other, without and with a forward pass of one token;
MiB are what the process held at most beyond what it held before, while the first was loaded and up to the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

from variants import checkpoint, run_each

VARIANTS = ["stock", "ours"]
MIB = 2**20


class Resident:
    """What this process holds at most of files that are not mapped, looked at every 2 ms."""

    def __init__(self) -> None:
        self.begin = self.most = self.now()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found["RssAnon"].split()[0]) * 1024

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.most = max(self.most, self.now())

    def peak(self) -> int:
        self.most = max(self.most, self.now())
        return (self.most - self.begin) // MIB

    def end(self) -> int:
        self._ends.set()
        self._thread.join()
        return self.peak()


def run(variant: str, path: str, device_name: str, loads: int) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = torch.device(device_name)
    # Imports the model's own module, and starts CUDA.
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    token = torch.ones((1, 1), dtype=torch.int64, device=device)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    if variant == "ours":
        from tightfit.transformers import TightfitConfig

        quantization: Any = TightfitConfig(**options)
    else:
        quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    resident = Resident()
    seconds, most = [], []
    for _ in range(loads):
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": str(device)}
        )
        loaded = time.perf_counter() - start
        most.append(resident.peak())
        with torch.no_grad():
            model(input_ids=token).logits.float().cpu()
        seconds.append((round(loaded, 3), round(time.perf_counter() - start, 3)))
        planned = model.tightfit.plan.bytes // MIB if variant == "ours" else None
        del model
        gc.collect()
    mib = (most[0], resident.end())
    return {"variant": variant, "seconds": seconds, "MiB over imports": mib, "planned MiB": planned}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="a shape of `tightfit synth`")
    parser.add_argument("--checkpoint", help="a directory that is used, or made and kept")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loads", type=int, default=4)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(run(given.variant, given.checkpoint, given.device, given.loads)))
        return
    with checkpoint(given.checkpoint, given.shape) as path:
        arguments = ["--checkpoint", str(path), "--device", given.device, "--loads", str(given.loads)]
        run_each(__file__, VARIANTS, arguments)


if __name__ == "__main__":
    main()
