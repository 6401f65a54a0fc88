"""Adapters on a model in 4 bits, trained with PEFT.

    python lora.py [MODEL]

MODEL is a directory or a Hugging Face id; without one, the first layers of Qwen2.5-0.5B's shape with made-up
weights, so that it runs anywhere.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

import tightfit.transformers

work = tempfile.TemporaryDirectory()
if len(sys.argv) > 1:
    source = sys.argv[1]
else:
    source = str(Path(work.name) / "model")
    command = [sys.executable, "-m", "tightfit", "synth", "qwen2.5-0.5b", source, "--layers", "2", "--quiet"]
    subprocess.run(command, check=True)

# ANCHOR: train
config = tightfit.transformers.TightfitConfig(purpose="qlora")
model = AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.bfloat16, quantization_config=config, device_map="auto"
)
model = peft.prepare_model_for_kbit_training(model)
lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(model, lora)

optimizer = torch.optim.AdamW(value for value in model.parameters() if value.requires_grad)
tokens = torch.arange(64, device=model.device).reshape(2, 32)
for step in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
# ANCHOR_END: train

model.save_pretrained(Path(work.name) / "adapters")
