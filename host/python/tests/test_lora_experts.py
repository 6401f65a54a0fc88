"""LoRA on experts in 4 bits, beside PEFT's own on the same weights in float."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

import test_experts  # noqa: E402
import test_transformers as whole  # noqa: E402
from test_experts import modules_of, sketch  # noqa: E402
from test_products import load  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from tightfit.transformers import TightfitConfig  # noqa: E402
from tightfit.transformers.experts import Stack4bit  # noqa: E402

STACKS = ["gate_up_proj", "down_proj"]
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": STACKS},
}
IDS = torch.arange(24).reshape(2, 12)


def config(targets: str = "parameters", rank: int = 4, **options: Any) -> Any:
    # Not zero at first, so that all adapters have gradients.
    options = {"init_lora_weights": False, "lora_alpha": 8, **TARGETS[targets], **options}
    return peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **options)


def adapted(model: Any, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(model, config(*arguments, **options))


def in_float(path: Path, model: Any) -> Any:
    """transformers' own model, with the weights that a model in 4 bits has."""
    from bitsandbytes.functional import dequantize_4bit

    dense = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Stack4bit):
                stack = torch.stack([module.dequantize(expert, torch.float32) for expert in range(len(module))])
                dense.get_parameter(name).copy_(stack)
            elif hasattr(module, "quant_state"):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                dense.get_submodule(name).weight.copy_(weight)
    return dense


def gradients(model: Any) -> dict[str, Any]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def of_experts(names: Any) -> list[str]:
    return [name for name in names if ".experts." in name and "lora_" in name]


def assert_close(have: Any, want: Any, what: str = "") -> None:
    assert have.shape == want.shape and want.abs().max() > 0, what
    assert (have - want).abs().max() <= 1e-4 * want.abs().max(), what


def compare(dense: Any, ours: Any, saved: Path) -> None:
    """Stock PEFT on stock transformers reads what ours has saved, computes the same, and has the same gradients."""
    ours.save_pretrained(saved)
    stock = peft.PeftModel.from_pretrained(dense, saved, is_trainable=True)
    assert_close(whole.logits(ours, IDS), whole.logits(stock, IDS))
    found, expected = gradients(ours), gradients(stock)
    assert set(found) == set(expected) and found
    for key, value in expected.items():
        assert_close(found[key], value, key)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", test_experts.MODELS)
def test_stock_reads_it_and_has_its_logits_and_gradients(
    golden_models: Path, tmp_path: Path, name: str, targets: str
) -> None:
    path = golden_models / name / "bf16"
    model = load(path, True)
    dense, ours = in_float(path, model), adapted(model, targets)
    own = [
        {key: value.shape for key, value in of.state_dict().items() if "lora_" in key}
        for of in (ours, adapted(copy.deepcopy(dense), targets))
    ]
    # PEFT knows for which families all-linear means experts too.
    assert own[0] == own[1] and (of_experts(own[0]) or (name, targets) == ("qwen3_5_moe", "all-linear"))
    compare(dense, ours, tmp_path)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("kind", ["gpt_oss", "olmoe", "fused"])
def test_so_it_is_with_other_families(kind: str, products: bool, tmp_path: Path) -> None:
    path = sketch(kind, tmp_path / "model")
    model = load(path, products, bnb_4bit_use_double_quant=True)
    dense, ours = in_float(path, model), adapted(model)
    compare(dense, ours, tmp_path / "adapter")


@pytest.mark.parametrize("name", test_experts.MODELS)
def test_it_is_read_again(golden_models: Path, tmp_path: Path, name: str) -> None:
    path = golden_models / name / "bf16"
    ours = adapted(load(path, True), "all-linear")
    ours.save_pretrained(tmp_path)
    want = whole.logits(ours, IDS)
    again = peft.PeftModel.from_pretrained(load(path, True), tmp_path)
    assert torch.equal(whole.logits(again, IDS), want)
    if test_experts.IS_OLD and name != "qwen3_5_moe":
        # transformers through 5.6.0 loads no adapter onto a model whose experts it has put together.
        return
    model = load(path, True)
    plain = whole.logits(model, IDS)
    model.load_adapter(str(tmp_path))
    assert torch.equal(whole.logits(model, IDS), want) and not torch.equal(plain, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(golden_models: Path, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = load(golden_models / "qwen3_moe" / "bf16", True)
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model = adapted(model).train()
        assert model.get_base_model().is_gradient_checkpointing == checkpointing
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and of_experts(found[0])
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


def test_training_changes_adapters_only(golden_models: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        golden_models / "qwen3_moe" / "bf16", dtype=torch.bfloat16, quantization_config=TightfitConfig()
    )
    model = adapted(peft.prepare_model_for_kbit_training(model), "all-linear", init_lora_weights=True).train()
    names = of_experts(name for name, _ in model.named_parameters())
    assert all(model.get_parameter(name).dtype == torch.float32 for name in names)
    before = {key: value.detach().clone() for key, value in model.state_dict().items() if hasattr(value, "detach")}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5, losses
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {key for key in before if "lora_" in key} and set(names) <= changed


class Largest(TorchDispatchMode):  # type: ignore[misc]
    """How many elements the largest tensor of floats has that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("products", [True, False])
def test_nothing_of_it_is_dense(tmp_path: Path, products: bool) -> None:
    path = sketch("fused", tmp_path)
    model = load(path, products)
    stack = modules_of(model)[0].gate_up_proj
    dense, ours = in_float(path, model), adapted(model)
    with Largest() as of_ours:
        gradients(ours)
    # One expert at a time, where it is bitsandbytes that dequantizes.
    assert of_ours.elements < stack.shape.numel() // 2
    stock = adapted(dense)
    with Largest() as of_stock:
        gradients(stock)
    assert of_stock.elements >= stack.shape.numel()


def test_adapters_are_switched_added_and_taken_off(golden_models: Path) -> None:
    path = golden_models / "qwen3_moe" / "bf16"
    model = load(path, True)
    plain = whole.logits(model, IDS)
    dense, ours = in_float(path, model), adapted(model)
    first = whole.logits(ours, IDS)
    ours.add_adapter("second", config())
    assert torch.equal(whole.logits(ours, IDS), first)
    ours.set_adapter("second")
    second = whole.logits(ours, IDS)
    ours.base_model.set_adapter(["default", "second"])
    both = whole.logits(ours, IDS)
    reference = peft.get_peft_model(dense, config())
    reference.add_adapter("second", config())
    reference.load_state_dict({key: value for key, value in ours.state_dict().items() if "lora_" in key}, strict=False)
    reference.base_model.set_adapter(["default", "second"])
    assert_close(both, whole.logits(reference, IDS))
    with ours.disable_adapter():
        assert torch.equal(whole.logits(ours, IDS), plain)
    assert len({tuple(each.flatten().tolist()) for each in (plain, first, second, both)}) == 4
    ours.delete_adapter("second")
    ours.set_adapter("default")
    assert torch.equal(whole.logits(ours, IDS), first)
    assert torch.equal(whole.logits(ours.unload(), IDS), plain)


def test_copies_and_files_have_it_too(golden_models: Path) -> None:
    ours = adapted(load(golden_models / "qwen3_moe" / "bf16", True))
    want = whole.logits(ours, IDS)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert (whole.logits(other, IDS) - want).abs().max() < 1e-5


def test_what_cannot_be_is_said(golden_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(golden_models / "qwen3_moe" / "bf16", True)
    plain = whole.logits(model, IDS)
    with pytest.raises(ValueError, match=r"target_parameters=\['gate_up_proj', 'down_proj'\]"):
        adapted(model, target_modules=["experts"], target_parameters=None)
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted(model, lora_dropout=0.1, target_modules=[])
    # The stacks are back in their places.
    assert torch.equal(whole.logits(model, IDS), plain)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted(load(golden_models / "qwen3_moe" / "bf16", True)).merge_and_unload()
    monkeypatch.delattr(peft.LoraConfig, "_register_custom_module")
    for targets in TARGETS:
        with pytest.raises(RuntimeError, match=r"no LoraConfig\._register_custom_module.*experts='stored'"):
            adapted(load(golden_models / "qwen3_moe" / "bf16", True), targets)
    # All else is as it was.
    adapted(load(golden_models / "llama" / "bf16", True), "all-linear")
    adapted(load(golden_models / "qwen3_moe" / "bf16", True), target_parameters=None)


def test_without_peft_it_is_loaded_all_the_same(golden_models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "peft"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('of another age')")
    path = golden_models / "qwen3_moe" / "bf16"
    program = (
        "import sys, transformers; from tightfit.transformers import TightfitConfig\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}, quantization_config=TightfitConfig())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "experts take no adapters, for PEFT cannot be imported: of another age" in done.stderr


def test_experts_as_they_are_stay_pefts_own(golden_models: Path, tmp_path: Path) -> None:
    path = golden_models / "qwen3_moe" / "bf16"
    model = load(path, True, experts="stored")
    dense, ours = in_float(path, model), adapted(model)
    wrappers = [module for module in ours.modules() if type(module).__name__ == "ParamWrapper"]
    assert {type(module).__module__ for module in wrappers} == {"peft.tuners.lora.layer"}
    compare(dense, ours, tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", *golden.DENSE[:1]])
def test_room_is_left_for_adapters_on_experts(golden_models: Path, name: str) -> None:
    path = golden_models / name / "bf16"
    found = [load(path, True, purpose="qlora", lora_rank=4, lora_experts=each) for each in (False, True)]
    without, has = (model.tightfit.headroom["lora"] for model in found)
    ours = adapted(found[1], "all-linear")
    own = {key: value.numel() for key, value in ours.named_parameters() if value.requires_grad and ".gate." not in key}
    assert has == 4 * sum(own.values())
    assert has - without == 4 * sum(own[key] for key in of_experts(own))
