"""Checkpoints for the tests: the repository's golden ones, and those that the command makes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every golden checkpoint."""
    directory = tmp_path_factory.mktemp("golden")
    for name in golden.MODELS:
        golden.unpack(name, directory / name)
    return directory


@pytest.fixture(scope="session")
def llama(golden_models: Path) -> Path:
    """A golden checkpoint in bf16, of two shards."""
    return golden_models / "llama" / "bf16"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of real shape that takes a while to load."""
    directory = tmp_path_factory.mktemp("large") / "model"
    # In a process of its own: the command takes over what an interrupt does.
    command = [sys.executable, "-m", "tightfit", "synth", "qwen2.5-0.5b", str(directory), "--quiet"]
    subprocess.run(command, check=True)
    return directory


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 22 MB: large beside what allocators keep, and loaded at once."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    directory.mkdir()
    hidden, inner, words, layers = 512, 1024, 4096, 2
    shapes = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # 0x3c00 to 0x3cff: small numbers, a different one for each of 256 elements.
    elements = b"".join(struct.pack("<H", 0x3C00 + index) for index in range(256))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + elements * (end // 512))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": words,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
