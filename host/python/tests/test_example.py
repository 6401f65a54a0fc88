"""The examples run as they stand there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bytes reserved, as planned" in ended.stdout
