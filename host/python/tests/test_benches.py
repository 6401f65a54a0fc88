"""The benchmark of `generate` and QLoRA, on models that are too small to measure anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

BENCH = Path(__file__).parents[1] / "benches" / "generate.py"


def run(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCH), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_qlora_is_alternated_with_stock_and_medians_are_given(golden_models: Path) -> None:
    checkpoint = str(golden_models / "qwen3_moe" / "bf16")
    variants = ["stock-qlora", "ours-qlora-experts"]
    arguments = ["--variants", ",".join(variants), "--rounds", "2", "--steps", "3", "--train", "2x8"]
    *lines, stock, ours = run("--checkpoint", checkpoint, "--device", "cpu", *arguments)
    assert [line["variant"] for line in lines] == [*variants, *variants]
    assert not any("error" in line for line in lines), lines
    for line in lines:
        assert line["trained"] == lines[0]["trained"] and len(line["losses"]) == 4
        # Adapters add nothing at first.
        assert abs(line["losses"][0] - lines[0]["losses"][0]) < 0.05
    for line, variant in ((stock, variants[0]), (ours, variants[1])):
        assert (line["variant"], line["runs"], line["failed"]) == (variant, 2, 0)
        found = line["seconds a step"]
        assert 0 < found["least"] <= found["median"] <= found["most"]


def test_devices_with_sizes_share_a_model(golden_models: Path) -> None:
    checkpoint = str(golden_models / "qwen3_5_moe" / "bf16")
    (line,) = run("--checkpoint", checkpoint, "--device", "sim:1GiB,sim:1GiB", "--variants", "ours", "--tokens", "2")
    assert "error" not in line, line
    assert list(line["tightfit"]) == ["sim:0", "sim:1"] and line["tokens/s"] > 0
