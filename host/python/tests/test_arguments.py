"""Arguments of `from_pretrained` that transformers keeps to itself: they count as they do for stock."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import test_transformers as whole  # noqa: E402
from test_transformers import bnb, equal_states, load  # noqa: E402

import tightfit  # noqa: E402
from tightfit.transformers import TightfitConfig, _caller, placement  # noqa: E402

reads = whole.reads

MAPPING = {r"^net\.blocks\.": "model.layers.", r"\.ffn\.": ".mlp."}


def renamed(source: Path, target: Path) -> Path:
    """A checkpoint whose names are others than the model's."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors.update(whole.safetensors_torch.load_file(file))
    names = {name: name.replace("model.layers.", "net.blocks.").replace(".mlp.", ".ffn.") for name in tensors}
    assert sum(name != names[name] for name in names) > 10
    named = {names[name]: tensor for name, tensor in tensors.items()}
    whole.safetensors_torch.save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("source", ["bf16", "nf4"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_key_mapping_renames(golden_models: Path, tmp_path: Path, reads: list[int], name: str, source: str) -> None:
    path = renamed(golden_models / name / source, tmp_path / "m")
    stock = load(path, bnb() if source == "bf16" else None, key_mapping=MAPPING)
    reads[0] = 0
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        quantization_config=TightfitConfig(experts="stored"),
        key_mapping=MAPPING,
        output_loading_info=True,
    )
    assert reads[0] == 0 and not any(info.values()), info
    assert equal_states(ours, stock)
    if name == "llama":
        assert ours.tightfit.plan["net.blocks.0.ffn.up_proj.weight"].format == ("nf4" if source == "bf16" else "stored")


def test_max_memory_bounds_the_plan(llama: Path, reads: list[int]) -> None:
    model = load(llama, TightfitConfig(), device_map="auto", max_memory={"cpu": "64MiB"})
    (device,) = model.tightfit.plan.devices
    assert (device.name, device.available) == ("cpu", 64 << 20)
    for max_memory in [{"cpu": "100KB"}, {"cpu": 100_000}]:
        with pytest.raises(tightfit.OutOfMemory) as error:
            load(llama, TightfitConfig(), device_map="auto", max_memory=max_memory)
        assert error.value.have <= 100_000
    assert reads[0] == 0


def test_max_memory_says_nothing_without_a_policy_to_ask(llama: Path) -> None:
    for device_map in [None, "cpu", {"": "cpu"}]:
        # As stock, for which only a map that it makes is bounded.
        if device_map != "cpu":
            load(llama, TightfitConfig(), device_map=device_map, max_memory={"cpu": "100KB"})
            load(llama, bnb(), device_map=device_map, max_memory={"cpu": "100KB"})


def test_max_memory_that_cannot_be_is_refused(llama: Path) -> None:
    for max_memory, error in [
        ({"cpu": "1GiB", "disk": "1GiB"}, "disk"),
        ({"cpu": 0, "mps": "1GiB"}, "mps"),
        ({0: 0}, "no device"),
    ]:
        with pytest.raises(ValueError, match=error):
            load(llama, TightfitConfig(), device_map="auto", max_memory=max_memory)
    with pytest.raises(ValueError, match="twice"):
        load(llama, TightfitConfig(devices=["cpu"]), device_map="auto", max_memory={"cpu": "1GiB"})


def test_devices_of_max_memory() -> None:
    both = {1: "2GiB", "cpu": "8GiB", 0: 10**9, 2: 0}
    assert placement.limited(both, False) == ["cuda:0:1000000000", "cuda:1:2147483648"]
    assert placement.limited(both, True) == ["cuda:0:1000000000", "cuda:1:2147483648", "cpu:8589934592"]
    assert placement.limited({"cpu": 5}, False) == ["cpu:5"]


def test_a_state_dict_keeps_max_memory(llama: Path, golden_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    from transformers.integrations import accelerate

    made = accelerate._get_device_map

    def noted(model: Any, device_map: Any, max_memory: Any, quantizer: Any) -> Any:
        seen.append(max_memory)
        return made(model, device_map, max_memory, quantizer)

    monkeypatch.setattr(accelerate, "_get_device_map", noted)
    config = transformers.AutoConfig.from_pretrained(golden_models / "llama" / "nf4")
    state = tightfit.torch.state_dict(tightfit.load(golden_models / "llama" / "nf4", "cpu"))
    with tightfit.transformers.installed():
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, device_map="auto", max_memory={"cpu": "1GiB"}
        )
    assert seen and all(max_memory == {"cpu": 1 << 30} for max_memory in seen)


def test_the_caller_is_known_in_this_version() -> None:
    assert _caller.problems() == []
    assert _caller.asked() == {}
