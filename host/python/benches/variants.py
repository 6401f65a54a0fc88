"""Variants of a benchmark, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def checkpoint(given: str | None, shape: str) -> Iterator[Path]:
    """The directory that was given, with a checkpoint of a real model's shape if it has none, or one for now."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(given or Path(made) / "model")
        if not (path / "config.json").exists():
            subprocess.run([sys.executable, "-m", "tightfit", "synth", shape, str(path), "--quiet"], check=True)
        yield path


def run_each(script: str, variants: list[str], arguments: list[str], timeout: float | None = None) -> None:
    """Runs a script with ``--variant`` and prints the last line of each, or what went wrong."""
    for variant in variants:
        command = [sys.executable, script, "--variant", variant, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            print(json.dumps({"variant": variant, "error": f"not done in {timeout} s"}), flush=True)
            continue
        if done.returncode == 0:
            print(done.stdout.strip().splitlines()[-1], flush=True)
        else:
            print(json.dumps({"variant": variant, "error": done.stderr[-1500:]}), flush=True)
