"""A model of transformers, planned, loaded and saved by Tightfit. Each ``# %%`` is a cell of a notebook.

    python from_pretrained.py [MODEL]

MODEL is a directory or a Hugging Face id; without one, the first layers of Qwen2.5-0.5B's shape with made-up
weights, so that it runs anywhere: without a GPU, a network or a download.
"""

# %% A checkpoint
import subprocess
import sys
import tempfile
from pathlib import Path

# ANCHOR: imports
import torch
from transformers import AutoModelForCausalLM

import tightfit
import tightfit.transformers

# ANCHOR_END: imports

work = tempfile.TemporaryDirectory()
if len(sys.argv) > 1:
    source = sys.argv[1]
else:
    source = str(Path(work.name) / "model")
    command = [sys.executable, "-m", "tightfit", "synth", "qwen2.5-0.5b", source, "--layers", "2", "--quiet"]
    subprocess.run(command, check=True)

# %% What it takes, to the byte, on cards that need not be there. A notebook draws the plan by itself.
# ANCHOR: plan
plan = tightfit.plan(source, ["sim:8GiB"], settings={"context": 4096})
print(plan)
assert plan.devices[0].reserved == plan.bytes
# ANCHOR_END: plan

# %% What does not fit is refused, before anything is reserved.
# ANCHOR: refused
try:
    tightfit.plan(source, ["sim:100MiB"])
except tightfit.OutOfMemory as error:
    print(f"{error.missing:,} bytes are missing")
# ANCHOR_END: refused

# %% The model, as ever but for one argument. On a machine with GPUs it is on them, else on the host.
# ANCHOR: load
config = tightfit.transformers.TightfitConfig(settings={"context": 4096})
model = AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.bfloat16, quantization_config=config, device_map="auto"
)
for memory in model.tightfit.memory:
    print(f"{memory.name}: {memory.reserved:,} bytes reserved, as planned")
# ANCHOR_END: load

# %% What it saves, transformers opens without Tightfit.
saved = Path(work.name) / "saved"
# ANCHOR: save
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map={"": model.device})
assert not hasattr(again, "tightfit")
# ANCHOR_END: save
theirs, ours = again.state_dict(), model.state_dict()
assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

# %% It is transformers' own model.
tokens = torch.arange(8, device=model.device)[None]
answer = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
print(answer[0].tolist())

# %% Programs that make a BitsAndBytesConfig themselves stay as they are: this is all that they need.
# ANCHOR: install
tightfit.transformers.install()
third = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map="auto")
print(third.tightfit.plan)
# ANCHOR_END: install
