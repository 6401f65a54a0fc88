"""The same job with transformers and bitsandbytes on the CPU: seconds and peak resident memory.

    pip install torch==2.15.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
    python host/wasm/benches/peer_transformers.py DIR [REPEATS] [double]

DIR is a checkpoint, for example one that `tightfit synth qwen2.5-0.5b DIR` wrote. Uses as many
threads as OMP_NUM_THREADS says.
"""

import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

directory, repeats = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant="double" in sys.argv[3:],
)
for _ in range(repeats):
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{seconds:.2f} s, peak resident {peak / 2**20:.0f} MiB, {model.get_memory_footprint()} bytes", flush=True)
    del model
