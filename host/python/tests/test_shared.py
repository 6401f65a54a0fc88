"""Models that several processes share, under torchrun, against the same model in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (5, 16), reason="this version of transformers cuts models another way")

# tp_plan is no argument of some versions.
TP_PLAN = ["as_tp_plan:qwen2_tied:bf16"] if VERSION >= (5, 20) else []

TWO = [
    *(f"tensor_parallel:{model}:{source}" for model in ("llama", "qwen2_tied") for source in ("bf16", "nf4", "nf4_dq")),
    "tensor_parallel:qwen2_untied:bf16:double",
    "tensor_parallel:mixtral:bf16",
    "tensor_parallel:qwen3_moe:nf4",
    "tensor_parallel:qwen3_5_moe:bf16",
    "products:llama:bf16",
    "products:mixtral:bf16",
    "stored_experts:mixtral:bf16",
    "stored_experts:qwen3_5_moe:bf16",
    "generate:llama:bf16:tp_size",
    "generate:llama:bf16:pp_size",
    "in_bfloat16:llama:nf4",
    "gradient:llama:bf16",
    "pipeline:qwen2_untied:nf4",
    "pipeline:mixtral:bf16",
    "fsdp:llama:bf16",
    "fsdp:qwen2_tied:nf4_dq",
    "fsdp:qwen2_untied:bf16:double",
    "refused:llama:bf16",
    *TP_PLAN,
]
if importlib.util.find_spec("peft") is not None:
    TWO += ["qlora:llama:bf16", "qlora:qwen2_untied:nf4_dq"]
FOUR = [f"tensor_parallel:{model}:bf16" for model in ("llama", "qwen2_tied", "mixtral", "qwen3_moe")]
FOUR += ["tensor_parallel:llama:nf4_dq", "fsdp:llama:nf4"]


ON_GPUS = ["tensor_parallel:llama:bf16", "tensor_parallel:mixtral:bf16", "fsdp:llama:bf16", "pipeline:mixtral:bf16"]
ON_GPUS += [check for check in TWO if check.startswith(("gradient", "generate", "qlora"))]


def run(processes: int, models: Path, output: Path, checks: list[str], **environment: str) -> list[dict[str, Any]]:
    """What each process found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).parent / "shared.py"), str(models), str(output), *checks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-20000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def two(golden_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, golden_models, tmp_path_factory.mktemp("two"), TWO, CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def four(golden_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(4, golden_models, tmp_path_factory.mktemp("four"), FOUR, CUDA_VISIBLE_DEVICES="")


def each(found: list[dict[str, Any]], check: str) -> list[tuple[str, dict[str, Any]]]:
    some = [(name, result) for of_rank in found for name, result in of_rank.items() if name.split(":")[0] == check]
    assert some
    return some


@pytest.mark.parametrize("processes", ["two", "four"])
def test_logits_under_tensor_parallelism_are_those_of_one_process(
    processes: str, request: pytest.FixtureRequest
) -> None:
    for name, result in each(request.getfixturevalue(processes), "tensor_parallel"):
        # Scales of scales depend on all scales that there are: a part has its own.
        assert result["difference"] < (3 if name.endswith(":double") else 0.01), (name, result)
        part, whole = result["planned"]
        assert part < (0.7 if processes == "two" else 0.55) * whole, (name, result)
        assert result["peak"] == [True], (name, result)
        assert result["parts"] + result["stacks"] > 0 or name.endswith(":double"), (name, result)
        assert result["stacks"] == {"mixtral": 4, "qwen3_moe": 4, "qwen3_5_moe": 4}.get(name.split(":")[1], 0), name


def test_a_process_reads_its_part(two: list[dict[str, Any]]) -> None:
    for name in ("tensor_parallel:llama:nf4", "fsdp:llama:bf16"):
        reads = [of_rank[name]["read"] for of_rank in two]
        # Columns of these small matrices are nearer to each other than what is read at once.
        limit = 0.55 if name.startswith("fsdp") else 0.85
        assert all(part < limit * whole for part, whole in reads), reads


def test_products_are_tightfits(two: list[dict[str, Any]]) -> None:
    for name, result in each(two, "products"):
        assert result["products"] and result["difference"] < 0.05, (name, result)


def test_experts_may_stay_as_they_are(two: list[dict[str, Any]]) -> None:
    for name, result in each(two, "stored_experts"):
        part, whole = result["planned"]
        assert result["difference"] < 0.05 and part < 0.6 * whole, (name, result)


def test_all_generate_the_same(two: list[dict[str, Any]]) -> None:
    for name, result in each(two, "generate"):
        whole, part = result["answers"]
        assert part == whole and len(whole) == 13, (name, result)


def test_in_bfloat16_it_differs_by_rounding(two: list[dict[str, Any]]) -> None:
    """What processes add up has been rounded in each of them, in every layer."""
    for name, result in each(two, "in_bfloat16"):
        assert result["difference"] <= 4, (name, result)


def test_gradients_pass_through(two: list[dict[str, Any]]) -> None:
    for _, result in each(two, "gradient"):
        assert result == {"equal": True, "some": True}


@pytest.mark.skipif(not TP_PLAN, reason="this version of transformers has no tp_plan")
def test_tp_plan_is_taken(two: list[dict[str, Any]]) -> None:
    for _, result in each(two, "as_tp_plan"):
        assert result["difference"] < 0.01


def test_stages_of_a_pipeline_have_whole_layers(two: list[dict[str, Any]]) -> None:
    for name, result in each(two, "pipeline"):
        assert result["difference"] == 0, (name, result)
        assert "PipelineIdentityLayer" in result["layers"] and len(result["layers"]) == 2
        part, whole = result["planned"]
        assert part < 0.6 * whole


@pytest.mark.parametrize("processes", ["two", "four"])
def test_fsdp_gets_shards_and_nobody_holds_the_whole(processes: str, request: pytest.FixtureRequest) -> None:
    share = {"two": 0.5, "four": 0.25}[processes]
    for name, result in each(request.getfixturevalue(processes), "fsdp"):
        assert result["difference"] < (0.1 if name.endswith(":double") else 1e-4), (name, result)
        assert result["sharded"] and abs(result["share"] - share) < 0.02, (name, result)
        assert result["peak"] < share + 0.12, (name, result)


@pytest.mark.skipif("qlora:llama:bf16" not in TWO, reason="there is no peft")
def test_qlora_trains_shards_that_are_loaded_when_it_is_sharded(two: list[dict[str, Any]]) -> None:
    for name, result in each(two, "qlora"):
        whole, part = result["losses"]
        assert whole[0] > whole[-1], (name, result)
        assert part == pytest.approx(whole, rel=1e-3), (name, result)
        assert result["begins"] == {"lora_A": True, "lora_B": False}, name
        assert result["peak"] < 0.6, (name, result)


def test_what_one_refuses_all_refuse(two: list[dict[str, Any]]) -> None:
    first, second = (of_rank["refused:llama:bf16"] for of_rank in two)
    assert second["memory"][0] == "OutOfMemory"
    assert first["memory"][0] == "OtherProcessError" and first["memory"][2] == "1"
    assert second["memory"][1] in first["memory"][1]
    for told in (first, second):
        assert told["storage"][0] == "ValueError" and "bnb_4bit_quant_storage" in told["storage"][1]
        assert told["both"][0] == "RuntimeError" or "one way" in told["both"][1]
        assert told["model"][0] == "UsageError" and "another model" in told["model"][1]
        assert told["save"][0] == "ValueError" and "part" in told["save"][1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus(golden_models: Path, tmp_path: Path) -> None:
    found = run(2, golden_models, tmp_path, ON_GPUS)
    for of_rank in found:
        for name, result in of_rank.items():
            assert result.get("difference", 0) < 0.5, (name, result)
            # Of a GPU's memory, which comes in 2 MiB, a part of a small model takes no less than the whole.
            assert result.get("peak", 0) == [True] or result.get("peak", 0) <= 1, (name, result)
    for name, result in each(found, "generate"):
        whole, part = result["answers"]
        assert part == whole, (name, result)
    for name, result in each(found, "qlora"):
        whole, part = result["losses"]
        assert part == pytest.approx(whole, rel=1e-2), (name, result)
