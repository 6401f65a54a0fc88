"""Fused experts of transformers' models in 4 bits."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path
from typing import Any

import golden
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import test_transformers as whole  # noqa: E402
from test_products import close, load, random  # noqa: E402

import tightfit  # noqa: E402
from tightfit.ops import Product, experts  # noqa: E402
from tightfit.transformers.experts import Experts4bit, Stack4bit  # noqa: E402

# Through transformers 5.6.0 qwen3_5_moe has other logits than the golden ones, also unquantized.
IS_OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 10)
MODELS = [name for name in golden.MODELS if name not in golden.DENSE and not (IS_OLD and name == "qwen3_5_moe")]

reads = whole.reads


def modules_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Experts4bit)]


def truth(golden_models: Path, name: str, source: str) -> Any:
    expected = whole.safetensors_torch.load_file(golden_models / name / "expected.safetensors")
    return expected["logits_nf4_dq_with_experts_f32" if source == "nf4_dq" else "logits_nf4_with_experts_f32"]


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("source", whole.SOURCES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_golden_ones_and_transformers_reads_nothing(
    golden_models: Path, reads: list[int], name: str, source: str, products: bool
) -> None:
    model = load(golden_models / name / source, products)
    assert reads[0] == 0
    modules = modules_of(model)
    assert len(modules) == model.config.num_hidden_layers and model.tightfit.skipped == {}
    assert all((module.layer is not None) == products for module in modules)
    assert all("experts" not in name or value.dim() < 3 for name, value in model.named_parameters())
    have = whole.logits(model, whole.ids(golden_models, name))
    # As the library's own tests: of one offset for a fused stack, and bitsandbytes' coarse table.
    tolerance = {"qwen3_5_moe": 5e-2}.get(name, 8e-3) if source == "nf4_dq" else 2e-5
    assert (have - truth(golden_models, name, source)).abs().max() < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_all_of_it_is_in_the_reservation(golden_models: Path, name: str) -> None:
    model = load(golden_models / name / "bf16", True)
    outside = [key for key, is_inside in whole.inside(model) if not is_inside]
    assert outside == []
    stacks = [module for module in model.modules() if isinstance(module, Stack4bit)]
    held = sum(buffer.numel() * buffer.element_size() for stack in stacks for buffer in stack.buffers())
    elements = sum(stack.shape.numel() for stack in stacks)
    assert held == elements // 2 + elements // 64 * 4


@pytest.mark.parametrize("source", ["bf16", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_with_a_key_each_are_one_tensor_in_memory(golden_models: Path, name: str, source: str) -> None:
    model = load(golden_models / name / source, True)
    for module in modules_of(model):
        for leaf in ("gate_up_proj", "down_proj"):
            stack = getattr(module, leaf)
            assert stack.is_whole and {key for key, _ in stack.named_buffers()} == {"codes_0_0", "absmax_0_0"}
            loaded = stack._kept.loaded
            # Each half is where it was found, and what the file has.
            for half, names in enumerate(stack.names):
                for expert, key in enumerate(names if not stack.is_fused else ()):
                    codes, state = stack.matrix(half, expert)
                    assert codes.data_ptr() == loaded[key].codes.address
                    assert state.absmax.data_ptr() == loaded[key].absmax.address
                    assert torch.equal(stack._dequantize(half, expert, torch.float32), dense(loaded[key]))
    # A mean for each expert: these are not.
    double = modules_of(load(golden_models / "qwen3_moe" / "bf16", True, bnb_4bit_use_double_quant=True))[0]
    assert not double.down_proj.is_whole and not double.gate_up_proj.is_whole


def dense(weight: Any) -> Any:
    return torch.from_numpy(weight.dequantize()).to(torch.float32)


def test_a_stack_of_a_loaded_model_is_one_weight(golden_models: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]
    for formats, part in [({}, "codes"), (dict.fromkeys(names, "stored"), "data")]:
        model = tightfit.load(tightfit.plan(golden_models / "qwen3_moe" / "bf16", "cpu", formats=formats))
        stack = model.stack(names)
        assert stack.shape == (8, *model[names[0]].shape) and stack.name == names[0]
        assert getattr(stack, part).address == getattr(model[names[0]], part).address
        assert getattr(stack, part).bytes == 8 * getattr(model[names[0]], part).bytes
        each = torch.stack([dense(model[name]) for name in names])
        assert torch.equal(dense(stack), each)
        assert f"{list(stack.shape)}" in repr(stack)
        if part == "data":
            assert torch.equal(tightfit.torch.tensor(stack).float(), each)
        assert model.stack(names[::-1]) is None and model.stack([]) is None
        with pytest.raises(KeyError, match="nothing"):
            model.stack(["nothing"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("double", [False, True])
def test_one_expert_after_the_other_gives_what_the_layer_does(golden_models: Path, name: str, double: bool) -> None:
    model = load(golden_models / name / "bf16", True, bnb_4bit_use_double_quant=double)
    module = modules_of(model)[0]
    number, hidden = len(module.down_proj), module.down_proj.shape[1]
    x = random(9, hidden)
    ids = torch.stack([torch.randperm(number, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)])
    # What no expert has the number of adds nothing: another process has it.
    ids[4] = number
    weights = random(9, 2, seed=1).abs()
    with torch.no_grad():
        layer = module(x, ids, weights)
    alone = module(x.clone().requires_grad_(True), ids, weights)
    assert alone.requires_grad and close(layer, alone.double())
    assert not layer[4].any()
    dense = {
        leaf: torch.stack([getattr(module, leaf)[expert] for expert in range(number)]).double()
        for leaf in ("gate_up_proj", "down_proj")
    }
    want = torch.zeros(9, hidden, dtype=torch.float64)
    for token, choice in [(token, choice) for token in range(9) for choice in range(2) if token != 4]:
        expert = ids[token, choice]
        gates = module._apply_gate((dense["gate_up_proj"][expert] @ x[token].double())[None])[0]
        want[token] += weights[token, choice] * (dense["down_proj"][expert] @ gates)
    assert close(layer, want)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_dequantized_experts(golden_models: Path, name: str, products: bool) -> None:
    module = modules_of(load(golden_models / name / "bf16", products))[0]
    base = type(module).base
    stock = base(module.config)
    with torch.no_grad():
        for leaf in ("gate_up_proj", "down_proj"):
            stack = getattr(module, leaf)
            whole_stack = torch.stack([stack[expert] for expert in range(len(stack))])
            setattr(stock, leaf, torch.nn.Parameter(whole_stack, requires_grad=False))
    stock.config._experts_implementation = "eager"
    x = random(7, module.down_proj.shape[1])
    ids = torch.stack([torch.randperm(len(module.down_proj))[:2] for _ in range(7)])
    weights = random(7, 2, seed=1).abs()
    found = []
    for of in (module, stock):
        inputs = [x.clone().requires_grad_(True), weights.clone().requires_grad_(True)]
        y = of(inputs[0], ids, inputs[1])
        y.square().sum().backward()
        found.append((y.detach(), *(value.grad for value in inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs.double())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("double", [False, True])
def test_it_is_saved_and_opened_again(golden_models: Path, tmp_path: Path, name: str, double: bool) -> None:
    model = load(golden_models / name / "bf16", True, bnb_4bit_use_double_quant=double)
    ids = whole.ids(golden_models, name)
    model.save_pretrained(tmp_path)
    from tightfit.transformers import TightfitConfig

    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=TightfitConfig(products=True, bnb_4bit_compute_dtype=torch.float32),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert {again.tightfit.plan[key].format for key in again.tightfit.plan} == {"stored"}
    assert torch.equal(whole.logits(again, ids), whole.logits(model, ids))


def test_copies_and_files_are_independent_of_it(golden_models: Path) -> None:
    model = load(golden_models / "qwen3_moe" / "bf16", True)
    ids = whole.ids(golden_models, "qwen3_moe")
    expected = whole.logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    copied, memory = copy.deepcopy(model), model.tightfit._model
    del model
    gc.collect()
    memory.unload()
    assert memory.memory[0].reserved == 0
    file.seek(0)
    for other in [copied, torch.load(file, weights_only=False)]:
        assert len(modules_of(other)) == 2
        assert (whole.logits(other, ids) - expected).abs().max() < 1e-5


def test_it_compiles_without_a_break(golden_models: Path) -> None:
    model = load(golden_models / "mixtral" / "bf16", True)
    ids = whole.ids(golden_models, "mixtral")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole.logits(compiled, ids), whole.logits(model, ids))


def test_experts_can_stay_as_they_are(golden_models: Path) -> None:
    model = load(golden_models / "qwen3_moe" / "bf16", True, experts="stored")
    assert modules_of(model) == [] and model.tightfit.skipped == {}
    skipped = load(golden_models / "qwen3_moe" / "bf16", True, llm_int8_skip_modules=["experts", "lm_head"])
    assert modules_of(skipped) == [] and len(skipped.tightfit.skipped) == 2
    for of in (model, skipped):
        # Where the plan has put them, and not copied together.
        assert [key for key, is_inside in whole.inside(of) if not is_inside] == []
    stock = transformers.AutoModelForCausalLM.from_pretrained(golden_models / "qwen3_moe" / "bf16", dtype=torch.float32)
    for key, value in stock.named_parameters():
        if ".experts." in key:
            assert torch.equal(model.get_parameter(key), value) and not model.get_parameter(key).is_meta


def test_the_operator_is_what_torch_asks_of_operators(golden_models: Path) -> None:
    model = tightfit.load(golden_models / "qwen3_5_moe" / "bf16", "cpu")
    of = {
        leaf: [name for name in model if ".layers.0." in name and ".experts." in name and leaf in name]
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    names = [of["gate_proj"], of["up_proj"]], of["down_proj"]
    layer = Product(model.experts(*names, "silu"))
    x, ids, weights = random(5, layer.native.hidden), torch.zeros(5, 2, dtype=torch.int64), random(5, 2)
    torch.library.opcheck(torch.ops.tightfit.experts.default, (x, ids, weights, None, None, layer.handle))
    for wrong in [
        (x[:, 1:], ids, weights),
        (x, ids[:3], weights),
        (x, ids, weights[:, :1]),
        (x, ids, weights, random(2, 2 * layer.native.intermediate)),
    ]:
        with pytest.raises(ValueError, match="tightfit"):
            experts(layer, *wrong)
    with pytest.raises(tightfit.UsageError, match="activation"):
        model.experts(*names, "clamped")
    with pytest.raises(tightfit.UsageError, match="shape"):
        model.experts([names[1]], names[1], "silu")


def sketch(kind: str, tmp_path: Path) -> Any:
    """A tiny checkpoint of a family whose experts lie otherwise."""
    common = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"num_key_value_heads": 1, "intermediate_size": 64, "num_experts_per_tok": 2, "eos_token_id": 1}
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(**common, head_dim=32, num_local_experts=4)
        model = transformers.GptOssForCausalLM(config)
    elif kind == "fused":
        config = transformers.Qwen3MoeConfig(**common, head_dim=32, num_experts=4, moe_intermediate_size=64)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.OlmoeConfig(**common, num_experts=4)
        model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    # Stacks as the modules have them, or a key for each expert.
    model.to(torch.bfloat16).save_pretrained(tmp_path, save_original_format=kind != "fused")
    return tmp_path


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("kind", ["gpt_oss", "olmoe", "fused"])
def test_other_families_are_the_dequantized_model(kind: str, products: bool, double: bool, tmp_path: Path) -> None:
    path = sketch(kind, tmp_path)
    model = load(path, products, bnb_4bit_use_double_quant=double)
    assert len(modules_of(model)) == 2, model.tightfit.skipped
    assert all((module.layer is not None) == (products and kind != "gpt_oss") for module in modules_of(model))
    assert any(module.down_proj.is_fused for module in modules_of(model)) == (kind != "olmoe")
    dense = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Stack4bit):
                stack = torch.stack([module[expert] for expert in range(len(module))])
                dense.get_parameter(name).copy_(stack)
            elif hasattr(module, "quant_state"):
                from bitsandbytes.functional import dequantize_4bit

                dense.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    ids = torch.arange(20).reshape(2, 10)
    have, want = whole.logits(model, ids), whole.logits(dense, ids)
    assert (have - want).abs().max() < 1e-4 * want.abs().max()
