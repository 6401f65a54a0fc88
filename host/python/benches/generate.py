#!/usr/bin/env python3
"""Tokens per second and memory of `generate`, and of a QLoRA step: transformers with bitsandbytes, and with Tightfit.

    pip install ./host/python transformers bitsandbytes accelerate peft
    python host/python/benches/generate.py [--shape qwen2.5-7b] [--device cuda:0] [--tokens N] [--variants stock,ours,...]
    python host/python/benches/generate.py --variants stock-qlora,ours-qlora --rounds 5
    python host/python/benches/generate.py --shape qwen3.5-35b-a3b --headers-only --device cuda:0:32GiB,cuda:1:32GiB \\
        --variants ours

The checkpoint has random weights and a real model's shape (`tightfit synth`); with `--headers-only` it takes no disk, and
all weights are zero. Several devices, or sizes, are for `device_map="auto"`: of a GPU with a size neither Tightfit nor
torch takes more than that. `--rounds N` runs all variants N times, one after the other in each round, and prints medians
of what they found. Each variant is a process of its own, so that one's memory is not the other's, and all are of one run
on one machine:

    stock            generate, greedy, as bitsandbytes has it
    ours             the same with TightfitConfig
    ours-compiled    a static cache, the decoder compiled by generate itself (torch.compile)
    stock-graph      a static cache, one decoding step captured in a CUDA graph
    ours-graph       the same with TightfitConfig
    stock-compiled-graph, ours-compiled-graph
                     the same with the step compiled before it is captured
    stock-qlora      a step of QLoRA of 2 x 512 tokens: gradient checkpointing, LoRA of rank 16 on all linear layers
    ours-qlora       the same with TightfitConfig(purpose="qlora")
    ours-qlora-experts
                     the same with adapters on experts, too
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from typing import Any

from variants import checkpoint, medians, run_each

VARIANTS = [
    "stock",
    "ours",
    "ours-compiled",
    "stock-graph",
    "ours-graph",
    "stock-compiled-graph",
    "ours-compiled-graph",
    "stock-qlora",
    "ours-qlora",
]
PROMPT = 32
MIB = 2**20


class Devices:
    """Where a model may be: `cuda:0`, `cpu`, or several and sizes, as in `cuda:0:32GiB,cuda:1:32GiB`."""

    def __init__(self, text: str) -> None:
        import torch

        self.specs = text.split(",")
        self.names, self.sizes = [], {}
        for spec in self.specs:
            parts = spec.split(":")
            name = ":".join(parts[:2]) if parts[0] == "cuda" else parts[0]
            size = ":".join(parts[2:] if parts[0] == "cuda" else parts[1:])
            # Simulated ones are host memory.
            name = "cpu" if name == "sim" else name
            self.names.append(name)
            if size:
                self.sizes[name] = size
        self.first = torch.device(self.names[0])
        self.is_one = len(self.specs) == 1 and not self.sizes

    def gpus(self) -> list[Any]:
        import torch

        return [torch.device(name) for name in self.names if name.startswith("cuda")]

    def memory(self) -> dict[str, dict[str, int]]:
        """MiB of each GPU: torch's own figures, and what the driver says is gone."""
        import torch

        found = {}
        for device in self.gpus():
            free, total = torch.cuda.mem_get_info(device)
            found[str(device)] = {
                "torch allocated": torch.cuda.memory_allocated(device) // MIB,
                "torch reserved": torch.cuda.memory_reserved(device) // MIB,
                "driver used": (total - free) // MIB,
            }
        return found

    def hold(self) -> None:
        """Has torch take no more than what is left of the sizes."""
        import torch
        from accelerate.utils.modeling import convert_file_size_to_int

        for device in self.gpus():
            if size := self.sizes.get(str(device)):
                free, total = torch.cuda.mem_get_info(device)
                others = total - free - torch.cuda.memory_reserved(device)
                left = max(convert_file_size_to_int(size) - others, 0)
                torch.cuda.set_per_process_memory_fraction(min(left / total, 1.0), device)

    def synchronize(self) -> None:
        import torch

        for device in self.gpus():
            torch.cuda.synchronize(device)


def load(path: str, devices: Devices, is_ours: bool, how: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    where: dict[str, Any] = {"device_map": {"": str(devices.first)} if devices.is_one else "auto"}
    if is_ours:
        from tightfit.transformers import TightfitConfig

        options["purpose"] = "qlora" if how.startswith("qlora") else "inference"
        options["lora_experts"] = how.endswith("experts")
        options["devices"] = None if devices.is_one else devices.specs
        config: Any = TightfitConfig(products=True, **options)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        if devices.sizes:
            where["max_memory"] = {
                int(name.partition(":")[2]) if name.startswith("cuda") else name: size
                for name, size in devices.sizes.items()
            }
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config, **where)


def timed(devices: Devices, work: Any) -> tuple[float, Any]:
    devices.synchronize()
    start = time.perf_counter()
    result = work()
    devices.synchronize()
    return time.perf_counter() - start, result


def some_tokens(model: Any, shape: list[int]) -> Any:
    import torch

    most = min(1000, model.config.get_text_config().vocab_size)
    return torch.randint(0, most, shape, generator=torch.Generator("cpu").manual_seed(0))


def generate(model: Any, ids: Any, tokens: int, **arguments: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **arguments,
        )


class Graph:
    """Greedy decoding with a static cache, one step of which is a CUDA graph."""

    def __init__(self, model: Any, ids: Any, tokens: int, is_compiled: bool) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.prompt = model, ids
        self.one = torch.compile(model.forward, dynamic=False) if is_compiled else model.forward
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ids.shape[1] + tokens + 8)
        self.token = torch.zeros_like(ids[:, :1])
        self.position = torch.zeros(1, dtype=torch.int64, device=ids.device)
        self.takes_position = "cache_position" in inspect.signature(model.forward).parameters
        self.prefill()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def forward(self, model: Any, ids: Any, positions: Any) -> None:
        named = {"cache_position": positions} if self.takes_position else {}
        out = model(
            input_ids=ids, position_ids=positions[None], past_key_values=self.cache, use_cache=True, **named
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def prefill(self) -> None:
        import torch

        self.cache.reset()
        self.forward(self.model, self.prompt, torch.arange(self.prompt.shape[1], device=self.prompt.device))
        self.position.fill_(self.prompt.shape[1])

    def step(self) -> None:
        self.forward(self.one, self.token, self.position)
        self.position.add_(1)

    def decode(self, tokens: int) -> Any:
        import torch

        self.prefill()
        found = [self.token.clone()]
        for _ in range(tokens - 1):
            self.graph.replay()
            found.append(self.token.clone())
        return torch.cat([self.prompt, *found], dim=1)


def qlora(model: Any, devices: Devices, steps: int, has_experts: bool, shape: list[int]) -> dict[str, Any]:
    import peft
    import torch

    device = devices.first
    model = peft.prepare_model_for_kbit_training(model)
    stacks = ["gate_up_proj", "down_proj"] if has_experts else None
    lora = peft.LoraConfig(r=16, target_modules="all-linear", target_parameters=stacks)
    model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = some_tokens(model, shape).to(device)
    model.train()

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    # The first makes what the others find.
    first, loss = timed(devices, step)
    losses, seconds = [loss], []
    for _ in range(steps):
        took, loss = timed(devices, step)
        seconds.append(took)
        losses.append(loss)
    found: dict[str, Any] = {
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds of the first step": round(first, 4),
        "seconds a step": round(statistics.median(seconds), 4),
        "fastest step": round(min(seconds), 4),
        "losses": [round(loss, 4) for loss in losses],
    }
    for gpu in devices.gpus():
        found[f"{gpu} torch peak reserved"] = torch.cuda.max_memory_reserved(gpu) // MIB
    return found


def kernels(decode: Any, tokens: int) -> dict[str, str]:
    """What the GPU does for a token: the kernels that take longest, as microseconds and how often, and all of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        decode()
    events = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    found = {event.key[:60]: (event.self_device_time_total / tokens, event.count / tokens) for event in events[:20]}
    found["all"] = tuple(sum(each) / tokens for each in zip(*[(e.self_device_time_total, e.count) for e in events]))
    return {name: f"{micros:.1f} us, {count:.1f}" for name, (micros, count) in found.items()}


def run(variant: str, given: argparse.Namespace) -> dict[str, Any]:
    import torch

    devices, tokens = Devices(given.device), given.tokens
    whose, _, how = variant.partition("-")
    if how.endswith("graph") and len(devices.gpus()) != 1:
        raise ValueError("a graph is of one GPU")
    before = devices.memory()
    devices.hold()
    took, model = timed(devices, lambda: load(given.checkpoint, devices, whose == "ours", how))
    devices.hold()
    found: dict[str, Any] = {"variant": variant, "seconds to load": round(took, 2), "before": before}
    found["loaded"] = devices.memory()
    if not devices.is_one:
        places = getattr(model, "hf_device_map", None) or {"": str(devices.first)}
        found["modules"] = {str(place): list(places.values()).count(place) for place in places.values()}
    if whose == "ours":
        found["tightfit"] = {
            name: {what: count // MIB for what, count in figures.items()}
            for name, figures in model.tightfit.figures().items()
        }
    if how.startswith("qlora"):
        shape = [int(length) for length in given.train.split("x")]
        found.update(qlora(model, devices, given.steps, how.endswith("experts"), shape))
        found["after"] = devices.memory()
        return found
    model.eval()
    ids = some_tokens(model, [1, PROMPT]).to(devices.first)
    with torch.no_grad():
        found["logits"] = [round(value, 4) for value in model(input_ids=ids).logits[0, -1, :8].float().tolist()]
        if how.endswith("graph"):
            graph = Graph(model, ids, tokens, how.startswith("compiled"))
            decode = lambda: graph.decode(tokens)  # noqa: E731
        elif how == "compiled":
            decode = lambda: generate(model, ids, tokens, cache_implementation="static")  # noqa: E731
        else:
            decode = lambda: generate(model, ids, tokens)  # noqa: E731
        found["seconds of the first"], _ = (round(timed(devices, decode)[0], 2), None)
        if how == "compiled":
            decode()
        times = []
        for _ in range(3):
            took, out = timed(devices, decode)
            times.append(took)
        if given.profile:
            found["kernels"] = kernels(decode, tokens)
    found["tokens/s"] = round(tokens / sorted(times)[1], 2)
    found["tokens"] = out[0, PROMPT : PROMPT + 16].tolist()
    found["after"] = devices.memory()
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a shape of `tightfit synth`")
    parser.add_argument("--layers", type=int, help="only its first layers")
    parser.add_argument("--headers-only", action="store_true", help="a checkpoint of zeros that takes no disk")
    parser.add_argument("--checkpoint", help="a directory that is used, or made and kept")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--steps", type=int, default=5, help="steps of QLoRA that are timed, after one that is not")
    parser.add_argument("--train", default="2x512", help="rows and tokens of a step of QLoRA")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=1, help="how often each variant is run")
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one variant at most")
    parser.add_argument("--profile", action="store_true", help="say which kernels take how long")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(run(given.variant, given)))
        return
    synth = ["--headers-only"] * given.headers_only + ([] if given.layers is None else ["--layers", str(given.layers)])
    with checkpoint(given.checkpoint, given.shape, synth) as path:
        arguments = ["--checkpoint", str(path), "--device", given.device, "--tokens", str(given.tokens)]
        arguments += ["--steps", str(given.steps), "--train", given.train]
        arguments += ["--profile"] * given.profile
        found = []
        for _ in range(given.rounds):
            found += run_each(__file__, given.variants.split(","), arguments, given.timeout)
    if given.rounds > 1:
        for line in medians(found):
            print(json.dumps(line))


if __name__ == "__main__":
    main()
