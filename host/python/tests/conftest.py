"""Checkpoints for the tests: the repository's golden ones, and those that the command makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
