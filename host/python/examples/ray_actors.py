"""A model that actors of Ray share: each loads its part, and all of them compute. Each ``# %%`` is a cell of a notebook.

    python ray_actors.py [MODEL [ACTORS]]

MODEL is a directory that all nodes have, or a Hugging Face id; without one, the first layers of Qwen2.5-0.5B's shape
with made-up weights. Needs Ray (``pip install ray``) and transformers 5.16 or newer; with GPUs there is one for each actor.
"""

# %% What an actor does: it has a rank, as a process under torchrun would.
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch


@ray.remote
class Rank:
    def __init__(self, rank: int, world: int) -> None:
        # Ray shows an actor its own GPU only: the first of one.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")

    def address(self) -> tuple[str, int]:
        """Where the others find the first of them."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def load(self, source: str, address: tuple[str, int]) -> dict[str, int]:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        from tightfit.transformers import TightfitConfig

        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        self.model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.bfloat16,
            quantization_config=TightfitConfig(),
            distributed_config=DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"])),
        )
        return {memory.name: memory.reserved for memory in self.model.tightfit.memory}

    def generate(self, tokens: list[int], new: int) -> list[int]:
        given = torch.tensor([tokens], device=self.model.device)
        answer = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        found: list[int] = answer[0].tolist()
        return found


# %% A checkpoint
work = tempfile.TemporaryDirectory()
world = int(sys.argv[2]) if len(sys.argv) > 2 else 2
if len(sys.argv) > 1:
    source = sys.argv[1]
else:
    source = str(Path(work.name) / "model")
    command = [sys.executable, "-m", "tightfit", "synth", "qwen2.5-0.5b", source, "--layers", "2", "--quiet"]
    subprocess.run(command, check=True)

# %% The actors
options: dict[str, Any] = {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1}
if not ray.is_initialized():
    # On a cluster: ray.init(address="auto").
    ray.init(num_cpus=max(world, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
actors = [Rank.options(**options).remote(rank, world) for rank in range(world)]
address = ray.get(actors[0].address.remote())

# %% Each loads its part. Where one cannot, all say so.
for rank, reserved in enumerate(ray.get([actor.load.remote(source, address) for actor in actors])):
    for device, size in reserved.items():
        print(f"rank {rank} has {size:,} bytes on {device}")

# %% And all compute.
answers = ray.get([actor.generate.remote([1, 2, 3, 4], 4) for actor in actors])
assert all(answer == answers[0] for answer in answers)
print(answers[0])
ray.shutdown()
