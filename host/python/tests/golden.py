"""The golden checkpoints of `tests/golden/ckpt`, put together again. See the README there."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path

MODELS = ["llama", "mixtral", "qwen2_tied", "qwen2_untied", "qwen3_5_moe", "qwen3_moe"]
DENSE = ["llama", "qwen2_tied", "qwen2_untied"]

_PACKED = Path(__file__).parents[3] / "tests" / "golden" / "ckpt"


def unpack(name: str, target: Path) -> None:
    """Writes a model's files into a directory, and checks them."""
    packed = _PACKED / name
    files = json.loads(gzip.decompress((packed / "files.json.gz").read_bytes()))["files"]
    payloads = (packed / "tensors.bin").read_bytes()
    for path, file in files.items():
        if "text" in file:
            contents = file["text"].encode()
        else:
            header = file["header"].encode()
            parts = [payloads[start : start + length] for start, length in file["payloads"]]
            # safetensors pads the header so that what follows is aligned.
            header += b" " * (file["length"] - 8 - len(header) - sum(map(len, parts)))
            contents = struct.pack("<Q", len(header)) + header + b"".join(parts)
        assert len(contents) == file["length"] and zlib.crc32(contents) == file["crc32"], path
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(contents)
