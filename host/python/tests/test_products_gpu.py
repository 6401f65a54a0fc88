"""Products on a GPU: skipped where there is none, which CI is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

import test_experts  # noqa: E402
import test_products as products  # noqa: E402
import test_transformers as whole  # noqa: E402
from bitsandbytes.functional import dequantize_4bit  # noqa: E402

import tightfit  # noqa: E402
import tightfit.torch  # noqa: E402
from tightfit.ops import Product, SharedWorkspace, linear, linear_transposed  # noqa: E402


@pytest.fixture(params=["bf16", "nf4_dq"])
def product(request: pytest.FixtureRequest, golden_models: Path) -> tuple[Product, Any]:
    model = tightfit.load(golden_models / "llama" / request.param, "cuda:0", rows=64)
    codes, state = tightfit.torch.quant_state(model[products.UP], torch.float32)
    shared = SharedWorkspace(model.workspace("cuda:0", 64, gradients=True))
    return Product(model.linear(products.UP), shared), dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", products.FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 64])
def test_a_product_is_that_of_the_dequantized_weight(product: Any, dtype: Any, rows: int) -> None:
    ours, weight = product
    x = products.random(rows, weight.shape[1], dtype=dtype).cuda()
    bias = products.random(weight.shape[0], dtype=dtype).cuda()
    assert products.close(linear(ours, x, bias), x.double() @ weight.double().T + bias.double())
    dy = products.random(rows, weight.shape[0], dtype=dtype).cuda()
    assert products.close(linear_transposed(ours, dy), dy.double() @ weight.double())


def test_a_graph_captures_it_and_streams_follow_one_another(product: Any) -> None:
    ours, weight = product
    x = products.random(4, weight.shape[1], dtype=torch.bfloat16).cuda()
    want = linear(ours, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            beside = linear(ours, x)
    for _ in range(20):
        again = linear(ours, x)
    torch.cuda.synchronize()
    assert torch.equal(beside, want) and torch.equal(again, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(ours, x)
    for seed in range(3):
        x.copy_(products.random(4, weight.shape[1], dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(y, linear(ours, x))


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("source", whole.SOURCES)
def test_logits_are_those_on_the_processor(golden_models: Path, name: str, source: str) -> None:
    path = golden_models / name / source
    ids = whole.ids(golden_models, name)
    host = whole.logits(products.load(path, True), ids)
    config = tightfit.transformers.TightfitConfig(products=True, bnb_4bit_compute_dtype=torch.float32)
    model = products.transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map={"": 0}
    )
    (figures,) = model.tightfit.figures().values()
    assert figures["planned"] == figures["reserved"] == figures["peak reserved"]
    assert (whole.logits(model, ids.cuda()).cpu() - host).abs().max() < 1e-4


# Stacks in the file, and experts with a key each that the plan lays out as stacks.
@pytest.mark.parametrize("kind", ["fused", "olmoe"])
def test_stacks_are_layers_with_ids_on_the_gpu(tmp_path: Path, kind: str) -> None:
    path = test_experts.sketch(kind, tmp_path)
    config = tightfit.transformers.TightfitConfig(products=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = products.transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0}
    )
    module = test_experts.modules_of(model)[0]
    assert module.layer is not None
    x = products.random(3, 64, dtype=torch.bfloat16).cuda()
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 3]]).cuda(), torch.full((3, 2), 0.5).cuda()
    with torch.no_grad():
        want = module(x, ids, weights)
        alone = module.forward(x, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x, ids, weights)
        graph.replay()
    assert torch.equal(y, want) and torch.equal(alone, want)
