#!/usr/bin/env python3
"""Tokens per second and memory of `generate`, and of a QLoRA step: transformers with bitsandbytes, and with Tightfit.

    pip install ./host/python transformers bitsandbytes accelerate peft
    python host/python/benches/generate.py [--shape qwen2.5-7b] [--device cuda:0] [--tokens N] [--variants stock,ours,...]

The checkpoint has random weights and a real model's shape (`tightfit synth`). Each variant is a process of its own,
so that one's memory is not the other's, and all are of one run on one machine:

    stock            generate, greedy, as bitsandbytes has it
    ours             the same with TightfitConfig
    ours-compiled    a static cache, the decoder compiled by generate itself (torch.compile)
    stock-graph      a static cache, one decoding step captured in a CUDA graph
    ours-graph       the same with TightfitConfig
    stock-compiled-graph, ours-compiled-graph
                     the same with the step compiled before it is captured
    stock-qlora      a step of QLoRA of 2 x 512 tokens: gradient checkpointing, LoRA of rank 16 on all linear layers
    ours-qlora       the same with TightfitConfig(purpose="qlora")
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from typing import Any

from variants import checkpoint, run_each

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


def memory(device: Any) -> dict[str, int]:
    """MiB of a device: torch's own figures, and what the driver says is gone."""
    import torch

    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "torch allocated": torch.cuda.memory_allocated(device) // MIB,
        "torch reserved": torch.cuda.memory_reserved(device) // MIB,
        "driver used": (total - free) // MIB,
    }


def load(path: str, device: Any, is_ours: bool, purpose: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    if is_ours:
        from tightfit.transformers import TightfitConfig

        config: Any = TightfitConfig(purpose=purpose, products=True, **options)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map={"": str(device)}
    )


def timed(device: Any, work: Any) -> tuple[float, Any]:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


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


def qlora(model: Any, device: Any) -> dict[str, Any]:
    import peft
    import torch

    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, 1000, (2, 512), device=device, generator=torch.Generator(device).manual_seed(0))
    model.train()

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    losses = [step()]
    seconds = []
    for _ in range(5):
        took, loss = timed(device, step)
        seconds.append(took)
        losses.append(loss)
    found: dict[str, Any] = {
        "seconds a step": round(sorted(seconds)[2], 4),
        "losses": [round(loss, 4) for loss in losses],
    }
    if device.type == "cuda":
        found["torch peak reserved"] = torch.cuda.max_memory_reserved(device) // MIB
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


def run(variant: str, path: str, device_name: str, tokens: int, is_profiled: bool) -> dict[str, Any]:
    import torch

    device = torch.device(device_name)
    whose, _, how = variant.partition("-")
    before = memory(device)
    took, model = timed(device, lambda: load(path, device, whose == "ours", "qlora" if how == "qlora" else "inference"))
    found: dict[str, Any] = {"variant": variant, "seconds to load": round(took, 2), "before": before}
    found["loaded"] = memory(device)
    if whose == "ours":
        found["tightfit"] = {
            name: {what: count // MIB for what, count in figures.items()}
            for name, figures in model.tightfit.figures().items()
        }
    if how == "qlora":
        found.update(qlora(model, device))
        found["after"] = memory(device)
        return found
    model.eval()
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, 1000, (1, PROMPT), generator=generator).to(device)
    with torch.no_grad():
        found["logits"] = [round(value, 4) for value in model(input_ids=ids).logits[0, -1, :8].float().tolist()]
        if how.endswith("graph"):
            graph = Graph(model, ids, tokens, how.startswith("compiled"))
            decode = lambda: graph.decode(tokens)  # noqa: E731
        elif how == "compiled":
            decode = lambda: generate(model, ids, tokens, cache_implementation="static")  # noqa: E731
        else:
            decode = lambda: generate(model, ids, tokens)  # noqa: E731
        found["seconds of the first"], _ = (round(timed(device, decode)[0], 2), None)
        if how == "compiled":
            decode()
        times = []
        for _ in range(3):
            took, out = timed(device, decode)
            times.append(took)
        if is_profiled:
            found["kernels"] = kernels(decode, tokens)
    found["tokens/s"] = round(tokens / sorted(times)[1], 2)
    found["tokens"] = out[0, PROMPT : PROMPT + 16].tolist()
    found["after"] = memory(device)
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a shape of `tightfit synth`")
    parser.add_argument("--checkpoint", help="a directory that is used, or made and kept")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one variant at most")
    parser.add_argument("--profile", action="store_true", help="say which kernels take how long")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(run(given.variant, given.checkpoint, given.device, given.tokens, given.profile)))
        return
    with checkpoint(given.checkpoint, given.shape) as path:
        arguments = ["--checkpoint", str(path), "--device", given.device, "--tokens", str(given.tokens)]
        arguments += ["--profile"] * given.profile
        run_each(__file__, given.variants.split(","), arguments, given.timeout)


if __name__ == "__main__":
    main()
