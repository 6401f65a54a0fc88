"""LoRA on models that Tightfit has loaded, beside stock; and the frameworks that people train with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from tightfit.transformers import TightfitConfig, installed, quantizer  # noqa: E402


def with_adapters(path: Path, config: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(7)
    # Not zero at first, so that all adapters have gradients.
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, lora)


def gradients(model: Any, tokens: Any) -> dict[str, Any]:
    model.train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", golden.DENSE)
def test_a_lora_step_changes_adapters_only_and_gradients_are_stocks(golden_models: Path, name: str) -> None:
    path = golden_models / name / "bf16"
    tokens = torch.arange(24).reshape(2, 12)
    bnb = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    expected = gradients(with_adapters(path, bnb), tokens)
    ours = with_adapters(path, TightfitConfig())
    assert hasattr(ours.base_model.model, "tightfit")
    found = gradients(ours, tokens)
    assert set(found) == set(expected) and all("lora_" in key for key in found)
    for key, value in expected.items():
        # To the bit with bitsandbytes' products; ours round in another order.
        assert value.abs().max() > 0
        assert (found[key] - value).abs().max() <= 2**-5 * value.abs().max(), key

    before = {key: value.detach().clone() for key, value in ours.state_dict().items() if hasattr(value, "detach")}
    torch.optim.AdamW((value for value in ours.parameters() if value.requires_grad), lr=0.01).step()
    after = ours.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {key for key in before if "lora_" in key}


class Words:
    """Sentences of words that the tokenizer has."""

    def __init__(self, directory: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        words = ["<pad>", "<eos>", "<unk>", *(f"word{index}" for index in range(200))]
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(directory)
        self.texts = [" ".join(words[3 + (start + step) % 200] for step in range(16)) for start in range(8)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every model that Tightfit loads meanwhile."""
    made: list[Any] = []
    after = quantizer.TightfitHfQuantizer._process_model_after_weight_loading

    def noted(self: Any, model: Any, **named: Any) -> Any:
        made.append(after(self, model, **named))
        return made[-1]

    monkeypatch.setattr(quantizer.TightfitHfQuantizer, "_process_model_after_weight_loading", noted)
    yield made


def saved_adapters(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = load_file(directory / "adapter_model.safetensors")
    assert tensors and all("lora_" in key for key in tensors)
    # B is zero until it is trained.
    trained = [value for key, value in tensors.items() if "lora_B" in key]
    assert all(torch.isfinite(value).all() for value in trained)
    assert any(value.abs().max() > 0 for value in trained)
    return tensors


def test_trls_own_script_for_sft(wide: Path, tmp_path: Path, loads: list[Any]) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from trl.scripts import sft

    words = Words(tmp_path / "model")
    shutil.copytree(wide, tmp_path / "model", dirs_exist_ok=True)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words.texts))
    arguments = (
        f"--model_name_or_path {tmp_path / 'model'} --dataset_name {data} --output_dir {tmp_path / 'out'}"
        " --load_in_4bit --bnb_4bit_quant_type nf4 --dtype bfloat16 --use_peft --lora_r 4"
        " --max_steps 2 --per_device_train_batch_size 2 --max_length 32 --report_to none --use_cpu"
        " --bf16 False --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 1"
    )
    parsed = sft.make_parser().parse_args_and_config(args=arguments.split())
    with installed():
        sft.main(*parsed)
    (loaded,) = loads
    assert loaded.tightfit.plan["model.layers.0.mlp.up_proj.weight"].format == "nf4"
    saved_adapters(tmp_path / "out")


def test_llama_factorys_own_training(wide: Path, tmp_path: Path, loads: list[Any]) -> None:
    pytest.importorskip("llamafactory")
    from llamafactory.train.tuner import run_exp

    words = Words(tmp_path / "model")
    shutil.copytree(wide, tmp_path / "model", dirs_exist_ok=True)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": text, "input": "", "output": text} for text in words.texts]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    losses: list[float] = []

    class Losses(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tmp_path / "model"),
        "finetuning_type": "lora",
        "lora_rank": 4,
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "template": "empty",
        "dataset": "rows",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "out"),
        "cutoff_len": 64,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    with installed():
        run_exp(arguments, callbacks=[Losses()])
    (loaded,) = loads
    assert loaded.tightfit.plan["model.layers.0.mlp.up_proj.weight"].format.startswith("nf4")
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    saved_adapters(tmp_path / "out")
