"""What Tightfit does not load: refused, or left to transformers with a warning."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
safetensors_torch = pytest.importorskip("safetensors.torch")

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils.deepspeed import HfDeepSpeedConfig  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402
from transformers.integrations import deepspeed  # noqa: E402

from tightfit.transformers import TightfitConfig, installed  # noqa: E402

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def load(path: Path, **arguments: Any) -> Any:
    arguments.setdefault("quantization_config", TightfitConfig())
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **arguments)


@pytest.fixture
def states() -> Iterator[None]:
    """accelerate keeps its state for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_is_refused(llama: Path, stage: int) -> None:
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1})
    if stage == 3:
        deepspeed.set_hf_deepspeed_config(config)
        try:
            with pytest.raises(ValueError, match="ZeRO-3"):
                load(llama)
        finally:
            deepspeed.unset_hf_deepspeed_config()
    assert hasattr(load(llama), "tightfit")


@pytest.mark.parametrize("version", ["1", "2"])
def test_fsdp_2_of_a_launcher_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    if version == "2":
        with installed(), pytest.raises(ValueError, match="FSDP2"):
            load(llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    else:
        assert hasattr(load(llama), "tightfit")


def test_fsdp_2_of_a_program_is_refused(llama: Path, states: None) -> None:
    PartialState(cpu=True)
    # As Accelerator keeps it where there are several processes.
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ValueError, match="FSDP2"):
        load(llama)


def run(program: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


@pytest.mark.parametrize("asked", ["tp_plan", "distributed_config"])
def test_a_tensor_parallel_plan_is_refused_by_versions_that_cut_another_way(llama: Path, asked: str) -> None:
    """Newer ones have nothing to cut for one process."""
    if asked == "tp_plan" and (5, 16) <= VERSION < (5, 20):
        pytest.skip("no argument of this version")
    program = """
        import sys
        import socket
        import os
        import torch
        import tightfit.transformers
        from transformers import AutoModelForCausalLM

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        if sys.argv[2] == "tp_plan":
            asked = {"tp_plan": "auto"}
        else:
            from transformers.distributed import DistributedConfig

            asked = {"distributed_config": DistributedConfig()}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                sys.argv[1],
                dtype=torch.bfloat16,
                quantization_config=tightfit.transformers.TightfitConfig(),
                **asked,
            )
            print("loaded" if hasattr(model, "tightfit") else "not by us")
        except ValueError as error:
            assert "tp_plan" in str(error) and "5.16" in str(error), error
            print("refused")
    """
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ended = run(program, llama, asked, **place)
    expected = "loaded\n" if VERSION >= (5, 16) else "refused\n"
    assert ended.stdout.endswith(expected), ended.stdout + ended.stderr


def test_a_version_whose_seams_differ_loads_by_itself(llama: Path) -> None:
    program = """
        import logging
        import sys
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.core_model_loading import WeightConverter

        logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
        add = WeightConverter.add_tensor
        WeightConverter.add_tensor = lambda self, key, source, pattern, tensor: add(self, key, source, pattern, tensor)
        import tightfit.transformers

        given = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        tightfit.transformers.install()
        for config in (tightfit.transformers.TightfitConfig(), BitsAndBytesConfig(**given)):
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=config)
            assert model.is_loaded_in_4bit and not hasattr(model, "tightfit")
            assert model.quantization_method == "bitsandbytes", model.quantization_method
        tightfit.transformers.uninstall()
        print("loaded")
    """
    ended = run(program, llama)
    assert ended.stdout.endswith("loaded\n"), ended.stdout + ended.stderr
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("WARNING tightfit.transformers ")]
    assert len(warnings) == 2 and all("add_tensor" in line for line in warnings), ended.stdout


@pytest.fixture
def pickled(llama: Path, tmp_path: Path) -> Path:
    """The checkpoint as older ones are: a pickle."""
    tensors: dict[str, Any] = {}
    for file in llama.glob("*.safetensors"):
        tensors.update(safetensors_torch.load_file(file))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(llama / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_pickles_are_left_to_transformers(
    llama: Path, pickled: Path, caplog: pytest.LogCaptureFixture, device_map: Any
) -> None:
    ours = load(llama, device_map=device_map)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "tightfit"):
        model = load(pickled, device_map=device_map)
    (record,) = [record for record in caplog.records if record.name.startswith("tightfit")]
    assert "pytorch_model.bin" in record.getMessage()
    assert not hasattr(model, "tightfit") and model.is_loaded_in_4bit
    assert model.quantization_method == ours.quantization_method
    assert getattr(model, "hf_device_map", None) == getattr(ours, "hf_device_map", None)
    state, expected = model.state_dict(), ours.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_given_state_dict_is_left_to_transformers(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors: dict[str, Any] = {}
    for file in llama.glob("*.safetensors"):
        tensors.update(safetensors_torch.load_file(file))
    config = AutoConfig.from_pretrained(llama)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.bfloat16, quantization_config=TightfitConfig()
    )
    assert "a state dict is given" in caplog.text
    assert not hasattr(model, "tightfit") and model.is_loaded_in_4bit
    expected = load(llama).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("own", [{"policy": "hostile.wasm"}, {"devices": ["cpu"]}, {"settings": {"reserve": "0"}}, {}])
def test_a_checkpoint_does_not_say_how_it_is_loaded(llama: Path, tmp_path: Path, own: dict[str, Any]) -> None:
    """A policy is code: only the caller names it."""
    directory = tmp_path / "model"
    shutil.copytree(llama, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "tightfit", "bnb_4bit_quant_type": "nf4", **own}
    (directory / "config.json").write_text(json.dumps(config))
    if own:
        with pytest.raises(ValueError, match="checkpoint"):
            AutoModelForCausalLM.from_pretrained(directory)
    else:
        assert AutoModelForCausalLM.from_pretrained(directory).is_loaded_in_4bit
