# Read by the scripts beside it, from the root of the clone.
# shellcheck shell=bash disable=SC2034

# That of manylinux2014 wheels, and the oldest that Rust's library runs with.
RELEASE_GLIBC=2.17
# Together, so that what they share is compiled once.
packages=(tightfit-cli tightfit-c)
target_dir=${CARGO_TARGET_DIR:-$PWD/target}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
repository=$(sed -n 's/^repository = "\(.*\)"/\1/p' Cargo.toml)
# Before 1.0 a change of the minor version may break.
abi=${version%.*}
# Neither the day nor the place of packing is in what is packed.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC PYTHONDONTWRITEBYTECODE=1

fail() {
    echo "$0: $1" >&2
    exit 1
}

# needs COMMAND WHERE-FROM
needs() {
    command -v "$1" >/dev/null || fail "there is no $1: $2"
}

# Adds to what every rustc is given. Not RUSTFLAGS: there may be blanks in paths.
rustflags() {
    local flag
    for flag in "$@"; do
        CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS:+$CARGO_ENCODED_RUSTFLAGS$'\x1f'}$flag
    done
    export CARGO_ENCODED_RUSTFLAGS
}

# Leaves paths of this machine, and what its user has set, out of what is compiled.
reproducible() {
    local home=${CARGO_HOME:-$HOME/.cargo} sysroot registry
    unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CFLAGS
    export CARGO_INCREMENTAL=0 CC_SHELL_ESCAPED_FLAGS=1
    sysroot=$(rustc --print sysroot)
    # Of several that match, the last one counts.
    remap "$PWD" /tightfit
    remap "$target_dir" /tightfit/target
    remap "$home" /cargo
    for registry in "$home"/registry/src/*; do
        remap "$registry" /cargo/registry
    done
    # Where the sources of Rust's library are installed, rustc names those.
    remap "$sysroot/lib/rustlib/src/rust" "/rustc/$(rustc -vV | sed -n 's/^commit-hash: //p')"
}

remap() {
    rustflags "--remap-path-prefix=$1=$2"
    CFLAGS="${CFLAGS-} $(printf %q "-ffile-prefix-map=$1=$2")"
    export CFLAGS
}

# What zig links into programs: `runtimes` is for describe.py.
runtimes_of_zig() {
    local python directory licence
    needs cargo-zigbuild "pip install -r release/requirements.txt"
    python=$(dirname "$(command -v cargo-zigbuild)")/python3
    directory=$("$python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')
    licence=$directory/lib/libunwind/LICENSE.TXT
    runtimes=(--runtime zig-compiler-rt "$("$python" -m ziglang version)" MIT "$directory/LICENSE"
        --runtime zig-libunwind "$("$python" -m ziglang version)" "Apache-2.0 WITH LLVM-exception" "$licence")
}

# A Windows of its own in a folder, for `wine`.
own_wine() {
    local stand_in=.ci/wine/bcryptprimitives.c libraries=$1/drive_c/windows/system32
    needs wine "apt-get install wine64"
    export WINEPREFIX=$1 WINEARCH=win64 WINEDEBUG=-all
    timeout 300 wine wineboot --init </dev/null >/dev/null 2>&1
    # Where Rust's library takes random numbers from: wine 8 does not have it.
    if [ ! -e "$libraries/bcryptprimitives.dll" ] && [ -e "$stand_in" ]; then
        x86_64-w64-mingw32-gcc -O2 -shared -o "$libraries/bcryptprimitives.dll" "$stand_in" -ladvapi32
    fi
}
