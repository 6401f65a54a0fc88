#!/bin/sh
# Builds the built-in policies and copies them to where the host embeds them from.
#
#     guest/policies/build.sh            build and copy
#     guest/policies/build.sh --check    build and compare; fails when a committed file is stale
#
# The bytes are the same in whatever directory and on whatever machine they are built: the
# toolchain and every dependency are pinned, and paths are mapped away.
set -eu

policies="auto huggingface map packed tensor-parallel"

check=false
case "${1-}" in
    "") ;;
    --check) check=true ;;
    *)
        echo "usage: $0 [--check]" >&2
        exit 2
        ;;
esac

root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd -P)
cd "$root"

target=wasm32-unknown-unknown
sysroot=$(rustc --print sysroot)
if [ ! -d "$sysroot/lib/rustlib/$target/lib" ]; then
    if command -v rustup >/dev/null 2>&1; then
        rustup target add "$target"
    else
        echo "$0: rustc has no target $target, and there is no rustup to add it" >&2
        exit 1
    fi
fi

# Of these cargo takes the encoded one first, then the plain one, then what configuration files
# say; so anything a user has set is overridden, which is what makes the bytes the same. Spaces in
# paths survive because the separator is another byte.
separator=$(printf '\037')
cargo_home=${CARGO_HOME:-$HOME/.cargo}
flags="--remap-path-prefix=$root=/tightfit"
flags="$flags$separator--remap-path-prefix=$cargo_home=/cargo"
# Sources of dependencies lie in a directory that is named after where they came from: a mirror has
# another name.
cargo fetch --quiet --locked --target "$target"
for sources in "$cargo_home"/registry/src/*; do
    flags="$flags$separator--remap-path-prefix=$sources=/cargo/src"
done
# Where the standard library's sources are installed rustc names them; elsewhere it says /rustc/...
commit=$(rustc -vV | sed -n 's/^commit-hash: //p')
flags="$flags$separator--remap-path-prefix=$sysroot/lib/rustlib/src/rust=/rustc/$commit"
unset RUSTFLAGS

out=host/wasm/src/policy/builtin
build=${CARGO_TARGET_DIR:-target}/$target/policy
stale=""
for policy in $policies; do
    # One at a time: the features of one policy's dependencies are none of another's business.
    CARGO_ENCODED_RUSTFLAGS=$flags CARGO_INCREMENTAL=0 \
        cargo build --quiet --locked --profile policy --target "$target" -p "tightfit-policy-$policy"
    built=$build/tightfit_policy_$(printf %s "$policy" | tr - _).wasm
    if ! $check; then
        mkdir -p "$out"
        cp "$built" "$out/$policy.wasm"
        echo "$out/$policy.wasm: $(wc -c <"$built" | tr -d ' ') bytes"
    elif ! cmp -s "$built" "$out/$policy.wasm"; then
        stale="$stale $out/$policy.wasm"
    fi
done

if [ -n "$stale" ]; then
    echo "$0: not what the sources build to:$stale" >&2
    echo "run guest/policies/build.sh and commit the result" >&2
    exit 1
fi
