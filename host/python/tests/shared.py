"""What `test_shared.py` runs in each of several processes, under torchrun: ``shared.py MODELS OUTPUT CHECK...``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import tightfit
from tightfit.transformers import OtherProcessError, TightfitConfig, materialize
from tightfit.transformers.experts import Stack4bit

# A unit in the last place of bf16, of what is between 1 and 2.
ULP = 2.0**-7


class Checks:
    """Each is a method. What they return is written for the test to look at."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"

    def load(self, path: Path, dtype: Any = torch.float32, shared: Any = None, **options: Any) -> Any:
        arguments = {"distributed_config": DistributedConfig(**shared)} if shared else {"device_map": {"": self.device}}
        options.setdefault("bnb_4bit_compute_dtype", dtype)
        return self.ready(
            AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, quantization_config=TightfitConfig(**options), **arguments
            )
        )

    def ready(self, model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # bitsandbytes would replace the weights at the first forward.
                module.support_avx512bf16_for_cpu = False
        return model

    def tokens(self, name: str) -> Any:
        return load_file(self.models / name / "expected.safetensors")["input_ids"].to(self.device)

    def difference(self, model: Any, whole: Any, name: str) -> float:
        """The largest of the differences between logits, in units in the last place of bf16."""
        with torch.no_grad():
            got = model(input_ids=self.tokens(name), use_cache=False).logits
            want = whole(input_ids=self.tokens(name), use_cache=False).logits
        assert got.shape == want.shape
        largest = float(want.abs().max())
        return float((got - want).abs().max()) / (ULP * 2.0 ** int(torch.tensor(largest).log2().floor()))

    def codes(self, whole: Any, part: Any) -> int:
        """Compares the elements of all linear layers in 4 bits with those of the whole ones; how many are parts."""
        parts = 0
        for name, module in part.named_modules():
            if not isinstance(module, bitsandbytes.nn.Linear4bit):
                continue
            have, want = dense(module), dense(whole.get_submodule(name))
            weight = module.weight
            assert type(weight) is bitsandbytes.nn.Params4bit and tuple(weight.quant_state.shape) == have.shape
            left, right = module.padding
            have = have[:, left : have.shape[1] - right]
            if have.shape == want.shape:
                assert torch.equal(have, want), name
                continue
            parts += 1
            dimension = 0 if have.shape[1] == want.shape[1] else 1
            chunks = want.chunk(self.world, dimension)
            assert torch.equal(have, chunks[self.rank]), name
        return parts

    def tensor_parallel(self, name: str, source: str, double: str = "") -> dict[str, Any]:
        path = self.models / name / source
        options = {"bnb_4bit_use_double_quant": bool(double)}
        whole, part = self.load(path, **options), self.load(path, shared={"tp_size": self.world}, **options)
        stacks = [module for module in part.modules() if isinstance(module, Stack4bit)]
        return {
            "difference": self.difference(part, whole, name),
            "parts": 0 if double else self.codes(whole, part),
            "stacks": len(stacks),
            "planned": [part.tightfit.plan.bytes, whole.tightfit.plan.bytes],
            "peak": [memory.peak_reserved == memory.planned for memory in part.tightfit.memory],
            "read": [model.tightfit._model.report()["load"]["bytes_read"] for model in (part, whole)],
        }

    def products(self, name: str, source: str) -> dict[str, Any]:
        """With Tightfit's own kernels."""
        path = self.models / name / source
        whole = self.load(path, products=True)
        part = self.load(path, products=True, shared={"tp_size": self.world})
        used = [module.product is not None for module in part.modules() if hasattr(module, "product")]
        return {"difference": self.difference(part, whole, name), "products": all(used) and len(used) > 0}

    def in_bfloat16(self, name: str, source: str) -> dict[str, Any]:
        path = self.models / name / source
        whole, part = (self.load(path, torch.bfloat16, shared) for shared in (None, {"tp_size": self.world}))
        return {"difference": self.difference(part, whole, name)}

    def stored_experts(self, name: str, source: str) -> dict[str, Any]:
        path = self.models / name / source
        options = {"experts": "stored"}
        whole, part = self.load(path, **options), self.load(path, shared={"tp_size": self.world}, **options)
        planned = [part.tightfit.plan.bytes, whole.tightfit.plan.bytes]
        return {"difference": self.difference(part, whole, name), "planned": planned}

    def generate(self, name: str, source: str, how: str) -> dict[str, Any]:
        path = self.models / name / source
        answers = []
        for shared in (None, {how: self.world}):
            model = self.load(path, shared=shared)
            given = self.tokens(name)[:1, :5]
            answer = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=8, min_new_tokens=8, do_sample=False
            )
            answers.append(answer[0].tolist())
        return {"answers": answers}

    def as_tp_plan(self, name: str, source: str) -> dict[str, Any]:
        """The argument of older versions, which newer ones take too."""
        path = self.models / name / source
        config = TightfitConfig(bnb_4bit_compute_dtype=torch.float32)
        part = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=config, tp_plan="auto"
        )
        return {"difference": self.difference(self.ready(part), self.load(path), name)}

    def gradient(self, name: str, source: str) -> dict[str, Any]:
        """That of the embeddings of what is put in."""
        path = self.models / name / source
        gradients = []
        for shared in (None, {"tp_size": self.world}):
            model = self.load(path, shared=shared)
            torch.manual_seed(0)
            embedded = torch.randn(1, 5, model.config.hidden_size, requires_grad=True, device=self.device)
            model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
            gradients.append(embedded.grad)
        return {"equal": torch.allclose(*gradients, rtol=1e-3, atol=1e-7), "some": bool(gradients[0].any())}

    def pipeline(self, name: str, source: str) -> dict[str, Any]:
        path = self.models / name / source
        whole, part = self.load(path), self.load(path, shared={"pp_size": self.world})
        layers = {module.__class__.__name__ for module in part.model.layers}
        return {
            "difference": self.difference(part, whole, name),
            "layers": sorted(layers),
            "planned": [part.tightfit.plan.bytes, whole.tightfit.plan.bytes],
        }

    def fsdp(self, name: str, source: str, double: str = "") -> dict[str, Any]:
        path = self.models / name / source
        options = {"bnb_4bit_use_double_quant": bool(double)}
        whole = self.load(path, **options)
        storage = {"bnb_4bit_quant_storage": torch.float32}
        part = self.load(path, shared={"fsdp_size": self.world}, **storage, **options)
        sharded = [parameter for _, parameter in part.named_parameters() if hasattr(parameter, "to_local")]
        kept = sum(parameter.to_local().numel() for parameter in sharded)
        is_all = len(sharded) == len(list(part.parameters()))
        return {
            # Twice: layers are gathered, and given back.
            "difference": max(self.difference(part, whole, name) for _ in range(2)),
            "sharded": is_all,
            "share": kept / sum(parameter.numel() for parameter in sharded),
            "peak": part.tightfit.memory[0].peak_reserved / whole.tightfit.memory[0].peak_reserved,
            "read": [model.tightfit._model.report()["load"]["bytes_read"] for model in (part, whole)],
        }

    def qlora(self, name: str, source: str) -> dict[str, Any]:
        """Adapters on a model that is loaded when it has been sharded, against the same in one process."""
        import peft
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        path = self.models / name / source

        def adapted(**options: Any) -> Any:
            config = TightfitConfig(products=False, **options)
            placed = {"device_map": {"": self.device}} if config.options.materialize else {}
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16, quantization_config=config, **placed
            )
            model = peft.prepare_model_for_kbit_training(self.ready(model), use_gradient_checkpointing=False)
            return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))

        # What PEFT would cast is f32 at once.
        whole = adapted(purpose="qlora")
        part = adapted(materialize=False, bnb_4bit_quant_storage=torch.float32)
        assert all(parameter.is_meta for parameter in part.parameters())
        for layer in part.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(part)
        materialize(part)
        begins = {"lora_A": False, "lora_B": False}
        for key, parameter in part.named_parameters():
            local = parameter.to_local()
            if not parameter.requires_grad:
                continue
            (which,) = [which for which in begins if which in key]
            begins[which] |= bool(local.any())
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) / 20
            values = values.to(self.device)
            local.detach().copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements).to_local())
            whole.get_parameter(key).data.copy_(values)
        losses = []
        for model in (whole, part):
            model.train()
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
            for _ in range(3):
                loss = model(input_ids=self.tokens(name), labels=self.tokens(name)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        memory = [model.get_base_model().tightfit.memory[0].peak_reserved for model in (part, whole)]
        return {"losses": [losses[:3], losses[3:]], "begins": begins, "peak": memory[0] / memory[1]}

    def refused(self, name: str, source: str) -> dict[str, Any]:
        """What all refuse though only one of them would, each in its own words."""
        path = self.models / name / source
        shared = {"tp_size": self.world}
        told = {}

        def attempt(what: str, step: Callable[[], Any]) -> None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - it is looked at
                told[what] = [type(error).__name__, str(error)]
                if isinstance(error, OtherProcessError):
                    told[what].append(str(error.rank))

        small = {"devices": ["cpu:100KiB"]} if self.rank == 1 else {}
        attempt("memory", lambda: self.load(path, shared=shared, **small))
        attempt("storage", lambda: self.load(path, shared={"fsdp_size": self.world}))
        attempt("both", lambda: self.load(path, shared={"fsdp_size": self.world, "tp_size": self.world}))
        other = self.models / ("qwen2_tied" if self.rank == 1 else name) / source
        attempt("model", lambda: self.load(other, shared=shared))
        part = self.load(path, shared=shared)
        attempt("save", lambda: part.save_pretrained(path.parent / "saved"))
        return told


def dense(module: Any) -> Any:
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def main() -> None:
    models, output, *names = sys.argv[1:]
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    checks = Checks(Path(models))
    found = {}
    for name in names:
        check, *arguments = name.split(":")
        found[name] = getattr(checks, check)(*arguments)
    Path(output, f"{checks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert tightfit.__version__
    main()
