"""The crates that are linked into what we hand out, as cargo resolves them."""

import json
import re
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Compiled into the host as wasm.
POLICIES = ["auto", "huggingface", "map", "packed", "tensor-parallel"]
WASM = "wasm32-unknown-unknown"

LINE = re.compile(r"(?P<depth>\d+)(?P<name>[^ ]+) v(?P<version>[^ ]+)")


@dataclass
class Crate:
    """One version of a crate."""

    name: str
    version: str
    # As SPDX writes it.
    licence: str
    directory: Path
    repository: str | None
    # SHA-256 of the package; of our own crates there is none.
    checksum: str | None
    needs: set[tuple[str, str]] = field(default_factory=set)

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version

    @property
    def ours(self) -> bool:
        return self.checksum is None


def cargo(*arguments: str) -> str:
    """Standard output of a cargo command that must succeed."""
    command = ["cargo", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def linked(target: str, packages: list[str], workspace: bool = False) -> dict[tuple[str, str], Crate]:
    """Returns the crates in programs of these packages for a target, with those of the policies inside.

    What runs only while compiling (build scripts, procedural macros) is left out, with what it needs. The
    features are those for which these packages ask together, or all packages of the workspace.
    """
    edges = tree(target, ["--workspace"] if workspace else [f"--package={package}" for package in packages])
    edges = reachable(edges, packages)
    for key, needs in tree(WASM, [f"--package=tightfit-policy-{policy}" for policy in POLICIES]).items():
        edges.setdefault(key, set()).update(needs)
    packages_of = {}
    for package in json.loads(cargo("metadata", "--format-version=1", "--locked"))["packages"]:
        packages_of[package["name"], package["version"]] = package
    checksums = {}
    for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]:
        checksums[package["name"], package["version"]] = package.get("checksum")
    crates = {}
    for key in sorted(edges):
        package = packages_of[key]
        crates[key] = Crate(
            name=key[0],
            version=key[1],
            # What cargo wrote before there were expressions.
            licence=re.sub(r" ?/ ?", " OR ", package["license"]),
            directory=Path(package["manifest_path"]).parent,
            repository=package["repository"],
            checksum=checksums[key],
            needs=edges[key],
        )
    return crates


def tree(target: str, selection: list[str]) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """What each crate in the selected packages needs."""
    arguments = ["tree", "--locked", "--target", target, "--edges=normal,no-proc-macro", "--prefix=depth", *selection]
    edges: dict[tuple[str, str], set[tuple[str, str]]] = {}
    above: list[tuple[str, str]] = []
    for line in cargo(*arguments).splitlines():
        found = LINE.match(line)
        # Between the trees of two packages is an empty line.
        if not found:
            continue
        key = found["name"], found["version"]
        del above[int(found["depth"]) :]
        edges.setdefault(key, set())
        if above:
            edges[above[-1]].add(key)
        above.append(key)
    return edges


def reachable(
    edges: dict[tuple[str, str], set[tuple[str, str]]], packages: list[str]
) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """What some packages need, directly or not, and they themselves."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    waiting = [key for key in edges if key[0] in packages]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found[key] = edges[key]
            waiting.extend(edges[key])
    return found
