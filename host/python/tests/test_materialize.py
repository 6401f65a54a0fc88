"""Models that are loaded later than they are made, in one process. Under FSDP2: `test_shared.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

from transformers import AutoModelForCausalLM  # noqa: E402

from tightfit.transformers import TightfitConfig, materialize  # noqa: E402


def load(path: Path, dtype: Any = torch.bfloat16, device_map: Any = None, **options: Any) -> Any:
    config = TightfitConfig(products=False, **options)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map=device_map)


def as_bytes(tensor: Any) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("source", ["bf16", "nf4_dq"])
@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_it_is_the_model_that_is_loaded_at_once(golden_models: Path, name: str, source: str) -> None:
    path = golden_models / name / source
    later = load(path, materialize=False, bnb_4bit_quant_storage=torch.bfloat16)
    assert all(parameter.is_meta for parameter in later.parameters())
    assert not any(buffer.is_meta for buffer in later.buffers())
    materialize(later)
    at_once = load(path, bnb_4bit_quant_storage=torch.bfloat16)
    have, want = later.state_dict(), at_once.state_dict()
    assert set(have) == set(want)
    # Codes that are seen as bf16 may be NaN.
    assert all(torch.equal(as_bytes(have[key]), as_bytes(value)) for key, value in want.items())
    assert [type(each) for each in later.parameters()] == [type(each) for each in at_once.parameters()]
    assert later.tightfit.plan.bytes == later.tightfit.memory[0].peak_reserved
    for module in at_once.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # bitsandbytes would replace the weights at the first forward, and multiply otherwise.
            module.support_avx512bf16_for_cpu = False
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(later(tokens).logits, at_once(tokens).logits)
    with pytest.raises(ValueError, match="nothing is left"):
        materialize(later)


def test_what_changed_meanwhile_counts(llama: Path) -> None:
    later = load(llama, materialize=False)
    for parameter in later.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(torch.float32)
    materialize(later)
    assert later.get_input_embeddings().weight.dtype == torch.float32
    at_once = load(llama)
    assert torch.equal(later.get_input_embeddings().weight, at_once.get_input_embeddings().weight.float())


def test_what_there_is_no_way_for(llama: Path, golden_models: Path) -> None:
    with pytest.raises(ValueError, match="device_map"):
        load(llama, materialize=False, device_map="auto")
    with pytest.raises(ValueError, match="Merge|later"):
        load(golden_models / "mixtral" / "bf16", materialize=False)
    with pytest.raises(ValueError, match="nothing is left"):
        materialize(load(llama))
