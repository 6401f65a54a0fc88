#!/usr/bin/env python3
"""Packs the golden checkpoints so that the repository holds every tensor once.

    pack_checkpoints.py SOURCE TARGET

SOURCE holds one directory per model. For each, TARGET gets a directory of the same name with
`tensors.bin`, the distinct tensor payloads one after the other, and `files.json.gz`, from which
every file of the model can be put together again, byte for byte:

    {"files": {"<relative path>": {"length": bytes, "crc32": number, and either
        "text": the whole file, or
        "header": the JSON header of a safetensors file as it stands there,
        "payloads": [[offset in tensors.bin, length], ...] in the order of the file}}}

The weights that bitsandbytes left alone are the same in the bf16, nf4 and nf4_dq checkpoints of a
model, and the packed codes are the same in the last two.
"""

import gzip
import io
import json
import struct
import sys
import zlib
from pathlib import Path


class Store:
    """Distinct byte strings, concatenated."""

    def __init__(self):
        self.data = bytearray()
        self.offsets = {}

    def add(self, payload):
        if payload not in self.offsets:
            self.offsets[payload] = len(self.data)
            self.data += payload
        return [self.offsets[payload], len(payload)]


def pack_safetensors(raw, store):
    (length,) = struct.unpack_from("<Q", raw)
    header = raw[8 : 8 + length].decode()
    data = raw[8 + length :]
    spans = sorted(
        tuple(entry["data_offsets"])
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
    )
    end = 0
    for span in spans:
        if span[0] != end:
            raise ValueError(f"byte {end} of the data belongs to no tensor")
        end = span[1]
    if end != len(data):
        raise ValueError(f"byte {end} of the data belongs to no tensor")
    return {"header": header, "payloads": [store.add(data[a:b]) for a, b in spans]}


def unpack(entry, store):
    if "text" in entry:
        return entry["text"].encode()
    header = entry["header"].encode()
    payloads = [store.data[offset : offset + length] for offset, length in entry["payloads"]]
    return struct.pack("<Q", len(header)) + header + b"".join(payloads)


def pack_model(source, target):
    store = Store()
    files = {}
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        raw = path.read_bytes()
        if path.suffix == ".safetensors":
            entry = pack_safetensors(raw, store)
        else:
            entry = {"text": raw.decode()}
        if unpack(entry, store) != raw:
            raise ValueError(f"{path} does not survive packing")
        entry |= {"length": len(raw), "crc32": zlib.crc32(raw)}
        files[path.relative_to(source).as_posix()] = entry
    target.mkdir(parents=True, exist_ok=True)
    (target / "tensors.bin").write_bytes(store.data)
    index = io.BytesIO()
    # No name and no time inside: packing the same files again gives the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=index, mtime=0) as file:
        file.write(json.dumps({"files": files}, sort_keys=True).encode())
    (target / "files.json.gz").write_bytes(index.getvalue())


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} SOURCE TARGET")
    source, target = map(Path, sys.argv[1:])
    for model in sorted(path for path in source.iterdir() if path.is_dir()):
        pack_model(model, target / model.name)


if __name__ == "__main__":
    main()
