#!/usr/bin/env bash
# Makes all that is handed out with a version: archives, wheels, the interface's package, lists of what is in
# them, and checksums over all. The same commit gives the same bytes, wherever it is.
#
#     release/build.sh [--out DIR] [TARGET ...]
#
# DIR is a new or an empty folder, by default target/release-archives, anew. Without TARGET for all. It takes, beside
# Rust from rustup:
#
#     pip install -r release/requirements.txt
#     apt-get install gcc-mingw-w64-x86-64           # for Windows
#
# Each target is compiled in target/TARGET/dist.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

out=$target_dir/release-archives
if [ "${1-}" = --out ]; then
    mkdir -p "$2"
    out=$(realpath "$2")
    [ -z "$(ls -A "$out")" ] || fail "$out is not empty"
    shift 2
else
    rm -rf "$out"
    mkdir -p "$out"
fi
host=$(rustc --print host-tuple)
if [ $# = 0 ]; then
    set -- x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-pc-windows-gnu
fi

if [ -n "$(git status --porcelain)" ]; then
    echo "$0: there are changes that are not in a commit, so nobody else can make these archives" >&2
fi
# A command that runs here writes the completions and manual pages of all.
release/compile.sh "$host"
for target in "$@"; do
    [ "$target" = "$host" ] || release/compile.sh "$target"
    release/pack.sh "$target" "$target_dir/$target/dist" "$out" "$target_dir/$host/dist/tightfit"
    case $target in
    *-linux-gnu) release/wheel.sh "$target" "$out" ;;
    esac
done

# The interface: in the binary form that registries take, and as it is written.
interface=tightfit-host-$version
cp wit/tightfit-host.wasm "$out/$interface.wasm"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/$interface"
cp wit/*.wit wit/README.md wit/REFERENCE.md LICENSE-APACHE LICENSE-MIT "$work/$interface/"
python3 release/archive.py "$work/$interface" "$out/$interface.tar.gz"

cd "$out"
sha256sum -- * >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" .
cat SHA256SUMS
