"""Opening, planning, loading and saving, without torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import tightfit

UP = "model.layers.0.mlp.up_proj.weight"


def test_nothing_else_is_imported() -> None:
    code = "import sys, tightfit; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensors_are_listed_before_anything_is_loaded(llama: Path) -> None:
    checkpoint = tightfit.open(llama)
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert len(checkpoint) == len(list(checkpoint)) == len(checkpoint.tensors()) == 21
    tensor = checkpoint[UP]
    assert (tensor.name, tensor.dtype, tensor.shape) == (UP, "BF16", (320, 192))
    assert tensor.bytes == 320 * 192 * 2
    assert tensor.quantized is None
    assert tensor.file in checkpoint.files
    assert UP in checkpoint and "nothing" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["nothing"]
    plan = tightfit.plan(checkpoint, "cpu")
    for mapping in (checkpoint, plan, tightfit.load(plan)):
        assert list(mapping) == list(mapping.keys()) == list(dict(mapping))
        assert [name for name, value in mapping.items() if value.name == name] == list(mapping)
        assert mapping.get(UP).name == UP and mapping.get("nothing") is None and mapping.get("nothing", 3) == 3


def test_what_bitsandbytes_has_quantized_is_one_tensor(golden_models: Path) -> None:
    checkpoint = tightfit.open(golden_models / "llama" / "nf4")
    assert checkpoint.quantization == "bitsandbytes"
    assert checkpoint[UP].quantized == "nf4"
    assert checkpoint[UP].shape == (320, 192)
    assert f"{UP}.absmax" not in checkpoint


def test_a_list_of_files_is_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    files = sorted(llama.glob("*.safetensors"))
    whole, given = tightfit.open(llama), tightfit.open(files)
    assert set(given) == set(whole)
    assert given.architecture == whole.architecture
    part = tightfit.open(files[:1])
    assert set(part) < set(whole)
    # As in the hub's cache: names of their own that lead to files elsewhere.
    for file in files:
        (tmp_path / file.name).symlink_to(file)
    assert set(tightfit.open([tmp_path / file.name for file in files])) == set(whole)
    with pytest.raises(tightfit.CheckpointError):
        tightfit.open([])
    with pytest.raises(tightfit.CheckpointError):
        tightfit.open([llama / "config.json"])


def test_a_plan_is_shown_in_every_form(llama: Path) -> None:
    plan = tightfit.plan(llama, ["sim:64MiB", "sim:64MiB"])
    assert [device.name for device in plan.devices] == ["sim:0", "sim:1"]
    assert plan.bytes == sum(device.reserved for device in plan.devices)
    text = str(plan)
    assert "sim:1" in text and "model.layers" in text
    assert plan._repr_html_().startswith("<svg")
    data = plan.to_dict()
    assert data["devices"][0]["reserved"] == plan.devices[0].reserved
    assert len(data["placements"]) == 21
    json.dumps(data)
    assert plan[UP].format == "nf4"
    assert plan[UP].bytes == 320 * 192 // 2 + 320 * 192 // 64 * 4
    assert sum(tensor.bytes for tensor in plan.tensors()) == sum(device.allocated for device in plan.devices)


def test_what_becomes_of_each_tensor_can_be_said(llama: Path, golden_models: Path) -> None:
    formats = {UP: "stored", "model.norm.weight": "cast:f32", "model.layers.0.mlp.down_proj.weight": "nf4+double"}
    plan = tightfit.plan(llama, "cpu", formats=formats, omit=["lm_head.weight"])
    for name, format in formats.items():
        assert plan[name].format == format
    assert "lm_head.weight" not in plan and len(plan) == 20
    model = tightfit.load(plan)
    assert "lm_head.weight" not in model
    assert model["model.norm.weight"].dtype == "F32"
    assert model["model.norm.weight"].numpy().dtype == numpy.float32
    with pytest.raises(tightfit.UsageError, match="no tensor 'nothing'"):
        tightfit.plan(llama, formats={"nothing": "nf4"})
    with pytest.raises(tightfit.UsageError, match="no tensor 'nothing'"):
        tightfit.plan(llama, omit=["nothing"])
    with pytest.raises(tightfit.UsageError, match="nf5"):
        tightfit.plan(llama, formats={"model.norm.weight": "nf5"})
    with pytest.raises(tightfit.UsageError, match=UP):
        tightfit.plan(golden_models / "llama" / "nf4", formats={UP: "nf4"})


def test_the_plan_that_was_shown_is_the_one_that_is_loaded(llama: Path) -> None:
    plan = tightfit.plan(llama, "sim:64MiB", double_quant=True)
    model = tightfit.load(plan)
    (memory,) = model.memory
    assert memory.reserved == memory.peak_reserved == memory.planned == plan.bytes
    assert memory.allocated == plan.devices[0].allocated
    assert model.plan.to_dict()["placements"] == plan.to_dict()["placements"]
    for tensor in plan.tensors():
        assert model[tensor.name].format == tensor.format
    assert model.report()["load"]["quantized"] == 14
    with pytest.raises(TypeError):
        tightfit.load(plan, "cpu")


def test_weights_are_bitsandbytes(golden_models: Path) -> None:
    """The same bytes from bf16 as bitsandbytes itself has made."""
    ours = tightfit.load(golden_models / "llama" / "bf16", "cpu")
    theirs = tightfit.load(golden_models / "llama" / "nf4", "cpu")
    for name in theirs:
        if theirs[name].quant_type is None:
            numpy.testing.assert_array_equal(
                numpy.from_dlpack(ours[name].data.raw()), numpy.from_dlpack(theirs[name].data.raw())
            )
            continue
        numpy.testing.assert_array_equal(ours[name].codes.numpy(), theirs[name].codes.numpy())
        numpy.testing.assert_array_equal(ours[name].absmax.numpy(), theirs[name].absmax.numpy())
        assert ours[name].codes.numpy().shape == (ours[name].codes.bytes, 1)
        assert ours[name].absmax.numpy().dtype == numpy.float32


def test_weights_are_dequantized(llama: Path) -> None:
    model = tightfit.load(llama, "cpu")
    stored = tightfit.load(llama, "cpu", formats={UP: "f32"})
    values = model[UP].dequantize()
    assert values.shape == (320, 192) and values.dtype == numpy.float32
    original = stored[UP].numpy()
    # A code is the nearest of 16 values, the furthest apart of which are 0.31 of a scale.
    scales = numpy.repeat(model[UP].absmax.numpy(), 64).reshape(320, 192)
    assert (numpy.abs(values - original) <= 0.16 * scales).all()
    assert model[UP].dequantize("float16").dtype == numpy.float16
    with pytest.raises(tightfit.UsageError):
        model[UP].dequantize("int3")


def test_arrays_outlive_the_model(llama: Path) -> None:
    model = tightfit.load(llama, "cpu")
    codes = model[UP].codes.numpy()
    assert codes.ctypes.data == model[UP].codes.address
    assert not codes.flags.writeable
    before = codes.copy()
    weight = model[UP]
    with model:
        pass
    assert not model.is_loaded
    with pytest.raises(tightfit.UsageError, match="unloaded"):
        weight.codes
    numpy.testing.assert_array_equal(codes, before)
    assert model.memory[0].reserved > 0
    del codes
    assert model.memory[0].reserved == 0


def test_capsules_are_of_the_form_that_is_asked_for(llama: Path) -> None:
    part = tightfit.load(llama, "cpu")[UP].codes
    assert part.__dlpack_device__() == (1, 0)
    assert '"dltensor_versioned"' in repr(part.__dlpack__(max_version=(1, 1)))
    assert '"dltensor"' in repr(part.__dlpack__())
    assert part.__dlpack__(max_version=(1, 0), dl_device=(1, 0), copy=False) is not None
    for arguments in ({"copy": True}, {"dl_device": (2, 0)}, {"stream": 1}):
        with pytest.raises(BufferError):
            part.__dlpack__(max_version=(1, 0), **arguments)
    with pytest.raises(BufferError):
        tightfit.load(llama, "cpu")[UP].__dlpack__()


def test_each_cause_has_its_class(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(tightfit.OutOfMemory) as small:
        tightfit.plan(llama, "sim:100KiB")
    error = small.value
    assert isinstance(error, MemoryError) and isinstance(error, tightfit.TightfitError)
    assert error.device == "sim:0" and error.have == 100 * 1024
    assert error.need == error.have + error.missing
    with pytest.raises(tightfit.CheckpointError) as missing:
        tightfit.open(tmp_path / "nothing")
    assert missing.value.path == str(tmp_path / "nothing")
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"\xff" * 64)
    with pytest.raises(tightfit.CheckpointError):
        tightfit.open(broken)
    with pytest.raises(tightfit.UsageError) as setting:
        tightfit.plan(llama, settings={"nothing": 1})
    assert setting.value.setting == "nothing"
    with pytest.raises(tightfit.UsageError):
        tightfit.plan(llama, policy="nothing")
    with pytest.raises(tightfit.UsageError):
        tightfit.plan(llama, "nothing")
    with pytest.raises(tightfit.UsageError):
        tightfit.open(llama, dequantize="some")
    (tmp_path / "there").mkdir()
    tightfit.save(llama, tmp_path / "saved")
    with pytest.raises(tightfit.OutputError):
        tightfit.save(llama, tmp_path / "saved")


def test_a_device_that_has_less_than_it_had_when_it_was_planned_for(llama: Path) -> None:
    # A size that this machine does not have.
    plan = tightfit.plan(llama, "cpu:1TiB", settings={"reserve": "900GiB"}, reserve_headroom=True)
    assert plan.bytes > 900 << 30
    with pytest.raises(tightfit.OutOfMemory) as error:
        tightfit.load(plan)
    assert error.value.device == "cpu"
    assert error.value.need == plan.bytes and error.value.have < 900 << 30


def test_what_is_saved_is_what_was_planned(llama: Path, tmp_path: Path) -> None:
    plan = tightfit.plan(llama, "cpu", formats={UP: "stored"})
    saved = tightfit.save(plan, tmp_path / "of-plan")
    assert saved["quantized"] == 13
    assert tightfit.open(tmp_path / "of-plan")[UP].quantized is None
    assert tightfit.save(llama, tmp_path / "whole", double_quant=True)["quantized"] == 14
    again = tightfit.load(tmp_path / "whole", "cpu")
    assert again[UP].absmax_mean is not None
    assert again[UP].nested_absmax.numpy().dtype == numpy.float32


def test_messages_go_to_logging(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="tightfit"):
        tightfit.load(llama, "cpu")
    assert any("workers" in record.getMessage() for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tightfit"):
        tightfit.load(llama, "cpu")
    assert not caplog.records


def test_a_policy_of_ones_own_is_compiled_beside_the_interpreter(llama: Path, tmp_path: Path) -> None:
    # The built-in one as a file is anybody's policy.
    builtin = Path(__file__).parents[2] / "wasm" / "src" / "policy" / "builtin" / "packed.wasm"
    policy = tmp_path / "own.wasm"
    policy.write_bytes(builtin.read_bytes())
    plan = tightfit.plan(llama, ["sim:64MiB", "sim:64MiB"], policy)
    assert [device.tensors for device in plan.devices] == [21, 0]
    policy.write_bytes(b"\0asm nonsense")
    with pytest.raises(tightfit.PolicyError) as error:
        tightfit.plan(llama, "cpu", policy)
    assert error.value.policy == str(policy)


def test_the_command_comes_with_it(llama: Path) -> None:
    command = Path(sys.executable).parent / "tightfit"
    for start in ([str(command)], [sys.executable, "-m", "tightfit"]):
        done = subprocess.run([*start, "plan", str(llama), "--device", "cpu", "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["tensors"] == 21
        done = subprocess.run([*start, "plan", "/nothing"], capture_output=True, text=True)
        assert done.returncode == 3 and "/nothing" in done.stderr
