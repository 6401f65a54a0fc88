"""Parts of tensors, as tensors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

import tightfit
from tightfit import Slice

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def elements(weight: tightfit.Weight) -> Any:
    """As integers: numpy has no type for bf16."""
    return numpy.from_dlpack(weight.data.raw())


def only(checkpoint: tightfit.Checkpoint) -> list[str]:
    """What is to be left out so that parts alone are loaded."""
    return [info.name for info in checkpoint.tensors() if info.slice is None]


def test_parts_are_tensors(llama: Path) -> None:
    whole = tightfit.open(llama)
    slices = [Slice(UP, 0, [(64, 128), (192, 320)]), Slice(DOWN, 1, [(64, 192)])]
    cut = whole.cut(slices)
    assert len(cut) == len(whole) and cut.bytes < whole.bytes
    assert f"{UP}[64:128+192:320]" in list(cut) and f"{DOWN}[:, 64:192]" in list(cut)
    # Under the tensor's name, too: there is one part of it.
    assert cut[UP].slice == slices[0] and cut[UP].shape == (192, 192)
    assert whole[UP].slice is None
    plan = tightfit.plan(cut, "cpu", formats={UP: "stored", DOWN: "stored"}, omit=only(cut))
    assert [planned.slice for planned in plan.tensors()] == [cut[name].slice for name in plan]
    part = tightfit.load(plan)
    full = tightfit.load(whole, "cpu", formats={UP: "stored", DOWN: "stored"})
    up, down = (elements(full[name]) for name in (UP, DOWN))
    assert numpy.array_equal(elements(part[UP]), numpy.concatenate([up[64:128], up[192:320]]))
    assert numpy.array_equal(elements(part[DOWN]), down[:, 64:192])


@pytest.mark.parametrize("source", ["bf16", "nf4"])
def test_parts_have_the_blocks_of_the_whole(golden_models: Path, source: str) -> None:
    path = golden_models / "llama" / source
    # Blocks of 64 in rows of 192 and of 320.
    plan = tightfit.plan(path, "cpu", slices=[Slice(UP, 0, [(64, 128)]), Slice(DOWN, 1, [(64, 192)])])
    part, full = tightfit.load(plan), tightfit.load(path, "cpu")
    for kind, per in (("codes", 2), ("absmax", 64)):
        up, down = (getattr(full[name], kind).numpy().reshape(rows, -1) for name, rows in ((UP, 320), (DOWN, 192)))
        assert numpy.array_equal(getattr(part[UP], kind).numpy().reshape(64, -1), up[64:128])
        assert numpy.array_equal(getattr(part[DOWN], kind).numpy().reshape(192, -1), down[:, 64 // per : 192 // per])
    assert part.report()["load"]["bytes_read"] < full.report()["load"]["bytes_read"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Slice("model.nothing", 0, [(0, 1)]), "there is no tensor 'model.nothing'"),
        (Slice(UP, 2, [(0, 1)]), "dimension 2"),
        (Slice(UP, 0, [(0, 1000)]), "0..1000"),
        (Slice(UP, 0, [(5, 5)]), "5..5"),
        (Slice(UP, 0, [(8, 16), (0, 8)]), "0..8"),
        (Slice(UP, 0, []), "0 ranges"),
    ],
)
def test_what_cannot_be_cut(llama: Path, wrong: Slice, says: str) -> None:
    with pytest.raises(tightfit.UsageError, match=says.replace(".", r"\.")):
        tightfit.open(llama).cut([wrong])
    with pytest.raises(tightfit.UsageError):
        tightfit.plan(llama, "cpu", slices=[wrong])


def test_a_slice_is_what_it_says() -> None:
    one = Slice("a", 1, [(0, 4), (8, 12)])
    assert (one.tensor, one.dimension, one.ranges) == ("a", 1, [(0, 4), (8, 12)])
    assert one == Slice("a", 1, [(0, 4), (8, 12)]) and one != Slice("a", 0, [(0, 4), (8, 12)])
    assert len({one, Slice("a", 1, [(0, 4), (8, 12)])}) == 1
    assert repr(one) == 'Slice("a", 1, [(0, 4), (8, 12)])'
    with pytest.raises(OverflowError):
        Slice("a", 0, [(-1, 4)])


def test_parts_are_not_saved(llama: Path, tmp_path: Path) -> None:
    cut = tightfit.open(llama).cut([Slice(UP, 0, [(0, 64)])])
    with pytest.raises(tightfit.TightfitError):
        tightfit.save(cut, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
