"""The examples run as they stand there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_from_pretrained_runs() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    path = EXAMPLES / "from_pretrained.py"
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bytes reserved, as planned" in ended.stdout


def test_lora_learns() -> None:
    for package in ("transformers", "bitsandbytes", "peft"):
        pytest.importorskip(package)
    path = EXAMPLES / "lora.py"
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", ended.stdout)]
    assert len(losses) == 3 and losses[2] < losses[0], ended.stdout


@pytest.fixture
def python_with_ray(tmp_path: Path) -> str:
    """An interpreter that has Ray beside what this one has."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 16):
        pytest.skip("this version of transformers cuts models another way")
    if importlib.util.find_spec("ray") is not None:
        return sys.executable
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    seen = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    # Those that are installed in place are found by files of this kind, too.
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(seen)]
    Path(own.stdout.strip(), "beside.pth").write_text("\n".join(lines) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "ray"]
    try:
        ended = subprocess.run(install, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip("ray cannot be had: pip takes too long")
    if ended.returncode != 0:
        pytest.skip(f"ray cannot be had: {ended.stderr.strip().splitlines()[-1:]}")
    return str(python)


def test_actors_of_ray_share_a_model(python_with_ray: str, golden_models: Path) -> None:
    ended = subprocess.run(
        [python_with_ray, str(EXAMPLES / "ray_actors.py"), str(golden_models / "qwen2_tied" / "bf16")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    reserved = [int(size.replace(",", "")) for size in re.findall(r"has ([0-9,]+) bytes", ended.stdout)]
    assert len(reserved) == 2 and min(reserved) > 0.9 * max(reserved), ended.stdout
