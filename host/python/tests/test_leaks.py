"""Loads leave nothing behind: neither those that succeed nor those that fail, at whatever stage.

``TIGHTFIT_LOADS`` is how often each is repeated; 50 by default.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tightfit

LOADS = int(os.environ.get("TIGHTFIT_LOADS", "50"))
WARM = 5


@pytest.fixture(scope="module", autouse=True)
def give_back_what_is_freed() -> None:
    """Has the C library return large blocks when they are freed.

    By default it raises, with the blocks that it sees freed, the size from which it maps a block of its own, and with it what it keeps for
    later: up to 64 MiB of what was freed long ago, which is not a leak.
    """
    mmap_threshold, bytes_ = -3, 128 << 10
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        assert mallopt(mmap_threshold, bytes_) == 1


@dataclass
class Held:
    """What this process holds of the system."""

    resident: int
    reserved: int
    files: int
    threads: int


def held() -> Held:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = Path("/proc/self/statm").read_text().split()
    reserved = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access = line.split()[:2]
        # What nobody may touch is what allocators keep addresses for.
        if access.startswith("rw"):
            start, end = (int(address, 16) for address in place.split("-"))
            reserved += end - start
    return Held(
        resident=int(pages[1]) * os.sysconf("SC_PAGE_SIZE"),
        reserved=reserved,
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
    )


def leaves_nothing(once: Callable[[], Any], size: int) -> None:
    """Repeats something that takes ``size`` bytes of memory for a while."""
    for _ in range(WARM):
        once()
    before = held()
    for _ in range(LOADS):
        once()
    after = held()
    # Threads of policies end soon after their answer.
    until = time.monotonic() + 10
    while (after.threads > before.threads or after.files > before.files) and time.monotonic() < until:
        time.sleep(0.05)
        after = held()
    # Allocators keep some pages; a single load that left its weights would show.
    slack = max(size // 2, 1 << 20)
    assert after.resident - before.resident < slack, (before, after, size)
    assert after.reserved - before.reserved < slack, (before, after, size)
    assert after.files <= before.files and after.threads <= before.threads, (before, after)


def test_loads_and_unloads(wide: Path) -> None:
    plan = tightfit.plan(wide, "cpu")

    def once() -> None:
        model = tightfit.load(plan)
        array = model["model.layers.0.mlp.up_proj.weight"].codes.numpy()
        model.unload()
        assert array[0, 0] >= 0
        del array
        assert model.memory[0].reserved == 0

    leaves_nothing(once, plan.bytes)


def test_plans_and_saves(wide: Path, tmp_path: Path) -> None:
    size = tightfit.plan(wide, "cpu").bytes

    def once() -> None:
        tightfit.save(tightfit.plan(wide, ["sim:64MiB", "sim:64MiB"]), tmp_path / "saved", force=True)

    leaves_nothing(once, size)


# Stages of a load, in their order. Each gives what fails, for a directory that is its own to spoil.


def cut_before_it_is_opened(directory: Path) -> Callable[[], Any]:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return lambda: tightfit.load(directory, "cpu")


def an_index_with_a_tensor_that_no_file_has(directory: Path) -> Callable[[], Any]:
    names = [*tightfit.open(directory), "model.layers.2.mlp.up_proj.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return lambda: tightfit.load(directory, "cpu")


def a_device_that_is_too_small(directory: Path) -> Callable[[], Any]:
    return lambda: tightfit.load(directory, "sim:1MiB")


def a_device_that_is_not_there(directory: Path) -> Callable[[], Any]:
    plan = tightfit.plan(directory, ["cpu", "cuda:63:1GiB"])
    return lambda: tightfit.load(plan)


def cut_once_it_is_planned(directory: Path) -> Callable[[], Any]:
    plan = tightfit.plan(directory, "cpu")
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4096)
    return lambda: tightfit.load(plan)


def infinities(directory: Path) -> Callable[[], Any]:
    with open(directory / "model.safetensors", "r+b") as file:
        # In the last weight.
        file.seek(-(1 << 20), os.SEEK_END)
        file.write(struct.pack("<H", 0x7F80) * 256)
    plan = tightfit.plan(directory, "cpu")
    return lambda: tightfit.load(plan, strict=True)


def cancelled(directory: Path) -> Callable[[], Any]:
    plan = tightfit.plan(directory, "cpu")

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    return lambda: tightfit.load(plan, progress=progress)


STAGES: list[tuple[Callable[[Path], Callable[[], Any]], type[BaseException]]] = [
    (cut_before_it_is_opened, tightfit.CheckpointError),
    (an_index_with_a_tensor_that_no_file_has, tightfit.CheckpointError),
    (a_device_that_is_too_small, tightfit.OutOfMemory),
    (a_device_that_is_not_there, tightfit.DeviceError),
    (cut_once_it_is_planned, tightfit.CheckpointError),
    (infinities, tightfit.NonFiniteError),
    (cancelled, KeyboardInterrupt),
]


@pytest.mark.parametrize(("stage", "error"), STAGES, ids=[stage.__name__ for stage, _ in STAGES])
def test_a_load_that_fails(
    wide: Path, tmp_path: Path, stage: Callable[[Path], Callable[[], Any]], error: type[BaseException]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(wide, directory)
    size = tightfit.plan(directory, "cpu").bytes
    fails = stage(directory)

    def once() -> None:
        with pytest.raises(error):
            fails()

    leaves_nothing(once, size)


def from_pretrained(path: Path, **arguments: Any) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    from tightfit.transformers import TightfitConfig

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=TightfitConfig(**arguments), device_map="auto"
    )


def test_models_of_transformers(wide: Path) -> None:
    def once() -> None:
        model = from_pretrained(wide)
        memory = model.tightfit._model
        watched = weakref.ref(model)
        del model
        gc.collect()
        assert watched() is None
        memory.unload()
        assert memory.memory[0].reserved == 0

    leaves_nothing(once, tightfit.plan(wide, "cpu").bytes)


def too_small(directory: Path) -> Callable[[], Any]:
    return lambda: from_pretrained(directory, devices=["sim:1MiB"])


def cut(directory: Path) -> Callable[[], Any]:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return lambda: from_pretrained(directory)


def stopped(directory: Path) -> Callable[[], Any]:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    return lambda: from_pretrained(directory, progress=progress)


def of_another_shape(directory: Path) -> Callable[[], Any]:
    """Found by transformers, when everything has been loaded."""
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] += 1
    (directory / "config.json").write_text(json.dumps(config))
    return lambda: from_pretrained(directory)


@pytest.mark.parametrize(
    ("stage", "error"),
    [(cut, ValueError), (too_small, MemoryError), (stopped, KeyboardInterrupt), (of_another_shape, RuntimeError)],
    ids=lambda value: value.__name__,
)
def test_a_model_of_transformers_that_fails(
    wide: Path, tmp_path: Path, stage: Callable[[Path], Callable[[], Any]], error: type[BaseException]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(wide, directory)
    size = tightfit.plan(directory, "cpu").bytes
    fails = stage(directory)

    def once() -> None:
        with pytest.raises(error):
            fails()

    leaves_nothing(once, size)


def test_a_model_that_lacks_a_tensor_says_which(wide: Path, tmp_path: Path) -> None:
    """transformers' own report: the tensor is made up, as ever."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file, save_file

    from tightfit.transformers import TightfitConfig

    shutil.copytree(wide, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, quantization_config=TightfitConfig(), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"model.norm.weight"}
