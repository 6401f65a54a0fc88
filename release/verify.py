"""Compares what an unpacked archive says about its crates with what was linked.

    python3 release/verify.py DIRECTORY ARCHIVE

The static C library has an object of every crate: those must be exactly the ones that the SBOM says it needs.
The other binaries name the packages in whose code they may panic: the SBOM must have these too. And `cargo
binstall` must find the archive, and the command in it.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from crates import ROOT, cargo

# With what it is made of that is no crate of the registry's; its other crates have namesakes there.
RUST_LIBRARY = {
    "addr2line", "alloc", "cfg_if", "compiler_builtins", "core", "gimli", "hashbrown", "libc", "memchr", "miniz_oxide",
    "adler2", "object", "panic_unwind", "rustc_demangle", "rustc_std_workspace_alloc", "rustc_std_workspace_core",
    "rustc_std_workspace_std", "std", "std_detect", "unwind", "windows_link", "windows_targets",
}  # fmt: skip
# On some processors nothing but macros, whose code is that of the crates which use them.
WITHOUT_OBJECTS = {"cpufeatures"}
# Of Rust's code; C code gives others.
RUST_OBJECT = re.compile(r"(?P<crate>[A-Za-z_]\w*)(-[0-9a-f]{16})?\..*\.rcgu\.o")
PANICS = re.compile(
    rb"(?:/cargo/registry|/registry/src/[^/\0]+)[/\\]([A-Za-z][A-Za-z0-9_-]*?)-(\d[0-9A-Za-z.+-]*)[/\\]"
)


def main() -> None:
    """The command line."""
    directory = Path(sys.argv[1])
    doc = directory / "share/doc/tightfit"
    sbom = json.loads((doc / "tightfit.cdx.json").read_text())
    components = {one["bom-ref"]: one for one in sbom["components"]}
    needs = {one["ref"]: one["dependsOn"] for one in sbom["dependencies"]}
    problems = []

    for reference in {*needs, *(name for names in needs.values() for name in names)} - {*components}:
        if reference != sbom["metadata"]["component"]["bom-ref"]:
            problems.append(f"{reference} is needed and not described")

    names = library_names()
    said = set()
    waiting = [reference for reference in components if reference.startswith("pkg:cargo/tightfit-c@")]
    while waiting:
        reference = waiting.pop()
        one = components[reference]
        if (name := names[one["name"], one["version"]]) not in said:
            said.add(name)
            waiting.extend(needs[reference])
    members = subprocess.run(
        ["ar", "t", directory / "lib/libtightfit_c.a"], check=True, stdout=subprocess.PIPE, text=True
    )
    objects = {found["crate"] for line in members.stdout.splitlines() if (found := RUST_OBJECT.fullmatch(line))}
    if not objects:
        problems.append("there is no Rust in the static library")
    for crate in sorted(objects - said - RUST_LIBRARY):
        problems.append(f"{crate} is in the static library and not in the SBOM")
    for crate in sorted(said - objects - WITHOUT_OBJECTS):
        problems.append(f"{crate} is in the SBOM and not in the static library")

    described = {(one["name"], one["version"]) for one in components.values()}
    panicking = set()
    for binary in [*directory.glob("bin/*"), *directory.glob("lib/*.so")]:
        for name, version in PANICS.findall(binary.read_bytes()):
            panicking.add((name.decode(), version.decode()))
    if not panicking:
        problems.append("no binary names a crate, which was to be compared with the SBOM")
    for name, version in sorted(panicking - described):
        problems.append(f"{name} {version} is in a binary and not in the SBOM")

    owners = set()
    for heading in re.findall(r"\n={80}\n(.*?)\n={80}\n", (doc / "LICENSES-THIRD-PARTY.txt").read_text(), re.DOTALL):
        owners.update(re.split(r",\s+", heading))
    for one in components.values():
        if f"{one['name']} {one['version']}" not in owners:
            problems.append(f"no licence is there for {one['name']} {one['version']}")

    problems += binstall(directory, Path(sys.argv[2]))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{len(components)} components, {len(objects)} crates in the library, {len(panicking)} named in binaries")


def binstall(directory: Path, archive: Path) -> list[str]:
    """What keeps cargo-binstall from installing the command from an archive."""
    package = tomllib.loads((ROOT / "host/cli/Cargo.toml").read_text())["package"]["metadata"]["binstall"]
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    target = directory.name.removeprefix(f"tightfit-{version}-")
    package = {**package, **package["overrides"].get(target, {})}
    suffix = {"tgz": ".tar.gz", "zip": ".zip"}[package["pkg-fmt"]]
    values = {
        "repo": "", "version": version, "target": target, "archive-suffix": suffix, "bin": "tightfit",
        "binary-ext": ".exe" if "windows" in target else "",
    }  # fmt: skip
    url, command = (
        re.sub(r"\{ ([a-z-]+) \}", lambda found: values[found[1]], package[key]) for key in ("pkg-url", "bin-dir")
    )
    problems = []
    if url != f"/releases/download/v{version}/{archive.name}":
        problems.append(f"cargo binstall looks for {url}, and this is {archive.name}")
    if not (directory.parent / command).is_file():
        problems.append(f"cargo binstall looks for {command}, which is not there")
    return problems


def library_names() -> dict[tuple[str, str], str]:
    """What the library of each package is called."""
    names = {}
    for package in json.loads(cargo("metadata", "--format-version=1", "--locked"))["packages"]:
        for target in package["targets"]:
            if {"lib", "rlib", "staticlib", "cdylib"} & {*target["kind"]}:
                names[package["name"], package["version"]] = target["name"].replace("-", "_")
    return names


if __name__ == "__main__":
    main()
