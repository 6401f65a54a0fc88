"""Checkpoints that stock transformers saved after it had computed on a processor with bfloat16 instructions."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import golden
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

import test_transformers as whole  # noqa: E402
from bitsandbytes import functional  # noqa: E402
from test_transformers import bnb, load  # noqa: E402

import tightfit  # noqa: E402
from tightfit.transformers import TightfitConfig  # noqa: E402


def used_and_saved(model: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Saves a model as bitsandbytes leaves it after a forward on such a processor; gives codes and states of before.

    What it does there needs no such processor: the packing is Python.
    """
    before = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            before[f"{name}.weight"] = module.weight.data.clone(), copy.deepcopy(state)
            if state.shape[0] % 32 == 0:
                module.weight.data, _ = functional._convert_weight_packed_for_cpu(module.weight.data, state)
    model.save_pretrained(path)
    return before


@pytest.mark.parametrize("name", golden.DENSE)
def test_rounded_scales_are_read_in_their_order(
    golden_models: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock = load(golden_models / name / "bf16", bnb())
    before = used_and_saved(stock, tmp_path)
    saved = whole.safetensors_torch.load_file(tmp_path / "model.safetensors")
    rounded = [key for key in before if saved[f"{key}.absmax"].dtype == torch.bfloat16]
    if not rounded:
        pytest.skip("this bitsandbytes saves scales as they were")
    with caplog.at_level(logging.WARNING, logger="tightfit"):
        model = load(tmp_path, TightfitConfig(products=False))
    assert any("scales of 16 bits" in record.getMessage() for record in caplog.records)
    for key, (codes, state) in before.items():
        weight = model.get_submodule(key.removesuffix(".weight")).weight
        assert torch.equal(weight.data, codes), key
        expected = state.absmax
        if key in rounded:
            expected = expected.to(torch.bfloat16).float()
        assert weight.quant_state.absmax.dtype == torch.float32
        assert torch.equal(weight.quant_state.absmax, expected), key
        # bitsandbytes takes what it has written for something else.
        of_blocks = [key for key in rounded if saved[f"{key}.absmax"].shape[0] > 1]
    assert of_blocks
    assert all(is_inside for _, is_inside in whole.inside(model))


def test_it_is_saved_as_bitsandbytes_reads_it(golden_models: Path, tmp_path: Path) -> None:
    used_and_saved(load(golden_models / "llama" / "bf16", bnb()), tmp_path / "used")
    model = load(tmp_path / "used", TightfitConfig(products=False))
    model.save_pretrained(tmp_path / "saved")
    tightfit.save(tmp_path / "used", tmp_path / "written")
    again = load(tmp_path / "saved")
    assert whole.equal_states(again, model)
    assert whole.equal_states(load(tmp_path / "written"), model)
    ids = whole.ids(golden_models, "llama")
    assert torch.equal(whole.logits(again, ids), whole.logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_double_quantized_scales_are_what_bitsandbytes_makes_of_them(
    golden_models: Path, tmp_path: Path, dtype: Any
) -> None:
    arguments = {"dtype": dtype, "quantization_config": bnb(double=True)}
    stock = transformers.AutoModelForCausalLM.from_pretrained(golden_models / "llama" / "bf16", **arguments)
    used_and_saved(stock, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = tightfit.load(tmp_path, "cpu")
    checked = 0
    for name, module in again.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        weight, state = model[f"{name}.weight"], module.weight.quant_state
        scales = functional.dequantize_blockwise(state.absmax, state.state2)
        scales += state.offset
        # Those in f32 keep their form.
        assert (weight.absmax_mean is not None) == (dtype == torch.float32)
        if dtype != torch.float32:
            assert torch.equal(tightfit.torch.tensor(weight.absmax), scales.float()), name
            checked += 1
    assert checked == (0 if dtype == torch.float32 else 14)
    # Written as bitsandbytes reads it: the same weights.
    tightfit.save(tmp_path, tmp_path / "written")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=dtype)
    for name, module in again.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            other = written.get_submodule(name).weight
            assert torch.equal(dense(other), dense(module.weight)), name


def dense(weight: Any) -> Any:
    return functional.dequantize_4bit(weight.data, weight.quant_state)
