#!/bin/sh
# Builds pin_layer.c into OUT/pin_layer.wasm, and multiply.c into OUT/multiply.wasm: core modules that the host
# makes components itself.
# The compiler is zig's clang, installed once, in OUT/venv; or CC, which must be able to build for
# wasm32-wasi as that of the wasi-sdk does.
#
#     [CC=...] build.sh OUT
#
# Exit status 3: the compiler cannot be installed here.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
out=${1:?usage: build.sh OUT}
tool=ziglang==0.17.1

mkdir -p "$out"
out=$(CDPATH= cd -- "$out" && pwd -P)
if [ -z "${CC-}" ]; then
    if [ "$(cat "$out/venv/tool" 2>/dev/null)" != "$tool" ]; then
        rm -rf "$out/venv"
        python3 -m venv "$out/venv" || exit 3
        "$out/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10 \
            "$tool" || exit 3
        echo "$tool" >"$out/venv/tool"
    fi
    cc() { ZIG_GLOBAL_CACHE_DIR="$out/cache" "$out/venv/bin/python" -m ziglang cc "$@"; }
else
    cc() { $CC "$@"; }
fi
# A reactor has no main. Nothing of WASI that the C library could use is used, so nothing of it
# is imported.
cd "$here"
cc -target wasm32-wasi -mexec-model=reactor -Os -Wall -Wextra -Wl,--strip-all \
    pin_layer.c bindings/policy.c bindings/policy_component_type.o -o "$out/pin_layer.wasm"
cc -target wasm32-wasi -mexec-model=reactor -Os -Wall -Wextra -Wl,--strip-all \
    multiply.c bindings/program.c bindings/program_component_type.o -o "$out/multiply.wasm"
