#!/bin/sh
# Builds pin-layer.js into OUT/pin_layer.wasm, and multiply.js into OUT/multiply.wasm. The tool is installed once, in OUT/node_modules.
#
#     build.sh OUT
#
# Exit status 3: the tool cannot be installed here.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
out=${1:?usage: build.sh OUT}

mkdir -p "$out"
out=$(CDPATH= cd -- "$out" && pwd -P)
if ! cmp -s "$here/package.json" "$out/installed.json"; then
    rm -rf "$out/node_modules" "$out/package-lock.json"
    cp "$here/package.json" "$out/package.json"
    (cd "$out" && npm install --no-fund --no-audit --loglevel=error \
        --fetch-retries=1 --fetch-timeout=20000) || exit 3
    cp "$here/package.json" "$out/installed.json"
fi
# Nothing of what an application would get: no clock, no randomness, no files, no network.
"$out/node_modules/.bin/componentize-js" "$here/pin-layer.js" --wit "$here/../../../wit" \
    --world-name policy --disable random stdio clocks http fetch-event --out "$out/pin_layer.wasm"
"$out/node_modules/.bin/componentize-js" "$here/multiply.js" --wit "$here/../../../wit" \
    --world-name program --disable random stdio clocks http fetch-event --out "$out/multiply.wasm"
