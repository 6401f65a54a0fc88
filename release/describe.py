"""Writes what a release says about the crates in it.

    python3 release/describe.py TARGET PACKAGE... --sbom FILE --licences FILE
        [--runtime NAME VERSION EXPRESSION FILE]... [--workspace]

The first is a CycloneDX document, the other the texts of all licences. A runtime is what the linker adds
that is no crate; the file holds its licence. With --workspace what was compiled had the features for which
all packages of the workspace ask. SOURCE_DATE_EPOCH is the time of both.
"""

import argparse
import datetime
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from crates import ROOT, Crate, linked

LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice|unlicense|copyright)", re.IGNORECASE)
# Says nothing about who wrote what, so that one text serves all who name it.
WITHOUT_NAMES = "Apache-2.0 WITH LLVM-exception"


@dataclass
class Runtime:
    """What is linked beside crates."""

    name: str
    version: str
    licence: str
    text: str


def rust_library() -> Runtime:
    """Rust's own library. The texts of all that is in it come with the compiler."""
    version = subprocess.run(["rustc", "-V"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[1]
    sysroot = subprocess.run(["rustc", "--print=sysroot"], check=True, stdout=subprocess.PIPE, text=True)
    page = Path(sysroot.stdout.strip()) / "share/doc/rust/COPYRIGHT-library.html"
    text = html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))
    text = re.sub(r"\n\s*\n+", "\n\n", text)
    return Runtime("rust-library", version, "MIT OR Apache-2.0", text.strip())


def texts_of(crate: Crate) -> list[str]:
    """The licence texts that are in a crate's package."""
    directory = ROOT if crate.ours else crate.directory
    files = sorted(path for path in directory.iterdir() if LICENCE_FILE.match(path.name))
    files = [inside for path in files for inside in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [path.read_text(errors="replace").strip() for path in files]


def same(text: str) -> str:
    """What two copies of a text have in common, however they are laid out."""
    return " ".join(text.split()).lower()


def licences(crates: list[Crate], runtimes: list[Runtime]) -> str:
    """Returns every licence text once, under the names of those whose it is."""
    shared = None
    missing = []
    texts: dict[str, tuple[str, list[str]]] = {}
    for crate in crates:
        found = texts_of(crate)
        if not found and crate.licence == WITHOUT_NAMES:
            shared = shared or next(
                texts_of(other) for other in crates if other.licence == WITHOUT_NAMES and len(texts_of(other)) == 1
            )
            found = shared
        if not found:
            missing.append(f"{crate.name} {crate.version} ({crate.licence})")
        for text in found:
            texts.setdefault(same(text), (text, []))[1].append(f"{crate.name} {crate.version}")
    if missing:
        sys.exit(f"describe.py: no licence text is in the packages of {', '.join(missing)}")
    for runtime in runtimes:
        texts.setdefault(same(runtime.text), (runtime.text, []))[1].append(f"{runtime.name} {runtime.version}")
    lines = ["What is in this release, and under which licences:", ""]
    lines += [f"  {crate.name} {crate.version}: {crate.licence}" for crate in crates]
    lines += [f"  {runtime.name} {runtime.version}: {runtime.licence}" for runtime in runtimes]
    for text, owners in texts.values():
        lines += ["", "=" * 80, *wrapped(owners), "=" * 80, "", text]
    return "\n".join(lines) + "\n"


def wrapped(words: list[str]) -> list[str]:
    """Words as lines of at most 80 characters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 2 + len(word) > 79:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return [f"{line}," for line in lines[:-1]] + lines[-1:]


def reference(crate: Crate) -> str:
    """The package URL of a crate."""
    return f"pkg:cargo/{crate.name}@{crate.version.replace('+', '%2B')}"


def component(crate: Crate) -> dict[str, object]:
    """A crate as CycloneDX describes it."""
    described: dict[str, object] = {
        "type": "library",
        "bom-ref": reference(crate),
        "name": crate.name,
        "version": crate.version,
        "licenses": [{"expression": crate.licence}],
        "purl": reference(crate),
    }
    if crate.checksum:
        described["hashes"] = [{"alg": "SHA-256", "content": crate.checksum}]
    if crate.repository:
        described["externalReferences"] = [{"type": "vcs", "url": crate.repository}]
    return described


def sbom(target: str, crates: list[Crate], runtimes: list[Runtime], packages: list[str]) -> dict[str, object]:
    """Returns a CycloneDX document of a release for a target."""
    version = next(crate.version for crate in crates if crate.name == packages[0])
    time = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.UTC)
    whole = f"pkg:generic/tightfit@{version}?target={target}"
    components = [component(crate) for crate in crates]
    depends = [
        {"ref": reference(crate), "dependsOn": sorted(f"pkg:cargo/{n}@{v.replace('+', '%2B')}" for n, v in crate.needs)}
        for crate in crates
    ]
    for runtime in runtimes:
        name = f"pkg:generic/{runtime.name}@{runtime.version.replace('+', '%2B')}"
        described = {"type": "library", "bom-ref": name, "name": runtime.name, "version": runtime.version}
        components.append({**described, "licenses": [{"expression": runtime.licence}], "purl": name})
    roots = [reference(crate) for crate in crates if crate.name in packages]
    roots += [str(one["bom-ref"]) for one in components[len(crates) :]]
    document: dict[str, object] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "application", "bom-ref": whole, "name": "tightfit", "version": version},
        },
        "components": components,
        "dependencies": [{"ref": whole, "dependsOn": sorted(roots)}, *depends],
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
    # From what it says, so that the same document has the same number.
    document["serialNumber"] = f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}"
    return document


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--sbom", type=Path, required=True)
    parser.add_argument("--licences", type=Path, required=True)
    parser.add_argument("--runtime", nargs=4, action="append", default=[])
    parser.add_argument("--workspace", action="store_true")
    arguments = parser.parse_args()
    crates = list(linked(arguments.target, arguments.packages, arguments.workspace).values())
    runtimes = [rust_library()]
    for name, version, licence, file in arguments.runtime:
        runtimes.append(Runtime(name, version, licence, Path(file).read_text(errors="replace").strip()))
    arguments.licences.write_text(licences(crates, runtimes))
    document = sbom(arguments.target, crates, runtimes, arguments.packages)
    arguments.sbom.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
