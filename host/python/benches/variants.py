"""Variants of a benchmark, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def checkpoint(given: str | None, shape: str, options: Sequence[str] = ()) -> Iterator[Path]:
    """The directory that was given, with a checkpoint of a real model's shape if it has none, or one for now."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(given or Path(made) / "model")
        if not (path / "config.json").exists():
            command = [sys.executable, "-m", "tightfit", "synth", shape, str(path), "--quiet", *options]
            subprocess.run(command, check=True)
        yield path


def run_each(
    script: str, variants: list[str], arguments: list[str], timeout: float | None = None
) -> list[dict[str, Any]]:
    """Runs a script with ``--variant``, prints the last line of each, or what went wrong, and gives what these say."""
    found = []
    for variant in variants:
        command = [sys.executable, script, "--variant", variant, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            found.append({"variant": variant, "error": f"not done in {timeout} s"})
        else:
            if done.returncode == 0:
                found.append(json.loads(done.stdout.strip().splitlines()[-1]))
            else:
                found.append({"variant": variant, "error": done.stderr[-1500:]})
        print(json.dumps(found[-1]), flush=True)
    return found


def medians(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant's numbers the median, the least and the most, and how many there are."""
    lines = []
    for variant in dict.fromkeys(each["variant"] for each in found):
        runs = [each for each in found if each["variant"] == variant]
        numbers: dict[str, list[float]] = {}
        for each in runs:
            for name, value in flat(each):
                numbers.setdefault(name, []).append(value)
        line: dict[str, Any] = {"variant": variant, "runs": len(runs), "failed": sum("error" in each for each in runs)}
        for name, values in numbers.items():
            line[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
        lines.append(line)
    return lines


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in it, and in what is in it, by their names."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}, ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, value
