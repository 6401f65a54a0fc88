#!/usr/bin/env bash
# Compiles what an archive is made of, for one target: the command and the C library.
#
#     release/compile.sh TARGET
#
# What comes out does not depend on where the clone, cargo's home or the target folder are. For Linux it
# asks for no newer glibc than common.sh says, and for no other library.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

target=$1
arguments=(--profile dist --locked)
for package in "${packages[@]}"; do
    arguments+=(-p "$package")
done
rustup target add "$target"
# The registry's sources must be where their paths are looked for.
cargo fetch --locked
reproducible
case $target in
*-linux-gnu)
    needs cargo-zigbuild "pip install -r release/requirements.txt"
    export TIGHTFIT_SONAME=libtightfit_c.so.$abi
    cargo-zigbuild zigbuild "${arguments[@]}" --target "$target.$RELEASE_GLIBC"
    ;;
x86_64-pc-windows-gnu)
    needs x86_64-w64-mingw32-gcc "apt-get install gcc-mingw-w64-x86-64"
    # The linker would write the time, and programs would look for libgcc beside them.
    rustflags -Clink-arg=-Wl,--no-insert-timestamp -Clink-arg=-static-libgcc
    cargo build "${arguments[@]}" --target "$target"
    ;;
*)
    fail "there are no releases for $target"
    ;;
esac
