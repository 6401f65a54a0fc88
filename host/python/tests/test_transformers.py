"""Models of transformers, against stock transformers with bitsandbytes in the same process."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, core_model_loading  # noqa: E402

import tightfit  # noqa: E402
import tightfit.torch  # noqa: E402
import tightfit.transformers  # noqa: E402
from tightfit.transformers import TightfitConfig, installed  # noqa: E402

SOURCES = ["bf16", "nf4", "nf4_dq"]
# transformers 5.6.0 computes other logits than the golden ones for it, also unquantized.
MODELS = [name for name in golden.MODELS if name != "qwen3_5_moe"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what transformers reads itself."""
    count = [0]
    read = core_model_loading._materialize_copy

    def counted(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        return read(*arguments, **named)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    return count


def ids(models: Path, name: str) -> Any:
    return safetensors_torch.load_file(models / name / "expected.safetensors")["input_ids"]


def bnb(double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )


def without_repacking(model: Any) -> Any:
    """bitsandbytes on a CPU with AVX-512 replaces weights at the first forward; this machine may have none."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load(path: Path, config: Any = None, **arguments: Any) -> Any:
    if config is not None:
        # transformers takes an explicit None for "not quantized".
        arguments["quantization_config"] = config
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **arguments)
    return without_repacking(model)


def logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def inside(model: Any) -> Iterator[tuple[str, bool]]:
    """For each tensor of a model that is not tiny, whether it lies in Tightfit's reservation."""
    loaded = model.tightfit._model
    starts = [getattr(loaded[name], part).address for name in loaded for part in parts(loaded[name])]
    low = min(starts)
    high = low + loaded.memory[0].reserved
    for name, value in model.state_dict().items():
        if "quant_map" not in name and "quant_state" not in name and value.numel() > 1:
            yield name, low <= value.data_ptr() < high


def parts(weight: Any) -> list[str]:
    return [part for part in ("data", "codes", "absmax", "nested_absmax") if hasattr(weight, part)]


def equal_states(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    assert set(a) == set(b)
    different = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    return different == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_stocks_to_the_bit_and_transformers_reads_nothing(
    golden_models: Path, reads: list[int], name: str, source: str
) -> None:
    path = golden_models / name / source
    stock = load(path, bnb() if source == "bf16" else None)
    assert reads[0] > 0
    reads[0] = 0
    ours, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        quantization_config=TightfitConfig(products=False, experts="stored"),
        output_loading_info=True,
    )
    assert reads[0] == 0
    assert not any(info.values()), info
    without_repacking(ours)
    assert type(ours) is type(stock)
    assert equal_states(ours, stock)
    assert torch.equal(logits(ours, ids(golden_models, name)), logits(stock, ids(golden_models, name)))
    assert ours.get_memory_footprint() == stock.get_memory_footprint()
    assert ours.config.quantization_config.to_dict() == stock.config.quantization_config.to_dict()
    assert ours.is_loaded_in_4bit and ours.quantization_method == stock.quantization_method
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in stock.named_parameters()
    }
    if name in golden.DENSE:
        assert all(is_inside for _, is_inside in inside(ours))


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_device_maps_are_taken_as_ever(llama: Path, device_map: Any) -> None:
    stock, ours = load(llama, bnb(), device_map=device_map), load(llama, TightfitConfig(), device_map=device_map)
    assert getattr(ours, "hf_device_map", None) == getattr(stock, "hf_device_map", None)
    assert equal_states(ours, stock)


def test_the_plan_and_its_memory_are_told(llama: Path) -> None:
    model = load(llama, TightfitConfig(devices=["sim:64MiB"]), device_map="auto")
    (memory,) = model.tightfit.memory
    assert memory.name == "sim:0"
    assert memory.reserved == memory.peak_reserved == model.tightfit.plan.bytes
    assert model.tightfit.plan["model.layers.0.mlp.up_proj.weight"].format == "nf4"


def test_what_does_not_fit_is_told_before_anything_is_read(llama: Path, reads: list[int]) -> None:
    with pytest.raises(tightfit.OutOfMemory) as error:
        load(llama, TightfitConfig(devices=["sim:100KiB"]), device_map="auto")
    assert error.value.device == "sim:0" and error.value.missing > 0
    assert reads[0] == 0


def test_programs_that_make_bitsandbytes_configuration_are_unchanged(golden_models: Path, reads: list[int]) -> None:
    path = golden_models / "llama"
    stock = load(path / "bf16", bnb(double=True))
    reads[0] = 0
    with installed():
        ours = load(path / "bf16", bnb(double=True))
        again = load(path / "nf4_dq")
    assert reads[0] == 0
    assert ours.tightfit.plan["model.layers.0.mlp.up_proj.weight"].format == "nf4+double"
    assert again.tightfit.plan["model.layers.0.mlp.up_proj.weight"].format == "stored"
    # bitsandbytes on a CPU takes a few 8-bit scales from a coarse table.
    difference = (logits(ours, ids(golden_models, "llama")) - logits(stock, ids(golden_models, "llama"))).abs().max()
    assert difference < 0.05
    load(path / "bf16", bnb())
    assert reads[0] > 0, "undone"


def test_fp4_stays_bitsandbytes_own(llama: Path, reads: list[int]) -> None:
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with installed():
        assert not hasattr(load(llama, fp4), "tightfit")
    assert reads[0] > 0
    with pytest.raises(ValueError, match="NF4"):
        load(llama, TightfitConfig(bnb_4bit_quant_type="fp4"))


@pytest.mark.parametrize(
    ("config", "arguments", "error"),
    [
        (lambda: TightfitConfig(load_in_8bit=True), {}, "8bit"),
        (lambda: TightfitConfig(llm_int8_enable_fp32_cpu_offload=True), {"device_map": {"": "disk"}}, "disk"),
    ],
)
def test_what_cannot_be_is_refused(llama: Path, config: Callable[[], Any], arguments: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load(llama, config(), **arguments)


def test_plain_tensors_are_cast_on_the_way(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16, quantization_config=TightfitConfig())
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16, quantization_config=bnb())
    assert model.lm_head.weight.dtype == torch.float16
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
    assert model.tightfit.plan["lm_head.weight"].format == "cast:f16"
    assert dict(inside(model))["lm_head.weight"]


def test_copies_and_files_of_a_model_are_independent_of_it(llama: Path, golden_models: Path) -> None:
    model = load(llama, TightfitConfig())
    expected = logits(model, ids(golden_models, "llama"))
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    memory = model.tightfit._model
    del model
    gc.collect()
    assert memory.memory[0].reserved > 0
    memory.unload()
    assert memory.memory[0].reserved == 0, "nothing of a copy is in the reservation"
    assert torch.equal(logits(copied, ids(golden_models, "llama")), expected)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids(golden_models, "llama")), expected)


def test_it_is_saved_as_bitsandbytes_would(llama: Path, golden_models: Path, tmp_path: Path) -> None:
    model = load(llama, TightfitConfig())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert equal_states(again, model)
    assert torch.equal(logits(again, ids(golden_models, "llama")), logits(model, ids(golden_models, "llama")))


def test_a_state_dict_is_bitsandbytes(golden_models: Path) -> None:
    for source in SOURCES:
        path = golden_models / "qwen2_tied" / source
        model = tightfit.load(path, "cpu")
        config = AutoConfig.from_pretrained(path)
        config.quantization_config = bnb(double=source == "nf4_dq").to_dict()
        made = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=config, state_dict=tightfit.torch.state_dict(model), dtype=torch.bfloat16
        )
        assert equal_states(made, load(path, bnb() if source == "bf16" else None))
